# expect: memoryLimit
taken = []
while True:
    taken.append(bytearray(1 << 22))
