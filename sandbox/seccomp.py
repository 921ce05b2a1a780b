"""Which system calls a jailed program may make. One table; every engine's filter is made from it.

An allow-list: what is not named does not exist for the program (ENOSYS, so that libraries fall back as on an older
kernel), and what is dangerous or privileged and well known is refused outright (EPERM).
"""

from __future__ import annotations

import functools
import struct
from typing import Any

EPERM, EAFNOSUPPORT, ENOSYS = 1, 97, 38

CLONE_NEW_ANY = 0x7E020080  # NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET and NEWTIME together
CLONE_PARENT = 0x8000  # would make a child of whoever waits for the program
REFUSED_CLONE = CLONE_NEW_ANY | CLONE_PARENT
AF_UNIX, AF_INET, AF_INET6 = 1, 2, 10
TIOCSTI, TIOCLINUX = 0x5412, 0x541C  # would put words into a terminal's mouth

# Grouped by what they are for. x86_64 and aarch64; a name that the machine lacks is left out when the filter is made.
ALLOWED: dict[str, str] = {
    "files": """
        read write readv writev pread64 pwrite64 preadv pwritev preadv2 pwritev2 open openat openat2 creat close
        close_range lseek dup dup2 dup3 fcntl flock fsync fdatasync sync_file_range truncate ftruncate fallocate
        fadvise64 readahead sendfile splice tee vmsplice copy_file_range pipe pipe2 memfd_create stat fstat
        lstat newfstatat statx access faccessat faccessat2 readlink readlinkat getcwd chdir fchdir getdents
        getdents64 mkdir mkdirat rmdir unlink unlinkat rename renameat renameat2 link linkat symlink symlinkat
        chmod fchmod fchmodat fchmodat2 chown fchown lchown fchownat umask utime utimes utimensat futimesat
        statfs fstatfs getxattr lgetxattr fgetxattr setxattr lsetxattr fsetxattr listxattr llistxattr flistxattr
        removexattr lremovexattr fremovexattr inotify_init inotify_init1 inotify_add_watch inotify_rm_watch
        mknod mknodat sync syncfs
    """,
    "waiting": """
        poll ppoll select pselect6 epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_wait epoll_wait_old
        epoll_pwait epoll_pwait2 eventfd eventfd2 signalfd signalfd4 timerfd_create timerfd_settime
        timerfd_gettime nanosleep clock_nanosleep pause alarm getitimer setitimer timer_create timer_settime
        timer_gettime timer_getoverrun timer_delete futex futex_waitv futex_wait futex_wake futex_requeue
        restart_syscall
    """,
    "memory": """
        mmap munmap mremap mprotect madvise brk msync mincore mlock mlock2 munlock mlockall munlockall
        membarrier pkey_alloc pkey_free pkey_mprotect get_mempolicy set_mempolicy mbind map_shadow_stack
    """,
    "processes": """
        fork vfork execve execveat exit exit_group wait4 waitid getpid getppid gettid getpgid setpgid getpgrp
        getsid setsid kill tkill tgkill rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigsuspend
        rt_sigtimedwait rt_sigqueueinfo rt_tgsigqueueinfo sigaltstack pidfd_open pidfd_send_signal prctl
        arch_prctl set_tid_address set_robust_list get_robust_list rseq sched_yield sched_getaffinity
        sched_setaffinity sched_getparam sched_getscheduler sched_setscheduler sched_setparam sched_getattr
        sched_setattr sched_get_priority_max sched_get_priority_min sched_rr_get_interval getpriority
        setpriority getrlimit setrlimit getrusage times getcpu ioprio_get ioprio_set
    """,
    "identity": """
        getuid geteuid getgid getegid getresuid getresgid getgroups capget capset setuid setgid setreuid
        setregid setresuid setresgid setfsuid setfsgid setgroups landlock_create_ruleset landlock_add_rule
        landlock_restrict_self seccomp
    """,
    "sockets": """
        bind listen accept accept4 connect getsockname getpeername sendto recvfrom sendmsg recvmsg sendmmsg
        recvmmsg getsockopt setsockopt shutdown
    """,
    "ipc": """
        shmget shmat shmdt shmctl semget semop semctl semtimedop msgget msgsnd msgrcv msgctl mq_open mq_unlink
        mq_timedsend mq_timedreceive mq_notify mq_getsetattr
    """,
    "time and system": """
        time gettimeofday clock_gettime clock_getres uname sysinfo getrandom
    """,
}

