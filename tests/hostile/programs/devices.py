# expect: ok out=null random urandom zero
import os
names = []
for n in sorted(os.listdir("/dev")):
    try:
        if os.path.isfile("/dev/" + n) or not os.path.isdir("/dev/" + n):
            os.close(os.open("/dev/" + n, os.O_RDONLY | os.O_NONBLOCK))
            names.append(n)
    except OSError:
        pass
print(*[n for n in names if n not in ("fd", "stdin", "stdout", "stderr", "full", "ptmx", "tty")])
