"""ClusterEngine: runs go to the workers of a Dask cluster, each of which has a local engine of its own."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import ipaddress
import logging
import random
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from background import spawn
from sandbox.engine import EngineAway, EngineUnavailable, never_started
from sandbox.local import Local
from sandbox.model import Channel, Job, Outcome

if TYPE_CHECKING:
    from sandbox.cluster_link import Link

log = logging.getLogger(__name__)

OPEN_SECONDS = 5.0
"""How long the server's start waits for a scheduler; later the server goes on without."""
CANCEL_SECONDS = 1.0
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 15.0
"""Seconds between two attempts to reach the scheduler: twice as many after each."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the cluster is: a scheduler's address, or None for workers embedded in this server.

    `tls` are the files of the authority, the certificate and the key. `workers`, `slots` (runs at once on each),
    `engine` and `local` are for embedded workers.
    """

    scheduler: str | None = None
    tls: tuple[Path | None, Path | None, Path | None] = (None, None, None)
    workers: int = 2
    slots: int = 1
    engine: str = "forkserver"
    local: Local = Local()


class ClusterEngine:
    """Runs Jobs on a cluster. Embedded workers start with the first run; a scheduler elsewhere is connected at once."""

    name = "cluster"

    def __init__(self, place: Place) -> None:
        self._place = place
        self._resized: Callable[[int], None] = lambda runs: None
        self._lost: Callable[[str], None] = lambda sentence: None
        self._capacity = 0 if place.scheduler else place.workers * place.slots
        self._link: Link | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._linked = asyncio.Event()
        self._parts = AsyncExitStack()
        self._starting: asyncio.Task[None] | None = None
        self._closing = False

    @property
    def capacity(self) -> int:
        """How many runs the workers hold at once, as far as is known."""
        return self._capacity

    def follow(self, resized: Callable[[int], None], lost: Callable[[str], None]) -> None:
        """`resized` hears how many runs all workers hold, `lost` why no run can be started any more."""
        self._resized, self._lost = resized, lost

    def away(self) -> str | None:
        """Why no run can be taken now, in a sentence; None if one can."""
        if self._place.scheduler is None:
            return None
        if self._link is None:
            return f"the cluster's scheduler at {self._place.scheduler} does not answer"
        return None if self._capacity else f"the cluster at {self._place.scheduler} has no worker with a sandbox"

    async def open(self) -> None:
        """Begins to look for the scheduler, if there is one. Raises EngineUnavailable: its address or keys are bad."""
        if self._place.scheduler is not None:
            dask_side = await _dask_side()
            try:
                security = dask_side.security(self._place.tls)
                dask_side.check_address(self._place.scheduler, security)
            except (OSError, ValueError) as failure:
                raise EngineUnavailable(f"the cluster cannot be used: {failure}") from failure
            self._keeping = spawn(self._keep_linked(self._place.scheduler, security), name="keep the cluster linked")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._linked.wait(), OPEN_SECONDS)

    def warnings(self) -> list[str]:
        """What is wrong with the way to the cluster. What a worker cannot enforce stands in its own log."""
        if self._place.scheduler is None or not self._place.scheduler.startswith("tcp://"):
            return []
        host = self._place.scheduler.removeprefix("tcp://").rpartition(":")[0].strip("[]")
        with contextlib.suppress(ValueError):
            if host == "localhost" or ipaddress.ip_address(host).is_loopback:
                return []
        return [
            f"the cluster at {self._place.scheduler} has no TLS: whoever reaches it can run anything on its machines"
        ]

    async def run(self, job: Job, channel: Channel) -> Outcome:
        """Runs `job` on a worker. Raises EngineAway: the cluster is not there, and nothing has started."""
        if self._place.scheduler is None and self._link is None:
            await self._start_embedded(channel)
            if channel.cancel.is_set():
                return never_started(job)
        if self._link is None:
            raise EngineAway(self.away() or "the cluster is closed")
        return await self._link.run(job, channel)

    async def close(self) -> None:
        """Ends embedded workers, or leaves the cluster."""
        self._closing = True
        for chore in (self._keeping, self._starting):
            if chore is not None:
                while not chore.done():  # Dask's client may swallow a cancel
                    chore.cancel()
                    await asyncio.wait({chore}, timeout=CANCEL_SECONDS)
        self._link = None
        await self._parts.aclose()

    # A scheduler elsewhere

    async def _keep_linked(self, address: str, security: Any) -> None:
        """Connects, and does so again whenever the connection is lost."""
        pause = FIRST_PAUSE
        dask_side = await _dask_side()
        async with dask_side.pooled(security) as pool:
            while not self._closing:
                try:
                    async with dask_side.linked(address, security, pool, self._heard_of_capacity) as link:
                        log.info("the cluster at %s is there and holds %d runs at once", address, self._capacity)
                        self._link, pause = link, FIRST_PAUSE
                        self._linked.set()
                        await link.lost.wait()
                        self._lose(address)
                except (OSError, TimeoutError) as failure:
                    log.warning("the cluster's scheduler at %s does not answer: %s", address, failure)
                await asyncio.sleep(pause * random.uniform(0.75, 1.25))  # noqa: S311 -- not all at the same moment
                pause = min(2 * pause, LONGEST_PAUSE)

    def _lose(self, address: str) -> None:
        log.warning("the cluster's scheduler at %s is gone", address)
        self._link = None
        self._lost(self.away() or "")

    def _heard_of_capacity(self, runs: int) -> None:
        """A worker has come or gone. Of embedded workers, one that is gone is on its way back."""
        self._capacity = max(1, runs) if self._place.scheduler is None else runs
        self._resized(self._capacity)

    # Embedded workers

    async def _start_embedded(self, channel: Channel) -> None:
        """Starts them, once; who comes meanwhile waits for the same start, unless it is cancelled."""
        if self._closing:
            raise EngineAway("the server is about to stop")
        if self._starting is None or (self._starting.done() and self._link is None):
            self._starting = spawn(self._embed(), name="start the embedded cluster")
        cancelled = spawn(channel.cancel.wait(), name="heed cancel")
        try:
            await asyncio.wait({self._starting, cancelled}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            cancelled.cancel()
        if self._starting.cancelled():
            raise EngineAway("the server is about to stop")
        if self._starting.done() and (failure := self._starting.exception()) is not None:
            raise EngineAway(f"the embedded cluster did not start: {failure}") from failure

    async def _embed(self) -> None:
        place, clock = self._place, asyncio.get_running_loop().time
        log.info("starting an embedded cluster of %d workers, %d runs at once on each", place.workers, place.slots)
        begin = clock()
        dask_side = await _dask_side()
        async with AsyncExitStack() as parts:
            address, security = await parts.enter_async_context(
                dask_side.embedded(place.workers, place.slots, place.local, place.engine)
            )
            pool = await parts.enter_async_context(dask_side.pooled(security))
            link = await parts.enter_async_context(dask_side.linked(address, security, pool, self._heard_of_capacity))
            self._parts = parts.pop_all()
        self._link = link
        log.info("the embedded cluster is ready after %.1f s, at %s", clock() - begin, address)


async def _dask_side() -> Any:
    """The module that imports Dask, which takes most of a second: in a thread, and only when it is needed."""
    return await asyncio.to_thread(importlib.import_module, "sandbox.cluster_link")
