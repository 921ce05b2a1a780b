"""The world of a run, as the system calls that make it: namespaces, mounts, streams, limits, no rights, filters.

One description for both languages. The fork servers in the jails carry it out and know nothing of it.
"""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass

from sandbox.model import Limits
from sandbox.policy import INSIDE_UID, scratch
from sandbox.syscalls import JOB_AT, JOB_BYTES, SHARED_AT, Descriptor, Image, Room, Step

REPORT, JOB, STDIN, FIRST_GROUP = 0, 1, 2, 5
"""Places in a request's descriptors."""
STREAMS = 3
OWN_PIDS, NOWHERE = 0, 2
"""Places in the row of three that a fork server keeps for itself, from its `base` on: its pid namespace, the file of
first processes, /dev/null. All that come with a request are above. A child has its report and its job at the first two.
"""

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS = 0x00020000, 0x02000000, 0x04000000
CLONE_NEWIPC, CLONE_NEWPID, CLONE_NEWNET = 0x08000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 4, 22, 38
SECCOMP_MODE_FILTER, INSTRUCTION_BYTES = 2, 8
CAPABILITY_VERSION_3 = 0x20080522
RLIMIT_NOFILE = 7
LAST_DESCRIPTOR = 0xFFFFFFFF
GO_BYTES = 24
"""The size of a job in digits, and a zero."""
FILTER = struct.Struct("<H6xQ")
"""The kernel's struct sock_fprog."""


@dataclass(frozen=True, slots=True)
class Parent:
    """What a fork server has told of itself.

    `base` is where the descriptors are that it keeps, `inherited` are those that its libraries know, which lead nowhere
    in a child, and `generator` is where a random generator's state is, and its size: a child's is made anew.
    """

    base: int
    generator: tuple[int, int]
    inherited: tuple[int, ...]


def shared(filter: bytes) -> bytes:
    """What all requests share: the filter for system calls, behind a struct sock_fprog that tells of it."""
    return FILTER.pack(len(filter) // INSTRUCTION_BYTES, SHARED_AT + FILTER.size) + filter


@functools.lru_cache(maxsize=1024)
def request(parent: Parent, user: int, limits: Limits, groups: int, extra: bytes = b"") -> Image:
    """A request for a child that is a user of its own inside, and joins so many control groups."""
    base = parent.base
    mine = {Descriptor(place): base + place for place in (REPORT, JOB)}
    streams = {Descriptor(STDIN + number): number for number in range(STREAMS)}
    joined = [Descriptor(FIRST_GROUP + number) for number in range(groups)]
    scratch_options = f"{scratch(limits)},uid={user},gid={user}".encode()
    no_rights = struct.pack("<6I", 0, 0, 0, 0, 0, 0)
    child = [
        *(Step("dup3", theirs, number, 0) for theirs, number in mine.items()),
        Step("setpgid", 0, 1),  # a signal to its process group does not reach others
        *(Step("write", group, b"0", 1, what="join a control group") for group in joined),
        Step("unshare", CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWNET),
        _mount(b"proc", b"/proc", MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC),
        *(_mount(b"tmpfs", place, MS_NOSUID | MS_NODEV, scratch_options) for place in (b"/tmp", b"/work", b"/dev/shm")),
        Step("chdir", b"/work"),
        *(Step("dup3", theirs, number, 0) for theirs, number in streams.items()),
        *(Step("dup3", base + NOWHERE, number, 0) for number in parent.inherited),
        *(Step("close", number) for number in range(STREAMS, base) if number not in parent.inherited),
        Step("close_range", base + NOWHERE, LAST_DESCRIPTOR, 0),
        Step("prlimit64", 0, RLIMIT_NOFILE, struct.pack("<2Q", limits.open_files, limits.open_files), 0),
        Step("capset", struct.pack("<2I", CAPABILITY_VERSION_3, 0), no_rights),
        Step("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        Step("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, SHARED_AT),
        Step("prctl", PR_SET_DUMPABLE, 1, 0, 0, 0),
        Step("getrandom", *parent.generator, 0),
    ]
    wait = [
        Step("write", base + REPORT, b"ready", 5),
        Step("read", base + REPORT, Room(GO_BYTES), GO_BYTES - 1),
        Step("pread64", base + JOB, JOB_AT, JOB_BYTES, 0),
    ]
    # The new pid namespace is for the next children only.
    before = [Step("unshare", CLONE_NEWPID, what="make a pid namespace"), *_become(user)]
    closed = [*mine, *streams, *joined]
    after = [
        *_become(INSIDE_UID),
        Step("setns", base + OWN_PIDS, CLONE_NEWPID),
        *(Step("close", one) for one in closed if one.place != REPORT),
    ]
    return Image(before, child, wait, after, extra)


def _mount(kind: bytes, place: bytes, flags: int, options: bytes | None = None) -> Step:
    return Step("mount", kind, place, kind, flags, options or 0, what=f"mount {place.decode()}")


def _become(user: int) -> list[Step]:
    """Takes another user's place; the rights stay."""
    return [Step("setresgid", user, user, user), Step("setresuid", user, user, user)]
