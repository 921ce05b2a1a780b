# expect: ok
import os
os.write(1, bytes(range(256)) + b"\x1b]0;x\x07\r\n\0")
