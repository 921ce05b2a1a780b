# expect: memoryLimit
for place in ("/tmp", "/dev/shm", "/work"):
    with open(place + "/full", "wb") as file:
        for _ in range(63):
            file.write(bytes(1 << 20))
taken = bytearray(150 << 20)
