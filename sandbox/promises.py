"""What the sandbox promises, as programs that try to break it. `python -m sandbox --check` and the tests run them.

A probe prints `kept` when its promise held, and otherwise what it got away with.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sandbox.model import Limits, Status


@dataclass(frozen=True, slots=True)
class Promise:
    """One sentence of docs/sandbox.md, the kernel feature behind it, and the program that tries to break it."""

    name: str
    sentence: str
    feature: str
    probe: str
    status: Status = Status.OK
    limits: Limits = field(default_factory=Limits)


_SYSCALL = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def refused(number, *arguments):
    ctypes.set_errno(0)
    return libc.syscall(number, *arguments) == -1 and ctypes.get_errno() in (1, 22, 38, 97)
"""

# Numbers of x86_64; on another machine the probe looks them up under other numbers and says so.
_DANGEROUS = {
    "ptrace": 101, "personality": 135, "pivot_root": 155, "mount": 165, "umount2": 166, "reboot": 169,
    "init_module": 175, "kexec_load": 246, "add_key": 248, "keyctl": 250, "unshare": 272, "perf_event_open": 298,
    "open_by_handle_at": 304, "setns": 308, "process_vm_readv": 310, "process_vm_writev": 311, "finit_module": 313,
    "bpf": 321, "userfaultfd": 323, "io_uring_setup": 425, "open_tree": 428, "move_mount": 429, "fsopen": 430,
}  # fmt: skip

