"""The fork server for Python: an interpreter that has started up to its last step before main.py, and is forked there.

It runs as `sitecustomize`, inside `import site`. A child that gets a job returns from here, and python goes on to run
main.py by itself, exactly as if it had just been started. Standard input is the socket to the server. The first message
on it is the set-up; each one after it asks for one child and brings its descriptors. For each child, a new pid
namespace gets a first process that does nothing; the child makes the other namespaces and gives up its rights by
itself. What is touched after the fork costs most, because each page is then copied: so little is.

A child may also become another interpreter, started ahead of its job (`request["start"]`).
"""

import atexit
import contextlib
import ctypes
import fcntl
import gc
import importlib
import marshal
import os
import posix
import resource
import select
import signal
import site
import socket
import sys
import time
import types
from collections.abc import Callable
from typing import Any

FOLDER = "/forkserver"
MESSAGE_BYTES = 1 << 18
MOST_DESCRIPTORS = 16
MOST_OPEN = 1 << 16
REPORT, JOB, STDIN, FIRST_GROUP = 0, 1, 2, 5
"""Places in a request's descriptors."""

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS = 0x00020000, 0x02000000, 0x04000000
CLONE_NEWIPC, CLONE_NEWPID, CLONE_NEWNET = 0x08000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MNT_DETACH = 2
PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 4, 22, 24, 38
PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
SECCOMP_MODE_FILTER, INSTRUCTION_BYTES = 2, 8
CAPABILITY_VERSION_3 = 0x20080522

libc = ctypes.PyDLL(None, use_errno=True)


class Filter(ctypes.Structure):
    """The kernel's struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def call(name: str, *arguments: object) -> int:
    """What a function of libc gives. Raises OSError."""
    answer: int = getattr(libc, name)(*arguments)
    if answer == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return answer


def serve() -> None:
    """Forks a child for every request. Returns in the child that is to be the program, and nowhere else."""
    control = socket.socket(fileno=0)
    setup = marshal.loads(control.recv(MESSAGE_BYTES))  # noqa: S302 -- of the server
    filters = [(Filter(len(one) // INSTRUCTION_BYTES, one),) for one in setup["filters"]]
    hooks = preload(setup["preload"])
    capability = 0
    while not libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0):
        capability += 1
    call("prctl", PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)  # a program that is started has no rights
    first = executable(setup["first_process"])
    own_user, own_group = os.getuid(), os.getgid()
    own_pids = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    ends = Ends()
    atexit.register(leave, frozenset(sys.modules))  # the first to be registered is the last to be called
    gc.collect()
    gc.freeze()
    control.send(b"ready")
    while True:
        ends.reported_until_request()
        text, descriptors, _, _ = socket.recv_fds(control, MESSAGE_BYTES, MOST_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)
        if not text:  # the server is gone
            os._exit(0)
        request = marshal.loads(text)  # noqa: S302 -- of the server
        report = descriptors[REPORT]
        init = 0
        try:
            call("unshare", CLONE_NEWPID)  # for the next children only
            become(request["user"], request["user"])
            init = start_first(first, report)
            ends.watch(init)
            program = call("fork")  # without python's own care for a forked interpreter, which touches many pages
        except OSError as failure:
            program = -1
            os.write(report, f"failed: {failure}".encode())
            if init:
                os.kill(init, signal.SIGKILL)
        if program == 0:
            try:
                close_all_but(descriptors)
                control.detach()
                make_world(request["scratch"], descriptors[FIRST_GROUP:])
                give_up_rights(request["open_files"], filters)
                become_program(descriptors, hooks)
                if "start" in request:
                    start(request["start"], descriptors)
                await_job(report, descriptors[JOB])
            except BaseException as failure:
                os.write(report, f"failed: {failure!r}".encode())
                os._exit(1)
            return
        become(own_user, own_group)
        call("setns", own_pids, CLONE_NEWPID)
        if program > 0:
            ends.watch(program, init, os.dup(report))
        for descriptor in descriptors:
            os.close(descriptor)


def executable(content: bytes) -> str:
    """A name of an executable that nobody may read: so no process can look into one that runs it."""
    file = os.memfd_create("init", os.MFD_CLOEXEC)
    os.write(file, content)
    path = os.open(f"/proc/self/fd/{file}", os.O_PATH | os.O_CLOEXEC)
    os.fchmod(file, 0o111)
    os.close(file)  # what is open for writing cannot be executed
    return f"/proc/self/fd/{path}"


def become(user: int, group: int) -> None:
    """Takes another user's place; the rights stay. Where there is one user only, it is nobody else's."""
    if user != os.getuid():
        call("setresgid", group, group, group)
        call("setresuid", user, user, user)


def start_first(path: str, report: int) -> int:
    """Starts a pid namespace's first process, as the leader of a process group; it says so to the server."""
    actions = [*((os.POSIX_SPAWN_CLOSE, number) for number in (0, 1, 2)), (os.POSIX_SPAWN_DUP2, report, 3)]
    return os.posix_spawn(path, ["init"], {}, file_actions=actions, setpgroup=0)


