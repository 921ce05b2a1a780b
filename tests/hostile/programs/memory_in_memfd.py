# expect: memoryLimit|error
import os
fd = os.memfd_create("x")
while True:
    os.write(fd, bytes(1 << 20))
