"""The pipes to a jailed process, and descriptors that are kept until they are given away or closed."""

from __future__ import annotations

import contextlib
import fcntl
import os

from sandbox.process import Pipes

ROOM_BYTES = 1 << 20
"""What the pipes for output hold, where the system allows it: node drops at process.exit() what did not fit, and the
usual 64 KiB are full before anybody has read them."""


def widen(*pipes: int) -> None:
    """Makes room in pipes for output, unless this user has too many such pipes already."""
    for pipe in pipes:
        with contextlib.suppress(OSError):
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, ROOM_BYTES)


class Descriptors:
    """Open descriptors with one owner, who closes whatever was not given away."""

    def __init__(self) -> None:
        self._open: set[int] = set()

    def keep(self, fd: int) -> int:
        """Takes `fd` over."""
        self._open.add(fd)
        return fd

    def pipe(self, *, write_end_is_ours: bool) -> tuple[int, int]:
        """A pipe as (their end, our end)."""
        read_end, write_end = os.pipe()
        self._open |= {read_end, write_end}
        return (read_end, write_end) if write_end_is_ours else (write_end, read_end)

    def standard_streams(self, owner: int) -> tuple[tuple[int, int, int], Pipes]:
        """Three pipes as (their ends, our ends); where it can be, `owner` may open theirs by name (/dev/stdout)."""
        stdin, our_stdin = self.pipe(write_end_is_ours=True)
        stdout, our_stdout = self.pipe(write_end_is_ours=False)
        stderr, our_stderr = self.pipe(write_end_is_ours=False)
        widen(our_stdout, our_stderr)
        if os.geteuid() == 0:
            for end in (stdin, stdout, stderr):
                os.fchown(end, owner, owner)
        return (stdin, stdout, stderr), Pipes(our_stdin, our_stdout, our_stderr)

    def has(self, fd: int) -> bool:
        """Whether `fd` is still here."""
        return fd in self._open

    def give(self, *fds: int) -> None:
        """Somebody else closes them."""
        self._open -= set(fds)

    def close(self, *fds: int) -> None:
        """Closes them, those that are still here."""
        for fd in self._open & set(fds):
            self._open.discard(fd)
            os.close(fd)

    def close_all(self) -> None:
        """Closes whatever is still here."""
        self.close(*self._open)
