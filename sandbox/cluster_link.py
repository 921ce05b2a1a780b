"""A server's connection to a Dask scheduler: leases come from there, runs go straight to the workers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import tempfile
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import dask
from distributed import Client, Future, LocalCluster, Security
from distributed.comm.core import Comm, connect
from distributed.core import ConnectionPool

from background import spawn
from sandbox.cluster_conversation import RUN, LeaseRefused, ServerEnd
from sandbox.cluster_worker import RESOURCE, SandboxPlugin, lease
from sandbox.engine import EngineAway, failed_outcome, never_started
from sandbox.local import Local
from sandbox.model import Channel, Facts, Job, Outcome
from sandbox.verdict import conclude

log = logging.getLogger(__name__)

ATTEMPTS = 4
"""So many leases a run may get, if their workers are lost one after the other before it has started."""
CONNECT_SECONDS = 5.0
FORGET_SECONDS = 1.0
"""How long a lease that is over may stay known, if no other is asked for. Dask's client sends once in 10 ms."""
CLOSE_SECONDS = 2.0
PRIORITY, BATCH_PRIORITY = 1, 0
"""Leases for runs that somebody waits for go first."""
EMBEDDED_DRAIN_SECONDS = 0.5
"""The runs of an embedded cluster are over before it is closed."""

dask.config.set(
    {
        "distributed.scheduler.allowed-failures": 0,
        "distributed.scheduler.http.routes": [],  # an embedded scheduler has nothing to show
        "distributed.worker.http.routes": [],
        "distributed.admin.tick.limit": "1h",  # Dask's complaint about a slow loop is not for our users
    }
)


@dataclass(frozen=True, slots=True)
class _Grant:
    """The scheduler has chosen a worker."""

    lease_id: str
    address: str
    worker: str


@dataclass(slots=True)
class _Request:
    """A lease that was asked for. `granted` is its grant; `failed` ends when Dask gives it up, with the reason."""

    granted: asyncio.Future[_Grant]
    failed: asyncio.Task[str]
    taken: bool = field(default=False)


