# expect: error|processLimit
import threading, time
while True:
    threading.Thread(target=time.sleep, args=(1e6,), daemon=True).start()
