"""Lists of system calls that a forked interpreter makes in one go, with some seventy bytes of machine code.

An interpreter that made them one by one would touch much more: each word of the code that makes them lies on a page
that is first copied, because the fork server has the same.

A request to a fork server is an image of such lists, made by the server and received where it will be used, at an
address that both know. It begins with 32-bit numbers: the places of four lists, where bytes that are waited for will
be, the length and place of what else there is, and the number of patches. Each patch has the place for a descriptor's
number, and which one of the request's it is. Places of lists and patches count such numbers from the image's start,
the others bytes.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass

from sandbox.seccomp import number_of

X86_64 = """
    53              push rbx
    4154            push r12
    4889fb          mov rbx, rdi            # the list
    4989fc          mov r12, rdi
    488b03          mov rax, [rbx]          # next: the call's number
    4885c0          test rax, rax
    7830            js done
    488b7b08        mov rdi, [rbx + 8]
    488b7310        mov rsi, [rbx + 16]
    488b5318        mov rdx, [rbx + 24]
    4c8b5320        mov r10, [rbx + 32]
    4c8b4328        mov r8, [rbx + 40]
    0f05            syscall
    4885c0          test rax, rax
    7806            js failed
    4883c340        add rbx, 64
    ebd7            jmp next
    4c29e3          sub rbx, r12            # failed: its place times 4096, and the error's number
    48c1e306        shl rbx, 6
    4829c3          sub rbx, rax
    4889d8          mov rax, rbx
    eb02            jmp out
    31c0            xor eax, eax            # done
    415c            pop r12                 # out
    5b              pop rbx
    c3              ret
"""
AARCH64 = """
    e90300aa        mov x9, x0              // the list
    ea0300aa        mov x10, x0
    280140f9        ldr x8, [x9]            // next: the call's number
    8801f8b7        tbnz x8, 63, done
    208540a9        ldp x0, x1, [x9, 8]
    228d41a9        ldp x2, x3, [x9, 24]
    241540f9        ldr x4, [x9, 40]
    010000d4        svc 0
    6000f8b7        tbnz x0, 63, failed
    29010191        add x9, x9, 64
    f8ffff17        b next
    29010acb        sub x9, x9, x10         // failed: its place times 4096, and the error's number
    29e57ad3        lsl x9, x9, 6
    200100cb        sub x0, x9, x0
    c0035fd6        ret
    000080d2        mov x0, 0               // done
    c0035fd6        ret
"""
CODE = {"x86_64": X86_64, "aarch64": AARCH64}
"""By `uname -m`: a function that is given the address of a list; its answer is 0, or what `failure` reads."""

ADDRESS = 0x20_0000_0000
"""Where no interpreter has anything, on a machine with addresses of 39 bits either."""
PART = 0x10000
CODE_AT, SHARED_AT, REQUEST_AT = ADDRESS, ADDRESS + PART, ADDRESS + 2 * PART
"""Three parts, each with its own pages: the code, what all requests share, and a request."""
JOB_AT, JOB_BYTES = REQUEST_AT + PART // 2, PART // 2
"""Behind a request is room for a job that is not large."""

STEP = struct.Struct("<q5Q16x")
END = STEP.pack(-1, 0, 0, 0, 0, 0)
HEADER = struct.Struct("<8i")
PATCH = struct.Struct("<2i")
WORD = 4
ERRNO_BITS = 12


def code(machine: str) -> bytes:
    """The function for a machine, named as by `uname -m`. Raises OSError for one that is not known."""
    try:
        text = CODE[machine]
    except KeyError:
        raise OSError(f"system calls cannot be made for {machine}, only for {' and '.join(CODE)}") from None
    return bytes.fromhex("".join(line.split()[0] for line in text.strip().splitlines()))


@dataclass(frozen=True, slots=True)
class Descriptor:
    """An argument: whatever number the request's descriptor at this place will have."""

    place: int


@dataclass(frozen=True, slots=True)
class Room:
    """An argument: the address of so many zeros, for what is read. An image has one."""

    size: int


Argument = int | bytes | Descriptor | Room
LISTS = ("before", "child", "wait", "after")


class Step:
    """One system call."""

    def __init__(self, call: str, *arguments: Argument, what: str = "") -> None:
        """Bytes are passed by address, with a zero behind them. `what` is what an error will be about."""
        self.call = call
        self.arguments = arguments
        self.what = what or call


class Image:
    """A request, with the lists of steps that it asks for.

    They are for the fork server before a fork, for the child, for the child when it only has to wait, and for the fork
    server after the fork.
    """

    def __init__(
        self, before: Iterable[Step] = (), child: Iterable[Step] = (), wait: Iterable[Step] = (),
        after: Iterable[Step] = (), extra: bytes = b"",
    ) -> None:  # fmt: skip
        """`extra` is for the fork server itself. Raises OSError for a call that this machine does not have."""
        lists = [tuple(before), tuple(child), tuple(wait), tuple(after)]
        self._whats = {name: [step.what for step in steps] for name, steps in zip(LISTS, lists, strict=True)}
        room = 0
        count = sum(isinstance(one, Descriptor) for steps in lists for step in steps for one in step.arguments)
        start = HEADER.size + count * PATCH.size
        start += -start % STEP.size
        starts = []
        for steps in lists:
            starts.append(start)
            start += (len(steps) + 1) * STEP.size
        texts = bytearray()

        def value(argument: Argument) -> int:
            nonlocal room
            if isinstance(argument, Descriptor):
                return 0
            if isinstance(argument, int):
                return argument & 0xFFFF_FFFF_FFFF_FFFF
            texts.extend(bytes(-len(texts) % 8))
            place = start + len(texts)
            if isinstance(argument, Room):
                room = place
                texts.extend(bytes(argument.size))
            else:
                texts.extend(argument + b"\0")
            return REQUEST_AT + place

        packed, patches = b"", b""
        for steps in lists:
            for step in steps:
                values = [value(argument) for argument in step.arguments]
                for number, argument in enumerate(step.arguments, 1):
                    if isinstance(argument, Descriptor):
                        patches += PATCH.pack((starts[0] + len(packed)) // WORD + 2 * number, argument.place)
                packed += STEP.pack(number_of(step.call), *values, *[0] * (5 - len(values)))
            packed += END
        header = HEADER.pack(*(one // WORD for one in starts), room, len(extra), start + len(texts), count)
        self.bytes = (header + patches).ljust(starts[0], b"\0") + packed + texts + extra

    def failure(self, text: str) -> str:
        """What a fork server's report of a failure means: the name of a list and the code's answer."""
        name, _, answer = text.partition(" ")
        if name not in self._whats or not answer.isdecimal():
            return text
        number, error = divmod(int(answer), 1 << ERRNO_BITS)
        return f"{self._whats[name][number]}: {os.strerror(error)}"
