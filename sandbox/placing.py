"""A job as the system calls that write its files: a child makes them, and then its interpreter runs the program.

An interpreter that wrote the files by itself would touch a hundred pages for it, or read and compile a dozen functions.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from time import CLOCK_MONOTONIC

from sandbox.syscalls import END, JOB_AT, JOB_BYTES, STEP, VALUE, WORD, pack

HEADER = struct.Struct("<2i56x")
"""Where what is for the interpreter itself is, counted from the beginning, and its length."""
PROGRAM_AT = JOB_AT + HEADER.size
MORE = 1
"""What the program gives if there is something for the interpreter; else 0."""
STARTED = struct.Struct("<8s2q")
"""What the child tells last: a word and the time, in seconds and nanoseconds of the monotonic clock."""
STARTED_WORD = b"started "
AT_FDCWD, CREATE = -100, 0o1 | 0o100 | 0o200
"""Write, and only what is not there yet."""
FOLDER_MODE, FILE_MODE = 0o777, 0o644
IN_MEMORY_BYTES = 4096
"""Larger contents go from file to file. Of one page, all is written or nothing."""


def placed(files: Mapping[str, bytes], report: int, job: int, extra: bytes = b"") -> bytes:
    """The contents of a child's job, whose descriptor is `job`; it tells `report` when the program starts.

    Raises:
        OSError: there are so many long names that they do not fit.
    """
    program = _Program(files)
    for folder in program.folders:
        program.step("mkdirat", AT_FDCWD, program.put(folder.encode()), FOLDER_MODE)
    for name, content in files.items():
        program.file(name, content, job)
    started = program.put(STARTED.pack(STARTED_WORD, 0, 0))
    program.step("clock_gettime", CLOCK_MONOTONIC, started + WORD)
    program.step("write", report, started, STARTED.size)
    program.step("close", report)
    program.step("close", job)
    program.step(END, MORE if extra else 0)
    return program.finish(extra)


class _Program:
    """Steps, what they refer to, and at last what they copy from file to file."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        parents = (name.split("/")[:-1] for name in files)
        self.folders = dict.fromkeys("/".join(parts[: depth + 1]) for parts in parents for depth in range(len(parts)))
        large = sum(len(content) > IN_MEMORY_BYTES for content in files.values())
        self._steps = bytearray()
        self._data = bytearray()
        self._data_at = PROGRAM_AT + STEP.size * (len(self.folders) + 5 * len(files) + 2 * large + 5)
        self._copied: list[tuple[int, bytes]] = []
        self._opened = self.put(bytes(WORD))

    def put(self, content: bytes) -> int:
        """The address that data will have; a zero follows."""
        address = self._data_at + len(self._data)
        self._data += content + bytes(WORD - len(content) % WORD)
        return address

    def step(self, call: str, *values: int, into: int = 0) -> None:
        self._steps += pack(call, values, into)

    def file(self, name: str, content: bytes, job: int) -> None:
        size, is_large = len(content), len(content) > IN_MEMORY_BYTES
        self.step("openat", AT_FDCWD, self.put(name.encode()), CREATE, FILE_MODE, into=self._opened)
        users = 3 if is_large else 2  # of the descriptor, which each has as its first argument
        for place in range(len(self._steps), len(self._steps) + STEP.size * users, STEP.size):
            self.step(VALUE, self._opened, into=PROGRAM_AT + place + STEP.size * users + WORD)
        if is_large:
            self.step("fallocate", 0, 0, 0, size)  # or it might be written in part
            self._copied.append((self.put(bytes(WORD)), content))
            self.step("sendfile", 0, job, self._copied[-1][0], size)
        else:
            self.step("write", 0, self.put(content), size)
        self.step("close", 0)

    def finish(self, extra: bytes) -> bytes:
        place = self._data_at - JOB_AT + len(self._data)
        rest = bytearray(extra)
        for address, content in self._copied:
            struct.pack_into("<q", self._data, address - self._data_at, place + len(rest))
            rest += content
        if place + len(extra) > JOB_BYTES:
            raise OSError(f"the names of the files take {place} bytes, and {JOB_BYTES} is the limit")
        assert self._data_at == PROGRAM_AT + len(self._steps)
        return b"".join([HEADER.pack(place, len(extra)), self._steps, self._data, rest])
