"""Programs of system calls, which a fork server or its child carries out with some hundred bytes of machine code.

An interpreter that made the calls one by one would touch much more: each word of the code that makes them lies on a
page that is copied after a fork. And an interpreter that runs between two forks is not the same at the second.

A program is an image, made by the server and received where it will be used, at an address that both know. It begins
with a step that leads to the others, and a header for the interpreter. Each step has 64 bytes: the call's number, five
arguments, where the result is put, and how far to go from there if the result is zero and if it is negative.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sandbox.seccomp import number_of

X86_64 = """
    53              push rbx
    4154            push r12
    4883ec08        sub rsp, 8              # a function finds the stack aligned
    4889fb          mov rbx, rdi            # the step
    4989f4          mov r12, rsi            # what forks
    next:
    488b03          mov rax, [rbx]
    488b7b08        mov rdi, [rbx + 8]
    488b7310        mov rsi, [rbx + 16]
    488b5318        mov rdx, [rbx + 24]
    4c8b5320        mov r10, [rbx + 32]
    4c8b4328        mov r8, [rbx + 40]
    4531c9          xor r9d, r9d
    4885c0          test rax, rax
    7832            js special
    0f05            syscall
    made:
    488b4b30        mov rcx, [rbx + 48]     # for the result
    e303            jrcxz kept
    488901          mov [rcx], rax
    kept:
    4885c0          test rax, rax
    780e            js negative
    7406            je zero
    4883c340        add rbx, 64
    ebc9            jmp next
    zero:
    48635338        movsxd rdx, dword ptr [rbx + 56]
    eb0f            jmp leap
    negative:
    4863533c        movsxd rdx, dword ptr [rbx + 60]
    4885d2          test rdx, rdx
    741f            je failed
    e304            jrcxz leap
    48895908        mov [rcx + 8], rbx      # which step it was
    leap:
    4801d3          add rbx, rdx
    ebaf            jmp next
    special:
    4883f8fe        cmp rax, -2
    7409            je value
    7f18            jg end
    41ffd4          call r12
    4898            cdqe
    ebc1            jmp made
    value:
    488b07          mov rax, [rdi]
    ebbc            jmp made
    failed:
    48c1e30c        shl rbx, 12             # its address times 4096, and the error's number
    4829c3          sub rbx, rax
    4889d8          mov rax, rbx
    eb03            jmp out
    end:
    4889f8          mov rax, rdi
    out:
    4883c408        add rsp, 8
    415c            pop r12
    5b              pop rbx
    c3              ret
"""
AARCH64 = """
    f353bea9        stp x19, x20, [sp, -32]!
    fe0b00f9        str x30, [sp, 16]
    f30300aa        mov x19, x0             // the step
    f40301aa        mov x20, x1             // what forks
    next:
    680240f9        ldr x8, [x19]
    608640a9        ldp x0, x1, [x19, 8]
    628e41a9        ldp x2, x3, [x19, 24]
    641640f9        ldr x4, [x19, 40]
    050080d2        mov x5, 0
    2802f8b7        tbnz x8, 63, special
    010000d4        svc 0
    made:
    691a40f9        ldr x9, [x19, 48]       // for the result
    490000b4        cbz x9, kept
    200100f9        str x0, [x9]
    kept:
    c000f8b7        tbnz x0, 63, negative
    600000b4        cbz x0, zero
    73020191        add x19, x19, 64
    f3ffff17        b next
    zero:
    6a3a80b9        ldrsw x10, [x19, 56]
    05000014        b leap
    negative:
    6a3e80b9        ldrsw x10, [x19, 60]
    aa0100b4        cbz x10, failed
    490000b4        cbz x9, leap
    330500f9        str x19, [x9, 8]        // which step it was
    leap:
    73020a8b        add x19, x19, x10
    ebffff17        b next
    special:
    08090091        add x8, x8, 2
    a80000b4        cbz x8, value
    0801f8b6        tbz x8, 63, out
    80023fd6        blr x20
    007c4093        sxtw x0, w0
    ecffff17        b made
    value:
    000040f9        ldr x0, [x0]
    eaffff17        b made
    failed:
    73ce74d3        lsl x19, x19, 12        // its address times 4096, and the error's number
    600200cb        sub x0, x19, x0
    out:
    fe0b40f9        ldr x30, [sp, 16]
    f353c2a8        ldp x19, x20, [sp], 32
    c0035fd6        ret
