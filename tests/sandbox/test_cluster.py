"""ClusterEngine: what the conformance suite does not ask of every engine."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing.resource_tracker
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import distributed  # noqa: F401 -- its import leaves descriptors and threads, which are not a test's
import psutil
import pytest

from sandbox.cluster import ClusterEngine, Place
from sandbox.engine import EngineAway, EngineUnavailable
from sandbox.model import Channel, Feed, Job, Limits, Outcome, Status
from tests.conftest import KEPT, SECOND, children, shared_cluster, until, within
from tests.dask_processes import Cluster
from tests.tls import make_certificates

ROOT = Path(__file__).parent.parent.parent
SLEEP = "import time; print('up', flush=True); time.sleep(1e6)"
LONG = Limits(wall_ms=60_000)


@asynccontextmanager
async def engine_of(cluster: Cluster) -> AsyncIterator[ClusterEngine]:
    engine = ClusterEngine(Place(scheduler=cluster.address))
    await engine.open()
    try:
        yield engine
    finally:
        await within(engine.close())


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """One of the test's own, with one worker of one slot."""
    own = Cluster(workers=1, slots=1)
    yield own
    own.stop()


class Talk:
    """A channel that a test looks at."""

    def __init__(self, *, fed: bool = False) -> None:
        self.printed = b""
        self.channel = Channel(self._print, feed=Feed() if fed else None)

    def _print(self, stream: str, chunk: bytes) -> None:
        self.printed += chunk

    async def says(self, text: bytes) -> None:
        await until(lambda: text in self.printed, 30)


def start(engine: ClusterEngine, code: str, talk: Talk | None = None, **more: object) -> asyncio.Task[Outcome]:
    channel = talk.channel if talk else Channel()
    job = Job("python", code, limits=LONG, **more)  # type: ignore[arg-type]
    return asyncio.create_task(engine.run(job, channel))


def processes_with(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.name() == mark:
                found.append(process)
    return found


def marked(mark: str) -> str:
    return f"import ctypes; ctypes.CDLL(None).prctl(15, b'{mark}', 0, 0, 0)\n{SLEEP}"


def test_output_comes_as_it_is_printed_and_in_order() -> None:
    async def main() -> None:
        async with engine_of(shared_cluster()) as engine:
            talk = Talk(fed=True)
            assert talk.channel.feed is not None
            code = "for line in iter(input, 'end'): print(line.upper(), flush=True)"
            running = start(engine, code, talk)
            for number in range(5):
                talk.channel.feed.push(f"line {number}\n".encode())
                await talk.says(f"LINE {number}\n".encode())
            talk.channel.feed.push(b"end\n")
            outcome = await running

            assert outcome.status is Status.OK
            assert outcome.stdout.encode() == talk.printed
            assert outcome.worker in ("worker-0", "worker-1")

    asyncio.run(main())


def test_what_a_program_has_not_read_stays_in_the_feed() -> None:
    async def main() -> None:
        async with engine_of(shared_cluster()) as engine:
            talk = Talk(fed=True)
            feed = talk.channel.feed
            assert feed is not None
            code = "import sys; print('up', flush=True); input(); print(len(sys.stdin.read()) - 1)"
            running = start(engine, f"{code}", talk, stdin="\n")
            await talk.says(b"up\n")
            feed.push(b"x" * 500_000)
            feed.end()
            outcome = await running

            assert outcome.stdout == "up\n499999\n"

    asyncio.run(main())


def test_a_full_feed_is_seen_by_the_server() -> None:
    async def main() -> None:
        async with engine_of(shared_cluster()) as engine:
            talk = Talk(fed=True)
            feed = talk.channel.feed
            assert feed is not None
            running = start(engine, f"{SLEEP}", talk)
            await talk.says(b"up\n")
            feed.push(b"x" * 500_000)
            await until(lambda: len(feed) < 500_000)  # a pipe holds 64 KiB
            await asyncio.sleep(0.1 * SECOND)
            assert len(feed) > 300_000
            talk.channel.cancel.set()
            await running

    asyncio.run(main())


def test_whoever_cancels_the_asyncio_task_finds_the_processes_gone() -> None:
    async def main() -> None:
        async with engine_of(shared_cluster()) as engine:
            talk = Talk()
            running = start(engine, marked("cancelled-task"), talk)
            await talk.says(b"up\n")
            assert processes_with("cancelled-task")
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running

            assert not processes_with("cancelled-task")

    asyncio.run(main())


def test_a_run_that_waits_can_be_cancelled_and_those_that_are_waited_for_go_first(cluster: Cluster) -> None:
    async def main() -> None:
        async with engine_of(cluster) as engine:
            first = Talk(fed=True)
            assert first.channel.feed is not None
            running = start(engine, "print('up', flush=True); input()", first)
            await first.says(b"up\n")
            order: list[str] = []

            async def ends(name: str, work: asyncio.Task[Outcome]) -> None:
                assert (await work).status is Status.OK
                order.append(name)

            batch = [ends(f"batch {n}", start(engine, "print(1)", batch=True)) for n in range(3)]
            gone = Talk()
            cancelled = start(engine, "print(1)", gone, batch=True)
            await asyncio.sleep(0.2 * SECOND)  # so that they wait at the worker
            urgent = ends("urgent", start(engine, "print(1)"))
            await asyncio.sleep(0.2 * SECOND)
            gone.channel.cancel.set()
            assert (await cancelled).status is Status.CANCELLED
            first.channel.feed.push(b"\n")
            await within(asyncio.gather(running, urgent, *batch), 60)

            assert order[0] == "urgent"
            assert len(order) == 4

    asyncio.run(main())


def test_a_killed_worker_is_a_fault_of_ours_and_its_run_is_not_run_again(cluster: Cluster) -> None:
    other = cluster.add_worker()

    async def main() -> None:
        async with engine_of(cluster) as engine:
            await until(lambda: engine.capacity == 2)
            talks = [Talk(), Talk()]
            running = [start(engine, marked(f"killed-{n}"), talk) for n, talk in enumerate(talks)]
            for talk in talks:
                await talk.says(b"up\n")
            waiting = [start(engine, "print('done')") for _ in range(4)]
            await asyncio.sleep(0.2 * SECOND)  # so that some of them wait at the worker that goes
            other.kill()
            lost, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED, timeout=20 * SECOND)
            assert len(lost) == 1
            outcome = lost.pop().result()
            left = next(talk for talk, run in zip(talks, running, strict=True) if not run.done())
            left.channel.cancel.set()
            outcomes = await within(asyncio.gather(*waiting), 60)

            assert (outcome.status, outcome.worker, outcome.stdout) == (Status.INTERNAL_ERROR, "worker-1", "up\n")
            assert outcome.error is not None
            assert "was lost while it ran the program, which is not run again" in outcome.error
            assert [one.stdout for one in outcomes] == ["done\n"] * 4  # type: ignore[attr-defined]
            await until(lambda: not processes_with("killed-0") and not processes_with("killed-1"))

    asyncio.run(main())


