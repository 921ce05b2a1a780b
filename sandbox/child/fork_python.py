"""The fork server for Python: an interpreter that has started up to its last step before main.py, and is forked there.

It runs as `sitecustomize`, inside `import site`. A child that gets a job returns from here, and python goes on to run
main.py by itself, exactly as if it had just been started. Standard input is the socket to the server. The first message
on it is the set-up; each one after it asks for one child and brings its descriptors. A child is two processes: the
first of a new pid namespace, which makes the other namespaces and in the end reports, and the one that becomes the
program. What is touched after the fork costs most, because each page is then copied: so little is.

A child may also become another interpreter, started ahead of its job (`request["start"]`).
"""

import atexit
import ctypes
import fcntl
import gc
import importlib
import marshal
import os
import resource
import signal
import socket
import sys
import time
import types
import weakref
from typing import Any

FOLDER = "/forkserver"
MESSAGE_BYTES = 1 << 18
MOST_DESCRIPTORS = 16
REPORT, JOB, STDIN, FIRST_GROUP = 0, 1, 2, 5
"""Places in a request's descriptors."""
HEADER_BYTES = 8
"""A job's file begins with the number of bytes of files to return; the rest is for the program's side."""

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS = 0x00020000, 0x02000000, 0x04000000
CLONE_NEWIPC, CLONE_NEWPID, CLONE_NEWNET = 0x08000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MNT_DETACH = 2
PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 4, 22, 24, 38
SECCOMP_MODE_FILTER, INSTRUCTION_BYTES = 2, 8
CAPABILITY_VERSION_3 = 0x20080522

libc = ctypes.PyDLL(None, use_errno=True)


class Filter(ctypes.Structure):
    """The kernel's struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def call(name: str, *arguments: object) -> None:
    """A function of libc. Raises OSError."""
    if getattr(libc, name)(*arguments) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def serve() -> None:
    """Forks a child for every request. Returns in the child that is to be the program, and nowhere else."""
    control = socket.socket(fileno=0)
    setup = marshal.loads(control.recv(MESSAGE_BYTES))  # noqa: S302 -- of the server
    filters = [(Filter(len(one) // INSTRUCTION_BYTES, one),) for one in setup["filters"]]
    for name in setup["preload"]:
        importlib.import_module(name)
    capability = 0
    while not libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0):
        capability += 1
    own_pids = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    atexit.register(leave, frozenset(sys.modules))  # the first to be registered is the last to be called
    gc.collect()
    gc.freeze()
    control.send(b"ready")
    while True:
        text, descriptors, _, _ = socket.recv_fds(control, MESSAGE_BYTES, MOST_DESCRIPTORS)
        if not text:  # the server is gone
            os._exit(0)
        request = marshal.loads(text)  # noqa: S302 -- of the server
        call("unshare", CLONE_NEWPID)  # for the next child only
        if not libc.fork():  # without python's own care for a forked interpreter: the first process needs none
            try:
                os.close(own_pids)
                control.detach()
                begin(request, filters, descriptors)
                make_world(request, descriptors)
                give_up_rights(request, filters)
                call("prctl", PR_SET_DUMPABLE, 1, 0, 0, 0)
                if "start" in request:
                    start(request["start"], descriptors)
                await_job(descriptors[REPORT], descriptors[JOB])
            except BaseException as failure:
                os.write(descriptors[REPORT], f"failed: {failure!r}".encode())
                os._exit(1)
            return
        call("setns", own_pids, CLONE_NEWPID)
        for descriptor in descriptors:
            os.close(descriptor)


def begin(request: dict[str, Any], filters: list[Any], descriptors: list[int]) -> None:
    """Becomes the first process of a new world and forks the one that will be the program, where this returns."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for group in descriptors[FIRST_GROUP:]:  # from here on, what is used counts as the run's
        os.write(group, b"0")
        os.close(group)
    report, job = descriptors[REPORT], descriptors[JOB]
    os.write(report, b"init")
    call("unshare", CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWNET)
    program = os.fork()
    if not program:
        return
    give_up_rights(request, filters)
    call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)  # the program has the same user
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of all signals, process 1 hears only those that it handles
    for descriptor in (0, 1, 2, *descriptors[STDIN:FIRST_GROUP]):
        os.close(descriptor)
    while True:
        pid, status = os.wait()
        if pid == program:
            ended = b"ended %d %d" % (time.monotonic_ns(), status)
            if return_bytes := int.from_bytes(os.pread(job, HEADER_BYTES, 0), "little"):
                os.chdir("/work")
                end_others_and_report(report, return_bytes)
            os.write(report, ended)
            os._exit(0)


