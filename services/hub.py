"""Delivery: an Outbox holds what one client has yet to be sent, the Hub knows who is in which room."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable
from typing import Protocol

from protocol.frame import text_frame
from protocol.message import Message, encode


class SlowClient(Exception):
    """A client that does not read what it is sent; its connection closes with 1013."""


class Outbox:
    """What waits for one client, in order and bounded. A keyed frame takes the place of the one still waiting."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._waiting: dict[Hashable, bytes] = {}
        self._bytes = 0
        self._filled = asyncio.Event()
        self._emptied = asyncio.Event()

    def put(self, frame: bytes, key: Hashable = None) -> None:
        """Appends `frame`. What is larger than the bound may still be put into an empty outbox.

        Raises:
            SlowClient: it does not fit beside what waits already.
        """
        replaced = self._waiting.get(key, b"") if key is not None else b""
        if len(self._waiting) > bool(replaced) and self._bytes - len(replaced) + len(frame) > self._limit:
            raise SlowClient(f"{self._bytes} bytes wait for the client, and the limit is {self._limit}")
        self._bytes += len(frame) - len(replaced)
        self._waiting[object() if key is None else key] = frame
        self._filled.set()

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits."""
        return not self._waiting

    async def put_when_room(self, frame: bytes, patience_s: float) -> None:
        """Appends `frame` as soon as it fits: for answers, which must not close a client that only takes its time.

        Raises:
            SlowClient: there was no room for `patience_s` seconds.
        """
        try:
            async with asyncio.timeout(patience_s):
                while True:
                    try:
                        return self.put(frame)
                    except SlowClient:
                        self._emptied.clear()
                        await self._emptied.wait()
        except TimeoutError:
            raise SlowClient(f"nothing of {self._bytes} bytes was read for {patience_s:g} s") from None

    async def take(self) -> bytes:
        """The next frame, as soon as there is one."""
        while not self._waiting:
            self._filled.clear()
            await self._filled.wait()
        key = next(iter(self._waiting))
        frame = self._waiting.pop(key)
        self._bytes -= len(frame)
        self._emptied.set()
        return frame


class Member(Protocol):
    """One who can be told things: a client's connection."""

    def tell(self, frame: bytes, key: Hashable) -> None:
        """Sends a framed message, or puts it into its outbox; never waits, never raises."""


class Hub:
    """The rooms and who is in them."""

    def __init__(self) -> None:
        self._rooms: dict[str, dict[Member, None]] = {}

    def join(self, room: str, member: Member) -> None:
        """From now on `member` gets what is published to `room`."""
        self._rooms.setdefault(room, {})[member] = None

    def leave(self, room: str, member: Member) -> None:
        """Takes `member` out; an empty room is forgotten."""
        members = self._rooms.get(room, {})
        members.pop(member, None)
        if not members:
            self._rooms.pop(room, None)

    def rooms(self) -> list[str]:
        """Those that have members."""
        return list(self._rooms)

    def has_members(self, room: str) -> bool:
        """Whether anyone is there to be told."""
        return room in self._rooms

    def publish(self, room: str, message: Message, key: Hashable = None) -> None:
        """Sends `message`, encoded and framed once, to everyone in `room`."""
        members = self._rooms.get(room)
        if members:
            frame = text_frame(encode(message))
            for member in list(members):
                member.tell(frame, key)
