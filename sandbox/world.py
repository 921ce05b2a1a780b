"""The world of a run, as the system calls that make it: namespaces, mounts, streams, limits, no rights, filters.

One description for both languages. The fork servers in the jails carry it out and know nothing of it; what they do
between two requests is described here too.
"""

from __future__ import annotations

import functools
import signal
import struct
from dataclasses import dataclass
from errno import EAGAIN
from os import WNOHANG
from time import CLOCK_MONOTONIC

from sandbox.model import Limits
from sandbox.placing import PROGRAM_AT
from sandbox.policy import INSIDE_UID, scratch
from sandbox.syscalls import (
    DATA_AT,
    END,
    FORK,
    JOB_AT,
    JOB_BYTES,
    PART,
    REQUEST_AT,
    SHARED_AT,
    VALUE,
    WORD,
    Hole,
    Image,
    Step,
)

REPORT, JOB, STDIN, FIRST_GROUP = 0, 1, 2, 5
"""Places in a request's descriptors."""
STREAMS = 3
OWN_PIDS, INIT, NOWHERE, POLL, OWN = 0, 1, 2, 3, 4
"""Places among the descriptors that a fork server keeps for itself, from its `base` on, and how many those are: its pid
namespace, the file of first processes, /dev/null, and what it waits with. Those that come with a request are above, in
their order. A child has its report and its job at the first two.
"""
CONTROL = 0
"""A fork server's standard input is its socket to the server."""

CLONE_VM, CLONE_PIDFD, CLONE_VFORK = 0x00000100, 0x00001000, 0x00004000
CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS = 0x00020000, 0x02000000, 0x04000000
CLONE_NEWIPC, CLONE_NEWPID, CLONE_NEWNET = 0x08000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 4, 22, 38
SECCOMP_MODE_FILTER, INSTRUCTION_BYTES = 2, 8
SECCOMP_SET_MODE_FILTER, NEW_LISTENER, WAIT_KILLABLE = 1, 8, 32
"""With the last, whoever waits for an answer is interrupted only by its end: linux/seccomp.h, since Linux 5.19."""
CAPABILITY_VERSION_3, NO_RIGHTS_BYTES = 0x20080522, 24
RLIMIT_NOFILE = 7
LAST_DESCRIPTOR = 0xFFFFFFFF
F_GETFD, AT_EMPTY_PATH = 1, 0x1000
EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLLIN, EPOLLONESHOT = 0x80000, 1, 1, 1 << 30
REAP_MS, FOR_EVER = 100, -1
MSG_DONTWAIT, MSG_NOSIGNAL, MSG_CMSG_CLOEXEC = 0x40, 0x4000, 0x40000000
SOL_SOCKET, SCM_RIGHTS = 1, 1
MOST_DESCRIPTORS = 16
GO_BYTES = 24
"""As much as the size of a job has digits."""
FILTER = struct.Struct("<H6xQ")
"""The kernel's struct sock_fprog."""
FILTER_AT = SHARED_AT + DATA_AT
EVENT, VECTOR, MESSAGE, RIGHTS = (struct.Struct(f"<{one}") for one in ("I12x", "2Q", "Qi4xQQQQi4x", "Q4i"))
"""The kernel's struct epoll_event, with room for what it says; iovec; msghdr; and cmsghdr with two descriptors."""
CONTROL_LENGTH_AT, DESCRIPTORS_AT, DESCRIPTOR_BYTES = 40, 16, 4
"""What the kernel puts into the last two."""
NOBODY = 0x7FFFFFFF
"""Not a process: to end it has no effect, and none waits for it."""

TOLD = struct.Struct("<6q")
"""What a fork server tells: one of the following, a number, a step's address, a status, and a time in seconds and
nanoseconds on the monotonic clock."""
FORKED, ENDED, FAILED, LISTENING = range(4)
"""A child of that number, with descriptors for the first process of its pid namespace and for itself, which somebody
must keep until it has ended; a child, with what wait4 says of it, and when; an error's number below zero, and a step;
at the beginning, a descriptor at which the kernel asks before a socket is made, if it does.
"""
NUMBER_AT, STATUS_AT, TIME_AT = 8, 24, 32


