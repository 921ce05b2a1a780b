"""A server's connection to a Dask scheduler: leases come from there, runs go straight to the workers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask
from distributed import Client, LocalCluster, Security
from distributed.comm.core import Comm, connect
from distributed.core import ConnectionPool

from background import spawn
from sandbox.cluster_conversation import RUN, NotStarted, ServerEnd, WorkerLost
from sandbox.cluster_leases import Lease, LeaseLost, Leases
from sandbox.cluster_worker import RESOURCE, SandboxPlugin
from sandbox.engine import EngineAway, failed_outcome, never_started
from sandbox.local import Local
from sandbox.model import Channel, Facts, Job, Outcome
from sandbox.verdict import conclude

log = logging.getLogger(__name__)

ATTEMPTS = 4
"""So many leases a run may get, if their workers are lost one after the other before it has started."""
CONNECT_SECONDS = 5.0
CLOSE_SECONDS = 2.0
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


class Link:
    """Runs Jobs on the workers of one scheduler until it is closed. `lost` is set when the scheduler is gone."""

    def __init__(self, client: Client, pool: ConnectionPool, resized: Callable[[int], None]) -> None:
        self.lost = asyncio.Event()
        self._client = client
        self._pool = pool
        self._resized = resized
        self._leases = Leases(client, self._give_back)

    async def begin(self) -> None:
        """Listens to what the scheduler tells, and counts the workers."""
        self._client.subscribe_topic("all", self._heard_of_worker)
        await self._count()

    def end(self) -> None:
        """Listens no more."""
        if not self.lost.is_set():
            self._leases.close()
            self._client.unsubscribe_topic("all")

    async def run(self, job: Job, channel: Channel) -> Outcome:
        """Runs `job` on the worker that the scheduler chooses. Raises EngineAway."""
        cancelled = spawn(channel.cancel.wait(), name="heed cancel")
        reason = ""
        try:
            for _ in range(ATTEMPTS):
                try:
                    lease = await self._leases.take(job.batch, cancelled)
                except LeaseLost as loss:
                    if self.lost.is_set() or self._client.status != "running":
                        raise EngineAway("the cluster's scheduler is gone") from loss
                    reason = str(loss)
                    continue
                if lease is None:
                    return never_started(job)
                try:
                    return await self._run_at(lease, job, channel)
                except NotStarted as failure:
                    reason = str(failure)
            return failed_outcome(job, f"the run was not started: {reason}")
        finally:
            cancelled.cancel()

    async def _run_at(self, lease: Lease, job: Job, channel: Channel) -> Outcome:
        """Runs `job` where the lease is. Raises NotStarted."""
        lost = False
        try:
            comm = await self._pool.connect(lease.address, timeout=CONNECT_SECONDS)
            end = ServerEnd(comm, lease.id, job, channel)
            try:
                outcome = await end.outcome()
            finally:
                self._pool.reuse(lease.address, comm)
        except OSError as failure:
            lost = True
            raise NotStarted(f"its worker {lease.worker} cannot be reached: {failure}") from failure
        except NotStarted:
            lost = True
            raise
        except WorkerLost:
            lost = True
            log.warning("the worker %s was lost in a run", lease.worker)
            sentence = f"the worker {lease.worker} was lost while it ran the program, which is not run again"
            facts = Facts(engine_failure=sentence)
            outcome = conclude(job, facts, bytes(end.printed["stdout"]), bytes(end.printed["stderr"]))
        finally:
            self._leases.give_back(lease, lost=lost)
        return replace(outcome, worker=lease.worker)

    def _give_back(self, lease: Lease) -> None:
        spawn(self._decline(lease), name="give back a lease")

    async def _decline(self, lease: Lease) -> None:
        with contextlib.suppress(OSError, RuntimeError):  # the worker is gone, or we are about to be
            comm = await self._pool.connect(lease.address, timeout=CONNECT_SECONDS)
            try:
                await comm.write({"op": RUN, "id": lease.id, "job": None})
            finally:
                self._pool.reuse(lease.address, comm)

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
async def pooled(security: Security) -> AsyncIterator[ConnectionPool]:
    """Connections to workers. They outlive a link, because runs go on for a while when the scheduler is gone."""
    pool = ConnectionPool(connection_args=security.get_connection_args("client"))
    await pool.start()
    try:
        yield pool
    finally:
        await pool.close()


@asynccontextmanager
async def linked(
    address: str, security: Security, pool: ConnectionPool, resized: Callable[[int], None]
) -> AsyncIterator[Link]:
    """A link to the scheduler at `address`, for as long as the block lasts. Raises OSError."""
    async with AsyncExitStack() as parts:
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
    security = await asyncio.to_thread(Security.temporary)
    with tempfile.TemporaryDirectory(prefix="runboard-cluster-", ignore_cleanup_errors=True) as folder:
        cluster = LocalCluster(
            n_workers=workers, threads_per_worker=slots, resources={RESOURCE: slots}, memory_limit=0,
            processes=True, host="127.0.0.1", dashboard_address="127.0.0.1:0", security=security, asynchronous=True,
            scheduler_kwargs={"dashboard": False}, local_directory=folder, silence_logs=logging.ERROR,
            plugins=(SandboxPlugin(local, (engine,), EMBEDDED_DRAIN_SECONDS),),
        )  # fmt: skip
        async with cluster:
            yield cluster.scheduler_address, security
