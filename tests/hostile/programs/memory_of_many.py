# expect: memoryLimit
import os, time
for _ in range(8):
    if os.fork() == 0:
        taken = bytearray(60 << 20)
        time.sleep(1e6)
time.sleep(1e6)
