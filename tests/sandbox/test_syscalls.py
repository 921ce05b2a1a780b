"""System calls made by machine code: the code itself is run, on the machine that the tests run on."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sandbox.child import fork_python
from sandbox.syscalls import (
    ADDRESS,
    CODE,
    CODE_AT,
    END,
    FORK,
    HEADER,
    PART,
    REQUEST_AT,
    STEP,
    VALUE,
    Hole,
    Image,
    Step,
    code,
    failed_step,
)

ROOT = Path(__file__).parent.parent.parent
Performs = Callable[..., int]
Lists = dict[str, list[Step]]


@pytest.fixture
def perform() -> Iterator[Performs]:
    """Carries out a program as a fork server does, in this process."""
    make = fork_python.maker(CODE_AT, PART, code(platform.machine()))
    fork_python.part(REQUEST_AT, PART)
    fork = ctypes.cast(ctypes.PyDLL(None).fork, ctypes.c_void_p).value

    def performed(image: Image) -> int:
        fork_python.memory(REQUEST_AT, PART)[: len(image.bytes)] = image.bytes
        return int(make(REQUEST_AT, fork))

    yield performed
    for part in (CODE_AT, REQUEST_AT):
        ctypes.CDLL(None).munmap(ctypes.c_void_p(part), ctypes.c_size_t(PART))


def finished(image: Image, **lists: list[Step]) -> Image:
    image.finish({**lists, "end": [Step(END)]}, inner="end")
    return image


def test_calls_are_made_in_order_with_numbers_and_data(perform: Performs) -> None:
    read_end, write_end = os.pipe()
    image = Image(REQUEST_AT)
    first = [Step("write", (write_end, image.put(b"ab"), 2)), Step("dup3", (write_end, write_end + 1000, 0))]
    second = [Step("write", (write_end + 1000, image.put(b"cdef"), 3)), Step("close", (write_end + 1000,))]

    assert perform(finished(image, first=first, second=second)) == 0
    assert os.read(read_end, 100) == b"abcde"
    os.close(read_end)
    os.close(write_end)


def test_a_result_becomes_an_argument_or_data(perform: Performs) -> None:
    read_end, write_end = os.pipe()
    image = Image(REQUEST_AT)
    cell, copy = image.put(bytes(8)), Hole()
    first = [
        Step("dup", (write_end,), copy),
        Step("close", (copy,)),
        Step("getpid", (), cell),
        Step("write", (write_end, cell, 8)),
    ]
    number = os.dup(write_end)  # the lowest that is free
    os.close(number)

    assert perform(finished(image, first=first)) == 0
    assert int.from_bytes(os.read(read_end, 8), "little") == os.getpid()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)
    os.close(read_end)
    os.close(write_end)


@pytest.mark.parametrize(("value", "expected"), [(0, b"zero"), (1, b"more"), (-errno.EAGAIN, b"less")])
def test_it_goes_on_as_a_result_says(perform: Performs, value: int, expected: bytes) -> None:
    read_end, write_end = os.pipe()
    image = Image(REQUEST_AT)

    def say(text: bytes) -> list[Step]:
        return [Step("write", (write_end, image.put(text), 4)), Step(VALUE, (image.put_number(0),), zero="end")]

    first = [Step(VALUE, (image.put_number(value),), zero="zero", negative="less"), *say(b"more")]

    assert perform(finished(image, first=first, zero=say(b"zero"), less=say(b"less"))) == 0
    assert os.read(read_end, 100) == expected
    os.close(read_end)
    os.close(write_end)


def test_an_error_that_is_gone_on_with_is_kept_with_its_place(perform: Performs) -> None:
    image = Image(REQUEST_AT)
    cell = image.put(bytes(16))
    finished(image, first=[Step("close", (-1,), cell, negative="end", what="close nothing")])

    assert perform(image) == 0
    error, address = fork_python.memory(cell, 16).cast("q")
    assert image.failure(address, -error) == f"close nothing: {os.strerror(errno.EBADF)}"


def test_the_first_call_that_fails_is_the_last_and_is_named(perform: Performs, tmp_path: Path) -> None:
    there, missing, never = tmp_path / "there", tmp_path / "missing" / "x", tmp_path / "never"
    image = Image(REQUEST_AT)
    first = [
        Step("mkdirat", (-100, image.put(bytes(there)), 0o700)),
        Step("mkdirat", (-100, image.put(bytes(missing)), 0o700), what="make a folder"),
        Step("mkdirat", (-100, image.put(bytes(never)), 0o700)),
    ]
    answer = perform(finished(image, first=first))

    assert image.failure(*failed_step(answer)) == f"make a folder: {os.strerror(errno.ENOENT)}"
    assert there.is_dir()
    assert not never.exists()


def test_a_fork_goes_on_on_both_sides(perform: Performs) -> None:
    read_end, write_end = os.pipe()
    image = Image(REQUEST_AT)
    pid, status, zero = Hole(), image.put(bytes(8)), image.put_number(0)
    first = [
        Step(FORK, (), pid, zero="child"),
        Step("wait4", (pid, status, 0, 0)),
        Step("write", (write_end, status + 1, 1)),
        Step(VALUE, (zero,), zero="end"),
    ]

    assert perform(finished(image, first=first, child=[Step("exit_group", (7,))])) == 0
    assert os.read(read_end, 100) == b"\7"
    os.close(read_end)
    os.close(write_end)


def test_an_interpreter_finds_what_is_for_it() -> None:
    image = Image(REQUEST_AT)
    image.finish({"first": [Step("getpid")], "inner": [Step(END, (7,))]}, inner="inner", extra=b"argv")
    inner, place, length = HEADER.unpack_from(image.bytes, STEP.size)

    assert image.bytes[inner:].startswith(STEP.pack(-1, 7, *[0] * 5, STEP.size, 0))
    assert image.bytes[place : place + length] == b"argv"


def test_a_program_that_does_not_fit_is_refused() -> None:
    with pytest.raises(OSError, match=r"has 7\d{4} bytes, and 65536 is the limit"):
        finished(Image(REQUEST_AT), first=[Step("getpid")], extra=[Step("getpid") for _ in range(1100)])


@pytest.mark.parametrize("machine", CODE)
def test_the_code_is_what_its_words_say(machine: str, tmp_path: Path) -> None:
    """Where an assembler for the machine is installed."""
    assembler = "as" if machine == platform.machine() else f"{machine}-linux-gnu-as"
    if shutil.which(assembler) is None:
        pytest.skip(f"{assembler} is not installed")
    lines = [line.partition("#")[0].partition("//")[0] for line in CODE[machine].strip().splitlines()]
    words = [line if line.strip().endswith(":") else line.strip().partition(" ")[2] for line in lines]
    source, built, raw = (tmp_path / f"code{end}" for end in (".s", ".o", ".bin"))
    dialect = ".intel_syntax noprefix\n" if machine == "x86_64" else ""
    source.write_text(dialect + "\n".join(words) + "\n")
    subprocess.run([assembler, source, "-o", built], check=True)
    subprocess.run([assembler.replace("as", "objcopy"), "-O", "binary", "-j", ".text", built, raw], check=True)

    assert raw.read_bytes().startswith(code(machine))  # what comes after it fills up


def test_a_machine_that_it_does_not_know_is_named() -> None:
    with pytest.raises(OSError, match="system calls cannot be made for vax, only for x86_64 and aarch64"):
        code("vax")


def test_the_address_is_below_all_that_machines_with_few_address_bits_have() -> None:
    assert ADDRESS + 3 * PART < 1 << 38


def test_memory_in_a_file_is_as_it_was_and_to_write_to() -> None:
    """In a process of its own: all that python has there, itself with it."""
    program = """
