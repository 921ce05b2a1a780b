# expect: processLimit|timeout|cpuLimit|memoryLimit|error
import os
while True:
    os.fork()