def test_workers_come_and_go_under_load_and_nothing_is_lost() -> None:
    cluster = Cluster(workers=1, slots=1, nanny=True)

    async def main() -> None:
        async with engine_of(cluster) as engine:
            runs = [start(engine, f"import time; time.sleep(0.1); print({n})") for n in range(40)]
            added = await asyncio.to_thread(cluster.add_worker)
            await until(lambda: engine.capacity == 2)
            await asyncio.wait(runs, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.to_thread(cluster.workers[0].stop)
            outcomes = await asyncio.gather(*runs)

            assert [outcome.stdout for outcome in outcomes] == [f"{n}\n" for n in range(40)]
            assert {outcome.worker for outcome in outcomes} == {"worker-0", "worker-1"}
            assert added.process.poll() is None

    try:
        asyncio.run(main())
    finally:
        cluster.stop()


def test_without_its_scheduler_a_cluster_refuses_until_it_is_back(cluster: Cluster) -> None:
    async def main() -> None:
        sentences: list[str] = []
        async with engine_of(cluster) as engine:
            engine.follow(lambda runs: None, sentences.append)
            talk = Talk(fed=True)
            assert talk.channel.feed is not None
            under_way = start(engine, "print('up', flush=True); print(input())", talk)
            await talk.says(b"up\n")
            waiting = start(engine, "print(1)")
            await asyncio.sleep(0.1 * SECOND)
            cluster.scheduler.kill()
            with pytest.raises(EngineAway):
                await within(waiting, 5)
            await until(lambda: sentences, 1)
            begin = time.monotonic()
            with pytest.raises(EngineAway, match="does not answer"):
                await engine.run(Job("python", "print(1)"), Channel())
            assert time.monotonic() - begin < 0.1 * SECOND
            await asyncio.sleep(2.5 * SECOND)  # until Dask's client is closed, which must not touch the run
            talk.channel.feed.push(b"on\n")
            assert (await under_way).stdout == "up\non\n"

            port = int(cluster.address.rsplit(":", 1)[1])
            again = await asyncio.to_thread(Cluster, 1, 1, port=port)
            try:
                await until(lambda: engine.away() is None, 30)
                assert (await engine.run(Job("python", "print(1)"), Channel())).stdout == "1\n"
            finally:
                await asyncio.to_thread(again.stop)

    asyncio.run(main())


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def secured(certificates: dict[str, Path]) -> Iterator[Cluster]:
    files = [
        f"--tls-ca-file={certificates['ca']}", f"--tls-cert={certificates['cluster']}",
        f"--tls-key={certificates['cluster_key']}",
    ]  # fmt: skip
    cluster = Cluster(1, 1, *files, protocol="tls")
    KEPT.update(cluster.pids())
    yield cluster
    KEPT.difference_update(cluster.pids())
    cluster.stop()


def test_who_has_a_certificate_may_use_the_cluster(secured: Cluster, certificates: dict[str, Path]) -> None:
    async def main() -> Outcome:
        tls = (certificates["ca"], certificates["cluster"], certificates["cluster_key"])
        engine = ClusterEngine(Place(scheduler=secured.address, tls=tls))
        await engine.open()
        try:
            return await engine.run(Job("python", "print(1)"), Channel())
        finally:
            await engine.close()

    outcome = asyncio.run(main())

    assert (outcome.stdout, outcome.worker) == ("1\n", "worker-0")


def test_who_has_none_is_refused_by_the_scheduler_and_by_the_worker(
    secured: Cluster, certificates: dict[str, Path]
) -> None:
    worker = secured.workers[0].told(r"Listening to:\s+(\S+)")
    for address in (secured.address, worker):
        host, port = address.removeprefix("tls://").rsplit(":", 1)
        bare = ssl.create_default_context(cafile=certificates["ca"])
        bare.check_hostname = False
        with (
            socket.create_connection((host, int(port))) as plain,
            bare.wrap_socket(plain) as end,
            pytest.raises(ssl.SSLError, match="certificate required"),  # TLS 1.3 says it after the handshake
        ):
            end.recv(1)

    async def main() -> None:
        tls = (certificates["ca"], None, None)
        with pytest.raises(EngineUnavailable, match="TLS needs all three"):
            await ClusterEngine(Place(scheduler=secured.address, tls=tls)).open()
        with pytest.raises(EngineUnavailable, match="both or none"):
            await ClusterEngine(Place(scheduler=secured.address)).open()

    asyncio.run(main())


def test_a_program_cannot_reach_scheduler_or_worker() -> None:
    cluster = shared_cluster()
    addresses = [cluster.address, *(worker.told(r"Listening to:\s+(\S+)") for worker in cluster.workers)]
    ports = [int(address.rsplit(":", 1)[1]) for address in addresses]
    code = (
        "import socket\n"
        f"for port in {ports}:\n"
        "    for kind, host in (socket.AF_INET, '127.0.0.1'), (socket.AF_INET, '10.0.0.1'), (socket.AF_INET6, '::1'):\n"
        "        try:\n"
        "            with socket.socket(kind) as end:\n"
        "                end.settimeout(1)\n"
        "                end.connect((host, port))\n"
        "                print('reached', port)\n"
        "        except OSError as failure:\n"
        "            print('refused')\n"
    )

    async def main() -> Outcome:
        async with engine_of(shared_cluster()) as engine:
            return await engine.run(Job("python", code), Channel())

    for port in ports:  # from here, each is reached
        with contextlib.closing(socket.create_connection(("127.0.0.1", port))):
            pass
    outcome = asyncio.run(main())

    assert outcome.stdout == "refused\n" * 9, outcome


@pytest.fixture(scope="module")
def tracker() -> None:
    """Python starts a process of its own with the first one that multiprocessing does, and keeps it."""
    multiprocessing.resource_tracker.ensure_running()


def test_an_embedded_cluster_starts_with_the_first_run_on_loopback_alone_and_leaves_nothing(tracker: None) -> None:
    async def main() -> None:
        engine = ClusterEngine(Place(workers=2, slots=1))
        await engine.open()
        before = {child.pid for child in children()}
        assert engine.capacity == 2
        pauses: list[float] = []

        async def beat() -> None:
            while True:
                begin = time.monotonic()
                await asyncio.sleep(0.01)
                pauses.append(time.monotonic() - begin)

        beating = asyncio.create_task(beat())
        try:
            talks = [Talk(), Talk()]
            running = [start(engine, SLEEP, talk) for talk in talks]
            for talk in talks:
                await talk.says(b"up\n")
            listeners = [
                connection.laddr
                for process in (psutil.Process(), *children())
                if process.pid not in before
                for connection in process.net_connections()
                if connection.status == psutil.CONN_LISTEN
            ]
            beating.cancel()
            for talk in talks:
                talk.channel.cancel.set()
            outcomes = await within(asyncio.gather(*running))

            assert {one.worker for one in outcomes} == {"0", "1"}  # type: ignore[attr-defined]
            assert {address.ip for address in listeners} == {"127.0.0.1"}
            assert max(pauses) < 1 * SECOND
        finally:
            await within(engine.close())

    asyncio.run(main())


@pytest.mark.parametrize(
    ("scheduler", "warned"),
    [(None, False), ("tls://dask:8786", False), ("tcp://127.0.0.1:1", False), ("tcp://[::1]:1", False),
     ("tcp://localhost:1", False), ("tcp://10.0.0.1:1", True), ("tcp://dask:8786", True)],
)  # fmt: skip
def test_a_cluster_beyond_this_machine_without_tls_is_warned_of(scheduler: str | None, warned: bool) -> None:
    assert any("has no TLS" in said for said in ClusterEngine(Place(scheduler=scheduler)).warnings()) is warned


@pytest.mark.parametrize("address", ["dask:8786", "http://dask:8786", "tls://dask:8786", "tcp://"])
def test_an_address_that_cannot_be_is_told(address: str) -> None:
    with pytest.raises(EngineUnavailable, match="--scheduler"):
        asyncio.run(ClusterEngine(Place(scheduler=address)).open())


def test_a_server_without_a_cluster_does_not_pay_for_dask() -> None:
    code = "import server, sys; sys.exit('distributed' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
