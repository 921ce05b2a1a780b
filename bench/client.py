"""A real server in a process of its own, and connections to it."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from websockets.asyncio.client import ClientConnection, connect

ROOT = Path(__file__).parent.parent


@asynccontextmanager
async def server(*options: str) -> AsyncIterator[int]:
    """Starts `server.py` with these options; gives its port."""
    with tempfile.TemporaryDirectory(prefix="runboard-bench-") as folder:
        log = Path(folder, "log")  # a pipe that nobody reads would stop the server when it is full
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, "server.py", "--port=0", f"--data-dir={folder}", *options],
                cwd=ROOT, stderr=file, env={**os.environ, "RUNBOARD_LOG_LEVEL": "info"},
            )  # fmt: skip
        try:
            yield await _port(process, log)
        finally:
            process.terminate()
            process.wait()


async def _port(process: subprocess.Popen[bytes], log: Path) -> int:
    while True:
        ended = process.poll() is not None
        said = log.read_text()
        for line in said.splitlines():
            if "listening on http://" in line:
                return int(line.split("http://")[1].split(",")[0].rsplit(":", 1)[1])
        if ended:
            raise SystemExit(f"the server did not start: {said}")
        await asyncio.sleep(0.02)


def to(port: int, path: str = "/appws") -> connect:
    """A connection, as a context manager."""
    return connect(f"ws://127.0.0.1:{port}{path}", compression=None, max_size=None)


async def ask(connection: ClientConnection, action: str, data: Any = None, id: str | None = None) -> dict[str, Any]:
    """Sends a message and gives the next one."""
    await connection.send(json.dumps({"action": action, "data": data or {}} | ({"id": id} if id else {})))
    answer: dict[str, Any] = json.loads(await connection.recv())
    return answer
