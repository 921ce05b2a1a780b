# expect: killed|error|ok
import os
os.kill(-1, 9)
print("alive")
