"""What makes a Dask worker run Jobs: `dask worker --preload sandbox.cluster_worker --resources sandbox=2`.

A worker opens a local engine of its own, so that programs run in a jail there as they do on the server. The scheduler
deals out leases, which are Dask tasks that hold one unit of the resource `sandbox`. A server that hears of its lease
connects to the worker and hands the job over. So the scheduler never sees a program or its output, and only the server
that has the job can start it.

Settings, in Dask's configuration: `runboard.engine` (`auto`, `forkserver`, `nsjail`; DASK_RUNBOARD__ENGINE) and
`runboard.warm`, the slots that wait ready.
"""

from __future__ import annotations

import asyncio
import logging

import dask
from distributed import Worker, WorkerPlugin, get_worker
from distributed.comm.core import Comm
from distributed.core import Status

from sandbox.cluster_conversation import RUN, WorkerEnd
from sandbox.engine import Engine, EngineUnavailable, failed_outcome
from sandbox.local import JAILING, Local, claim_number
from sandbox.model import Job, Outcome

log = logging.getLogger(__name__)

RESOURCE = "sandbox"
LEASE_SECONDS = 10.0
"""How long a lease without a run waits for its server, which may be gone."""
DRAIN_SECONDS = 8.0
"""How long the runs of a worker that is taken away may still last; 10 s after a signal, Dask's nanny kills it."""


class _Lease:
    """A place that a server has: it may be busy with a run, and is over when the server says so."""

    def __init__(self) -> None:
        self.busy = False
        self.over = asyncio.Event()


class SandboxPlugin(WorkerPlugin):
    """A worker's engine, its leases and its runs."""

    name = "runboard"

    def __init__(self, local: Local, engines: tuple[str, ...] = JAILING, drain_s: float = DRAIN_SECONDS) -> None:
        """Opens the first of these engines that the machine can run."""
        self._local = local
        self._engines = engines
        self._drain_s = drain_s
        self._engine: Engine | None = None

    async def setup(self, worker: Worker) -> None:
        """Makes the worker ready. Raises EngineUnavailable, and then the worker does not start."""
        self._worker = worker
        self._leases: dict[str, _Lease] = {}
        self._runs: set[WorkerEnd] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        number, self._claim = claim_number()
        self._engine = engine = await self._open(number)
        for warning in engine.warnings():
            log.warning("not enforced here: %s", warning)
        worker.handlers[RUN] = self.serve

    async def teardown(self, worker: Worker) -> None:
        """Lets the runs under way end, if they do so soon."""
        if self._engine is None:
            return
        for lease in self._leases.values():
            lease.over.set()
        self._leases.clear()
        try:
            await asyncio.wait_for(self._idle.wait(), self._drain_s)
        except TimeoutError:
            for run in self._runs:
                run.cut_off()
            await self._idle.wait()
        await self._engine.close()
        self._claim.close()

    async def lend(self, lease_id: str, topic: str) -> None:
        """Holds a lease: tells its server of it, and returns when that gives it back, or does not come for it."""
        lease = self._leases[lease_id] = _Lease()
        worker = self._worker
        told = {"lease": lease_id, "address": worker.address, "name": str(worker.name)}  # Dask overwrites `worker`
        worker.log_event(topic, told)
        try:
            while not lease.over.is_set():
                try:
                    await asyncio.wait_for(lease.over.wait(), LEASE_SECONDS)
                except TimeoutError:
                    if not lease.busy:
                        log.warning("nobody came for a lease within %g s", LEASE_SECONDS)
                        return
        finally:
            self._leases.pop(lease_id, None)

    async def serve(
        self, comm: Comm, id: str, job: Job | None, live: bool = False, interactive: bool = False
    ) -> Status:
        """One run of a server that has the lease of that id; without a job it gives the lease back."""
        lease = self._leases.get(id)
        if job is None:
            if lease is not None:
                lease.over.set()
        elif lease is None or lease.busy:
            await comm.write({"refused": f"{self._worker.name} has no such lease"})
            await WorkerEnd.until_over(comm)
        else:
            lease.busy = True
            await self._run(comm, job, lease, live, interactive)
        return Status.dont_reply

    async def _run(self, comm: Comm, job: Job, lease: _Lease, live: bool, interactive: bool) -> None:
        end = WorkerEnd(comm, live, interactive)
        self._runs.add(end)
        self._idle.clear()
        try:
            try:
                outcome = await self._outcome(job, end)
            finally:
                lease.busy = False
            await end.end(outcome)
        finally:
            if end.deserted:
                lease.over.set()
            self._runs.discard(end)
            if not self._runs:
                self._idle.set()

    async def _outcome(self, job: Job, end: WorkerEnd) -> Outcome:
        assert self._engine is not None
        try:
            outcome = await self._engine.run(job, end.channel)
        except Exception:
            log.exception("the %s engine failed", self._engine.name)
            return failed_outcome(job, f"the engine of the worker {self._worker.name} failed; its log has more")
        if end.cut:
            return failed_outcome(job, f"the worker {self._worker.name} was taken away before the program was over")
        return outcome

    async def _open(self, number: int) -> Engine:
        try:
            return await self._local.open_first(self._engines, number)
        except BaseException:
            self._claim.close()
            raise


async def lease(lease_id: str, topic: str) -> None:
    """The Dask task. The server that hears of it in `topic` owns it."""
    plugin = get_worker().plugins.get(SandboxPlugin.name)
    if not isinstance(plugin, SandboxPlugin):
        raise EngineUnavailable("the worker has no sandbox; start it with --preload sandbox.cluster_worker")
    await plugin.lend(lease_id, topic)


async def dask_setup(worker: Worker) -> None:
    """What Dask calls for `--preload sandbox.cluster_worker`."""
    engine = dask.config.get("runboard.engine", "auto")
    local = Local(warm=int(dask.config.get("runboard.warm", worker.state.nthreads)))
    await worker.plugin_add(SandboxPlugin(local, JAILING if engine == "auto" else (engine,)), catch_errors=False)