# Refused with EPERM, as a program expects of what it is not privileged to do.
REFUSED = """
    ptrace process_vm_readv process_vm_writev process_madvise process_mrelease kcmp pidfd_getfd
    add_key request_key keyctl bpf perf_event_open userfaultfd io_uring_setup io_uring_enter io_uring_register
    mount umount2 pivot_root chroot setns unshare swapon swapoff
    fsopen fsconfig fsmount fspick move_mount open_tree mount_setattr statmount listmount
    kexec_load kexec_file_load init_module finit_module delete_module reboot
    open_by_handle_at name_to_handle_at personality acct quotactl quotactl_fd syslog
    settimeofday clock_settime clock_adjtime adjtimex sethostname setdomainname iopl ioperm modify_ldt
    fanotify_init fanotify_mark lookup_dcookie nfsservctl vhangup
    migrate_pages move_pages set_mempolicy_home_node memfd_secret lsm_set_self_attr
"""

# kafel calls some by the kernel's function; others are too new for it, and numbered alike on every machine.
KAFEL = {
    "stat": "newstat",
    "fstat": "newfstat",
    "lstat": "newlstat",
    "uname": "newuname",
    "sendfile": "sendfile64",
    "umount2": "umount",
    "memfd_secret": "SYSCALL[447]",
    "process_mrelease": "SYSCALL[448]",
    "futex_waitv": "SYSCALL[449]",
    "set_mempolicy_home_node": "SYSCALL[450]",
    "fchmodat2": "SYSCALL[452]",
    "map_shadow_stack": "SYSCALL[453]",
    "futex_wake": "SYSCALL[454]",
    "futex_wait": "SYSCALL[455]",
    "futex_requeue": "SYSCALL[456]",
    "statmount": "SYSCALL[457]",
    "listmount": "SYSCALL[458]",
    "lsm_set_self_attr": "SYSCALL[460]",
}


def kafel() -> str:
    """The policy in nsjail's filter language."""
    allowed = [name for group in ALLOWED.values() for name in group.split()]
    return f"""
POLICY runboard {{
  ALLOW {{
    {_names(allowed)},
    clone {{ (clone_flags & {REFUSED_CLONE:#x}) == 0 }},
    socket {{ family == {AF_UNIX} || family == {AF_INET} || family == {AF_INET6} }},
    socketpair {{ family == {AF_UNIX} }},
    ioctl {{ cmd != {TIOCSTI:#x} && cmd != {TIOCLINUX:#x} }},
    prlimit64 {{ pid == 0 || new_rlim == 0 }}
  }},
  ERRNO({EPERM}) {{ {_names(REFUSED.split())}, clone, ioctl, prlimit64 }},
  ERRNO({EAFNOSUPPORT}) {{ socket, socketpair }}
}}
USE runboard DEFAULT ERRNO({ENOSYS})
"""


DONTFORK = 10
"""madvise(…, MADV_DONTFORK): with it, V8 would keep its heap from children that are forked from node."""


def kafel_of_fork_server() -> str:
    """The policy of a fork server itself, which is ours: a heap stays forkable, whatever V8 wishes, and libuv makes no
    rings, whose memory would be shared with every child.

    Its children have `bpf` on top of it.
    """
    return f"POLICY forkable {{ ERRNO(0) {{ madvise(start, len_in, behavior) {{ behavior == {DONTFORK} }} }}, " \
           f"ERRNO({ENOSYS}) {{ io_uring_setup }} }}\n" \
           "USE forkable DEFAULT ALLOW\n"  # fmt: skip


def asking() -> bytes:
    """A filter as the kernel takes it, with which it asks a listener before a socket is made.

    What a filter of `bpf` refuses, it refuses without asking.
    """
    program = _Program()
    program.add(LOAD, NUMBER_AT)
    program.add(IF_EQUAL, number_of("socket"), "ask")
    program.add(IF_EQUAL, number_of("socketpair"), "ask")
    program.add(RETURN, ALLOW)
    program.name("ask")
    program.add(RETURN, ASK)
    return program.bytes()


LOAD, RETURN, IF_EQUAL, IF_AT_LEAST, IF_ANY_BIT = 0x20, 0x06, 0x15, 0x35, 0x45
"""Instructions of classic BPF; the conditions are about what was loaded last. Source: linux/bpf_common.h."""
INSTRUCTION = struct.Struct("<HBBI")
NUMBER_AT, ARCHITECTURE_AT, ARGUMENTS_AT = 0, 4, 16
"""In the kernel's struct seccomp_data, whose arguments have 64 bits each."""
ALL_BITS = 0xFFFFFFFF
ALLOW, ERRNO, KILL, ASK = 0x7FFF0000, 0x00050000, 0x80000000, 0x7FC00000
ANSWERS = {
    "allow": ALLOW, "refuse": ERRNO | EPERM, "no such family": ERRNO | EAFNOSUPPORT, "no such call": ERRNO | ENOSYS,
    "kill": KILL,
}  # fmt: skip


