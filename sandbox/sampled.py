"""What a control group does, done with psutil by looking often: for machines and users that have no control groups.

It limits less sharply: memory may pass its limit for a moment, and CPU time of a process that nobody saw is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable

import psutil

from sandbox.model import Limits

SAMPLE_SECONDS = 0.01


class SampledGroups:
    """Gives out process trees as `Cgroups` gives out control groups."""

    def leaf(self) -> ProcessTree:
        """A tree yet without processes."""
        return ProcessTree()

    def close(self) -> None:
        """Nothing is kept."""


class ProcessTree:
    """A child and all that comes of it, followed with psutil: by parenthood, and by session for what was orphaned."""

    def __init__(self) -> None:
        self._limits = Limits()
        self._root: psutil.Process | None = None
        self._known: dict[int, psutil.Process] = {}
        self._cpu_s: dict[int, float] = {}
        self._peak = 0
        self._over = 0
        self._sampler: asyncio.TimerHandle | None = None
        self._on_oom: Callable[[], None] = lambda: None

    def add(self, pid: int) -> None:
        """The first process of the run."""
        self._root = psutil.Process(pid)
        self._known[pid] = self._root

    def entrances(self) -> list[int]:
        """None: a process has to be added."""
        return []

    def limit(self, limits: Limits, extra_processes: int = 0) -> None:
        """Sets the limits. The number of processes is for the engine to limit, with RLIMIT_NPROC."""
        self._limits = limits

    def watch_oom(self, on_oom: Callable[[], None]) -> None:
        """Samples memory from now on and calls `on_oom` when it is over the limit."""
        self._on_oom = on_oom
        self._sample()

    def cpu_ms(self) -> float:
        """CPU time of every process that was seen."""
        self._look()
        return sum(self._cpu_s.values()) * 1000

    def peak_bytes(self) -> int:
        """The most resident memory that was seen at once."""
        return self._peak

    def oom_kills(self) -> int:
        """1 when the run was over its memory."""
        return self._over

    def refused_forks(self) -> int:
        """Not known here: the limit is the user's, not the run's."""
        return 0

    def kill(self) -> None:
        """Ends the tree, again until nothing new turns up."""
        while living := self._look():
            for process in living:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs([process for process in living if process != self._root], timeout=0.05)
            if all(process == self._root for process in living):
                break

    async def release(self) -> None:
        """As `remove`: there is nothing to be used again."""
        await self.remove()

    async def remove(self) -> None:
        """Ends the tree and stops sampling."""
        if self._sampler is not None:
            self._sampler.cancel()
        self.kill()

    def _sample(self) -> None:
        used = 0
        for process in self._look():
            with contextlib.suppress(psutil.Error):
                used += process.memory_info().rss
        self._peak = max(self._peak, used)
        if used > self._limits.memory_bytes:
            self._over = 1
            self._on_oom()
            return
        self._sampler = asyncio.get_running_loop().call_later(SAMPLE_SECONDS, self._sample)

    def _look(self) -> list[psutil.Process]:
        """The living processes of the tree."""
        for process in list(self._known.values()):
            with contextlib.suppress(psutil.Error):
                self._known.update({child.pid: child for child in process.children(recursive=True)})
        for process in psutil.process_iter():  # those whose parent has gone, but whose session is a known one
            if process.pid not in self._known:
                with contextlib.suppress(OSError):
                    if os.getsid(process.pid) in self._known:
                        self._known[process.pid] = process
        living = []
        for process in self._known.values():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                self._cpu_s[process.pid] = times.user + times.system
                if process.status() != psutil.STATUS_ZOMBIE:
                    living.append(process)
        return living