PROMISES = (
    Promise(
        "outside-user", "Outside, a program's user is neither root nor one with rights", "user namespace",
        """
import os
for line in open("/proc/self/uid_map"):
    inside, outside, count = map(int, line.split())
    if inside <= os.getuid() < inside + count:
        user = outside + os.getuid() - inside
print("kept" if user > 0 else f"user {user} outside")
""",
    ),
    Promise(
        "capabilities", "A program has no capability and can gain none", "capabilities, no_new_privs",
        """
fields = dict(line.split(":\\t") for line in open("/proc/self/status").read().splitlines() if ":\\t" in line)
sets = {name: int(fields[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")}
print("kept" if not any(sets.values()) and fields["NoNewPrivs"] == "1" else sets)
""",
    ),
    Promise(
        "system-calls", "System calls that are dangerous or privileged are refused", "seccomp filter",
        f"""{_SYSCALL}
import platform
fields = dict(line.split(":\\t") for line in open("/proc/self/status").read().splitlines() if ":\\t" in line)
calls = {_DANGEROUS!r} if platform.machine() == "x86_64" else {{}}
open_calls = [name for name, number in calls.items() if not refused(number, 0, 0, 0, 0, 0)]
print("kept" if fields["Seccomp"] == "2" and not open_calls else open_calls)
""",
    ),
    Promise(
        "new-user-namespace", "A program cannot make a user namespace of its own", "seccomp filter",
        f"""{_SYSCALL}
import os
pid = libc.syscall(56, 0x10000000 | 17, 0, 0, 0, 0)
if pid == 0:
    os._exit(0)
print("kept" if pid == -1 and refused(272, 0x10000000) else "clone or unshare made one")
""",
    ),
    Promise(
        "descriptors", "A program has no descriptor but its three standard streams", "close-on-exec",
        """
import os
extra = []
for number in range(3, 1024):
    try:
        os.fstat(number)
        extra.append(number)
    except OSError:
        pass
print("kept" if not extra else extra)
""",
    ),
    Promise(
        "processes-seen", "A program sees its own processes only", "pid namespace, a /proc of its own",
        """
import os
pids = sorted(int(name) for name in os.listdir("/proc") if name.isdigit())
print("kept" if set(pids) <= {1, os.getpid()} else pids)
""",
    ),
    Promise(
        "init", "A program can neither look into nor end the first process beside it", "undumpable pid 1",
        """
import os, signal
gained = []
for name in ("mem", "environ", "maps", "fd", "root"):
    try:
        path = f"/proc/1/{name}"
        os.listdir(path) if name in ("fd", "root") else open(path, "rb").read(1)
        gained.append(path)
    except OSError:
        pass
os.kill(1, signal.SIGTERM)
os.kill(1, signal.SIGKILL)
print("kept" if not gained else gained)
""",
    ),
    Promise(
        "host-files", "No file of the host is there beyond interpreter and libraries", "mount namespace, allow-list",
        """
import os
seen = [path for path in ("/root", "/home", "/etc/shadow", "/etc/hostname", "/var/log", "/var/tmp", "/sys", "/boot",
                          "/usr/sbin", "/run", "/mnt", "/opt", "/srv") if os.path.exists(path)]
users = {line.split(":")[0] for line in open("/etc/passwd")}
print("kept" if not seen and users == {"sandbox", "nobody"} else [*seen, *users])
""",
    ),
    Promise(
        "read-only", "A program can write to its scratch folders only", "read-only mounts",
        """
import os
for folder, _, _ in os.walk("/"):
    if folder.startswith(("/proc", "/tmp", "/work", "/dev/shm")):
        continue
    path = os.path.join(folder, "runboard-probe")
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except OSError:
        continue
    os.unlink(path)
    print(folder, "is writable")
    break
else:
    print("kept")
""",
    ),
    Promise(
        "environment", "Nothing of the server's environment is passed on", "a made-up environment",
        """
import os
known = {"PATH", "HOME", "TMPDIR", "LANG", "LC_ALL", "LC_CTYPE", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE",
         "PYTHONIOENCODING", "PYTHONUTF8", "NODE_NO_WARNINGS", "NODE_OPTIONS", "TZ", "USER"}
extra = set(os.environ) - known
print("kept" if not extra else extra)
""",
    ),
    Promise(
        "network", "There is no network, not even the host's loopback", "network namespace without an interface",
        """
import socket
reached = []
for family, address in ((socket.AF_INET, ("127.0.0.1", 8080)), (socket.AF_INET, ("1.1.1.1", 53)),
                        (socket.AF_INET6, ("::1", 8080))):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        try:
            with socket.socket(family, kind) as probe:
                probe.settimeout(0.5)
                probe.connect(address)
                reached.append(address)
        except OSError:
            pass
print("kept" if not reached else reached)
""",
    ),
    Promise(
        "sockets", "Sockets of other kinds cannot be made: netlink, vsock, packet, alg", "seccomp filter",
        """
import socket
made = []
for family in (16, 17, 38, 40, 44):
    for kind in (socket.SOCK_RAW, socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET):
        try:
            socket.socket(family, kind).close()
            made.append(family)
        except OSError:
            pass
print("kept" if not made else made)
""",
    ),
    Promise(
        "abstract-sockets", "UNIX sockets of the host cannot be reached", "network and mount namespace",
        """
import socket
names = [line.split()[-1] for line in open("/proc/net/unix").read().splitlines()[1:] if len(line.split()) > 7]
print("kept" if not names else names)
""",
    ),
    Promise(
        "kernel-switches", "No setting of the kernel can be changed", "no rights on /proc/sys, no /sys",
        """
import os
opened = []
for folder, _, files in os.walk("/proc/sys"):
    for name in files:
        try:
            os.close(os.open(os.path.join(folder, name), os.O_WRONLY))
            opened.append(name)
        except OSError:
            pass
try:
    os.close(os.open("/proc/sysrq-trigger", os.O_WRONLY))
    opened.append("sysrq-trigger")
except OSError:
    pass
print("kept" if not opened else opened)
""",
    ),
    Promise(
        "open-files", "A process has at most so many open files", "RLIMIT_NOFILE",
        """
import os
count = 0
try:
    while count < 5000:
        os.dup(0)
        count += 1
except OSError:
    pass
print("kept" if count < 256 else f"{count} opened")
""",
    ),
    Promise(
        "full-disk", "A full scratch folder hurts only its program", "tmpfs with a size",
        """
written = 0
try:
    with open("/tmp/full", "wb", buffering=0) as file:
        while written < 512 << 20:
            written += file.write(bytes(1 << 20))
except OSError:
    pass
print("kept" if written <= 64 << 20 else f"{written} bytes written")
""",
    ),
    Promise(
        "wall-time", "A program that sleeps for ever is ended", "the server's clock, the control group",
        "import time; time.sleep(1e6)", Status.TIMEOUT, Limits(wall_ms=300),
    ),
    Promise(
        "cpu-time", "A program that spins for ever is ended", "the control group's CPU time",
        "while True: pass", Status.CPU_LIMIT, Limits(cpu_ms=300),
    ),
    Promise(
        "memory", "A program that takes all memory is ended", "the control group's memory limit",
        "taken = []\nwhile True: taken.append(bytearray(1 << 20))", Status.MEMORY_LIMIT, Limits(memory_bytes=64 << 20),
    ),
    Promise(
        "output", "A program that writes for ever is ended", "the server's cap",
        "while True: print('x' * 1000)", Status.OUTPUT_LIMIT,
    ),
    Promise(
        "fork-bomb", "A fork bomb does not get beyond its limit", "the control group's process limit",
        """
import os, time
made = 0
try:
    while made < 1000:
        if os.fork() == 0:
            time.sleep(1e6)
        made += 1
except OSError:
    pass
print("kept" if made < 64 else f"{made} processes made")
""",
    ),
)  # fmt: skip