"""
CODE = {"x86_64": X86_64, "aarch64": AARCH64}
"""By `uname -m`: a function that is given the address of a step and of a function that forks. Its answer is that
of an end, or what `failed_step` reads."""

ADDRESS = 0x20_0000_0000
"""Where no interpreter has anything, on a machine with addresses of 39 bits either."""
PART = 0x10000
CODE_AT, SHARED_AT, REQUEST_AT, JOB_AT = (ADDRESS + number * PART for number in range(4))
"""The code, what all requests share, a request, and a job, each with its own pages."""
JOB_BYTES = 1 << 25
"""More than the names of all files that a job may have; what is not used costs nothing."""

STEP = struct.Struct("<q6Q2i")
MOST_ARGUMENTS = 5
HEADER = struct.Struct("<3i52x")
"""Places in the image, in bytes: a list for the interpreter, and what else there is for it; and the length of that."""
DATA_AT = STEP.size + HEADER.size
"""In an image."""
END, VALUE, FORK = "end", "value", "fork the interpreter"
"""No calls: returns the first argument to the interpreter; reads the number that is at the first argument; forks."""
OWN = {END: -1, VALUE: -2, FORK: -3}
WORD = 8
ERRNO_BITS = 12


def code(machine: str) -> bytes:
    """The function for a machine, named as by `uname -m`. Raises OSError for one that is not known."""
    try:
        text = CODE[machine]
    except KeyError:
        raise OSError(f"system calls cannot be made for {machine}, only for {' and '.join(CODE)}") from None
    lines = [line.split() for line in text.strip().splitlines()]
    return bytes.fromhex("".join(hexadecimal for hexadecimal, *words in lines if words))


@dataclass(frozen=True, slots=True, eq=False)
class Hole:
    """An argument that the result of another step becomes; till then it is `value`."""

    value: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One system call.

    `into` is where its result goes: an argument of another step, or an address. If the program goes on after a negative
    one, the step's own address follows it there. `zero` and `negative` are the lists to go on with after such a result;
    else zero is like any other, and a negative one ends the program. `what` is what an error will be about.
    """

    call: str
    arguments: tuple[int | Hole, ...] = ()
    into: Hole | int = 0
    zero: str = ""
    negative: str = ""
    what: str = ""


class Image:
    """A program for an address. Data come first; then the lists, each of which goes on with the next."""

    def __init__(self, address: int, **known: int) -> None:
        """`known` are addresses of other programs, which steps may go on with."""
        self.bytes = b""
        self._address = address
        self._known = known
        self._data = bytearray(DATA_AT)
        self._steps: dict[int, Step] = {}

    def put(self, content: bytes) -> int:
        """The address that data will have; a zero follows."""
        self._data.extend(bytes(-len(self._data) % WORD))
        place = len(self._data)
        self._data.extend(content + b"\0")
        return self._address + place

    def put_number(self, number: int) -> int:
        """The address that a number of 64 bits will have."""
        return self.put(struct.pack("<q", number))

    def finish(self, lists: Mapping[str, Sequence[Step]], inner: str, extra: bytes = b"") -> None:
        """Begins with the first of the lists. `inner` is the one that the interpreter has carried out at another time,
        and `extra` is for itself. Raises OSError for a call that this machine does not have, or for too many.
        """
        zero = self.put_number(0)
        self._data.extend(bytes(-len(self._data) % STEP.size))
        address = self._address + len(self._data)
        starts, holes = dict(self._known), dict[Hole, int]()
        for name, steps in lists.items():
            starts[name] = address
            for step in steps:
                self._steps[address] = step
                places = range(address + WORD, address + STEP.size, WORD)
                holes |= {
                    one: place for one, place in zip(step.arguments, places, strict=False) if isinstance(one, Hole)
                }
                address += STEP.size
        first = Step(VALUE, (zero,), zero=next(iter(lists)))
        packed = [_packed(step, place, starts, holes) for place, step in [(self._address, first), *self._steps.items()]]
        header = HEADER.pack(starts[inner] - self._address, address - self._address, len(extra))
        self.bytes = b"".join([packed[0], header, self._data[DATA_AT:], *packed[1:], extra])
        if len(self.bytes) > PART:
            raise OSError(f"a program of system calls has {len(self.bytes)} bytes, and {PART} is the limit")

    def failure(self, address: int, error: int) -> str:
        """What a step's error means."""
        step = self._steps.get(address)
        return f"{f'{address:#x}' if step is None else step.what or step.call}: {os.strerror(error)}"


def failed_step(answer: int) -> tuple[int, int]:
    """What the code's answer means: a step's address, and an error."""
    return divmod(answer, 1 << ERRNO_BITS)


def pack(call: str, arguments: Sequence[int], into: int = 0, zero: int = STEP.size, negative: int = 0) -> bytes:
    """A step as the code reads it; the last two say how far to go from it."""
    number = OWN[call] if call in OWN else number_of(call)
    values = [argument & 0xFFFF_FFFF_FFFF_FFFF for argument in arguments]
    return STEP.pack(number, *values, *[0] * (MOST_ARGUMENTS - len(values)), into, zero, negative)


def _packed(step: Step, address: int, starts: Mapping[str, int], holes: Mapping[Hole, int]) -> bytes:
    arguments = [one.value if isinstance(one, Hole) else one for one in step.arguments]
    into = holes[step.into] if isinstance(step.into, Hole) else step.into
    zero = starts[step.zero] - address if step.zero else STEP.size
    negative = starts[step.negative] - address if step.negative else 0
    return pack(step.call, arguments, into, zero, negative)
