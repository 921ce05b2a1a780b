"""A job's files, written by machine code in a child of its own."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from sandbox.child import fork_python
from sandbox.placing import HEADER, IN_MEMORY_BYTES, MORE, STARTED, placed
from sandbox.syscalls import ADDRESS, CODE_AT, JOB_AT, JOB_BYTES, PART, code


class Placed(NamedTuple):
    """What came of it."""

    answer: int
    told: bytes


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    before = os.getcwd()
    os.chdir(tmp_path)
    yield tmp_path
    os.chdir(before)


def carry_out(files: dict[str, bytes], extra: bytes = b"") -> Placed:
    """In this process; what a child's descriptors would be, it closes."""
    make = fork_python.maker(CODE_AT, PART, code(platform.machine()))
    fork_python.part(JOB_AT, JOB_BYTES)
    read_end, report = os.pipe()
    job = os.memfd_create("job")
    content = placed(files, report, job, extra)
    os.pwrite(job, content, 0)
    try:
        fork_python.memory(JOB_AT, len(content))[:] = content
        answer = int(make(JOB_AT + HEADER.size, None))
        told = os.read(read_end, 1000) if answer < ADDRESS else b""
        for one in (report, job):
            if answer < ADDRESS:
                with pytest.raises(OSError, match="Bad file descriptor"):
                    os.fstat(one)
            else:
                os.close(one)
        return Placed(answer, told)
    finally:
        os.close(read_end)
        for part, size in ((CODE_AT, PART), (JOB_AT, JOB_BYTES)):
            ctypes.CDLL(None).munmap(ctypes.c_void_p(part), ctypes.c_size_t(size))


def test_files_are_there_whole_and_in_their_folders(folder: Path) -> None:
    files = {
        "main.py": b"print(1)",
        "empty": b"",
        "a/b/c.txt": b"deep",
        "a/d": bytes(range(256)),
        "one page": b"x" * IN_MEMORY_BYTES,
        "large": os.urandom(1_000_001),
        "a/large too": os.urandom(IN_MEMORY_BYTES + 1),
        "\u00fc\u20ac": "\u00fc\ud800".encode("utf-8", "surrogatepass"),
    }
    answer, told = carry_out(files)

    assert answer == 0
    assert {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()} == files
    word, seconds, nanoseconds = STARTED.unpack(told)
    assert word == b"started "
    assert seconds >= 0 <= nanoseconds < 1e9


def test_there_may_be_something_for_the_interpreter(folder: Path) -> None:
    content = placed({"main.py": b"", "large": bytes(10_000)}, 1000, 1001, b"for it")
    place, length = struct.unpack_from("<2i", content)

    assert content[place : place + length] == b"for it"
    assert carry_out({"main.py": b""}, b"for it").answer == MORE


@pytest.mark.parametrize("files", [{"there": b"x"}, {"there/x": b""}, {"a": b"", "a/b": b""}])
def test_what_is_there_is_not_written_to(folder: Path, files: dict[str, bytes]) -> None:
    (folder / "there").write_bytes(b"kept")
    answer, _ = carry_out(files)

    assert answer > ADDRESS
    assert (folder / "there").read_bytes() == b"kept"


def test_as_many_and_as_long_names_as_a_job_may_have_fit() -> None:
    names = ["/".join(f"{number}-{depth}".ljust(255, "x") for depth in range(16)) for number in range(100)]

    assert len(placed(dict.fromkeys(names, b""), 3, 4)) < JOB_BYTES


def test_more_is_refused_with_the_limit() -> None:
    names = ["/".join(f"{number}-{depth}".ljust(255, "x") for depth in range(16)) for number in range(1000)]
    with pytest.raises(OSError, match=f"the names of the files take .* bytes, and {JOB_BYTES} is the limit"):
        placed(dict.fromkeys(names, b""), 3, 4)
