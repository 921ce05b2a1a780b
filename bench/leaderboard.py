"""Leaderboards: one change in a large room, durable changes through the WebSocket, and how soon others see them.

python -m bench.leaderboard [--seconds S] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.client import ask, server, to
from services.board import Board
from services.store import Player

PLAYERS = 100_000
CLIENTS = 20
IN_FLIGHT = 16


def in_memory() -> float:
    """Median of a change, its rank and the first 100, in µs, in a room of 100,000."""
    board = Board()
    board.start([Player(n, f"Player {n}") for n in range(PLAYERS)])
    dice = random.Random(1)
    for n in range(PLAYERS):
        board.add(n, dice.randrange(10**9), PLAYERS)
    times = []
    for _ in range(5000):
        player, micros = dice.randrange(PLAYERS), dice.randrange(10**6)
        begin = time.perf_counter()
        board.add(player, micros, PLAYERS)
        board.rank(player)
        board.rows(100)
        times.append((time.perf_counter() - begin) * 1e6)
    return statistics.median(times)


async def durable(port: int, seconds: float) -> float:
    """Acknowledged changes per second from 20 clients, each with 16 on the way."""
    done = 0

    async def client(number: int) -> None:
        nonlocal done
        async with to(port, "/appws?room=rate") as connection:
            sent = 0
            end = time.monotonic() + seconds
            waiting = 0
            while time.monotonic() < end or waiting:
                while waiting < IN_FLIGHT and time.monotonic() < end:
                    update = {
                        "action": "updateScore",
                        "data": {"playerId": number, "change": 1},
                        "id": f"{number}-{sent}",
                    }
                    await connection.send(json.dumps(update))
                    sent += 1
                    waiting += 1
                if '"ack"' in str(await connection.recv())[:20]:
                    waiting -= 1
                    done += 1

    async with to(port, "/appws?room=rate") as connection:
        await ask(connection, "startGame")
    begin = time.monotonic()
    await asyncio.gather(*(client(number) for number in range(CLIENTS)))
    return done / (time.monotonic() - begin)


async def seen(port: int, seconds: float) -> tuple[float, float]:
    """From updateScore to another client's board, in ms: the median of first changes, and p99 of changes on end."""
    async with to(port, "/appws?room=seen") as writer, to(port, "/appws?room=seen") as reader:
        await writer.send(json.dumps({"action": "startGame"}))
        await reader.recv()
        sent: list[float] = []
        first: list[float] = []

        async def change() -> None:
            sent.append(time.perf_counter())
            await writer.send(json.dumps({"action": "updateScore", "data": {"playerId": 1, "change": 1}}))

        for _ in range(30):
            await asyncio.sleep(0.15)  # longer than the pause between two boards
            await change()
            await reader.recv()
            first.append((time.perf_counter() - sent[-1]) * 1000)
        delays: list[float] = []

        async def read() -> None:
            known = len(sent)
            while True:
                score = json.loads(await reader.recv())["data"][0]["score"]
                now = time.perf_counter()
                delays.extend((now - at) * 1000 for at in sent[known:score])
                known = max(known, score)

        reading = asyncio.create_task(read())  # noqa: TID251 -- a measurement, not the server
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            await change()
            await asyncio.sleep(random.uniform(0.001, 0.02))
        await asyncio.sleep(0.3)
        reading.cancel()
        return statistics.median(first), statistics.quantiles(delays, n=100)[98]


@contextmanager
def redis() -> Iterator[str]:
    """A Redis that loses nothing."""
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            ["redis-server", "--port", "0", "--unixsocket", f"{folder}/redis.sock", "--dir", folder,
             "--appendonly", "yes", "--appendfsync", "always", "--save", ""],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        try:
            while "ready to accept" not in process.stdout.readline():
                pass
            yield f"unix://{folder}/redis.sock"
        finally:
            process.terminate()
            process.communicate()


async def through_websocket(store: str, seconds: float) -> dict[str, Any]:
    """All that is measured over the socket, with one store."""
    async with server("--engine=subprocess", f"--store={store}", "--max-players=200000") as port:
        rate = await durable(port, seconds)
        first_ms, p99_ms = await seen(port, seconds)
    return {"updates_per_s": rate, "first_board_ms": first_ms, "board_p99_ms": p99_ms}


def main(seconds: float, file: Path | None) -> None:
    """Measures, and prints a table."""
    result: dict[str, Any] = {"in_memory_us": in_memory()}
    print(f"change + rank + first 100 of {PLAYERS:,} players: {result['in_memory_us']:.1f} us at the median")
    result["sqlite"] = asyncio.run(through_websocket("sqlite", seconds))
    if shutil.which("redis-server"):
        with redis() as url:
            result["redis"] = asyncio.run(through_websocket(url, seconds))
    for store in ("sqlite", "redis"):
        if row := result.get(store):
            print(f"{store}: {row['updates_per_s']:.0f} durable updates/s from {CLIENTS} clients")
            print(f"{store}: a first change is seen by another client after {row['first_board_ms']:.1f} ms (median)")
            print(f"{store}: changes on end are seen after at most {row['board_p99_ms']:.0f} ms (p99)")
    if file is not None:
        file.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.leaderboard", description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    main(options.seconds, options.json)