def make_world(request: dict[str, Any], descriptors: list[int]) -> None:
    """Mounts what is the run's own, and takes its standard streams."""
    call("mount", b"proc", b"/proc", b"proc", MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC, None)
    for place in (b"/tmp", b"/work", b"/dev/shm"):
        call("mount", b"tmpfs", place, b"tmpfs", MS_NOSUID | MS_NODEV, request["scratch"].encode())
    call("umount2", FOLDER.encode(), MNT_DETACH)
    os.chdir("/work")
    for number in (0, 1, 2):
        os.dup2(descriptors[STDIN + number], number)
        os.close(descriptors[STDIN + number])


def give_up_rights(request: dict[str, Any], filters: list[Any]) -> None:
    """Takes the slot's user and drops every right that could be used or regained."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (request["open_files"], request["open_files"]))
    user = request["user"]
    if user != os.getuid():
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    call("capset", (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)())
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    for (one,) in filters:
        call("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(one), 0, 0)


def start(command: dict[str, Any], descriptors: list[int]) -> None:
    """Becomes another interpreter, which finds the socket as descriptor 3 and the job as 4."""
    report, job = (fcntl.fcntl(descriptors[place], fcntl.F_DUPFD, 5) for place in (REPORT, JOB))
    os.dup2(report, 3)
    os.dup2(job, 4)
    os.closerange(5, 256)
    for number in (signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ):  # those that python itself catches or ignores
        signal.signal(number, signal.SIG_DFL)
    os.execve(command["argv"][0], command["argv"], command["environment"])  # noqa: S606


def await_job(report: int, job: int) -> None:
    """Waits for the job and leaves python as it is when it is about to run main.py."""
    os.write(report, b"ready")
    if not os.read(report, 1):
        os._exit(0)  # not wanted any more
    args, files = marshal.loads(os.pread(job, os.fstat(job).st_size, HEADER_BYTES))  # noqa: S302 -- of the server
    os.close(job)
    for name, content in files.items():
        folder, _, _ = name.rpartition("/")
        if folder:
            os.makedirs(folder, exist_ok=True)
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        left = memoryview(content)
        while left:
            left = left[os.write(file, left) :]
        os.close(file)
        sys.modules.pop(name.partition("/")[0].removesuffix(".py"), None)  # it comes before one that is warm
    sys.argv[1:] = sys.orig_argv[2:] = args
    sys.modules[__name__] = types.ModuleType(__name__)
    main = types.ModuleType("__main__")  # not the one that is frozen: what a program leaves in it is to be collected
    vars(main).update(vars(sys.modules["__main__"]))
    sys.modules["__main__"] = main
    os.write(report, b"started %d" % time.monotonic_ns())
    os.close(report)


def leave(warm: frozenset[str]) -> None:
    """Ends a program that came to its end by itself, after all of python's own end that can be noticed.

    The rest, taking the interpreter apart, costs more than most programs: it touches every page that was forked.
    Python removes `__file__` from a main module that is through, but not when SystemExit ended it, and sets `last_type`
    for an error: in both cases only python itself knows the exit code, and is left to its own way.
    """
    main = vars(sys.modules["__main__"])
    if "__file__" in main or hasattr(sys, "last_type"):
        return
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except Exception:  # python will try again and tell
        return
    names = [name for name in sys.modules if name not in warm or name == "__main__"]
    modules = [weakref.ref(sys.modules[name]) for name in names]
    for name in names:
        sys.modules[name] = None  # type: ignore[assignment]
    del main
    gc.collect()
    for reference in modules:  # those that something still refers to lose their contents: private names first
        module = reference()
        if module is not None:
            contents = vars(module)
            private = [name for name in contents if name[0] == "_" and name[1:2] != "_"]
            for name in [*private, *(name for name in contents if name != "__builtins__")]:
                contents[name] = None
    gc.collect()
    libc.exit(0)


if __name__ == "sitecustomize":
    from collect import end_others_and_report  # type: ignore[import-not-found]

    del sys.modules["collect"]
    sys.path.remove(FOLDER)
    sys.path_importer_cache.pop(FOLDER, None)
    del os.environ["PYTHONPATH"]
    serve()