@dataclass(frozen=True, slots=True)
class Parent:
    """What a fork server has told of itself.

    `base` is where the descriptors are that it keeps, `inherited` are those that its libraries know, which lead nowhere
    in a child, and `generator` is where a random generator's state is, and its size: a child's is made anew.
    """

    base: int
    generator: tuple[int, int]
    inherited: tuple[int, ...]


def shared(parent: Parent, filter: bytes, asking: bytes) -> bytes:
    """What a fork server does until a request comes, and what all requests share: the filter for system calls.

    `asking` is one for the fork server itself.
    """
    image = Image(SHARED_AT, request=REQUEST_AT)
    image.put(FILTER.pack(len(filter) // INSTRUCTION_BYTES, FILTER_AT + FILTER.size) + filter)
    poll = parent.base + POLL
    zero, one_request = image.put_number(0), image.put(EVENT.pack(EPOLLIN))
    event = image.put(EVENT.pack(0))
    told = image.put(TOLD.pack(ENDED, 0, 0, 0, 0, 0))
    vector = image.put(VECTOR.pack(REQUEST_AT, PART))
    ancillary = bytes(RIGHTS.size + WORD * MOST_DESCRIPTORS)
    room = image.put_number(len(ancillary))
    message = image.put(MESSAGE.pack(0, 0, vector, 1, image.put(ancillary), len(ancillary), 0))
    length, listener = image.put(bytes(2 * WORD)), image.put(bytes(2 * WORD))
    instructions = image.put(asking)
    asks = image.put(FILTER.pack(len(asking) // INSTRUCTION_BYTES, instructions))
    told_listening = image.put(TOLD.pack(LISTENING, 0, 0, 0, 0, 0))
    listening, listener_told = _telling(image, told_listening, 1)

    def wait(milliseconds: int, negative: str, zero: str = "") -> Step:
        return Step("epoll_pwait", (poll, event, 1, milliseconds, 0), zero=zero, negative=negative)

    def reap(then: str, otherwise: str) -> list[Step]:
        ended = told + STATUS_AT
        return [
            Step("wait4", (-1, ended, WNOHANG, 0), told + NUMBER_AT, zero=otherwise, negative=otherwise),
            Step("clock_gettime", (CLOCK_MONOTONIC, told + TIME_AT)),
            Step("sendto", (CONTROL, told, TOLD.size, MSG_NOSIGNAL, 0), negative="leave"),
            Step(VALUE, (zero,), zero=then),
        ]

    lists = {
        # A first process ends unnoticed after its child: it is looked for when there was nothing to do for a moment.
        "wait a moment": [wait(REAP_MS, zero="reap at rest", negative="wait a moment")],
        "reap": reap(then="reap", otherwise="receive"),
        "receive": [
            Step(VALUE, (room,), message + CONTROL_LENGTH_AT),
            Step(
                "recvmsg", (CONTROL, message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC), length,
                zero="leave", negative="wait a moment",
            ),
            Step(VALUE, (zero,), zero="request"),
        ],
        "reap at rest": reap(then="wait a moment", otherwise="wait"),
        "wait": [wait(FOR_EVER, negative="wait"), Step(VALUE, (zero,), zero="reap")],
        "leave": [Step("exit_group", (0,))],
        "begin": [
            Step("close_range", (poll, LAST_DESCRIPTOR, 0)),
            Step("epoll_create1", (EPOLL_CLOEXEC,)),
            Step("epoll_ctl", (poll, EPOLL_CTL_ADD, CONTROL, one_request), what="keep the lowest descriptors"),
            Step("seccomp", (SECCOMP_SET_MODE_FILTER, NEW_LISTENER | WAIT_KILLABLE, asks), listener, negative="alone"),
            Step(VALUE, (listener,), listener_told),
            Step("sendmsg", (CONTROL, listening, MSG_NOSIGNAL)),
            Step("close_range", (poll + 1, LAST_DESCRIPTOR, 0)),
            Step(END, (0,)),
        ],
        "alone": [Step("sendto", (CONTROL, told_listening, TOLD.size, MSG_NOSIGNAL, 0)), Step(END, (0,))],
    }  # fmt: skip
    image.finish(lists, inner="begin")
    return image.bytes


@functools.lru_cache(maxsize=1024)
def request(
    parent: Parent, user: int, limits: Limits, groups: int, *, has_network: bool = False, straight: bool = False,
    extra: bytes = b"",
) -> Image:  # fmt: skip
    """A request for a child that is a user of its own inside, and joins so many control groups.

    `has_network`: its last descriptor is for its network namespace; else it makes one. `straight`: it goes on to wait
    for its job; else the interpreter has something to do before, perhaps with `extra`.
    """
    image = Image(REQUEST_AT, wait=SHARED_AT, place=PROGRAM_AT)
    first = parent.base + OWN
    network = first + FIRST_GROUP + groups if has_network else None
    last = first + FIRST_GROUP + groups - (network is None)
    lists = {
        **_forked(image, parent, user, first, last),
        **_child(image, parent, user, limits, first, groups, network),
    }
    if not straight:
        lists["be the program"].append(Step(END, (0,)))
    lists["job"] = [
        Step("write", (parent.base + REPORT, image.put(b"ready"), 5)),
        Step("read", (parent.base + REPORT, image.put(bytes(GO_BYTES)), GO_BYTES), zero="leave"),  # it is not wanted
        Step("pread64", (parent.base + JOB, JOB_AT, JOB_BYTES, 0)),
        Step(VALUE, (image.put_number(0),), zero="place"),
    ]
    image.finish(lists, "job", extra)
    return image


def _telling(image: Image, told: int, descriptors: int) -> tuple[int, int]:
    """A message that tells so, with one or two descriptors: its address, and where the first of them has to be put."""
    vector = image.put(VECTOR.pack(told, TOLD.size))
    rights = image.put(RIGHTS.pack(DESCRIPTORS_AT + descriptors * DESCRIPTOR_BYTES, SOL_SOCKET, SCM_RIGHTS, 0, 0))
    return image.put(MESSAGE.pack(0, 0, vector, 1, rights, RIGHTS.size, 0)), rights + DESCRIPTORS_AT


def _forked(image: Image, parent: Parent, user: int, first: int, last: int) -> dict[str, list[Step]]:
    """What the fork server does. The new pid namespace's first process shares its memory until it is a program."""
    arguments = image.put(struct.pack("<2Q", image.put(b"init"), 0))
    zero, no_process = image.put_number(0), image.put_number(-EAGAIN)
    failed = image.put(TOLD.pack(FAILED, 0, 0, 0, 0, 0))
    told = image.put(TOLD.pack(FORKED, NOBODY, 0, 0, 0, 0))
    message, init_descriptor = _telling(image, told, 2)
    its_end = image.put(EVENT.pack(EPOLLIN | EPOLLONESHOT))
    init, program, polled, to_reap = Hole(NOBODY), Hole(), Hole(), Hole()

    def or_fail(call: str, *values: int | Hole, what: str = "") -> Step:
        return Step(call, values, failed + NUMBER_AT, negative="fail", what=what)

    def become(user: int) -> list[Step]:
        """Takes another user's place; the rights stay."""
        return [or_fail("setresgid", user, user, user), or_fail("setresuid", user, user, user)]

    flags = CLONE_VM | CLONE_VFORK | CLONE_PIDFD | signal.SIGCHLD
    return {
        "begin": [
            Step("fcntl", (last, F_GETFD), what="take descriptors in their order"),
            or_fail("unshare", CLONE_NEWPID, what="make a pid namespace"),  # for the next children only
            *become(user),
            Step("clone", (flags, 0, init_descriptor), init, zero="be the first", negative="have no first"),
            Step(FORK, (), told + NUMBER_AT, zero="be the program", negative="have no program"),
            Step(VALUE, (told + NUMBER_AT,), program),
            or_fail("pidfd_open", program, 0),
            Step(VALUE, (failed + NUMBER_AT,), init_descriptor + DESCRIPTOR_BYTES),
            Step(VALUE, (failed + NUMBER_AT,), polled),
            or_fail("epoll_ctl", parent.base + POLL, EPOLL_CTL_ADD, polled, its_end),
            Step("sendmsg", (CONTROL, message, MSG_NOSIGNAL), negative="leave"),
        ],
        "go on": [
            Step("setresgid", (INSIDE_UID,) * 3),
            Step("setresuid", (INSIDE_UID,) * 3),
            Step("setns", (parent.base + OWN_PIDS, CLONE_NEWPID)),
            Step("close_range", (first, LAST_DESCRIPTOR, 0)),
            Step(VALUE, (zero,), zero="wait"),
        ],
        "have no first": [
            Step(VALUE, (no_process,), failed + NUMBER_AT, negative="tell", what="start a first process")
        ],
        "have no program": [Step(VALUE, (no_process,), failed + NUMBER_AT, negative="fail", what="fork")],
        "fail": [
            Step("kill", (init, signal.SIGKILL), negative="tell"),
            Step(VALUE, (told + NUMBER_AT,), to_reap, negative="tell"),
            Step("wait4", (to_reap, 0, 0, 0), negative="tell"),
        ],
        "tell": [
            Step("sendto", (CONTROL, failed, TOLD.size, MSG_NOSIGNAL, 0), negative="leave"),
            Step(VALUE, (zero,), zero="go on"),
        ],
        "be the first": [
            Step("setpgid", (0, 0), negative="leave"),  # a signal to its process group does not reach others
            *(Step("close", (number,), negative="leave") for number in range(STREAMS)),
            Step(
                "execveat", (parent.base + INIT, arguments + 2 * WORD, arguments, arguments + WORD, AT_EMPTY_PATH),
                negative="leave",
            ),
        ],
        "leave": [Step("exit_group", (1,))],
    }  # fmt: skip


def _child(
    image: Image, parent: Parent, user: int, limits: Limits, first: int, groups: int, network: int | None
) -> dict[str, list[Step]]:
    """What makes a child's world. `network` is a descriptor for its network namespace, if it does not make one."""
    base = parent.base
    new = CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC
    open_files = struct.pack("<2Q", limits.open_files, limits.open_files)
    scratch_options = image.put(f"{scratch(limits)},uid={user},gid={user}".encode())

    def mount(kind: bytes, place: bytes, flags: int, options: int = 0) -> Step:
        what = f"mount {place.decode()}"
        return Step("mount", (image.put(kind), image.put(place), image.put(kind), flags, options), what=what)

    return {
        "be the program": [
            *(Step("dup3", (first + place, base + place, 0)) for place in (REPORT, JOB)),
            Step("setpgid", (0, 1)),  # a signal to its process group does not reach others
            *(
                Step("write", (first + FIRST_GROUP + number, image.put(b"0"), 1), what="join a control group")
                for number in range(groups)
            ),
            *([] if network is None else [Step("setns", (network, CLONE_NEWNET), what="enter a network")]),
            Step("unshare", (new | (CLONE_NEWNET if network is None else 0),)),
            mount(b"proc", b"/proc", MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC),
            *(
                mount(b"tmpfs", place, MS_NOSUID | MS_NODEV, scratch_options)
                for place in (b"/tmp", b"/work", b"/dev/shm")
            ),
            Step("chdir", (image.put(b"/work"),)),
            *(Step("dup3", (first + STDIN + number, number, 0)) for number in range(STREAMS)),
            *(Step("dup3", (base + NOWHERE, number, 0)) for number in parent.inherited),
            *(Step("close", (number,)) for number in range(STREAMS, base) if number not in parent.inherited),
            Step("close_range", (base + NOWHERE, LAST_DESCRIPTOR, 0)),
            Step("prlimit64", (0, RLIMIT_NOFILE, image.put(open_files), 0)),
            Step("capset", (image.put(struct.pack("<2I", CAPABILITY_VERSION_3, 0)), image.put(bytes(NO_RIGHTS_BYTES)))),
            Step("prctl", (PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)),
            Step("prctl", (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, FILTER_AT)),
            Step("prctl", (PR_SET_DUMPABLE, 1, 0, 0, 0)),
            Step("getrandom", (*parent.generator, 0)),
        ]
    }
