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


@dataclass(frozen=True, slots=True)
class Layout:
    """Where one version keeps its knobs: each value is (controller, file). Version 2's controller is always ""."""

    memory_max: tuple[str, str]
    swap_max: tuple[str, str]
    swap_includes_memory: bool
    memory_peak: tuple[str, str]
    oom_events: tuple[str, str]
    pids_max: tuple[str, str]
    pids_events: tuple[str, str]
    cpu_time: tuple[str, str]
    cpu_field: str | None
    cpu_per_ms: int
    weight: tuple[str, str, str]


V1 = Layout(
    memory_max=("memory", "memory.limit_in_bytes"),
    swap_max=("memory", "memory.memsw.limit_in_bytes"),
    swap_includes_memory=True,
    memory_peak=("memory", "memory.max_usage_in_bytes"),
    oom_events=("memory", "memory.oom_control"),
    pids_max=("pids", "pids.max"),
    pids_events=("pids", "pids.events"),
    cpu_time=("cpuacct", "cpuacct.usage"),
    cpu_field=None,
    cpu_per_ms=1_000_000,
    weight=("cpu", "cpu.shares", "128"),
)
V2 = Layout(
    memory_max=("", "memory.max"),
    swap_max=("", "memory.swap.max"),
    swap_includes_memory=False,
    memory_peak=("", "memory.peak"),
    oom_events=("", "memory.events"),
    pids_max=("", "pids.max"),
    pids_events=("", "pids.events"),
    cpu_time=("", "cpu.stat"),
    cpu_field="usage_usec",
    cpu_per_ms=1_000,
    weight=("", "cpu.weight", "12"),
)


class Cgroups:
    """The group of this server, below which each run gets a leaf of its own."""

    def __init__(self, layout: Layout, folders: dict[str, Path]) -> None:
        """`folders` has the server's group for each controller of `layout`; they exist and are ours."""
        self._layout = layout
        self.folders = folders
        self._numbers = itertools.count()

    def leaf(self) -> Leaf:
        """A new group, yet without limits."""
        name = f"run-{next(self._numbers)}"
        leaf = Leaf(self._layout, {controller: folder / name for controller, folder in self.folders.items()})
        leaf.make()
        return leaf

    def close(self) -> None:
        """Removes the server's group; leaves must be gone."""
        for folder in self.folders.values():
            with contextlib.suppress(OSError):
                folder.rmdir()


class Leaf:
    """The control group of one run."""

    def __init__(self, layout: Layout, folders: dict[str, Path]) -> None:
        self._layout = layout
        self._folders = folders
        self._places = set(folders.values())  # controllers that are mounted together share one
        self._oom_fd: int | None = None
        self._oom_told = 0

    def make(self) -> None:
        """Creates the group."""
        for folder in self._places:
            folder.mkdir()
        if self._layout is V2:
            self._write(("", "memory.oom.group"), 1)

    def limit(self, limits: Limits, extra_processes: int = 0) -> None:
        """Sets the limits; `extra_processes` of our own are allowed beside the program's."""
        self._write(self._layout.memory_max, limits.memory_bytes)
        with contextlib.suppress(OSError):  # a kernel without swap accounting has no such file; check() says so
            self._write(self._layout.swap_max, limits.memory_bytes if self._layout.swap_includes_memory else 0)
        self._write(self._layout.pids_max, limits.processes + extra_processes)

    def add(self, pid: int) -> None:
        """Puts a process, and so whatever it will fork, into the group."""
        for folder in self._places:
            _write(folder / "cgroup.procs", pid)

    def entrances(self) -> list[int]:
        """Descriptors, the caller's to close: a process that writes "0" to each is in the group.

        One that moves itself, without threads, moves at once; moving another makes all processors take note first.
        """
        return [os.open(folder / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC) for folder in self._places]

    def watch_oom(self, on_oom: Callable[[], None]) -> None:
        """Calls `on_oom` from the event loop when the kernel had to kill for memory (version 1: version 2 has
        `memory.oom.group`, with which the kernel ends the whole run by itself)."""
        if self._layout is V2:
            return
        controller, name = self._layout.oom_events
        self._oom_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        control = os.open(self._folders[controller] / name, os.O_RDONLY)
        try:
            _write(self._folders[controller] / "cgroup.event_control", f"{self._oom_fd} {control}")
        finally:
            os.close(control)
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
        """CPU time of all processes that ever were in the group."""
        text = self._read(self._layout.cpu_time)
        used = int(text) if self._layout.cpu_field is None else _field(text, self._layout.cpu_field)
        return used / self._layout.cpu_per_ms

    def peak_bytes(self) -> int:
        """The most memory that the group held at once."""
        return int(self._read(self._layout.memory_peak))

    def oom_kills(self) -> int:
        """How many processes the kernel killed for memory, or at least 1 if it was about to."""
        self._hear_of_oom()
        return max(self._oom_told, _field(self._read(self._layout.oom_events), "oom_kill"))

    def refused_forks(self) -> int:
        """How often the kernel refused a new process or thread."""
        return _field(self._read(self._layout.pids_events), "max")

    def pids(self) -> list[int]:
        """The processes that are in the group now."""
        controller, _ = self._layout.pids_max
        return [int(pid) for pid in (self._folders[controller] / "cgroup.procs").read_text().split()]

    def kill(self) -> None:
        """Sends SIGKILL to every process; first forbids new ones, so that none slips through."""
        self._write(self._layout.pids_max, 0)
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    async def remove(self) -> None:
        """Ends what is still in the group, waits until it is empty, and removes it."""
        if self._oom_fd is not None:
            asyncio.get_running_loop().remove_reader(self._oom_fd)
            os.close(self._oom_fd)
            self._oom_fd = None
        pause = 0.0005
        while not self._try_remove():
            self.kill()
            await asyncio.sleep(pause)
            pause = min(pause * 2, 0.1)

    def _try_remove(self) -> bool:
        for folder in self._places:
            try:
                folder.rmdir()
            except FileNotFoundError:
                continue
            except OSError as failure:
                if failure.errno != errno.EBUSY:
                    raise
                return False
        return True

    def _read(self, knob: tuple[str, str]) -> str:
        controller, name = knob
        return (self._folders[controller] / name).read_text()

    def _write(self, knob: tuple[str, str], value: int) -> None:
        controller, name = knob
        _write(self._folders[controller] / name, value)


def _write(path: Path, value: int | str) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, str(value).encode())
    finally:
        os.close(fd)


def _field(text: str, name: str) -> int:
    for line in text.splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0