def bpf() -> bytes:
    """The policy as the kernel takes it: an array of struct sock_filter.

    A search among the ranges of calls that are treated alike. The kernel translates each filter anew for each run, and
    asks it about every call ahead: libseccomp's own, of 500 instructions, cost a run 0.3 ms.

    Raises:
        OSError: libseccomp, which knows the calls' numbers, is not on this machine.
    """
    places = {number: "allow" for name in " ".join(ALLOWED.values()).split() if (number := _number(name)) >= 0}
    places |= {number: "refuse" for name in REFUSED.split() if (number := _number(name)) >= 0}
    places |= {number_of(name): name for name in ("clone", "ioctl", "prlimit64", "socket", "socketpair")}
    ranges = [(0, places.get(0, "no such call"))]
    for number in range(1, max(places) + 2):
        if (place := places.get(number, "no such call")) != ranges[-1][1]:
            ranges.append((number, place))
    program = _Program()
    program.add(LOAD, ARCHITECTURE_AT)
    program.add(IF_EQUAL, _library().system_arch(), no="kill")
    program.add(LOAD, NUMBER_AT)
    program.search(ranges)
    program.block("clone", lower(0), [(IF_ANY_BIT, REFUSED_CLONE, "refuse")], "allow")
    program.block("ioctl", lower(1), [(IF_EQUAL, TIOCSTI, "refuse"), (IF_EQUAL, TIOCLINUX, "refuse")], "allow")
    program.block("prlimit64", lower(0), [(IF_EQUAL, 0, "allow")], "limits of another")  # its init's
    program.block("limits of another", lower(2), [(IF_ANY_BIT, ALL_BITS, "refuse")], "upper half")
    program.block("upper half", lower(2) + 4, [(IF_ANY_BIT, ALL_BITS, "refuse")], "allow")
    families = [(IF_EQUAL, family, "allow") for family in (AF_UNIX, AF_INET, AF_INET6)]
    program.block("socket", lower(0), families, "no such family")
    program.block("socketpair", lower(0), families[:1], "no such family")
    for name, answer in ANSWERS.items():
        program.name(name)
        program.add(RETURN, answer)
    return program.bytes()


def lower(argument: int) -> int:
    """Where the lower half of an argument is: of a number of 32 bits, the kernel takes no more."""
    return ARGUMENTS_AT + 8 * argument


class _Program:
    """Instructions, whose targets are places or names; without one, the next instruction follows."""

    def __init__(self) -> None:
        self._lines: list[tuple[int, int, int | str, int | str]] = []
        self._names: dict[str, int] = {}

    def name(self, name: str) -> None:
        self._names[name] = len(self._lines)

    def add(self, code: int, value: int, yes: int | str = "", no: int | str = "") -> None:
        self._lines.append((code, value, yes, no))

    def block(self, name: str, place: int, conditions: list[tuple[int, int, str]], otherwise: str) -> None:
        """Looks at what is at a place in the kernel's struct."""
        self.name(name)
        self.add(LOAD, place)
        for code, value, yes in conditions[:-1]:
            self.add(code, value, yes)
        code, value, yes = conditions[-1]
        self.add(code, value, yes, otherwise)

    def search(self, ranges: list[tuple[int, str]]) -> int | str:
        """Finds the range of what was loaded; each has its first number. Gives the place of the search."""
        if len(ranges) == 1:
            return ranges[0][1]
        middle, place = len(ranges) // 2, len(self._lines)
        self.add(IF_AT_LEAST, ranges[middle][0])
        below, above = self.search(ranges[:middle]), self.search(ranges[middle:])
        self._lines[place] = (IF_AT_LEAST, ranges[middle][0], above, below)
        return place

    def bytes(self) -> bytes:
        def distance(place: int, target: int | str) -> int:
            if target == "":
                return 0
            return (target if isinstance(target, int) else self._names[target]) - place - 1

        return b"".join(
            INSTRUCTION.pack(code, distance(place, yes), distance(place, no), value)
            for place, (code, value, yes, no) in enumerate(self._lines)
        )


@functools.cache
def number_of(call: str) -> int:
    """A system call's number on this machine. Raises OSError."""
    number = _number(call)
    if number < 0:
        raise OSError(ENOSYS, f"this machine has no {call}")
    return number


def _number(call: str) -> int:
    library = _library()
    number: int = library.resolve_syscall(library.Arch.NATIVE, call)
    return number


def _library() -> Any:
    try:
        import pyseccomp
    except RuntimeError as failure:
        raise OSError(str(failure)) from failure
    return pyseccomp


def _names(calls: list[str]) -> str:
    return ", ".join(KAFEL.get(call, call) for call in calls)
