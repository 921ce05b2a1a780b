"""mode cluster, as a client meets it."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing.resource_tracker
import time
from collections import Counter
from pathlib import Path
from typing import Any

import distributed  # noqa: F401 -- its import leaves descriptors and threads, which are not a test's
import psutil
import pytest
from tornado.websocket import websocket_connect

from tests.conftest import GEN_TEST, SECOND, shared_cluster, until
from tests.dask_processes import Cluster
from tests.handlers.client import Client, connected, serving
from tests.handlers.test_tasks import ends, task
from tests.test_server import started

pytestmark = GEN_TEST
NOWHERE = "tcp://127.0.0.1:1"


@pytest.fixture(scope="module")
def tracker() -> None:
    """Python starts a process of its own with the first one that multiprocessing does, and keeps it."""
    multiprocessing.resource_tracker.ensure_running()


def cluster_run(code: str, **more: Any) -> dict[str, Any]:
    return {"language": "python", "code": code, "mode": "cluster", **more}


def named(mark: str) -> list[int]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.name() == mark:
                found.append(process.pid)
    return found


def marked(mark: str) -> str:
    name = f"import ctypes; ctypes.CDLL(None).prctl(15, b'{mark}', 0, 0, 0)"
    return f"{name}\nimport time; print('up', flush=True); time.sleep(1e6)"


async def heard(client: Client, action: str) -> dict[str, Any]:
    while (message := await client.hear(60))["action"] != action:
        pass
    return message


async def test_the_embedded_cluster_runs_streams_reads_cancels_and_does_tasks(tracker: None) -> None:
    async with serving(cluster_workers=2, cluster_runs_per_worker=1) as server, connected(server) as client:
        await client.send(
            "runCode", cluster_run("import os; os.write(1, input().encode())", stream=True, interactive=True), id="r"
        )
        await heard(client, "runStatus")
        await client.send("sendInput", {"run": "r", "text": "hi\n"})
        assert (await heard(client, "outputChunk"))["data"] == {"stream": "stdout", "text": "hi"}
        data = (await heard(client, "output"))["data"]
        assert (data["status"], data["output"], data["worker"] in ("0", "1")) == ("ok", "hi", True)

        await client.send("runCode", cluster_run(marked("cancel-me"), stream=True), id="c")
        await heard(client, "outputChunk")
        assert (await client.ask("runCode", cluster_run("print(1)", mode="standalone"), id="c"))["details"]["code"] == (
            "CONFLICT"
        )
        await client.send("cancelRun", {"run": "c"})
        assert (await heard(client, "output"))["data"]["status"] == "cancelled"
        assert not named("cancel-me")

        run = {"language": "python", "code": "print(input())", "mode": "cluster"}
        grade = {**run, "tests": [{"stdin": f"{n}\n", "expected": f"{n}\n"} for n in range(6)]}
        batch = [task("r", "runCode", **run, stdin="x\n"), task("g", "gradeCode", **grade)]
        await client.send("startTasks", {"tasks": batch})
        updates = await ends(client, {"r", "g"})
        assert updates["r"][-1]["result"]["output"] == "x\n"
        assert updates["r"][-1]["result"]["worker"] in ("0", "1")
        assert (updates["g"][-1]["result"]["verdict"], updates["g"][-1]["result"]["passed"]) == ("passed", 6)


async def test_a_cluster_that_is_not_there_refuses_at_once_and_standalone_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sandbox.cluster.OPEN_SECONDS", 0.1)
    async with serving(scheduler=NOWHERE) as server, connected(server) as client:
        begin = time.monotonic()
        answer = await client.ask("runCode", cluster_run("print(1)"), id=1)
        assert time.monotonic() - begin < 0.5 * SECOND
        assert (answer["id"], answer["details"]["code"], answer["details"]["retryable"]) == (
            1, "CLUSTER_UNAVAILABLE", True,
        )  # fmt: skip
        assert NOWHERE in answer["error"]

        await client.send("startTasks", {"tasks": [task("t", "runCode", **cluster_run("print(1)"))]})
        assert (await ends(client, {"t"}))["t"][-1]["result"]["code"] == "CLUSTER_UNAVAILABLE"
        assert (await client.run("print(1)"))["output"] == "1\n"


async def test_a_batch_of_tasks_spreads_over_the_workers() -> None:
    async with serving(scheduler=shared_cluster().address) as server, connected(server) as client:
        batch = [task(str(n), "runCode", **cluster_run(f"print({n})")) for n in range(60)]
        await client.send("startTasks", {"tasks": batch})
        updates = await ends(client, {str(n) for n in range(60)})

        assert [updates[str(n)][-1]["result"]["output"] for n in range(60)] == [f"{n}\n" for n in range(60)]
        counts = Counter(updates[str(n)][-1]["result"]["worker"] for n in range(60))
        assert set(counts) == {"worker-0", "worker-1"}
        assert min(counts.values()) >= 15


async def test_a_run_ends_with_its_connection_on_a_worker_too() -> None:
    async with serving(scheduler=shared_cluster().address) as server:
        async with connected(server) as client:
            await client.send("runCode", cluster_run(marked("left-alone"), stream=True))
            await heard(client, "outputChunk")
            assert named("left-alone")
        await until(lambda: not named("left-alone"), 1)


async def test_a_server_that_stops_ends_its_runs_and_answers_them() -> None:
    async with serving(scheduler=shared_cluster().address) as server:
        client = Client(await websocket_connect(f"ws://127.0.0.1:{server.port}/appws"))
        await client.send("runCode", cluster_run(marked("stopped-too")))
        await until(lambda: named("stopped-too"))
    assert not named("stopped-too")
    assert (await heard(client, "output"))["data"]["status"] == "cancelled"
    await client.leave()


async def test_a_server_that_is_killed_leaves_no_run_on_a_worker(tmp_path: Path) -> None:
    async with started(tmp_path, f"--scheduler={shared_cluster().address}") as (process, port):
        client = Client(await websocket_connect(f"ws://127.0.0.1:{port}/appws"))
        await client.send("runCode", cluster_run(marked("orphaned"), stream=True))
        await heard(client, "outputChunk")
        assert named("orphaned")
        process.kill()
        await until(lambda: not named("orphaned"))
        client.connection.close()


async def test_a_worker_killed_among_many_runs_costs_each_client_one_output_and_no_more() -> None:
    cluster = await asyncio.to_thread(Cluster, 2, 1)
    try:
        async with serving(scheduler=cluster.address) as server, connected(server) as client:
            for number in range(30):
                await client.send("runCode", cluster_run(f"import time; time.sleep(0.1); print({number})"), id=number)
            answers = [await client.hear(60) for _ in range(5)]
            cluster.workers[0].kill()
            answers += [await client.hear(60) for _ in range(25)]

            assert sorted(answer["id"] for answer in answers) == list(range(30))
            statuses = Counter(answer["data"]["status"] for answer in answers)
            assert statuses["ok"] + statuses["internalError"] == 30
            assert statuses["internalError"] <= 1
            assert all(one["data"]["output"] == f"{one['id']}\n" for one in answers if one["data"]["status"] == "ok")
            await client.send("runCode", cluster_run("print('still')"), id="s")
            assert (await client.hear())["data"]["worker"] == "worker-1"
    finally:
        await asyncio.to_thread(cluster.stop)
