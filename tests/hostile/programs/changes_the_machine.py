# expect: ok out=refused
import ctypes, socket, time
got = []
for act in (lambda: time.clock_settime(time.CLOCK_REALTIME, 0), lambda: socket.sethostname("mine"),
            lambda: open("/proc/sys/kernel/hostname", "w").write("x"), lambda: open("/proc/sysrq-trigger", "w")):
    try:
        act()
        got.append(1)
    except OSError:
        pass
libc = ctypes.CDLL(None)
got += [n for n in (169, 175, 246, 248, 250, 298, 321, 323, 425) if libc.syscall(n, 0, 0, 0, 0, 0) != -1]
print(got or "refused")
