# expect: memoryLimit
taken = []
while True:
    try:
        taken.append(bytearray(1 << 24))
    except MemoryError:
        pass
