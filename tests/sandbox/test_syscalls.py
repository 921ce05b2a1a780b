"""System calls made by machine code: the code itself is run, on the machine that the tests run on."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sandbox.child import fork_python
from sandbox.syscalls import ADDRESS, CODE, CODE_AT, PART, REQUEST_AT, Descriptor, Image, Step, code

Performs = Callable[..., int]


@pytest.fixture
def perform() -> Iterator[Performs]:
    """Performs a list of an image as a fork server does, in this process."""
    make = fork_python.maker(CODE_AT, PART, code(platform.machine()))
    memory = fork_python.part(REQUEST_AT, PART)

    def performed(image: Image, place: int, *descriptors: int) -> int:
        memory[: len(image.bytes)] = image.bytes
        header = fork_python.patched(memory.cast("i"), list(descriptors))
        return int(make(REQUEST_AT + 4 * header[place]))

    yield performed
    for part in (CODE_AT, REQUEST_AT):
        ctypes.CDLL(None).munmap(ctypes.c_void_p(part), ctypes.c_size_t(PART))


def test_calls_are_made_in_order_with_numbers_texts_and_descriptors(perform: Performs) -> None:
    read_end, write_end = os.pipe()
    steps = [
        Step("write", Descriptor(1), b"ab", 2),
        Step("dup3", Descriptor(1), write_end + 1000, 0),
        Step("write", write_end + 1000, b"cdef", 3),
        Step("close", write_end + 1000),
    ]
    image = Image(child=steps)

    assert perform(image, 1, 0, write_end) == 0
    assert perform(image, 0, 0, write_end) == perform(image, 2, 0, write_end) == 0  # there is nothing in them
    assert os.read(read_end, 100) == b"abcde"
    os.close(read_end)
    os.close(write_end)


def test_the_first_call_that_fails_is_the_last_and_is_named(perform: Performs, tmp_path: Path) -> None:
    there, missing, never = tmp_path / "there", tmp_path / "missing" / "x", tmp_path / "never"
    steps = [
        Step("mkdirat", -100, bytes(there), 0o700),
        Step("mkdirat", -100, bytes(missing), 0o700, what="make a folder"),
        Step("mkdirat", -100, bytes(never), 0o700),
    ]
    image = Image(before=steps)
    answer = perform(image, 0)

    assert image.failure(f"before {answer}") == f"make a folder: {os.strerror(errno.ENOENT)}"
    assert there.is_dir()
    assert not never.exists()


def test_a_failure_in_other_words_is_left_as_it_is() -> None:
    assert Image().failure("fork: no") == "fork: no"
    assert Image().failure("before it began") == "before it began"


def test_what_else_an_image_has_is_found() -> None:
    content = Image([Step("write", Descriptor(0), b"x", 1)], extra=b"argv").bytes
    *_, length, start, patches = memoryview(content)[:32].cast("i")

    assert content[start : start + length] == b"argv"
    assert patches == 1


@pytest.mark.parametrize("machine", CODE)
def test_the_code_is_what_its_words_say(machine: str, tmp_path: Path) -> None:
    """Where an assembler for the machine is installed; jumps, whose targets have no name in the table, are left out."""
    assembler = "as" if machine == platform.machine() else f"{machine}-linux-gnu-as"
    if shutil.which(assembler) is None:
        pytest.skip(f"{assembler} is not installed")
    lines = [line.strip() for line in CODE[machine].strip().splitlines()]
    for number, line in enumerate(lines):
        hexadecimal, _, words = line.partition(" ")
        instruction = words.partition("#")[0].partition("//")[0].strip()
        if instruction.startswith(("j", "b ", "tbnz")):
            continue
        dialect = ".intel_syntax noprefix\n" if machine == "x86_64" else ""
        source, built, raw = (tmp_path / f"{number}{end}" for end in (".s", ".o", ".bin"))
        source.write_text(f"{dialect}{instruction}\n")
        subprocess.run([assembler, source, "-o", built], check=True)
        subprocess.run([assembler.replace("as", "objcopy"), "-O", "binary", "-j", ".text", built, raw], check=True)
        assert raw.read_bytes().hex() == hexadecimal, line


def test_a_machine_that_it_does_not_know_is_named() -> None:
    with pytest.raises(OSError, match="system calls cannot be made for vax, only for x86_64 and aarch64"):
        code("vax")


def test_the_address_is_below_all_that_machines_with_few_address_bits_have() -> None:
    assert ADDRESS + 3 * PART < 1 << 38
