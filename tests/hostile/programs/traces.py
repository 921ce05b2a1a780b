# expect: ok out=refused
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
tries = [libc.ptrace(16, 1, 0, 0), libc.ptrace(0, 0, 0, 0), libc.process_vm_readv(1, 0, 0, 0, 0, 0)]
print("refused" if all(t == -1 for t in tries) else tries)
