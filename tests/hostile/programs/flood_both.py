# expect: outputLimit
import os
while True:
    os.write(1, b"x" * 999)
    os.write(2, b"y" * 999)
