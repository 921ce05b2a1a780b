"""The admission queue: bounded, fair between connections, and with an end for every run."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace

from protocol.errors import ClusterUnavailable, Conflict, NotFound, Overloaded, PayloadTooLarge, ShuttingDown
from sandbox.engine import Engine, EngineAway, failed_outcome, never_started
from sandbox.model import Channel, Feed, Job, Outcome, Stream

log = logging.getLogger(__name__)
RETRY_AFTER_MS = 1000
MAX_UNREAD_BYTES = 1 << 20
"""Standard input that may wait for a run to read it."""

Emit = Callable[[Stream, bytes], None]
Tell = Callable[[str, int | None], None]


@dataclass(eq=False, slots=True)
class _Entry:
    """A run that is queued or under way."""

    job: Job
    channel: Channel
    turn: asyncio.Future[None]
    size: int
    counts: bool = False
    """Whether it is among those under way."""
    queued_at: float = field(default_factory=time.monotonic)


def _unavailable(sentence: str) -> ClusterUnavailable:
    return ClusterUnavailable(f"{sentence}; mode standalone is there", retryAfterMs=RETRY_AFTER_MS)


def _channel(emit: Emit | None, interactive: bool) -> Channel:
    feed = Feed() if interactive else None
    return Channel(feed=feed) if emit is None else Channel(emit, feed=feed)


@dataclass(frozen=True, slots=True)
class Bounds:
    """How many runs may be under way and may wait, in all and of one connection, and how large those that wait are."""

    running: int
    queued: int
    queued_bytes: int
    running_of_one: int
    queued_of_one: int


class Runs:
    """Runs Jobs on an engine, so many at once; the rest wait, connection by connection in turn.

    An `owner` stands for a connection: any hashable thing.
    """

    def __init__(self, engine: Engine, bounds: Bounds, away: Callable[[], str | None] = lambda: None) -> None:
        """`away` says in a sentence why the engine can take no run now, if it cannot."""
        self._engine = engine
        self._bounds = bounds
        self._away = away
        self._running_of: Counter[Hashable] = Counter()
        self._queues: dict[Hashable, deque[_Entry]] = {}  # in the order in which owners have their next turn
        self._queued = self._queued_bytes = 0
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
        *,
        emit: Emit | None = None,
        interactive: bool = False,
        of_task: bool = False,
        tell: Tell | None = None,
    ) -> tuple[Outcome, float]:
        """Runs `job` when it is its turn; gives its Outcome and how long it waited, in milliseconds.

        `emit` gets the output as it comes. An interactive run's standard input is what `feed` brings.

        A run `of_task` may wait in a full queue too: tasks are bounded themselves, and a task that was accepted must
        not fail because others are busy. `tell` hears `queued` with a position, if the run has to wait, and `running`.

        Raises:
            Overloaded: the queue is full.
            Conflict: `owner` has a run of that name already.
            ShuttingDown: the server is about to stop.
            ClusterUnavailable: the engine is a cluster that is not there; nothing has started.
        """
        entry = self._admit(job, owner, name, _channel(emit, interactive), bounded=not of_task)
        try:
            if tell is not None and not entry.turn.done():
                tell("queued", self._position(entry, owner))
            if not await self._has_its_turn(entry, owner):
                return never_started(job), (time.monotonic() - entry.queued_at) * 1000
            queue_ms = (time.monotonic() - entry.queued_at) * 1000
            if tell is not None:
                tell("running", None)
            first = self._running_of[owner] == 1
            channel = replace(entry.channel, first=first, ended=lambda: self._give_back(entry, owner))
            try:
                return await self._engine.run(job, channel), queue_ms
            except EngineAway as away:
                raise _unavailable(str(away)) from away
            except Exception:
                log.exception("the %s engine failed", self._engine.name)
                return failed_outcome(job, "the engine failed; the server's log has more"), queue_ms
            finally:
                self._give_back(entry, owner)
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

    def feed(self, owner: Hashable, name: str | int, text: str, *, end: bool) -> None:
        """More standard input for a run, queued or under way.

        Raises:
            NotFound: `owner` has no such run now.
            Conflict: its standard input does not take any.
            PayloadTooLarge: more would wait than a run may leave unread.
        """
        entry = self._named.get((owner, name))
        if entry is None:
            raise NotFound(f"this connection has no run {name!r} under way", path="/data/run")
        feed = entry.channel.feed
        if feed is None:
            raise Conflict(f"the run {name!r} was not started with interactive: true", path="/data/run")
        if feed.ended:
            raise Conflict(f"standard input of the run {name!r} was ended before", path="/data/run")
        added = text.encode("utf-8", "surrogatepass")
        if len(feed) + len(added) > MAX_UNREAD_BYTES:
            raise PayloadTooLarge(
                f"the run {name!r} has left {len(feed)} bytes unread; {len(added)} more would be over the limit of"
                f" {MAX_UNREAD_BYTES} bytes (fixed by the protocol)",
                path="/data/text", limit=MAX_UNREAD_BYTES,
            )  # fmt: skip
        feed.push(added)
        if end:
            feed.end()

    def has(self, owner: Hashable, name: str | int) -> bool:
        """Whether `owner` has a run of that name, queued or under way."""
        return (owner, name) in self._named

    def resize(self, bounds: Bounds) -> None:
        """From now on, so many; what is under way beyond that may end."""
        self._bounds = bounds
        self._give_turns()

    def refuse_waiting(self, sentence: str) -> None:
        """The engine is gone: whoever waits for a turn is told so, instead of waiting for nobody knows how long."""
        for entry in [entry for queue in self._queues.values() for entry in queue]:
            if not entry.turn.done():
                entry.turn.set_exception(_unavailable(sentence))

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
        if (reason := self._away()) is not None:
            raise _unavailable(reason)
        if bounded:
            self._check_room(owner, job)
        if name is not None and (owner, name) in self._named:
            raise Conflict(f"this connection has a run {name!r} under way already", path="/id")
        entry = _Entry(job, channel, asyncio.get_running_loop().create_future(), job.given_bytes)
        self._entries.setdefault(owner, set()).add(entry)
        self._idle.clear()
        if name is not None:
            self._named[owner, name] = entry
        self._queues.setdefault(owner, deque()).append(entry)
        self._count(entry, 1)
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
                self._give_back(entry, owner)
            raise
        finally:
            queue = self._queues.get(owner)
            if queue and entry in queue:
                queue.remove(entry)
                self._count(entry, -1)
        return True

    def _count(self, entry: _Entry, more: int) -> None:
        self._queued += more
        self._queued_bytes += more * entry.size

    def _check_room(self, owner: Hashable, job: Job) -> None:
        """Refuses a run that would have to wait where as many wait as may."""
        bounds, own = self._bounds, len(self._queues.get(owner, ()))
        if self._may_run(owner) and own == 0:
            return
        if own >= bounds.queued_of_one:
            raise Overloaded(
                f"{own} runs of this connection wait already, and the limit is {bounds.queued_of_one}"
                " (--max-queued-per-connection)",
                limit=bounds.queued_of_one, retryAfterMs=RETRY_AFTER_MS,
            )  # fmt: skip
        if self._queued >= bounds.queued:
            raise Overloaded(
                f"{self._queued} runs wait already, and the limit is {bounds.queued} (--queue-size)",
                limit=bounds.queued, retryAfterMs=RETRY_AFTER_MS,
            )  # fmt: skip
        if self._queued_bytes + job.given_bytes > bounds.queued_bytes:
            raise Overloaded(
                f"the runs that wait have {self._queued_bytes} bytes of code, input and files; {job.given_bytes} more"
                f" would be over the limit of {bounds.queued_bytes} bytes (--queue-bytes)",
                limit=bounds.queued_bytes, retryAfterMs=RETRY_AFTER_MS,
            )  # fmt: skip

    def _may_run(self, owner: Hashable) -> bool:
        return self._running < self._bounds.running and self._running_of[owner] < self._bounds.running_of_one

    def _position(self, entry: _Entry, owner: Hashable) -> int:
        """How many turns it takes until it is this run's, if nobody else comes: 1 for the next."""
        before = self._queues[owner].index(entry)
        owners = list(self._queues)
        place = owners.index(owner)
        earlier = sum(min(len(self._queues[other]), before + 1) for other in owners[:place])
        return 1 + before + earlier + sum(min(len(self._queues[other]), before) for other in owners[place + 1 :])

    def _give_turns(self) -> None:
        while (owner := self._next_owner()) is not None:
            queue = self._queues.pop(owner)
            entry = queue.popleft() if queue else None
            if queue:
                self._queues[owner] = queue  # behind all the others
            if entry is not None:
                self._count(entry, -1)
                if not entry.turn.done():
                    entry.turn.set_result(None)
                    entry.counts = True
                    self._running += 1
                    self._running_of[owner] += 1

    def _next_owner(self) -> Hashable:
        """Of those who may run more, one with the fewest runs under way; of several, the one who waits for longest."""
        if self._running >= self._bounds.running:
            return None
        idle = next((owner for owner in self._queues if owner not in self._running_of), None)
        if idle is not None:
            return idle
        may_run = (owner for owner in self._queues if self._may_run(owner))
        return min(may_run, key=lambda owner: self._running_of[owner], default=None)

    def _give_back(self, entry: _Entry, owner: Hashable) -> None:
        """A program has ended: its place is the next one's."""
        if not entry.counts:
            return
        entry.counts = False
        self._running -= 1
        self._running_of[owner] -= 1
        if not self._running_of[owner]:
            del self._running_of[owner]
        self._give_turns()

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
