"""The two ways of a frame to its client: neither overtakes the other."""

from __future__ import annotations

import asyncio
import json
import random

import pytest

from handlers.base import ProtocolSocket
from handlers.wire import Wire
from protocol.frame import text_frame
from protocol.message import Message, encode
from tests.conftest import GEN_TEST
from tests.handlers.client import connected, serving

pytestmark = GEN_TEST
FRAMES = 500


async def test_frames_arrive_in_the_order_in_which_they_were_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the kernel takes some at once, and some not, as it likes."""
    sockets: set[ProtocolSocket] = set()
    bound, send_now = Wire.bound, Wire.send_now

    def meet(wire: Wire) -> None:
        assert isinstance(wire._handler, ProtocolSocket)
        sockets.add(wire._handler)
        bound(wire)

    monkeypatch.setattr(Wire, "bound", meet)
    monkeypatch.setattr(Wire, "send_now", lambda wire, frame: random.random() < 0.5 and send_now(wire, frame))

    async with serving() as server, connected(server, "/devws") as client:
        (socket,) = sockets
        for number in range(FRAMES):
            socket.tell(text_frame(encode(Message("echo", number))))
            while not socket._outbox.is_empty:  # the next comes just when this one is taken out to be sent
                await asyncio.sleep(0)

        assert [json.loads(str(await client._read(20)))["data"] for _ in range(FRAMES)] == list(range(FRAMES))
