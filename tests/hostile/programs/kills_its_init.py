# expect: ok
import os
try:
    os.kill(1, 9)
except PermissionError:
    pass
print("still here")