class Ends:
    """The processes that were forked and have not ended."""

    def __init__(self) -> None:
        self._poll = select.poll()
        self._poll.register(0, select.POLLIN)
        self._living: dict[int, tuple[int, int, int]] = {}

    def watch(self, pid: int, init: int = 0, report: int = -1) -> None:
        """When `pid` has ended, so will its `init`, and `report`, which is taken over, is told."""
        pidfd = os.pidfd_open(pid)
        self._living[pidfd] = pid, init, report
        self._poll.register(pidfd, select.POLLIN)

    def reported_until_request(self) -> None:
        """Hears of ends until there is something to read from the server."""
        while True:
            ready = [descriptor for descriptor, _ in self._poll.poll()]
            for pidfd in ready:
                if pidfd:
                    self._ended(pidfd)
            if ready == [0]:
                return

    def _ended(self, pidfd: int) -> None:
        pid, init, report = self._living.pop(pidfd)
        self._poll.unregister(pidfd)
        os.close(pidfd)
        _, status = os.waitpid(pid, 0)
        if init:
            ended = time.monotonic_ns()
            os.kill(init, signal.SIGKILL)
            with contextlib.suppress(OSError):  # the server does not listen any more
                os.write(report, b"ended %d %d" % (ended, status))
            os.close(report)


def preload(names: tuple[str, ...]) -> list[Any]:
    """Imports modules; gives what they want to be called in each forked child."""
    hooks: list[Any] = []
    register = os.register_at_fork

    def register_and_note(**callables: Any) -> None:
        if "after_in_child" in callables:
            hooks.append(callables["after_in_child"])
        register(**callables)

    os.register_at_fork = register_and_note
    try:
        for name in names:
            importlib.import_module(name)
    finally:
        os.register_at_fork = register
    if "threading" in sys.modules:  # its own hook looks for threads that did not survive: there were none
        threading = sys.modules["threading"]
        hooks.remove(threading._after_fork)
        hooks.append(threading.main_thread()._set_native_id)
    if "numpy.random" in sys.modules:  # it has no hook, and would give every run the same numbers
        hooks.append(sys.modules["numpy.random"].seed)
    return hooks


def skip_user_customization() -> None:
    """Spares each child the search for a module that no jail has."""
    wanted = site.execusercustomize

    def skip() -> None:
        site.execusercustomize = wanted

    site.execusercustomize = skip


def close_all_but(kept: list[int]) -> None:
    """Closes whatever the fork server has open, but the standard streams, which are replaced."""
    begin = 3
    for descriptor in [*sorted(kept), MOST_OPEN]:
        os.closerange(begin, descriptor)
        begin = descriptor + 1


def make_world(scratch: str, groups: list[int]) -> None:
    """Moves into a new world, with nothing in it."""
    call("setpgid", 0, 1)  # a signal to its process group does not reach others
    for group in groups:  # from here on, what is used counts as the run's
        os.write(group, b"0")
        os.close(group)
    call("unshare", CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWNET)
    call("mount", b"proc", b"/proc", b"proc", MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC, None)
    for place in (b"/tmp", b"/work", b"/dev/shm"):
        call("mount", b"tmpfs", place, b"tmpfs", MS_NOSUID | MS_NODEV, scratch.encode())
    call("umount2", FOLDER.encode(), MNT_DETACH)
    os.chdir("/work")


def give_up_rights(open_files: int, filters: list[Any]) -> None:
    """Drops every right that could be used or regained."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_files, open_files))
    call("capset", (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)())
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    for (one,) in filters:
        call("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(one), 0, 0)
    call("prctl", PR_SET_DUMPABLE, 1, 0, 0, 0)


def become_program(descriptors: list[int], hooks: list[Any]) -> None:
    """Takes the standard streams, and becomes an interpreter like no other."""
    for number in (0, 1, 2):
        os.dup2(descriptors[STDIN + number], number)
        os.close(descriptors[STDIN + number])
    for hook in hooks:
        hook()
    os.getppid = posix.getppid = parent_for(os.getppid)


def parent_for(outside: Callable[[], int]) -> Callable[[], int]:
    """What os.getppid() is for the program: its parent is outside of its pid namespace, where its number would be 0.

    A signal to 0 reaches one's own process group, which is not what a program means by its parent.
    """

    def getppid() -> int:
        return outside() or 1

    return getppid


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
    args, files = marshal.loads(os.pread(job, os.fstat(job).st_size, 0))  # noqa: S302 -- of the server
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
        forget(name.partition("/")[0].removesuffix(".py"))  # it comes before one that is warm
    sys.argv[1:] = sys.orig_argv[2:] = args
    sys.path_importer_cache[f"/work/{sys.argv[0]}"] = None  # it is no archive, as python would find after a long look
    sys.modules[__name__] = types.ModuleType(__name__)
    main = types.ModuleType("__main__")  # not the one that is frozen: what a program leaves in it is to be collected
    vars(main).update(vars(sys.modules["__main__"]))
    sys.modules["__main__"] = main
    mains.append(main)
    os.write(report, b"started %d" % time.monotonic_ns())
    os.close(report)


def forget(name: str) -> None:
    """Has a module, and what is in its package, imported anew."""
    for known in [known for known in sys.modules if known == name or known.startswith(f"{name}.")]:
        del sys.modules[known]


if __name__ == "sitecustomize":
    from early_end import leave, mains  # type: ignore[import-not-found]

    del sys.modules["early_end"]
    sys.path.remove(FOLDER)
    sys.path_importer_cache.pop(FOLDER, None)
    if packages := os.environ.pop("PYTHONPATH").partition(":")[2]:
        os.environ["PYTHONPATH"] = packages
    skip_user_customization()
    serve()
