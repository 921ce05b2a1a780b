"""The fork server for Python: an interpreter that has started up to its last step before main.py, and is forked there.

It is loaded as `sitecustomize`. When python has started and asks its path hooks whether main.py is an archive, one of
them forks. A child that gets a job answers that it is none, and python goes on to run main.py by itself, exactly as if
it had just been started. Standard input is the socket to the server. The first message on it is the set-up; each one
after it asks for one child and brings its descriptors. For each child, a new pid namespace gets a first process that
does nothing; the child makes the other namespaces and gives up its rights by itself. What is touched after the fork
costs most, because each page is then copied: so little is.

A child may also become another interpreter, started ahead of its job.
"""

import sys

STARTED = frozenset(sys.modules)
"""What python itself has imported: a program's own file of such a name is not looked at."""

# ruff: noqa: E402
import atexit
import contextlib
import ctypes
import fcntl
import gc
import importlib
import marshal
import os
import posix
import select
import signal
import socket
import time
import traceback
import types
from collections.abc import Callable, Sequence
from typing import Any

FOLDER = "/forkserver"
MESSAGE_BYTES = 1 << 18
MOST_DESCRIPTORS = 16
MOST_DIGITS = 24
REAP_MS = 10
PROGRAM = 2
"""A program's own number: the first process has 1."""
HEADER = 8
REPORT, JOB = 0, 1
"""Places in a request's descriptors, and, from `BASE` on, in a child."""
INIT = 1
BASE, RESERVED = 3, 3
"""So many descriptors from there on are the fork server's own: all that come with a request are above."""

PROT_READ, PROT_WRITE, PROT_EXEC = 1, 2, 4
MAP_PRIVATE, MAP_ANONYMOUS, MAP_FIXED_NOREPLACE = 2, 0x20, 0x100000
MNT_DETACH = 2
PR_CAPBSET_DROP, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 24, 47, 4

libc = ctypes.PyDLL(None, use_errno=True)
libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
libc.mmap.restype = ctypes.c_void_p
libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def begin() -> None:
    """Takes the set-up, and has python call the fork server at its last step."""
    control = socket.socket(fileno=0)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(control))  # it stays: a child's descriptor 0 is not its to close
    setup = marshal.loads(control.recv(MESSAGE_BYTES))  # noqa: S302 -- of the server
    reserve(setup["first_process"])
    hooks = preload(setup["preload"])
    capability = 0
    while not libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0):
        capability += 1
    libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)  # a program that is started has no rights
    size, lists = setup["size"], setup["request_at"]
    make = maker(setup["code_at"], size, setup["code"])
    part(setup["shared_at"], size, setup["shared"])
    image = part(lists, size)

    def perform(name: str, place: int) -> None:
        failure = make(lists + 4 * place)
        if failure:
            raise OSError(f"{name} {failure}")

    def path_hook(path: str) -> Any:
        if os.path.basename(path) != sys.argv[0]:  # a folder or an archive to import from
            raise ImportError
        sys.path_hooks.remove(path_hook)
        try:
            serve(control, image, perform, hooks)
        except BaseException:  # which python would take for a no, if it is an ImportError
            traceback.print_exc()
            os._exit(1)

    sys.path_hooks.insert(0, path_hook)


