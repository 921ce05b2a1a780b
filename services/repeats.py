"""Requests that a client sends again because it does not know whether they arrived: applied once, answered twice."""

from __future__ import annotations

import hashlib
import json
import time

from protocol.message import Message
from services.store import REPEAT_SECONDS

MOST_REMEMBERED = 1000


class Repeats:
    """What one connection has asked for lately; the store does the same for what concerns a room."""

    def __init__(self) -> None:
        self._applied: dict[bytes, float] = {}

    def was_applied(self, message: Message) -> bool:
        """Whether a request with this id, action and data was applied less than two minutes ago."""
        at = self._applied.get(_digest(message))
        return message.id is not None and at is not None and time.monotonic() - at < REPEAT_SECONDS

    def applied(self, message: Message) -> None:
        """Remembers a request that was applied."""
        if message.id is not None:
            digest = _digest(message)
            self._applied.pop(digest, None)
            self._applied[digest] = time.monotonic()
            if len(self._applied) > MOST_REMEMBERED:
                del self._applied[next(iter(self._applied))]


def _digest(message: Message) -> bytes:
    said = json.dumps([message.id, message.action, message.data], sort_keys=True)
    return hashlib.blake2b(said.encode(), digest_size=16).digest()
