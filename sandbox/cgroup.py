"""One control group per run: limits, peak memory, OOM kills, CPU time, and an end for every process in it.

Version 1 keeps a tree per controller, version 2 one tree for all. What differs stands in two tables of file names;
the rest of the code is the same for both. Facts: the kernel's Documentation/admin-guide/cgroup-v1 and cgroup-v2.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sandbox.model import Limits


class CgroupUnavailable(Exception):
    """The text says in a sentence why runs cannot have control groups here."""


class TooLittleMemory(Exception):
    """A limit that would end a run before it begins."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where one version keeps its knobs: each value is (controller, file). Version 2's controller is always ""."""

    memory_max: tuple[str, str]
    swap_max: tuple[str, str]
    swap_includes_memory: bool
    memory_peak: tuple[str, str]
    memory_now: tuple[str, str]
    peak_can_be_reset: bool
    oom_events: tuple[str, str]
    pids_now: tuple[str, str]
    pids_max: tuple[str, str]
    pids_events: tuple[str, str]
    cpu_time: tuple[str, str]
    cpu_field: str | None
    cpu_per_ms: int
    weight: tuple[str, str, str]
    own_entrance: str
    """What a process without threads writes "0" to. For version 1's `cgroup.procs`, a kernel stops all forks and waits
    some milliseconds; version 2 has no other file for it."""


V1 = Layout(
    memory_max=("memory", "memory.limit_in_bytes"),
    swap_max=("memory", "memory.memsw.limit_in_bytes"),
    swap_includes_memory=True,
    memory_peak=("memory", "memory.max_usage_in_bytes"),
    memory_now=("memory", "memory.usage_in_bytes"),
    peak_can_be_reset=True,
    oom_events=("memory", "memory.oom_control"),
    pids_now=("pids", "pids.current"),
    pids_max=("pids", "pids.max"),
    pids_events=("pids", "pids.events"),
    cpu_time=("cpuacct", "cpuacct.usage"),
    cpu_field=None,
    cpu_per_ms=1_000_000,
    weight=("cpu", "cpu.shares", "128"),
    own_entrance="tasks",
)
V2 = Layout(
    memory_max=("", "memory.max"),
    swap_max=("", "memory.swap.max"),
    swap_includes_memory=False,
    memory_peak=("", "memory.peak"),
    memory_now=("", "memory.current"),
    peak_can_be_reset=False,  # only since Linux 6.12, and then for one descriptor
    oom_events=("", "memory.events"),
    pids_now=("", "pids.current"),
    pids_max=("", "pids.max"),
    pids_events=("", "pids.events"),
    cpu_time=("", "cpu.stat"),
    cpu_field="usage_usec",
    cpu_per_ms=1_000,
    weight=("", "cpu.weight", "12"),
    own_entrance="cgroup.procs",
)


READ_BYTES = 4096
"""More than any file has but the list of processes."""
REUSABLE_BYTES = 1 << 20
"""What a group may still hold after its run, and be used for another: pages that the kernel frees a moment later."""
ROOMY = Limits(memory_bytes=32 << 20, processes=8)
"""With less, what is made ahead of the next run would not fit into a group that keeps its limits."""


class Cgroups:
    """The group of this server, below which each run gets a leaf of its own."""

    def __init__(self, layout: Layout, folders: dict[str, Path]) -> None:
        """`folders` has the server's group for each controller of `layout`; they exist and are ours."""
        self._layout = layout
        self.folders = folders
        self._numbers = itertools.count()
        self._free: list[Leaf] = []

    def leaf(self) -> Leaf:
        """A group without processes: one that is like new, or else a new one, yet without limits."""
        try:
            return self._free.pop()
        except IndexError:
            name = f"run-{next(self._numbers)}"
            folders = {controller: folder / name for controller, folder in self.folders.items()}
            leaf = Leaf(self._layout, folders, self._free)
            leaf.make()
            return leaf

    def close(self) -> None:
        """Removes the server's group; leaves must be given back or removed."""
        while self._free:
            self._free.pop().remove_empty()
        for folder in self.folders.values():
            with contextlib.suppress(OSError):
                folder.rmdir()


