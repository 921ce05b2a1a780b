"""One board to 1,000 clients: the Hub, Tornado's write_message and websockets.broadcast, side by side.

python -m bench.broadcast [--clients N] [--rounds N] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import websockets
from websockets.asyncio.server import ServerConnection, serve

import server
from config import Settings
from handlers.base import ProtocolSocket
from handlers.wire import SEND_BUFFER_BYTES
from protocol.frame import text_frame
from protocol.message import Message, encode
from services.hub import Hub

ROWS = [{"id": n, "name": f"Player {n}", "score": 1000 - n, "rank": n + 1} for n in range(42)]
BOARD = Message("leaderboardUpdate", ROWS)
HANDSHAKE = (
    "GET /appws HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
DRAIN_SECONDS = 0.05


def connected(port: int) -> socket.socket:
    """A client's socket after the handshake."""
    client = socket.create_connection(("127.0.0.1", port))
    client.sendall(HANDSHAKE.format(port=port).encode())
    answer = b""
    while not answer.endswith(b"\r\n\r\n"):
        answer += client.recv(1)
    return client


def read_for_ever(port: int, count: int) -> None:
    """A process of clients that read whatever comes."""
    _many_files()
    waiting = selectors.DefaultSelector()
    for _ in range(count):
        client = connected(port)
        client.setblocking(False)
        waiting.register(client, selectors.EVENT_READ)
    print("ready", flush=True)
    while waiting.get_map():
        for key, _ in waiting.select():
            if not key.fileobj.recv(1 << 20):  # type: ignore[union-attr]
                waiting.unregister(key.fileobj)


async def main(count: int, rounds: int, file: Path | None) -> None:
    """Measures, and prints a table."""
    _many_files()
    hubs: list[Hub] = []

    class KeptHub(Hub):
        def __init__(self) -> None:
            super().__init__()
            hubs.append(self)

    setattr(server, "Hub", KeptHub)  # noqa: B010 -- the only way to the server's own
    others: set[ServerConnection] = set()

    async def stay(connection: ServerConnection) -> None:
        others.add(connection)
        await connection.wait_closed()

    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(port=0, engine="subprocess", data_dir=Path(folder))
        async with server.running(settings) as ours, serve(stay, "127.0.0.1", 0, compression=None) as theirs:
            their_port = next(iter(theirs.sockets)).getsockname()[1]
            clients = [await _clients(ours.port, count), await _clients(their_port, count)]
            members: list[ProtocolSocket] = list(hubs[0]._rooms["app/default"])  # type: ignore[arg-type]
            text = encode(BOARD)

            def by_write_message() -> None:
                for member in members:
                    member.write_message(text)

            ways: dict[str, Callable[[], None]] = {
                "hub.publish": lambda: hubs[0].publish("app/default", BOARD, "leaderboardUpdate"),
                "write_message(str)": by_write_message,
                "websockets.broadcast": lambda: websockets.broadcast(others, text),
            }
            times: dict[str, list[float]] = {name: [] for name in ways}
            for number in range(-3, rounds):
                for name, way in ways.items():
                    begin = time.perf_counter()
                    way()
                    await asyncio.sleep(0)  # what it has put off
                    await asyncio.sleep(0)
                    if number >= 0:
                        times[name].append((time.perf_counter() - begin) * 1000)
                    await asyncio.sleep(DRAIN_SECONDS)
            held = await _held_for_one_that_never_reads(ours.port, hubs[0])
            for process in clients:
                process.kill()
                process.communicate()
    _report(times, count, len(text_frame(text)), held, file)


async def _clients(port: int, count: int) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.broadcast", "--read", str(port), "--clients", str(count)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    await asyncio.to_thread(process.stdout.readline)
    return process


async def _held_for_one_that_never_reads(port: int, hub: Hub) -> int:
    """Bytes that the server and its kernel keep for it at most, while 5,000 boards are published."""
    before = set(hub._rooms["app/default"])
    slow = await asyncio.to_thread(connected, port)
    while not (new := set(hub._rooms["app/default"]) - before):
        await asyncio.sleep(0.01)
    member: Any = new.pop()
    most = 0
    for _ in range(5000):
        hub.publish("app/default", BOARD, "leaderboardUpdate")
        await asyncio.sleep(0)
        stream = member.ws_connection.stream if member.ws_connection else None
        most = max(most, member._outbox._bytes + (len(stream._write_buffer) if stream else 0))
    slow.close()
    return most + 2 * SEND_BUFFER_BYTES  # the kernel counts its own records of a buffer too, as much again


def _report(times: dict[str, list[float]], count: int, size: int, held: int, file: Path | None) -> None:
    medians = {name: statistics.median(ms) for name, ms in times.items()}
    print(f"{count} clients, a board of {size} bytes")
    for name, ms in times.items():
        print(f"{name:<22}{medians[name]:>7.2f} ms at the median{statistics.quantiles(ms, n=10)[8]:>8.2f} ms p90")
    for other in ("write_message(str)", "websockets.broadcast"):
        print(f"hub.publish takes {medians['hub.publish'] / medians[other]:.2f} x the time of {other}")
    print(f"a client that never reads costs at most {held / 2**20:.2f} MiB")
    if file is not None:
        file.write_text(json.dumps({"medians_ms": medians, "held_bytes": held}, indent=2) + "\n")


def _many_files() -> None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 65536), most))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.broadcast", description=__doc__)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--read", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        read_for_ever(options.read, options.clients)
    else:
        asyncio.run(main(options.clients, options.rounds, options.json))
