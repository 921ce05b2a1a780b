"""Watches one run from its first instruction to its end: its output under a cap, its clocks, and what must end it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from sandbox.model import Channel, Facts, Feed, Job, Outcome, Stream, Usage
from sandbox.verdict import conclude

READ_BYTES = WRITE_BYTES = 1 << 16
PIPE_GRACE_S = 0.25
"""How long an ended run's pipes may take to close: what holds them then is not of the run."""
CPU_CHECK_FLOOR_S = 0.005
PROCESSORS = os.cpu_count() or 1


class Group(Protocol):
    """All processes of one run, taken together."""

    def cpu_ms(self) -> float: ...
    def peak_bytes(self) -> int: ...
    def oom_kills(self) -> int: ...
    def refused_forks(self) -> int: ...
    def kill(self) -> None: ...
    def watch_oom(self, on_oom: Callable[[], None]) -> None: ...


class Pipes(NamedTuple):
    """The server's ends of a run's standard streams; the watch closes them."""

    stdin: int
    stdout: int
    stderr: int


class Watch:
    """One run under watch. Its engine says when the program starts and when it is over; the watch does the rest."""

    def __init__(
        self, job: Job, channel: Channel, group: Group, pipes: Pipes, kill: Callable[[], None] | None = None
    ) -> None:
        """`kill` ends all processes of the run where there is a quicker way than the group's."""
        self._job = job
        self._channel = channel
        self._group = group
        self._kill = kill or group.kill
        self._loop = asyncio.get_running_loop()
        self._over = asyncio.Event()
        self._facts: dict[str, Any] = {}
        self._started: float | None = None
        self._ended: float | None = None
        self._cpu_before = 0.0
        self._is_left = False
        self._clocks: dict[str, asyncio.TimerHandle] = {}
        self._out = _Reader(pipes.stdout, job.limits.output_bytes, self._printed("stdout"))
        self._err = _Reader(pipes.stderr, job.limits.output_bytes, self._printed("stderr"))
        self._in = _Writer(pipes.stdin, job.stdin.encode("utf-8", "surrogatepass"), channel.feed)

    def started(self, at: float) -> None:
        """The program's first instruction was at `at` (seconds, monotonic clock): from there its time counts."""
        if self._is_left:
            return
        self._started = at
        self._cpu_before = self._group.cpu_ms()
        wall_s = at + self._job.limits.wall_ms / 1000 - time.monotonic()
        self._clocks["wall"] = self._loop.call_later(wall_s, lambda: self.end(wall_cut=True))
        self._group.watch_oom(self.end)
        self._check_cpu_after(self._job.limits.cpu_ms)

    def ended(self, at: float, **facts: Any) -> bool:
        """The program's first process was over at `at`; `facts` say how. False if the run had been ended before."""
        if self._over.is_set():
            return False
        self._ended = at
        self._facts |= facts
        self._over.set()
        self._channel.ended()
        return True

    def lost(self, reason: Callable[[], str]) -> None:
        """Nothing more will be heard of the run: a fault of ours, unless its end is known or memory ran out."""
        if self._over.is_set():
            return
        if self._group.oom_kills():
            self.end()
        else:
            self.failed(reason())

    def failed(self, sentence: str) -> None:
        """The engine could not do its part."""
        self._facts["engine_failure"] = sentence
        self._over.set()

    def end(self, **why: bool) -> None:
        """Ends the run; the first reason stays."""
        if self._is_left:
            return
        if not self._over.is_set():
            self._ended = time.monotonic()
            self._facts |= {"signal": "SIGKILL", **why}
            self._over.set()
        self._kill()

    async def outcome(self) -> Outcome:
        """Waits for the end, whoever brings it, and for what is still in the pipes."""
        cancel = self._channel.cancel
        cancel.listeners.append(self._cancelled)
        if cancel.is_set():
            self._cancelled()
        try:
            await self._over.wait()
            self._stop_clocks()
            self._kill()
            for reader in (self._out, self._err):
                await reader.drained(PIPE_GRACE_S)
            return conclude(self._job, self._complete(), self._out.kept, self._err.kept)
        except BaseException:
            self._kill()
            raise
        finally:
            self._is_left = True  # what is heard of it from now on changes nothing: its processes may be others' soon
            cancel.listeners.remove(self._cancelled)
            self._stop_clocks()
            for end in (self._in, self._out, self._err):
                end.close()

    def _complete(self) -> Facts:
        wall_ms = ((self._ended or 0) - self._started) * 1000 if self._started is not None and self._ended else 0.0
        cpu_ms = max(0.0, self._group.cpu_ms() - self._cpu_before) if self._started is not None else 0.0
        readers: dict[Stream, _Reader] = {"stdout": self._out, "stderr": self._err}
        cut = tuple(stream for stream, reader in readers.items() if reader.cut)
        return Facts(
            **self._facts,
            output_cut=cut,
            oom_kills=self._group.oom_kills(),
            refused_forks=self._group.refused_forks(),
            usage=Usage(max(0.0, wall_ms), cpu_ms, self._group.peak_bytes()),
        )

    def _printed(self, stream: Stream) -> Callable[[bytes, bool], None]:
        def printed(chunk: bytes, over: bool) -> None:
            if chunk:
                self._channel.emit(stream, chunk)
            if over:
                self.end()

        return printed

    def _check_cpu(self) -> None:
        left_ms = self._job.limits.cpu_ms - (self._group.cpu_ms() - self._cpu_before)
        if left_ms <= 0:
            self.end(cpu_cut=True)
        else:
            self._check_cpu_after(left_ms)

    def _check_cpu_after(self, left_ms: float) -> None:
        """Looks at the earliest moment at which all processors together could have used up the rest."""
        pause = max(left_ms / 1000 / PROCESSORS, CPU_CHECK_FLOOR_S)
        self._clocks["cpu"] = self._loop.call_later(pause, self._check_cpu)

    def _stop_clocks(self) -> None:
        for clock in self._clocks.values():
            clock.cancel()

    def _cancelled(self) -> None:
        self.end(cancelled=True)


