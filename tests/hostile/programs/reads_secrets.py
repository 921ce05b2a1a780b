# expect: ok out=nothing
import glob
found = [p for p in ("/etc/shadow", "/root/.ssh", "/proc/1/environ", "/proc/kcore", "/var/run", "/sys/class", "/home")
         if glob.glob(p + "/*") or (glob.glob(p) and __import__("os").access(p, 4) and open(p, "rb").read(1))]
print(found or "nothing")
