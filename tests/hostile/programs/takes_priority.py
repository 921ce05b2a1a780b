# expect: ok out=refused
import os
got = []
for act in (lambda: os.nice(-5), lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)),
            lambda: os.setpriority(os.PRIO_PROCESS, 0, -10)):
    try:
        act()
        got.append(1)
    except OSError:
        pass
print(got or "refused")