class _Reader:
    """Keeps the first `cap` bytes that come through a pipe; what comes after only says that there was more."""

    def __init__(self, fd: int, cap: int, printed: Callable[[bytes, bool], None]) -> None:
        self.cut = False
        self._fd = fd
        self._cap = cap
        self._kept = bytearray()
        self._printed = printed
        self._eof = asyncio.Event()
        os.set_blocking(fd, False)
        asyncio.get_running_loop().add_reader(fd, self._read)

    @property
    def kept(self) -> bytes:
        return bytes(self._kept)

    async def drained(self, grace_s: float) -> None:
        """Waits until every writer has closed the pipe, or for the grace."""
        if self._eof.is_set():
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._eof.wait()

    def close(self) -> None:
        if self._fd >= 0:
            asyncio.get_running_loop().remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1
            self._eof.set()

    def _read(self) -> None:
        try:
            chunk = os.read(self._fd, READ_BYTES)
        except BlockingIOError:
            return
        if not chunk:
            self.close()
            return
        room = self._cap - len(self._kept)
        self._kept += chunk[:room]
        first_too_many = len(chunk) > room and not self.cut
        self.cut = self.cut or first_too_many
        self._printed(chunk[:room], first_too_many)


class _Writer:
    """Feeds a text, and then what the feed brings, into a pipe as fast as the program reads; then closes it."""

    def __init__(self, fd: int, text: bytes, feed: Feed | None) -> None:
        self._fd = fd
        self._feed = Feed() if feed is None else feed
        os.set_blocking(fd, False)
        later = self._feed.take(len(self._feed))
        self._feed.taken(len(later))
        self._feed.push(text + later)
        if feed is None:
            self._feed.end()
        self._feed.attach(self._write)
        self._write()

    def close(self) -> None:
        if self._fd >= 0:
            asyncio.get_running_loop().remove_writer(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _write(self) -> None:
        """Writes what fits. The loop calls again when there is room, the feed when there is more."""
        if self._fd < 0:
            return
        loop = asyncio.get_running_loop()
        try:
            while piece := self._feed.take(WRITE_BYTES):
                self._feed.taken(os.write(self._fd, piece))
        except BlockingIOError:
            loop.add_writer(self._fd, self._write)
            return
        except BrokenPipeError:  # it reads no more
            self.close()
            return
        loop.remove_writer(self._fd)
        if self._feed.ended:
            self.close()
