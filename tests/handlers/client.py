"""A WebSocket client for tests: checks every message that it gets against the schemas."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tornado.httpclient import HTTPRequest
from tornado.websocket import WebSocketClientConnection, websocket_connect

from config import Settings
from protocol.message import decode
from protocol.schema import Schemas
from server import Running, running
from tests.conftest import SECOND

SCHEMAS = Schemas()


class Client:
    """One connection."""

    def __init__(self, connection: WebSocketClientConnection) -> None:
        self.connection = connection
        self._over = False

    async def send(self, action: str, data: Any = None, id: str | int | None = None) -> None:
        message: dict[str, Any] = {"action": action}
        if data is not None:
            message["data"] = data
        if id is not None:
            message["id"] = id
        await self.say(json.dumps(message))

    async def say(self, frame: str | bytes) -> None:
        await self.connection.write_message(frame, binary=isinstance(frame, bytes))

    async def hear(self, seconds: float = 30) -> dict[str, Any]:
        """The next message; fails when the connection closes instead."""
        text = await self._read(seconds)
        assert text is not None, f"closed with {self.connection.close_code}"
        assert isinstance(text, str)
        SCHEMAS.check(decode(text), side="server")
        message: dict[str, Any] = json.loads(text)
        return message

    async def ask(self, action: str, data: Any = None, id: str | int | None = None) -> dict[str, Any]:
        await self.send(action, data, id)
        return await self.hear()

    async def run(self, code: str, language: str = "python", **more: Any) -> dict[str, Any]:
        """The data of the output."""
        answer = await self.ask("runCode", {"language": language, "code": code, "mode": "standalone", **more})
        assert answer["action"] == "output", answer
        data: dict[str, Any] = answer["data"]
        return data

    async def close_code(self, seconds: float = 30) -> int | None:
        """Waits until the server closes; gives the code."""
        while await self._read(seconds) is not None:
            pass
        return self.connection.close_code

    async def leave(self) -> None:
        """Closes and waits until that is done."""
        self.connection.close()
        await self.close_code()

    async def _read(self, seconds: float) -> str | bytes | None:
        """The next frame, or None, again and again, when the connection is over."""
        if not self._over:
            text = await asyncio.wait_for(self.connection.read_message(), seconds * SECOND)
            self._over = text is None
            return text
        return None


@asynccontextmanager
async def serving(**settings: Any) -> AsyncIterator[Running]:
    """The real server on a free port, with a folder of its own for its data."""
    with tempfile.TemporaryDirectory(prefix="runboard-test-") as folder:
        # Cold jails are opened in no time; what depends on the engine names it; test_server.py has the default.
        common = {"engine": "nsjail", "fork_servers": 1, "port": 0, "drain_s": 0.0, "data_dir": Path(folder)}
        async with running(Settings(**{**common, **settings})) as server:
            yield server


@asynccontextmanager
async def connected(server: Running, path: str = "/appws", origin: str | None = None) -> AsyncIterator[Client]:
    """A client of it."""
    headers = {} if origin is None else {"Origin": origin}
    request = HTTPRequest(f"ws://127.0.0.1:{server.port}{path}", headers=headers)
    client = Client(await websocket_connect(request, max_message_size=64 << 20))
    try:
        yield client
    finally:
        await client.leave()