import ctypes, os, platform, sys
from sandbox.child import fork_python
from sandbox.snapshot import FILE, snapshot
from sandbox.syscalls import CODE_AT, PART, REQUEST_AT, code

make = fork_python.maker(CODE_AT, PART, code(platform.machine()))
fork_python.part(REQUEST_AT, PART)
known = {number: str(number) for number in range(100_000)}
image = snapshot(open("/proc/self/maps").read())
fork_python.memory(REQUEST_AT, PART)[:len(image)] = image
assert make(REQUEST_AT, None) == 0
maps = open("/proc/self/maps").read()
assert [line for line in maps.splitlines() if "/memfd:warm" in line and " rw-p " in line]
assert all(known[number] == str(number) for number in range(100_000))
before = len(known)
known.update({number: "new" for number in range(100_000, 300_000)})
if not (pid := os.fork()):
    known.clear()
    os._exit(len(known))
assert os.waitpid(pid, 0)[1] == 0
assert len(known) == 300_000 and not os.path.exists(f"/proc/self/fd/{FILE}")
print("well")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)

    assert (done.stdout, done.returncode) == ("well\n", 0), done.stderr


def test_nobody_can_write_to_the_file_that_memory_is_in() -> None:
    program = """
import ctypes, os, platform
from sandbox.child import fork_python
from sandbox.snapshot import snapshot
from sandbox.syscalls import CODE_AT, PART, REQUEST_AT, code

make = fork_python.maker(CODE_AT, PART, code(platform.machine()))
fork_python.part(REQUEST_AT, PART)
image = snapshot(open("/proc/self/maps").read())
fork_python.memory(REQUEST_AT, PART)[:len(image)] = image
assert make(REQUEST_AT, None) == 0
line = next(line for line in open("/proc/self/maps") if "/memfd:warm" in line)
place = "-".join(f"{int(one, 16):x}" for one in line.split()[0].split("-"))
try:
    file = os.open(f"/proc/self/map_files/{place}", os.O_RDWR)  # not everybody may do even that
    os.write(file, b"x")
except PermissionError:
    print("sealed")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)

    assert (done.stdout, done.returncode) == ("sealed\n", 0), done.stderr