class Leaf:
    """The control group of one run. Its files stay open: opening one costs more than reading it."""

    def __init__(self, layout: Layout, folders: dict[str, Path], free: list[Leaf] | None = None) -> None:
        """`free` is where it waits for its next use."""
        self._layout = layout
        self._folders = folders
        self._places = {
            folder: controller for controller, folder in folders.items()
        }  # those mounted together share one
        self._free = free
        self._open: dict[tuple[str, str, int], int] = {}
        self._limits: tuple[int, int] | None = None
        self._oom_fd: int | None = None
        self._oom_told = 0
        self._oom_kills_before = self._refused_forks_before = 0

    def make(self) -> None:
        """Creates the group."""
        for folder in self._places:
            folder.mkdir()
        if self._layout is V2:
            self._write(("", "memory.oom.group"), 1)

    def limit(self, limits: Limits, extra_processes: int = 0) -> None:
        """Sets the limits; `extra_processes` of our own are allowed beside the program's.

        Raises:
            TooLittleMemory: more is in use already.
        """
        wanted = (limits.memory_bytes, limits.processes + extra_processes)
        if wanted == self._limits:  # those of the run before
            return
        if self._limits is not None:
            with contextlib.suppress(OSError):
                self._write(self._layout.swap_max, -1)  # version 1 keeps it above the other
        self._limits = None
        try:
            self._write(self._layout.memory_max, limits.memory_bytes)
        except OSError as failure:
            if failure.errno != errno.EBUSY:
                raise
            raise TooLittleMemory(f"{limits.memory_bytes} bytes are less than it takes to start a program") from failure
        with contextlib.suppress(OSError):  # a kernel without swap accounting has no such file; check() says so
            self._write(self._layout.swap_max, limits.memory_bytes if self._layout.swap_includes_memory else 0)
        self._write(self._layout.pids_max, limits.processes + extra_processes)
        self._limits = wanted

    def add(self, pid: int) -> None:
        """Puts a process, and so whatever it will fork, into the group."""
        for controller in self._places.values():
            self._write((controller, "cgroup.procs"), pid)

    def entrances(self) -> list[int]:
        """Descriptors, which stay the group's: a process without threads that writes "0" to each is in it."""
        return [self._fd((controller, self._layout.own_entrance), os.O_WRONLY) for controller in self._places.values()]

    def watch_oom(self, on_oom: Callable[[], None]) -> None:
        """Calls `on_oom` from the event loop when the kernel had to kill for memory (version 1: version 2 has
        `memory.oom.group`, with which the kernel ends the whole run by itself)."""
        if self._layout is V2:
            return
        if self._oom_fd is None:
            self._oom_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            control = self._fd(self._layout.oom_events, os.O_RDONLY)
            events = self._fd((self._layout.oom_events[0], "cgroup.event_control"), os.O_WRONLY)
            os.write(events, f"{self._oom_fd} {control}".encode())
        asyncio.get_running_loop().add_reader(self._oom_fd, self._oom_happened, on_oom)

    def _oom_happened(self, on_oom: Callable[[], None]) -> None:
        self._hear_of_oom()
        on_oom()

    def _hear_of_oom(self) -> None:
        """The kernel tells before it kills, and does not count those who were killed by us meanwhile."""
        if self._oom_fd is not None:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._oom_fd)
                self._oom_told = 1

    def cpu_ms(self) -> float:
        """CPU time of all processes that ever were in the group, in earlier runs too."""
        text = self._read(self._layout.cpu_time)
        used = int(text) if self._layout.cpu_field is None else _field(text, self._layout.cpu_field)
        return used / self._layout.cpu_per_ms

    def peak_bytes(self) -> int:
        """The most memory that the group held at once."""
        return int(self._read(self._layout.memory_peak))

    def oom_kills(self) -> int:
        """How many processes the kernel killed for memory, or at least 1 if it was about to."""
        self._hear_of_oom()
        return max(self._oom_told, self._all_oom_kills() - self._oom_kills_before)

    def refused_forks(self) -> int:
        """How often the kernel refused a new process or thread."""
        return self._all_refused_forks() - self._refused_forks_before

    def pids(self) -> list[int]:
        """The processes that are in the group now."""
        controller, _ = self._layout.pids_max
        # Opened anew: version 1 shows an open file the list as it was.
        with open(self._folders[controller] / "cgroup.procs", "rb", buffering=0) as file:
            return [int(pid) for pid in file.read().split()]

    def kill(self) -> None:
        """Sends SIGKILL to every process; first forbids new ones, so that none slips through."""
        self._limits = None
        self._write(self._layout.pids_max, 0)
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    async def release(self) -> None:
        """Gives it back to be used again, if it can be made like new, and else removes it."""
        self._stop_watching_oom()
        if self._free is not None and self._is_like_new():
            self._free.append(self)
        else:
            await self.remove()

    async def remove(self) -> None:
        """Ends what is still in the group, waits until it is empty, and removes it."""
        self._stop_watching_oom()
        pause = 0.0005
        while not self.remove_empty():
            self.kill()
            await asyncio.sleep(pause)
            pause = min(pause * 2, 0.1)

    def remove_empty(self) -> bool:
        """Removes the group; False when something is still in it."""
        for folder in self._places:
            try:
                folder.rmdir()
            except FileNotFoundError:
                continue
            except OSError as failure:
                if failure.errno != errno.EBUSY:
                    raise
                return False
        self.close()
        return True

    def close(self) -> None:
        """Closes its files."""
        if self._oom_fd is not None:
            os.close(self._oom_fd)
            self._oom_fd = None
        while self._open:
            os.close(self._open.popitem()[1])

    def _is_like_new(self) -> bool:
        """Whether nothing of the run is left but its limits, if they leave room for what is made ahead of the next.

        Counters that cannot be reset go on from where they are.
        """
        layout = self._layout
        if not layout.peak_can_be_reset or int(self._read(layout.pids_now)):
            return False
        if int(self._read(layout.memory_now)) > REUSABLE_BYTES:
            return False
        memory, processes = self._limits or (0, 0)
        if memory < ROOMY.memory_bytes or processes < ROOMY.processes:
            with contextlib.suppress(OSError):
                self._write(layout.swap_max, -1)
            self._write(layout.memory_max, -1)
            self._write(layout.pids_max, "max")
            self._limits = None
        self._write(layout.memory_peak, 0)
        self._hear_of_oom()
        self._oom_told = 0
        self._oom_kills_before, self._refused_forks_before = self._all_oom_kills(), self._all_refused_forks()
        return True

    def _all_oom_kills(self) -> int:
        return _field(self._read(self._layout.oom_events), "oom_kill")

    def _all_refused_forks(self) -> int:
        return _field(self._read(self._layout.pids_events), "max")

    def _stop_watching_oom(self) -> None:
        if self._oom_fd is not None:
            asyncio.get_running_loop().remove_reader(self._oom_fd)

    def _read(self, knob: tuple[str, str]) -> str:
        return os.pread(self._fd(knob, os.O_RDONLY), READ_BYTES, 0).decode()

    def _write(self, knob: tuple[str, str], value: int | str) -> None:
        os.pwrite(self._fd(knob, os.O_WRONLY), str(value).encode(), 0)

    def _fd(self, knob: tuple[str, str], mode: int) -> int:
        controller, name = knob
        key = controller, name, mode
        try:
            return self._open[key]
        except KeyError:
            path = self._folders[controller] / name
            return self._open.setdefault(key, os.open(path, mode | os.O_CLOEXEC))


def _field(text: str, name: str) -> int:
    for line in text.splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0
