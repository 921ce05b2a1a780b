# expect: cpuLimit|timeout|memoryLimit
print(len(str(10 ** (10 ** 8))))
