"""Reads the regular files that a program has left in its folder. Used inside jails too: standard library only."""

import os
import stat

MOST_FILES = 201
"""As many as a job may bring and may get back, and the program itself."""
MOST_DEPTH = 16
PIECE_BYTES = 32 << 10
SIGKILL = 9
OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""A link is not followed, and a pipe without a writer does not make us wait."""


def end_others_and_report(report_fd: int, most_bytes: int) -> None:
    """For the first process of a jail: ends whatever else still runs, and reports the files that are left."""
    try:
        os.kill(-1, SIGKILL)
        while True:
            os.wait()
    except (ChildProcessError, ProcessLookupError):
        pass
    files, cut = collect("/proc/self/cwd", most_bytes)  # which can be named even if the program has closed it
    for name, content in files.items():
        os.write(report_fd, b"file " + name.encode())
        for start in range(0, len(content), PIECE_BYTES):
            os.write(report_fd, b"data " + content[start : start + PIECE_BYTES])
    if cut:
        os.write(report_fd, b"cut")


def collect(folder: str, most_bytes: int) -> tuple[dict[str, bytes], bool]:
    """The files as path → content, at most 201 and `most_bytes` of them, and whether some were left out.

    Each is opened below the folder that it was found in, so no name and no link leads out. Nobody else may be at work
    there any more.
    """
    found: dict[str, bytes] = {}
    os.chmod(folder, 0o700)
    root = os.open(folder, OPEN & ~os.O_NOFOLLOW)
    try:
        complete = _visit(root, "", found, most_bytes, 0)
    finally:
        os.close(root)
    return found, not complete


def _visit(folder: int, path: str, found: dict[str, bytes], most_bytes: int, depth: int) -> bool:
    complete = True
    for name in sorted(os.listdir(folder)):
        mode = os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode
        if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
            continue
        try:
            os.chmod(name, 0o700, dir_fd=folder)
            entry = os.open(name, OPEN, dir_fd=folder)
        except OSError:  # of another user, or too many are open
            complete = False
            continue
        shown = path + os.fsencode(name).decode("utf-8", "replace")
        try:
            if stat.S_ISDIR(mode):
                complete &= depth < MOST_DEPTH and _visit(entry, f"{shown}/", found, most_bytes, depth + 1)
                continue
            left = most_bytes - sum(map(len, found.values()))
            if len(found) < MOST_FILES and shown not in found and os.fstat(entry).st_size <= left:
                with open(entry, "rb", closefd=False) as file:
                    found[shown] = file.read(left)
            else:
                complete = False
        finally:
            os.close(entry)
    return complete
