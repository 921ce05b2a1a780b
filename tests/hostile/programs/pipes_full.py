# expect: error|timeout
import os
while True:
    r, w = os.pipe()
    os.set_blocking(w, False)
    try:
        os.write(w, bytes(1 << 20))
    except BlockingIOError:
        pass
