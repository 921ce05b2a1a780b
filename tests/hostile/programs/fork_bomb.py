# expect: processLimit|timeout|cpuLimit|error
import os
while True:
    os.fork()
