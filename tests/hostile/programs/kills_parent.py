# expect: ok out=still here
import os
for pid in (os.getppid(), 1):
    for number in (9, 15, 19):
        os.kill(pid, number)
print("still here")
