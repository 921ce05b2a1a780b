"""The fork server for Python: an interpreter that has started up to its last step before main.py, and is forked there.

It is loaded as `sitecustomize`. When python has started and asks its path hooks whether main.py is an archive, one of
them forks. A child that gets a job answers that it is none, and python goes on to run main.py by itself, exactly as if
it had just been started. Standard input is the socket to the server. The first message on it is the set-up, the next
is the program of system calls with which the fork server serves: python itself goes on in its children only. What is
touched after the fork costs most, because each page is then copied: so little is.

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
import signal
import socket
import traceback
import types
from collections.abc import Callable
from typing import Any

FOLDER = "/forkserver"
MESSAGE_BYTES = 1 << 18
PROGRAM = 2
"""A program's own number: the first process has 1."""
HEADER_AT = 64
BASE = 3
"""The first descriptor that the fork server keeps for itself."""
REPORT = BASE
"""Of a child."""

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
    size = setup["size"]
    make = maker(setup["code_at"], size, setup["code"])
    fork = ctypes.cast(libc.fork, ctypes.c_void_p).value
    part(setup["shared_at"], size)
    part(setup["request_at"], size)
    part(setup["job_at"], setup["job_bytes"])

    def perform(address: int) -> int:
        answer = make(address, fork)
        if answer >= setup["code_at"]:
            raise OSError(answer)
        return answer

    def path_hook(path: str) -> Any:
        if os.path.basename(path) != sys.argv[0]:  # a folder or an archive to import from
            raise ImportError
        sys.path_hooks.remove(path_hook)
        try:
            serve(control, setup, perform, hooks)
        except BaseException as failure:  # which python would take for a no, if it is an ImportError
            with contextlib.suppress(OSError):  # where this is no child
                os.write(REPORT, f"failed: {failure}".encode())
            traceback.print_exc()
            os._exit(1)

    sys.path_hooks.insert(0, path_hook)


def serve(control: socket.socket, setup: dict[str, Any], perform: Callable[[int], int], hooks: list[Any]) -> None:
    """Forks a child for every request. Returns in the child that is to be the program, and nowhere else."""
    del sys.modules[__name__]
    sys.modules[__name__] = types.ModuleType(__name__)  # now the last
    # The first to be registered is the last to be called.
    atexit.register(leave, frozenset(sys.modules), has_native_code(sys.modules))
    libc.umount2(FOLDER.encode(), MNT_DETACH)  # for all children at once: the kernel waits for all processors each time
    os.getppid = posix.getppid = parent_for(os.getppid)
    shared, request, job = (memory(setup[place], setup["size"]) for place in ("shared_at", "request_at", "job_at"))
    gc.collect()
    gc.freeze()
    main = types.ModuleType("__main__")  # not the one that is frozen: what a program leaves in it is to be collected
    vars(main).update(vars(sys.modules["__main__"]))
    sys.modules["__main__"] = main
    mains.append(main)
    have_code_mapped()
    control.send(b"ready %d %d %d" % (BASE, *generator(hooks)))
    control.recv_into(shared)
    begin, *_ = numbers(shared, HEADER_AT)
    perform(setup["shared_at"] + begin)
    more = perform(setup["shared_at"])  # without python's own care for a forked interpreter, which touches many pages
    _, place, length = numbers(request, HEADER_AT)
    if length:
        start_other(*marshal.loads(request[place : place + length]))  # noqa: S302 -- of the server
    for hook in hooks:
        hook()
    if more:
        place, length, _ = numbers(job, 0)
        args, names = marshal.loads(memory(setup["job_at"] + place, length))  # noqa: S302 -- of the server
        sys.argv[1:] = sys.orig_argv[2:] = args
        for name in names:
            forget(name)


def memory(address: int, size: int) -> memoryview:
    """What is at an address."""
    return memoryview((ctypes.c_char * size).from_address(address)).cast("B")


def numbers(image: memoryview, place: int) -> list[int]:
    """Three numbers that an image has for an interpreter."""
    return image[place : place + 12].cast("i").tolist()


def part(address: int, size: int, content: bytes = b"") -> None:
    """Gets memory at an address that the server has chosen."""
    flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE
    if libc.mmap(address, size, PROT_READ | PROT_WRITE, flags, -1, 0) != address:
        raise OSError(f"{address:#x} is taken: {os.strerror(ctypes.get_errno())}")
    memory(address, size)[: len(content)] = content


def maker(address: int, size: int, code: bytes) -> Callable[[int, Any], int]:
    """The function that makes the system calls of a program, and forks with another.

    Its answer is small, or greater than the program's address if a call has failed.
    """
    part(address, size, code)
    libc.mprotect(address, size, PROT_READ | PROT_EXEC)
    return ctypes.PYFUNCTYPE(ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)(address)


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
    aside = [fcntl.fcntl(one, fcntl.F_DUPFD_CLOEXEC, BASE + 2 * len(opened)) for one in opened]
    for place, one in enumerate(aside):
        os.dup2(one, BASE + place, inheritable=False)
    os.closerange(BASE + len(aside), max(aside) + 1)


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
