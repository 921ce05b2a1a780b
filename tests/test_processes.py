"""Several server processes on one port and one Redis."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import psutil
from tornado.websocket import websocket_connect

from tests.conftest import GEN_TEST, SECOND, until
from tests.handlers.client import Client
from tests.services.redis_server import running_redis
from tests.test_server import COMMAND, ROOT, refusal

pytestmark = GEN_TEST


async def test_processes_without_a_shared_store_are_refused() -> None:
    assert "--store redis://" in refusal("--processes=2", "--port=0")


async def score(client: Client) -> Any:
    await client.send("getLeaderboard", id="g")
    while (message := await client.hear()).get("id") != "g":
        pass
    return message["data"]


async def updates(client: Client, name: str, count: int) -> None:
    waiting = set()
    for number in range(count):
        await client.send("updateScore", {"playerId": number % 3, "change": 1}, id=f"{name}-{number}")
        waiting.add(f"{name}-{number}")
    while waiting:
        message = await client.hear(120)
        if message["action"] == "ack":
            waiting.discard(message["id"])


async def test_two_processes_share_a_room_and_give_exact_sums(tmp_path: Path) -> None:
    async with running_redis() as redis:
        process = await asyncio.create_subprocess_exec(
            *COMMAND, "--port=0", f"--data-dir={tmp_path}", "--processes=2", f"--store={redis.url}", "--warm=0",
            stderr=asyncio.subprocess.PIPE, cwd=ROOT,
        )  # fmt: skip
        assert process.stderr is not None
        ports = []
        while len(ports) < 2:
            line = await asyncio.wait_for(process.stderr.readline(), 60 * SECOND)
            assert line
            if b"listening on http://" in line:
                ports.append(int(line.split(b"http://")[1].split(b",")[0].rsplit(b":", 1)[1]))
        assert ports[0] == ports[1]
        servers = psutil.Process(process.pid).children()
        clients: list[Client] = []
        served: dict[int, int] = {}
        while len([pid for pid in served if served[pid]]) < 2 or len(clients) < 10:  # the kernel deals them out
            clients.append(Client(await websocket_connect(f"ws://127.0.0.1:{ports[0]}/appws?room=shared")))
            served = {server.pid: len(server.net_connections("tcp")) - 1 for server in servers}
        await clients[0].send("startGame", id="start")
        while (await clients[0].hear()).get("id") != "start":
            pass
        each = 5000 // len(clients)
        await asyncio.gather(*(updates(client, str(n), each) for n, client in enumerate(clients)))

        boards = [await score(client) for client in clients]
        assert all(board == boards[0] for board in boards)
        assert sum(row["score"] for row in boards[0]) == each * len(clients)

        os.kill(servers[0].pid, signal.SIGKILL)  # one dies: another one takes its place
        await until(lambda: len([c for c in psutil.Process(process.pid).children() if c.status() != "zombie"]) == 2, 60)
        process.send_signal(signal.SIGTERM)
        await process.communicate()
        assert process.returncode == 0
        for client in clients:
            await client.leave()
