# expect: cpuLimit|timeout
import os
while True:
    if os.fork() == 0:
        for _ in range(10**6):
            pass
        os._exit(0)
    os.wait()