class Link:
    """Runs Jobs on the workers of one scheduler until it is closed. `lost` is set when the scheduler is gone."""

    def __init__(self, client: Client, pool: ConnectionPool, resized: Callable[[int], None]) -> None:
        self.lost = asyncio.Event()
        self._client = client
        self._pool = pool
        self._resized = resized
        self._topic = f"runboard-{uuid.uuid4().hex}"
        self._requests: dict[str, _Request] = {}
        self._over: list[Future[Any]] = []
        self._forgetting: asyncio.TimerHandle | None = None

    async def begin(self) -> None:
        """Listens to what the scheduler tells, and counts the workers."""
        self._client.subscribe_topic(self._topic, self._heard_of_lease)
        self._client.subscribe_topic("all", self._heard_of_worker)
        await self._count()

    def end(self) -> None:
        """Listens no more."""
        if not self.lost.is_set():
            self._forget()
            for topic in (self._topic, "all"):
                self._client.unsubscribe_topic(topic)

    async def run(self, job: Job, channel: Channel) -> Outcome:
        """Runs `job` on the worker that the scheduler chooses. Raises EngineAway."""
        cancelled = spawn(channel.cancel.wait(), name="heed cancel")
        try:
            reason = ""
            for _ in range(ATTEMPTS):
                async with self._request(job) as request:
                    news: set[asyncio.Future[Any]] = {request.granted, request.failed, cancelled}
                    await asyncio.wait(news, return_when=asyncio.FIRST_COMPLETED)
                    if channel.cancel.is_set():
                        return never_started(job)
                    if not request.granted.done():
                        reason = request.failed.result()
                        if self.lost.is_set() or self._client.status != "running":
                            raise EngineAway("the cluster's scheduler is gone")
                        continue
                    grant = request.granted.result()
                    try:
                        comm = await self._pool.connect(grant.address, timeout=CONNECT_SECONDS)
                    except OSError as failure:
                        reason = f"its worker {grant.worker} cannot be reached: {failure}"
                        continue
                    request.taken = True
                    try:
                        return await _converse(comm, grant, job, channel)
                    except LeaseRefused as refusal:
                        reason = f"its worker {grant.worker} gave it back: {refusal}"
                    finally:
                        self._pool.reuse(grant.address, comm)
            return failed_outcome(job, f"the run was not started: {reason}")
        finally:
            cancelled.cancel()

    @asynccontextmanager
    async def _request(self, job: Job) -> AsyncIterator[_Request]:
        """Asks for a lease; what is not taken is given back, and Dask keeps nothing of it."""
        lease_id = uuid.uuid4().hex
        future = self._client.submit(
            lease, lease_id, self._topic, key=f"runboard-{lease_id}", pure=False, retries=0,
            resources={RESOURCE: 1}, priority=BATCH_PRIORITY if job.batch else PRIORITY,
        )  # fmt: skip
        request = _Request(asyncio.get_running_loop().create_future(), spawn(_failure(future), name="watch a lease"))
        self._requests[lease_id] = request
        self._forget()
        try:
            yield request
        finally:
            del self._requests[lease_id]
            request.failed.cancel()
            self._over.append(future)
            if request.taken and self._forgetting is None:
                self._forgetting = asyncio.get_running_loop().call_later(FORGET_SECONDS, self._forget)
            elif not request.taken:
                self._forget()
            if request.granted.done() and not request.taken:
                self._give_back(request.granted.result())

    def _forget(self) -> None:
        """Releases leases that are over: with the next request, because a message of its own would hold that up."""
        if self._forgetting is not None:
            self._forgetting.cancel()
            self._forgetting = None
        for future in self._over:
            future.release()
        self._over.clear()

    def _heard_of_lease(self, event: tuple[float, dict[str, str]]) -> None:
        told = event[1]
        grant = _Grant(told["lease"], told["address"], told["name"])
        request = self._requests.get(grant.lease_id)
        if request is None or request.granted.done():
            self._give_back(grant)
        else:
            request.granted.set_result(grant)

    def _give_back(self, grant: _Grant) -> None:
        spawn(self._decline(grant), name="give back a lease")

    async def _decline(self, grant: _Grant) -> None:
        with contextlib.suppress(OSError, RuntimeError):  # the worker is gone, or we are about to be
            comm = await self._pool.connect(grant.address, timeout=CONNECT_SECONDS)
            try:
                await comm.write({"op": RUN, "id": grant.lease_id, "job": None})
            finally:
                self._pool.reuse(grant.address, comm)

    def _heard_of_worker(self, event: tuple[float, dict[str, Any]]) -> None:
        if event[1].get("action") in ("add-worker", "remove-worker"):
            spawn(self._count(), name="count workers")

    async def _count(self) -> None:
        """Tells how many runs all workers together hold."""
        with contextlib.suppress(OSError):
            scheduler: Any = self._client.scheduler
            identity = await scheduler.identity(n_workers=-1)
            workers = identity["workers"].values()
            self._resized(sum(int(worker["resources"].get(RESOURCE, 0)) for worker in workers))


async def _failure(future: Any) -> str:
    """Waits until Dask has ended a lease; gives the reason. A lease that was kept ends without one."""
    try:
        await future
    except asyncio.CancelledError:
        if not future.cancelled():
            raise
        return "the scheduler is gone"
    except Exception as failure:
        return f"{type(failure).__name__}: {failure}"
    return "nobody came for its lease in time"


async def _converse(comm: Comm, grant: _Grant, job: Job, channel: Channel) -> Outcome:
    end = ServerEnd(comm, grant.lease_id, job, channel)
    try:
        outcome = await end.outcome()
    except OSError:
        log.warning("the worker %s was lost in a run", grant.worker)
        lost = f"the worker {grant.worker} was lost while it ran the program, which is not run again"
        facts = Facts(engine_failure=lost)
        outcome = conclude(job, facts, bytes(end.printed["stdout"]), bytes(end.printed["stderr"]))
    return replace(outcome, worker=grant.worker)


