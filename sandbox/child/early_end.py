"""How a forked python ends early, after all of python's own end that can be noticed. Standard library only.

Taking the interpreter apart, which python does last, costs more than most programs: it touches every page that was
forked.
"""

import atexit
import contextlib
import ctypes
import gc
import io
import itertools
import sys
import types
import weakref
from collections.abc import Iterable

OWN_EXTENSIONS = "/lib-dynload/"
LAST = "sitecustomize"
"""Of the warm modules in sys.modules."""

libc = ctypes.PyDLL(None)

mains: list[types.ModuleType] = []
"""The program's own module, once there is one."""


def leave(warm: frozenset[str], native: bool) -> None:
    """Ends a program that came to its end by itself. Where it is not sure what python would do, python goes on.

    `native`: some of the `warm` modules are written in C and not python's own.
    """
    try:
        if ran_through(mains[0]):
            names = ["__main__", *added(warm)]
            exit = libc.exit if native or has_native_code(names) else exit_at_once
            flush()
            atexit._clear()  # their work is done; what they refer to is to be collected
            finalize(names)
            exit(0)
    except BaseException:  # of a program that has changed what is used here
        return


def ran_through(main: types.ModuleType) -> bool:
    """Whether main.py came to its end without an error: then python has removed two names, and set none of three."""
    contents = vars(main)
    return (
        sys.modules.get("__main__") is main
        and "__builtins__" in contents
        and "__file__" not in contents
        and "__cached__" not in contents
        and not any(hasattr(sys, name) for name in ("last_type", "last_value", "last_traceback"))
    )


def flush() -> None:
    """Writes out what the program has left in open files; text first, which goes into the buffers of bytes."""
    sys.stdout.flush()
    sys.stderr.flush()
    files = [
        found
        for found in gc.get_objects()
        if isinstance(found, io.TextIOWrapper | io.BufferedWriter | io.BufferedRandom)
    ]
    for file in sorted(files, key=lambda file: not isinstance(file, io.TextIOWrapper)):
        with contextlib.suppress(Exception):  # closed, or detached
            file.flush()


def added(warm: frozenset[str]) -> list[str]:
    """The names of modules that are not warm. They stand behind those that are, each of which would be touched."""
    names = list(itertools.takewhile(lambda name: name != LAST, reversed(sys.modules)))
    if len(sys.modules) - len(names) != len(warm):  # some were removed or put elsewhere
        names = list(reversed(sys.modules))
    return [name for name in names if name not in warm][::-1]


def has_native_code(names: Iterable[str]) -> bool:
    """Whether modules may have told C what to do at its end: none of python's own has."""
    files = (getattr(sys.modules[name], "__file__", None) or "" for name in names)
    return any(file.endswith(".so") and OWN_EXTENSIONS not in file for file in files)


def exit_at_once(code: int) -> None:
    """C's end without a look at each library, which would touch it."""
    libc.fflush(None)
    libc._exit(code)


def finalize(names: list[str]) -> None:
    """Lets the program's modules go, in python's order, so that finalizers run."""
    modules = [weakref.ref(sys.modules[name]) for name in names]
    for name in names:
        sys.modules[name] = None  # type: ignore[assignment]
    mains.clear()
    gc.collect()
    for reference in modules:  # those that something still refers to lose their contents: private names first
        module = reference()
        if module is not None:
            contents = vars(module)
            private = [name for name in contents if name[0] == "_" and name[1:2] != "_"]
            for name in [*private, *(name for name in contents if name != "__builtins__")]:
                contents[name] = None
    gc.collect()
