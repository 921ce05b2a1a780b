"""The first process of a run's pid namespace: a program of some hundred bytes that adopts orphans, and nothing else.

The kernel wants a first process; forked from an interpreter, it would copy as many pages as the program that it is for.
This one ignores SIGCHLD (so that the kernel reaps what it adopts) and sleeps for ever. It has no descriptors and reads
nothing, so there is nothing in it that a program could attack.
"""

from __future__ import annotations

import struct

X86_64 = """
    b80d000000      mov eax, 13             # rt_sigaction
    bf11000000      mov edi, 17             # SIGCHLD
    488d3513000000  lea rsi, [rip + ignore]
    31d2            xor edx, edx
    41ba08000000    mov r10d, 8
    0f05            syscall
    b822000000      mov eax, 34             # pause
    0f05            syscall
    ebf7            jmp -9
"""
AARCH64 = """
    c81080d2        mov x8, 134             # rt_sigaction
    200280d2        mov x0, 17              # SIGCHLD
    61010010        adr x1, ignore
    020080d2        mov x2, 0
    030180d2        mov x3, 8
    010000d4        svc 0
    000080d2        mov x0, 0
    010080d2        mov x1, 0
    020080d2        mov x2, 0
    030080d2        mov x3, 0
    280980d2        mov x8, 73              # ppoll
    010000d4        svc 0
    faffff17        b -24
"""
SIG_IGN = 1
IGNORE = struct.pack("<4Q", SIG_IGN, 0, 0, 0)
"""The kernel's struct sigaction."""
CODE = {"x86_64": (62, X86_64), "aarch64": (183, AARCH64)}
"""By `uname -m`: the processor's number in an ELF header, and instructions as hexadecimal and in words."""

ELF_HEADER = struct.Struct("<4sBBBBQHHIQQQIHHHHHH")
PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")
EXECUTABLE, LOADED, READ_AND_EXECUTE = 2, 1, 5
ADDRESS, PAGE = 0x400000, 0x10000


def executable(machine: str) -> bytes:
    """The program as an ELF file for a machine, named as by `uname -m`. Raises OSError for one that is not known."""
    try:
        number, text = CODE[machine]
    except KeyError:
        raise OSError(f"there is no first process for {machine}, only for {' and '.join(CODE)}") from None
    code = bytes.fromhex("".join(line.split()[0] for line in text.strip().splitlines())) + IGNORE
    start = ELF_HEADER.size + PROGRAM_HEADER.size
    size = start + len(code)
    header = ELF_HEADER.pack(
        b"\x7fELF", 2, 1, 1, 0, 0, EXECUTABLE, number, 1, ADDRESS + start, ELF_HEADER.size, 0, 0,
        ELF_HEADER.size, PROGRAM_HEADER.size, 1, 0, 0, 0,
    )  # fmt: skip
    return header + PROGRAM_HEADER.pack(LOADED, READ_AND_EXECUTE, 0, ADDRESS, ADDRESS, size, size, PAGE) + code