def serve(control: socket.socket, image: memoryview, perform: Callable[[str, int], None], hooks: list[Any]) -> None:
    """Forks a child for every request. Returns in the child that is to be the program, and nowhere else."""
    del sys.modules[__name__]
    sys.modules[__name__] = types.ModuleType(__name__)  # now the last
    # The first to be registered is the last to be called.
    atexit.register(leave, frozenset(sys.modules), has_native_code(sys.modules))
    libc.umount2(FOLDER.encode(), MNT_DETACH)  # for all children at once: the kernel waits for all processors each time
    os.getppid = posix.getppid = parent_for(os.getppid)
    numbers = image.cast("i")
    ends = Ends()
    gc.collect()
    gc.freeze()
    have_code_mapped()
    control.send(b"ready %d %d %d" % (BASE, *generator(hooks)))
    while True:
        ends.reported_until_request()
        descriptors = received(control, image)
        if min(descriptors) < BASE + RESERVED:
            raise OSError(f"descriptors came at {list(descriptors)}")
        before, child, wait, after, room, length, start, _ = patched(numbers, descriptors)
        report = descriptors[REPORT]
        init, program = 0, -1
        try:
            perform("before", before)
            init = start_first(report)
            program = libc.fork()  # without python's own care for a forked interpreter, which touches many pages
            if not program:
                perform("child", child)
                for hook in hooks:
                    hook()
                if length:
                    start_other(*marshal.loads(image[start : start + length]))  # noqa: S302 -- of the server
                perform("wait", wait)
                size = bytes(image[room : room + MOST_DIGITS]).rstrip(b"\0")
                if not size:  # not wanted any more
                    os._exit(0)
                take_job(BASE + REPORT, BASE + JOB, image[len(image) // 2 :], int(size))
                return
            if program < 0:
                raise OSError(f"fork: {os.strerror(ctypes.get_errno())}")
        except BaseException as failure:
            with contextlib.suppress(OSError):  # the server does not listen any more
                os.write(report if program else BASE + REPORT, f"failed: {failure}".encode())
            if not program:
                os._exit(1)
            if init:
                ends.end(init)
        perform("after", after)
        if program > 0:
            ends.watch(program, init, report)
        else:
            os.close(report)


def part(address: int, size: int, content: bytes = b"") -> memoryview:
    """Memory at an address that the server has chosen."""
    flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE
    if libc.mmap(address, size, PROT_READ | PROT_WRITE, flags, -1, 0) != address:
        raise OSError(f"{address:#x} is taken: {os.strerror(ctypes.get_errno())}")
    memory = memoryview((ctypes.c_char * size).from_address(address)).cast("B")
    memory[: len(content)] = content
    return memory


def maker(address: int, size: int, code: bytes) -> Callable[[int], int]:
    """The function that makes the system calls of a list, whose address it is given. Its answer is 0 if all is well."""
    part(address, size, code)
    libc.mprotect(address, size, PROT_READ | PROT_EXEC)
    return ctypes.PYFUNCTYPE(ctypes.c_long, ctypes.c_void_p)(address)


def patched(numbers: memoryview, descriptors: Sequence[int]) -> list[int]:
    """Puts the numbers of descriptors into an image where they belong; gives its header."""
    header = numbers[:HEADER].tolist()
    for place in range(HEADER, HEADER + 2 * header[-1], 2):
        numbers[numbers[place]] = descriptors[numbers[place + 1]]
    return header


def have_code_mapped() -> None:
    """Has the kernel hand on, with a fork, which pages of files are in memory; else each child asks for them anew.

    It does so for parts of memory of which a page was written to, and so is no file's any more.
    """
    with open("/proc/self/maps") as lines:
        found = [line.split() for line in lines if " r-xp " in line or " r--p " in line]
    for extent, rights, _, _, inode, *_ in found:
        if inode == "0":
            continue
        first, last = (int(address, 16) for address in extent.split("-"))
        allowed = PROT_READ | (PROT_EXEC if "x" in rights else 0)
        if libc.mprotect(first, last - first, allowed | PROT_WRITE) == 0:
            byte = ctypes.c_char.from_address(first)
            byte.value = byte.value
            libc.mprotect(first, last - first, allowed)


def reserve(first_process: bytes) -> None:
    """Puts what is needed for ever where no request's descriptors will be."""
    file = os.memfd_create("init", os.MFD_CLOEXEC)
    os.write(file, first_process)
    opened = (
        os.open("/proc/self/ns/pid", os.O_RDONLY),
        os.open(f"/proc/self/fd/{file}", os.O_PATH),
        os.open(os.devnull, os.O_RDWR),
    )
    os.fchmod(file, 0o111)  # nobody may read it: so no process can look into one that runs it
    os.close(file)  # what is open for writing cannot be executed
    aside = [fcntl.fcntl(one, fcntl.F_DUPFD_CLOEXEC, BASE + 2 * RESERVED) for one in opened]
    for place, one in enumerate(aside):
        os.dup2(one, BASE + place, inheritable=False)
    os.closerange(BASE + RESERVED, max(aside) + 1)


def received(control: socket.socket, image: memoryview) -> Sequence[int]:
    """The numbers of the descriptors that came with the next request, which is put into `image`."""
    space = socket.CMSG_SPACE(4 * MOST_DESCRIPTORS)
    length, ancillary, _, _ = control.recvmsg_into([image], space, socket.MSG_CMSG_CLOEXEC)
    if not length:  # the server is gone
        os._exit(0)
    return memoryview(ancillary[0][2]).cast("i")


def start_first(report: int) -> int:
    """Starts a pid namespace's first process, as the leader of a process group; it says so to the server."""
    actions = [*((os.POSIX_SPAWN_CLOSE, number) for number in (0, 1, 2)), (os.POSIX_SPAWN_DUP2, report, 3)]
    return os.posix_spawn(f"/proc/self/fd/{BASE + INIT}", ["init"], {}, file_actions=actions, setpgroup=0)


class Ends:
    """The programs that were forked and have not ended, and the first processes that were told to."""

    def __init__(self) -> None:
        self._poll = select.poll()
        self._poll.register(0, select.POLLIN)
        self._living: dict[int, tuple[int, int, int]] = {}
        self._dying: list[int] = []

    def watch(self, pid: int, init: int, report: int) -> None:
        """When `pid` has ended, so will its `init`, and `report`, which is taken over, is told."""
        pidfd = os.pidfd_open(pid)
        self._living[pidfd] = pid, init, report
        self._poll.register(pidfd, select.POLLIN)

    def end(self, init: int) -> None:
        """Ends a first process, and the kernel with it all others of its pid namespace."""
        os.kill(init, signal.SIGKILL)
        self._dying.append(init)

    def reported_until_request(self) -> None:
        """Hears of ends until there is something to read from the server."""
        while True:
            self._dying = [init for init in self._dying if not os.waitpid(init, os.WNOHANG)[0]]
            ready = [descriptor for descriptor, _ in self._poll.poll(REAP_MS if self._dying else None)]
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
        ended = time.monotonic_ns()
        self.end(init)
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
    if "threading" in sys.modules:
        threading = sys.modules["threading"]
        hooks.remove(threading._after_fork)  # looks for threads that did not survive: there were none
        threading.main_thread()._native_id = PROGRAM
    if "numpy.random" in sys.modules:  # it has no hook, and would give every run the same numbers
        hooks.append(sys.modules["numpy.random"].seed)
    return hooks


def generator(hooks: list[Any]) -> tuple[int, int]:
    """Where the state of random's own generator is, and its size; then it needs no hook. (0, 0) if it is not found."""
    random = sys.modules.get("random")
    if random is None or random._inst.seed not in hooks:
        return 0, 0
    *expected, index = random._inst.getstate()[1]
    start = id(random._inst) + object.__basicsize__
    if list((ctypes.c_uint32 * (1 + len(expected))).from_address(start)) != [index, *expected]:
        return 0, 0
    hooks.remove(random._inst.seed)
    return start + ctypes.sizeof(ctypes.c_uint32), len(expected) * ctypes.sizeof(ctypes.c_uint32)


def parent_for(outside: Callable[[], int]) -> Callable[[], int]:
    """What os.getppid() is for the program: its parent is outside of its pid namespace, where its number would be 0.

    A signal to 0 reaches one's own process group, which is not what a program means by its parent.
    """

    def getppid() -> int:
        return outside() or 1

    return getppid


def start_other(argv: list[str], environment: dict[str, str]) -> None:
    """Becomes another interpreter, which finds the socket and the job where this one has them."""
    for number in (signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ):  # those that python itself catches or ignores
        signal.signal(number, signal.SIG_DFL)
    os.execve(argv[0], argv, environment)  # noqa: S606


def take_job(report: int, job: int, room: memoryview, size: int) -> None:
    """Writes the job's files and leaves python as it is before it runs main.py. A job that fits is in `room`."""
    text = room[:size] if size <= len(room) else os.pread(job, size, 0)
    args, files = marshal.loads(text)  # noqa: S302 -- of the server
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
    main = types.ModuleType("__main__")  # not the one that is frozen: what a program leaves in it is to be collected
    vars(main).update(vars(sys.modules["__main__"]))
    sys.modules["__main__"] = main
    mains.append(main)
    os.write(report, b"started %d" % time.monotonic_ns())
    os.close(report)


def forget(name: str) -> None:
    """Has a module, and what is in its package, imported anew."""
    if name in STARTED or name not in sys.modules:  # those that are would all be touched by a look at each
        return
    for known in [known for known in sys.modules if known == name or known.startswith(f"{name}.")]:
        del sys.modules[known]


if __name__ == "sitecustomize":
    from early_end import has_native_code, leave, mains  # type: ignore[import-not-found]

    del sys.modules["early_end"]
    sys.path.remove(FOLDER)
    sys.path_importer_cache.pop(FOLDER, None)
    if packages := os.environ.pop("PYTHONPATH").partition(":")[2]:
        os.environ["PYTHONPATH"] = packages
    begin()
