"""A real redis-server on a UNIX socket of its own, that keeps everything it has acknowledged."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.conftest import SECOND


class RedisServer:
    """It can be stopped and started again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._socket = folder / "redis.sock"
        self.url = f"unix://{self._socket}"
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            "redis-server", "--port", "0", "--unixsocket", str(self._socket), "--dir", str(self._folder),
            "--appendonly", "yes", "--appendfsync", "always", "--save", "",
            stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert self._process.stdout is not None
        while b"ready to accept connections" not in (
            line := await asyncio.wait_for(self._process.stdout.readline(), 30 * SECOND)
        ):
            assert line, "redis-server did not start"

    async def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            await self._process.communicate()
            self._process = None


def need_redis() -> None:
    """Skips a test where there is no redis-server; CI has one, so there it fails."""
    if shutil.which("redis-server") is None:
        if "CI_HAS_REDIS" in os.environ:
            pytest.fail("CI must have a redis-server")
        pytest.skip("redis-server is not installed: apt-get install redis-server")


@asynccontextmanager
async def running_redis() -> AsyncIterator[RedisServer]:
    need_redis()
    with tempfile.TemporaryDirectory(prefix="runboard-test-") as folder:
        server = RedisServer(Path(folder))
        await server.start()
        try:
            yield server
        finally:
            await server.stop()


@asynccontextmanager
async def redis_server() -> AsyncIterator[str]:
    """Its address."""
    async with running_redis() as server:
        yield server.url
