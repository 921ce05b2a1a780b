# expect: ok out=hidden
try:
    addresses = {line.split()[0] for line in open("/proc/kallsyms")}
except OSError:
    addresses = set()
print("hidden" if addresses <= {"0" * 16} else "shown")
