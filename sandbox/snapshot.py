"""Puts what a fork server has in memory into a file, as system calls that it makes on itself.

Linux copies with each fork the tables of all pages that a process has for itself, some thousands in a warm interpreter,
and takes them apart when the child ends. Of a file it copies only those that were used since: a child whose program
does little needs few of them, and asks for others when it comes to them. The file can be written no more, and each
process has the pages that it writes to itself for itself.
"""

from __future__ import annotations

from collections.abc import Iterator

from sandbox.syscalls import ADDRESS, END, REQUEST_AT, VALUE, WORD, Hole, Image, Step

STAGE_AT = ADDRESS + (1 << 32)
"""Where the file is mapped before its parts are put into place."""
FILE = 900
"""A descriptor that nothing has."""
PROT_READ, PROT_WRITE = 1, 2
MAP_PRIVATE, MAP_FIXED_NOREPLACE = 2, 0x100000
MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2
MFD_CLOEXEC, MFD_ALLOW_SEALING = 1, 2
F_DUPFD_CLOEXEC, F_ADD_SEALS, ALL_SEALS = 1030, 1033, 0xF


def snapshot(maps: str) -> bytes:
    """A program that does it, for a process whose /proc/self/maps says `maps`."""
    image = Image(REQUEST_AT)
    places = list(_writable(maps))
    total = sum(size for _, size in places)
    file, opened, closed = image.put(bytes(2 * WORD)), Hole(), Hole()
    lists = {
        "begin": [
            Step("memfd_create", (image.put(b"warm"), MFD_CLOEXEC | MFD_ALLOW_SEALING), file),
            Step(VALUE, (file,), opened),
            Step("fcntl", (opened, F_DUPFD_CLOEXEC, FILE)),
            Step(VALUE, (file,), closed),
            Step("close", (closed,)),
            Step("ftruncate", (FILE, total)),
            Step("mmap", (STAGE_AT, total, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED_NOREPLACE, FILE)),
        ]
    }
    place = 0
    for number, (start, size) in enumerate(places):
        lists[f"{number}"] = [
            Step("pwrite64", (FILE, start, size, place), negative=f"{number + 1}"),  # it has just been given back
            Step("mremap", (STAGE_AT + place, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, start)),
        ]
        place += size
    lists[f"{len(places)}"] = [
        Step("munmap", (STAGE_AT, total)),
        Step("fcntl", (FILE, F_ADD_SEALS, ALL_SEALS)),
        Step("close", (FILE,)),
        Step(END, (0,)),
    ]
    image.finish(lists, inner="begin")
    return image.bytes


def _writable(maps: str) -> Iterator[tuple[int, int]]:
    """The parts of memory that a process has for itself and may write to, as addresses and sizes.

    Not those that may be executed, not the stack, which grows by itself, and not what is used here.
    """
    for line in maps.splitlines():
        extent, rights, _, _, _, *name = line.split()
        start, end = (int(address, 16) for address in extent.split("-"))
        if rights == "rw-p" and name != ["[stack]"] and not ADDRESS <= start < STAGE_AT:
            yield start, end - start
