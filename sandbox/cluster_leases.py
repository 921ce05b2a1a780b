"""The places on workers that a server has leased, and those that it has asked the scheduler for.

A lease costs a round through the scheduler, about 10 ms. So it serves one run after the other, as long as they follow
each other closely, but no longer than LEASE_SECONDS: then it goes back, and the scheduler decides anew who is next.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from distributed import Client, Future

from background import spawn
from sandbox.cluster_worker import RESOURCE, lease

LEASE_SECONDS = 1.0
"""How long one lease serves. Other servers of the cluster, and runs of a higher priority, wait for it no longer."""
KEPT_SECONDS = 0.1
"""How long a lease is kept with nothing to run."""
FORGET_SECONDS = 1.0
"""How long Dask may know a lease that is over. It is forgotten with the next request, because Dask's client sends once
in 10 ms, and a message of its own would hold the next request up."""
PRIORITY, BATCH_PRIORITY = 1, 0
"""Runs that somebody waits for go first."""


class LeaseLost(Exception):
    """The scheduler gave up a lease before it was granted; the text says why."""


@dataclass(frozen=True, slots=True)
class Lease:
    """A place on a worker. `until` (the loop's clock) is the latest time at which it takes another run."""

    id: str
    address: str
    worker: str
    until: float


@dataclass(eq=False, slots=True)
class _Request:
    """One that was asked for. `failed` ends when Dask gives it up, with the reason."""

    id: str
    batch: bool
    granted: asyncio.Future[Lease]
    failed: asyncio.Task[str]


class Leases:
    """Those of one link. `decline` tells a worker that its lease is not needed."""

    def __init__(self, client: Client, decline: Callable[[Lease], None]) -> None:
        self._client = client
        self._decline = decline
        self._loop = asyncio.get_running_loop()
        self._topic = f"runboard-{uuid.uuid4().hex}"
        self._requests: list[_Request] = []
        self._kept: list[Lease] = []
        self._known: dict[str, Future[Any]] = {}
        self._over: list[Future[Any]] = []
        self._forgetting: asyncio.TimerHandle | None = None
        client.subscribe_topic(self._topic, self._heard)

    def close(self) -> None:
        """Gives back what is kept."""
        for kept in self._kept:
            self._decline(kept)
        self._kept.clear()
        self._over += self._known.values()
        self._forget()
        self._client.unsubscribe_topic(self._topic)

    async def take(self, batch: bool, cancelled: asyncio.Future[Any]) -> Lease | None:
        """Waits for a lease; None when `cancelled` is done first. Raises LeaseLost."""
        while self._kept:
            kept = self._kept.pop(0)
            if self._loop.time() < kept.until:
                return kept
            self.give_back(kept)
        request = self._ask(batch)
        taken = False
        try:
            news: set[asyncio.Future[Any]] = {request.granted, request.failed, cancelled}
            await asyncio.wait(news, return_when=asyncio.FIRST_COMPLETED)
            if cancelled.done():
                return None
            if not request.granted.done():
                raise LeaseLost(request.failed.result())
            taken = True
            return request.granted.result()
        finally:
            self._requests.remove(request)
            request.failed.cancel()
            granted = request.granted.result() if request.granted.done() else None
            if granted is None or granted.id != request.id:  # it got another's
                self._over.append(self._known.pop(request.id))
                self._forget()
            if granted is not None and not taken:
                self.give_back(granted)

    def give_back(self, lease: Lease, *, lost: bool = False) -> None:
        """A run is over: the lease goes to the next one that waits, is kept for a moment, or goes back."""
        if not lost and self._loop.time() < lease.until and lease.id in self._known:
            if not self._offer(lease):
                self._kept.append(lease)
                self._loop.call_later(KEPT_SECONDS, self._let_go, lease)
            return
        if not lost:
            self._decline(lease)
        if (future := self._known.pop(lease.id, None)) is not None:
            self._over.append(future)
            if self._forgetting is None:
                self._forgetting = self._loop.call_later(FORGET_SECONDS, self._forget)

    def _ask(self, batch: bool) -> _Request:
        lease_id = uuid.uuid4().hex
        future = self._client.submit(
            lease, lease_id, self._topic, key=f"runboard-{lease_id}", pure=False, retries=0,
            resources={RESOURCE: 1}, priority=BATCH_PRIORITY if batch else PRIORITY,
        )  # fmt: skip
        self._forget()
        self._known[lease_id] = future
        failed = spawn(_failure(future), name="watch a lease")
        request = _Request(lease_id, batch, self._loop.create_future(), failed)
        self._requests.append(request)
        return request

    def _heard(self, event: tuple[float, dict[str, str]]) -> None:
        told = event[1]
        granted = Lease(told["lease"], told["address"], told["name"], self._loop.time() + LEASE_SECONDS)
        own = next((request for request in self._requests if request.id == granted.id), None)
        if own is not None and not own.granted.done():
            own.granted.set_result(granted)
        elif not self._offer(granted):
            self._decline(granted)

    def _offer(self, lease: Lease) -> bool:
        """Gives a lease to the first request that waits, whichever was asked for; those of a batch come last."""
        waiting = [request for request in self._requests if not request.granted.done()]
        first = min(waiting, key=lambda request: request.batch, default=None)
        if first is not None:
            first.granted.set_result(lease)
        return first is not None

    def _let_go(self, lease: Lease) -> None:
        if lease in self._kept:
            self._kept.remove(lease)
            self._decline(lease)
            self.give_back(lease, lost=True)

    def _forget(self) -> None:
        if self._forgetting is not None:
            self._forgetting.cancel()
            self._forgetting = None
        for future in self._over:
            future.release()
        self._over.clear()


async def _failure(future: Future[Any]) -> str:
    """Waits until Dask has ended a lease; gives the reason."""
    try:
        await future
    except asyncio.CancelledError:
        if not future.cancelled():
            raise
        return "the scheduler is gone"
    except Exception as failure:
        return f"{type(failure).__name__}: {failure}"
    return "nobody came for its lease in time"
