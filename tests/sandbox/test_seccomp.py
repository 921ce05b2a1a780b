"""The filter for system calls, asked about every call by an interpreter of BPF, and compared with libseccomp's own."""

from __future__ import annotations

import contextlib
import itertools
import struct
import tempfile
from collections.abc import Iterable
from functools import cache
from typing import Any

import pyseccomp
import pytest

from sandbox.seccomp import (
    AF_INET,
    AF_INET6,
    AF_UNIX,
    ALLOW,
    ALLOWED,
    EAFNOSUPPORT,
    ENOSYS,
    EPERM,
    ERRNO,
    KILL,
    REFUSED,
    REFUSED_CLONE,
    TIOCLINUX,
    TIOCSTI,
    bpf,
    number_of,
)  # fmt: skip

HERE = pyseccomp.system_arch()
I386, X32 = 0x40000003, 0x40000000
HALVES = (0, 1, 2, 3, 9, 10, 11, 16, 40, TIOCSTI, TIOCLINUX, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
MOST_INSTRUCTIONS = 150


def answer(program: bytes, number: int, arguments: Iterable[int] = (), architecture: int = HERE) -> int:
    """What the kernel would be told."""
    data = struct.pack("<IIQ6Q", number, architecture, 0, *[*arguments, 0, 0, 0, 0, 0, 0][:6])
    lines = list(struct.iter_unpack("<HBBI", program))
    place = loaded = 0
    while True:
        code, yes, no, value = lines[place]
        place += 1
        match code:
            case 0x20:
                loaded = struct.unpack_from("<I", data, value)[0]
            case 0x06:
                return int(value)
            case 0x05:
                place += value
            case 0x54:
                loaded &= value
            case 0x15:
                place += yes if loaded == value else no
            case 0x25:
                place += yes if loaded > value else no
            case 0x35:
                place += yes if loaded >= value else no
            case 0x45:
                place += yes if loaded & value else no
            case _:
                raise AssertionError(f"no instruction that is known: {code:#x}")


@cache
def librarys() -> list[bytes]:
    """The same policy by libseccomp, as two filters of which the stricter counts: by argument, and by name."""
    by_argument = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    for flag in (1 << bit for bit in range(32) if REFUSED_CLONE >> bit & 1):
        by_argument.add_rule(pyseccomp.ERRNO(EPERM), "clone", pyseccomp.Arg(0, pyseccomp.MASKED_EQ, flag, flag))
    for command in (TIOCSTI, TIOCLINUX):
        by_argument.add_rule(
            pyseccomp.ERRNO(EPERM), "ioctl", pyseccomp.Arg(1, pyseccomp.MASKED_EQ, 0xFFFFFFFF, command)
        )
    other = pyseccomp.Arg(0, pyseccomp.NE, 0), pyseccomp.Arg(2, pyseccomp.NE, 0)
    by_argument.add_rule(pyseccomp.ERRNO(EPERM), "prlimit64", *other)
    for call, families in (("socket", (AF_UNIX, AF_INET, AF_INET6)), ("socketpair", (AF_UNIX,))):
        for family in range(max(families)):
            if family not in families:
                by_argument.add_rule(pyseccomp.ERRNO(EAFNOSUPPORT), call, pyseccomp.Arg(0, pyseccomp.EQ, family))
        by_argument.add_rule(pyseccomp.ERRNO(EAFNOSUPPORT), call, pyseccomp.Arg(0, pyseccomp.GT, max(families)))
    by_name = pyseccomp.SyscallFilter(pyseccomp.ERRNO(ENOSYS))
    conditional = "clone ioctl prlimit64 socket socketpair"
    for action, names in (
        (pyseccomp.ALLOW, " ".join([*ALLOWED.values(), conditional])),
        (pyseccomp.ERRNO(EPERM), REFUSED),
    ):
        for name in names.split():
            with contextlib.suppress(OSError):
                by_name.add_rule(action, name)
    return [exported(by_argument), exported(by_name)]


def exported(policy: Any) -> bytes:
    with tempfile.TemporaryFile() as file:
        policy.export_bpf(file)
        file.seek(0)
        return file.read()


def expected(number: int, arguments: Iterable[int] = ()) -> int:
    """The by-name filter's refusal counts first: for a call with conditions it never refuses."""
    answers = [answer(one, number, arguments) for one in librarys()]
    return next((one for one in answers if one != ALLOW), ALLOW)


def test_every_call_is_treated_as_by_libseccomp() -> None:
    program = bpf()

    assert [answer(program, number) for number in range(1200)] == [expected(number) for number in range(1200)]
    assert len(program) // 8 <= MOST_INSTRUCTIONS


@pytest.mark.parametrize("name", ["clone", "ioctl", "prlimit64", "socket", "socketpair"])
def test_conditions_are_about_the_same_arguments(name: str) -> None:
    program, number = bpf(), number_of(name)
    flags = [1 << bit for bit in range(32)]
    for arguments in itertools.product((*HALVES, *flags), HALVES, HALVES):
        assert answer(program, number, arguments) == expected(number, arguments), arguments


def test_of_arguments_with_32_bits_the_rest_does_not_count_and_of_others_it_does() -> None:
    """The kernel looks at no more of them, so a filter that did could be led past them."""
    program, high = bpf(), 1 << 32
    assert answer(program, number_of("clone"), [high | REFUSED_CLONE]) == ERRNO | EPERM
    assert answer(program, number_of("ioctl"), [0, high | TIOCSTI]) == ERRNO | EPERM
    assert answer(program, number_of("socket"), [high | 16]) == ERRNO | EAFNOSUPPORT
    assert answer(program, number_of("socketpair"), [high | AF_INET]) == ERRNO | EAFNOSUPPORT
    assert answer(program, number_of("prlimit64"), [high, 0, 1]) == ALLOW
    assert answer(program, number_of("prlimit64"), [1, 0, high]) == ERRNO | EPERM


def test_calls_of_another_architecture_end_the_program_and_those_of_x32_do_not_exist() -> None:
    program = bpf()

    assert answer(program, 1, architecture=I386) == KILL
    assert answer(program, X32 | 1) == ERRNO | ENOSYS
    assert answer(program, 0xFFFFFFFF) == ERRNO | ENOSYS
