"""The server as a process: how it starts, refuses to start, stops, and is killed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest
from tornado.websocket import WebSocketClosedError, websocket_connect

from tests.conftest import GEN_TEST, SECOND, until
from tests.handlers.client import Client, connected, serving

pytestmark = GEN_TEST
ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, str(ROOT / "server.py")]


def refusal(*options: str) -> str:
    """What a server that cannot start says."""
    done = subprocess.run(
        [*COMMAND, *options], capture_output=True, text=True, check=False, timeout=60 * SECOND, cwd=ROOT
    )
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("server.py: ")
    assert "Traceback" not in done.stderr
    return last


@asynccontextmanager
async def started(folder: Path, *options: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, int]]:
    """A server process and its port."""
    process = await asyncio.create_subprocess_exec(
        *COMMAND, "--port=0", f"--data-dir={folder}", *options, stderr=asyncio.subprocess.PIPE, cwd=ROOT
    )
    assert process.stderr is not None
    try:
        while b"listening on http://" not in (line := await asyncio.wait_for(process.stderr.readline(), 60 * SECOND)):
            assert line
        yield process, int(line.split(b"http://")[1].split(b",")[0].rsplit(b":", 1)[1])
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


def marked(mark: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if mark in " ".join([process.name(), *process.cmdline()]):
                yield process


async def test_a_busy_port_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

        assert f"cannot listen on 127.0.0.1:{port}: Address already in use (--address, --port)" in refusal(
            f"--port={port}"
        )


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--port=x", "--port must be a whole number"),
        ("--pot=1", "unrecognized arguments: --pot=1"),
        ("--python=/nowhere/python3", "/nowhere/python3"),
        ("--node=/nowhere/node", "/nowhere/node"),
        ("--task-modules=no_such_module", "the module no_such_module cannot be imported"),
        ("--store=mysql://x", "--store"),
        ("--data-dir=/proc/nowhere", "--data-dir"),
    ],
)
async def test_what_cannot_be_is_told_in_one_sentence(option: str, said: str, tmp_path: Path) -> None:
    assert said in refusal(f"--data-dir={tmp_path}", "--port=0", option)


async def test_the_subprocess_engine_serves_this_machine_only() -> None:
    assert "only with --allow-unsafe" in refusal("--engine=subprocess", "--address=0.0.0.0", "--port=0")


async def test_a_stopped_server_says_goodbye_and_ends_well(tmp_path: Path) -> None:
    async with started(tmp_path) as (process, port):
        client = Client(await websocket_connect(f"ws://127.0.0.1:{port}/appws"))
        process.send_signal(signal.SIGTERM)

        assert await client.close_code() == 1012
        assert await asyncio.wait_for(process.wait(), 60 * SECOND) == 0
        await client.leave()


async def test_a_run_under_way_may_end_before_the_server_does(tmp_path: Path) -> None:
    async with started(tmp_path) as (process, port):
        client = Client(await websocket_connect(f"ws://127.0.0.1:{port}/appws"))
        code = f"import time; print('up', flush=True); time.sleep({0.5 * SECOND}); print('done')"
        await client.send("runCode", {"language": "python", "code": code, "mode": "standalone", "stream": True})
        while (await client.hear())["action"] != "outputChunk":
            pass
        process.send_signal(signal.SIGTERM)
        while (answer := await client.hear())["action"] != "output":
            pass

        assert answer["data"]["output"] == "up\ndone\n"
        assert await client.close_code() == 1012
        await process.wait()
        await client.leave()


async def test_kill_9_leaves_no_jailed_process(tmp_path: Path) -> None:
    async with started(tmp_path) as (process, port):
        client = Client(await websocket_connect(f"ws://127.0.0.1:{port}/appws"))
        mark = f"mark-{os.getpid()}"
        spin = {"mode": "standalone", "limits": {"timeMs": 60_000}}
        named = f"import ctypes, os; ctypes.CDLL(None).prctl(15, b'{mark}', 0, 0, 0); os.fork()"
        await client.send("runCode", {**spin, "language": "python", "code": f"{named}\nwhile 1: pass"})
        await client.send("runCode", {**spin, "language": "javascript", "code": f"process.title = '{mark}'; for (;;);"})
        await until(lambda: len(list(marked(mark))) >= 3, 60)
        process.kill()

        await until(lambda: not any(marked(mark)))
        client.connection.close()


async def test_kill_9_among_ten_thousand_updates_loses_none_and_counts_none_twice(tmp_path: Path) -> None:
    acknowledged: set[str] = set()

    async def send_all(client: Client) -> None:
        for number in range(10_000):
            await client.send("updateScore", {"playerId": number % 7, "change": 1}, id=f"u{number}")
            if number % 100 == 99:
                await asyncio.sleep(0)

    async with started(tmp_path) as (process, port):
        client = Client(await websocket_connect(f"ws://127.0.0.1:{port}/appws"))
        await client.send("startGame", id="start")
        with contextlib.suppress(WebSocketClosedError):
            sending = asyncio.gather(send_all(client), return_exceptions=True)
            while len(acknowledged) < 3000:
                message = await client.hear()
                if message["action"] == "ack":
                    acknowledged.add(message["id"])
            process.kill()
            await sending
        await client.leave()
    acknowledged.discard("start")
    async with started(tmp_path) as (_, port):
        client = Client(await websocket_connect(f"ws://127.0.0.1:{port}/appws"))
        board = (await client.ask("getLeaderboard"))["data"]
        assert sum(row["score"] for row in board) >= len(acknowledged)
        sending = asyncio.gather(send_all(client))
        waiting = {f"u{number}" for number in range(10_000)}
        while waiting:
            message = await client.hear(60)
            if message["action"] == "ack":
                waiting.discard(message["id"])
        await sending
        await client.send("getLeaderboard", id="g")
        while (message := await client.hear()).get("id") != "g":
            pass
        assert sum(row["score"] for row in message["data"]) == 10_000
        await client.leave()


async def test_tasks_of_a_session_are_interrupted_by_kill_9(tmp_path: Path) -> None:
    async with started(tmp_path) as (process, port):
        client = Client(await websocket_connect(f"ws://127.0.0.1:{port}/appws?session=me"))
        await client.send("startTasks", {"tasks": [{"id": "a", "action": "sleep", "params": {"seconds": 1000}}]})
        assert (await client.hear())["data"]["status"] == "running"
        process.kill()
        await client.leave()
    async with started(tmp_path) as (_, port):
        client = Client(await websocket_connect(f"ws://127.0.0.1:{port}/appws?session=me"))
        update = (await client.ask("getTasks"))["data"]
        assert (update["taskId"], update["status"], update["result"]["code"]) == ("a", "failed", "INTERRUPTED")
        await client.leave()


async def test_200_runs_from_50_connections_are_200_right_outputs() -> None:
    async with serving() as server:

        async def visit(visitor: int) -> None:
            async with connected(server) as client:
                for number in range(4):
                    await client.send(
                        "runCode",
                        {"language": "python", "code": f"print({visitor} * 10 + {number})", "mode": "standalone"},
                        id=number,
                    )
                answers = [await client.hear(120) for _ in range(4)]
                assert {answer["id"]: answer["data"]["output"] for answer in answers} == {
                    number: f"{visitor * 10 + number}\n" for number in range(4)
                }

        await asyncio.gather(*(visit(visitor) for visitor in range(50)))