def security(tls: tuple[Path | None, Path | None, Path | None]) -> Security:
    """The keys of a server. Raises OSError: a file cannot be read; ValueError: one is missing, or they do not fit."""
    ca, certificate, key = (None if file is None else str(file) for file in tls)
    if ca is None and certificate is None and key is None:
        return Security()
    if ca is None or certificate is None or key is None:
        raise ValueError("TLS needs all three of --cluster-tls-ca, --cluster-tls-cert and --cluster-tls-key")
    for file in (ca, certificate, key):
        Path(file).read_bytes()
    keys = Security(
        require_encryption=True, tls_ca_file=ca, tls_client_cert=certificate, tls_client_key=key,
    )  # fmt: skip
    keys.get_connection_args("client")
    return keys


def check_address(address: str, keys: Security) -> None:
    """Raises ValueError: no address of a scheduler, or one that does not go with the keys."""
    scheme, _, place = address.partition("://")
    if scheme not in ("tcp", "tls") or not place:
        raise ValueError(f"--scheduler must be tls://host:8786 or tcp://host:8786, not {address!r}")
    if (scheme == "tls") != bool(keys.require_encryption):
        raise ValueError(
            f"--scheduler {address} and --cluster-tls-ca, --cluster-tls-cert, --cluster-tls-key: both or none"
        )


@asynccontextmanager
async def linked(address: str, security: Security, resized: Callable[[int], None]) -> AsyncIterator[Link]:
    """A link to the scheduler at `address`, for as long as the block lasts. Raises OSError."""
    async with AsyncExitStack() as parts:
        pool = ConnectionPool(connection_args=security.get_connection_args("client"))
        await pool.start()
        parts.push_async_callback(pool.close)
        client = Client(
            address, security=security, asynchronous=True, set_as_default=False, timeout=CONNECT_SECONDS,
            direct_to_workers=False,
        )  # fmt: skip
        parts.push_async_callback(_close, client)
        await client
        link = Link(client, pool, resized)
        watching = await connect(address, timeout=CONNECT_SECONDS, **security.get_connection_args("client"))
        parts.callback(watching.abort)
        watch = spawn(_watch(watching, link.lost), name="watch the scheduler")
        parts.callback(watch.cancel)
        await link.begin()
        parts.callback(link.end)
        yield link


async def _watch(comm: Comm, lost: asyncio.Event) -> None:
    """A connection on which nothing is ever said: its end is the scheduler's."""
    with contextlib.suppress(OSError):
        await comm.read()
    lost.set()


async def _close(client: Client) -> None:
    with contextlib.suppress(TimeoutError, OSError):
        await client.close(timeout=CLOSE_SECONDS)


@asynccontextmanager
async def embedded(workers: int, slots: int, local: Local, engine: str) -> AsyncIterator[tuple[str, Security]]:
    """A cluster on this machine, whose workers are child processes: its address, and the keys that open it.

    It listens on loopback alone, and the keys are in memory only: other users of the machine cannot talk to it.
    """
    security = Security.temporary()
    with tempfile.TemporaryDirectory(prefix="runboard-cluster-", ignore_cleanup_errors=True) as folder:
        cluster = LocalCluster(
            n_workers=workers, threads_per_worker=slots, resources={RESOURCE: slots}, memory_limit=0,
            processes=True, host="127.0.0.1", dashboard_address="127.0.0.1:0", security=security, asynchronous=True,
            scheduler_kwargs={"dashboard": False}, local_directory=folder, silence_logs=logging.ERROR,
            plugins=(SandboxPlugin(local, (engine,), EMBEDDED_DRAIN_SECONDS),),
        )  # fmt: skip
        async with cluster:
            yield cluster.scheduler_address, security
