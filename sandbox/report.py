"""Hears over a socket what the first process of a jail reports: the program's start, its files, its end."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

from sandbox.signals import signal_name

REPORT_BYTES = 1 << 16


class Reports:
    """The server's end of the socket. What arrives is of our own code, but is believed no further than it must be."""

    def __init__(
        self,
        end: socket.socket,
        most_file_bytes: int,
        started: Callable[[float], None],
        ended: Callable[..., object],
        failed: Callable[[str], None],
    ) -> None:
        """Calls `started` and `ended` with the time (seconds, monotonic clock), and `ended` with facts by name; or
        `failed` with the reason why the program could not be started."""
        self._end = end
        self._started = started
        self._ended = ended
        self._failed = failed
        self._room = most_file_bytes
        self._files: dict[str, bytearray] = {}
        self._files_cut = False

    def heard(self) -> bool:
        """Takes one report. Gives False when there will be no more."""
        try:
            report = self._end.recv(REPORT_BYTES)
        except BlockingIOError:
            return True
        except OSError:
            report = b""
        kind, _, content = report.partition(b" ")
        match [kind, *content.split()] if kind in (b"started", b"ended") else [kind]:
            case [b"file"]:
                self._files[content.decode("utf-8", "replace")] = bytearray()
            case [b"data"] if self._files:
                self._room -= len(content)
                if self._room >= 0:  # the sender keeps to it, but whether it does is not ours to believe
                    self._files[next(reversed(self._files))] += content
            case [b"failed:"]:
                self._failed(content.decode("utf-8", "replace"))
            case [b"cut"]:
                self._files_cut = True
            case [b"started", nanoseconds]:
                self._started(int(nanoseconds) / 1e9)
            case [b"ended", nanoseconds, status]:
                files = {name: bytes(text) for name, text in self._files.items()}
                self._ended(int(nanoseconds) / 1e9, files=files, files_cut=self._files_cut, **how(int(status)))
            case _:
                return False
        return True


def how(status: int) -> dict[str, int | str]:
    """The facts that a status, as `wait` gives it, tells of a program's end."""
    code = os.waitstatus_to_exitcode(status)
    return {"exit_code": code} if code >= 0 else {"signal": signal_name(-code)}
