# expect: error
import os
os.truncate(os.open("/tmp/x", os.O_CREAT | os.O_RDWR), 1 << 50)
print(1)
os.write(1, b"x")
raise SystemExit(3)
