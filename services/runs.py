"""The admission queue: bounded, fair between connections, and with an end for every run."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field

from protocol.errors import Conflict, NotFound, Overloaded, ShuttingDown
from sandbox.engine import Engine, failed_outcome, never_started
from sandbox.model import Channel, Job, Outcome

log = logging.getLogger(__name__)
RETRY_AFTER_MS = 1000


@dataclass(eq=False, slots=True)
class _Entry:
    """A run that is queued or under way."""

    job: Job
    channel: Channel
    turn: asyncio.Future[None]
    queued_at: float = field(default_factory=time.monotonic)


class Runs:
    """Runs Jobs on an engine, so many at once; the rest wait, connection by connection in turn.

    An `owner` stands for a connection: any hashable thing.
    """

    def __init__(self, engine: Engine, max_runs: int, queue_size: int) -> None:
        self._engine = engine
        self._max_runs = max_runs
        self._queue_size = queue_size
        self._queues: dict[Hashable, deque[_Entry]] = {}  # in the order in which owners have their next turn
        self._queued = 0
        self._running = 0
        self._entries: dict[Hashable, set[_Entry]] = {}
        self._named: dict[tuple[Hashable, str | int], _Entry] = {}
        self._closed = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def counts(self) -> dict[str, int]:
        """How many runs are under way and how many wait."""
        return {"running": self._running, "queued": self._queued}

    async def run(
        self,
        job: Job,
        owner: Hashable,
        name: str | int | None = None,
        channel: Channel | None = None,
        *,
        of_task: bool = False,
    ) -> tuple[Outcome, float]:
        """Runs `job` when it is its turn; gives its Outcome and how long it waited, in milliseconds.

        A run `of_task` may wait in a full queue too: tasks are bounded themselves, and a task that was accepted must
        not fail because others are busy.

        Raises:
            Overloaded: the queue is full.
            Conflict: `owner` has a run of that name already.
            ShuttingDown: the server is about to stop.
        """
        entry = self._admit(job, owner, name, channel or Channel(), bounded=not of_task)
        try:
            if not await self._has_its_turn(entry, owner):
                return never_started(job), (time.monotonic() - entry.queued_at) * 1000
            queue_ms = (time.monotonic() - entry.queued_at) * 1000
            try:
                return await self._engine.run(job, entry.channel), queue_ms
            except Exception:
                log.exception("the %s engine failed", self._engine.name)
                return failed_outcome(job, "the engine failed; the server's log has more"), queue_ms
            finally:
                self._running -= 1
                self._give_turns()
        finally:
            self._forget(entry, owner, name)

    def cancel(self, owner: Hashable, name: str | int) -> None:
        """Ends one run, queued or under way.

        Raises:
            NotFound: `owner` has no such run now.
        """
        entry = self._named.get((owner, name))
        if entry is None:
            raise NotFound(f"this connection has no run {name!r} under way", path="/data/run")
        self._end(entry)

    def leave(self, owner: Hashable) -> None:
        """Ends all runs of a connection that is gone."""
        for entry in list(self._entries.get(owner, ())):
            self._end(entry)

    async def close(self, drain_s: float) -> None:
        """Takes nothing more; what is under way may finish for `drain_s` seconds, then it is ended."""
        self._closed = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), drain_s)
        for owner in list(self._entries):
            self.leave(owner)
        await self._idle.wait()

    @property
    def closed(self) -> bool:
        """Whether the server is about to stop."""
        return self._closed

    def _admit(self, job: Job, owner: Hashable, name: str | int | None, channel: Channel, *, bounded: bool) -> _Entry:
        if self._closed:
            raise ShuttingDown("the server is about to stop; connect again in a moment")
        if bounded and self._running >= self._max_runs and self._queued >= self._queue_size:
            raise Overloaded(
                f"{self._queued} runs wait already, and the limit is {self._queue_size} (--queue-size)",
                limit=self._queue_size, retryAfterMs=RETRY_AFTER_MS,
            )  # fmt: skip
        if name is not None and (owner, name) in self._named:
            raise Conflict(f"this connection has a run {name!r} under way already", path="/id")
        entry = _Entry(job, channel, asyncio.get_running_loop().create_future())
        self._entries.setdefault(owner, set()).add(entry)
        self._idle.clear()
        if name is not None:
            self._named[owner, name] = entry
        self._queues.setdefault(owner, deque()).append(entry)
        self._queued += 1
        self._give_turns()
        return entry

    async def _has_its_turn(self, entry: _Entry, owner: Hashable) -> bool:
        """Waits for the turn; False when the run was cancelled first."""
        try:
            await entry.turn
        except asyncio.CancelledError:
            if entry.turn.cancelled() and entry.channel.cancel.is_set():
                return False
            if not entry.turn.cancelled():  # the turn had come, but whoever waited for it is gone
                self._running -= 1
                self._give_turns()
            raise
        finally:
            queue = self._queues.get(owner)
            if queue and entry in queue:
                queue.remove(entry)
                self._queued -= 1
        return True

    def _give_turns(self) -> None:
        while self._running < self._max_runs and self._queues:
            owner, queue = next(iter(self._queues.items()))
            del self._queues[owner]
            entry = queue.popleft() if queue else None
            if queue:
                self._queues[owner] = queue  # behind all the others
            if entry is not None:
                self._queued -= 1
                if not entry.turn.done():
                    entry.turn.set_result(None)
                    self._running += 1

    def _end(self, entry: _Entry) -> None:
        entry.channel.cancel.set()
        if not entry.turn.done():
            entry.turn.cancel()

    def _forget(self, entry: _Entry, owner: Hashable, name: str | int | None) -> None:
        self._entries[owner].discard(entry)
        if not self._entries[owner]:
            del self._entries[owner]
        if not self._entries:
            self._idle.set()
        if name is not None:
            del self._named[owner, name]
