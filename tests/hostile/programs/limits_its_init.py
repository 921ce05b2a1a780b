# expect: ok out=refused
import resource
try:
    resource.prlimit(1, resource.RLIMIT_NOFILE, (0, 0))
    print("done")
except PermissionError:
    print("refused")
print(resource.prlimit(1, resource.RLIMIT_CPU), resource.prlimit(0, resource.RLIMIT_NOFILE, (99, 99)))
