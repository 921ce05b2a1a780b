# expect: ok
import os, time
if os.fork() == 0:
    os.setsid()
    time.sleep(1e6)
print("parent ends")
