"""Calls of Redis scripts in the order in which they were asked for; what waits meanwhile shares the next round trip."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis
from redis.commands.core import AsyncScript
from redis.exceptions import RedisError

from background import spawn

MOST_AT_ONCE = 128
"""Calls in one round trip: enough to hide its cost, few enough that it is short."""


@dataclass(eq=False, slots=True)
class _Call:
    script: AsyncScript
    keys: list[str]
    arguments: list[Any]
    answer: asyncio.Future[Any]


class CallsInOrder:
    """A pool of connections would let a client's second request overtake its first."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._waiting: deque[_Call] = deque()
        self._sending: asyncio.Task[None] | None = None

    async def call(self, script: AsyncScript, keys: list[str], arguments: list[Any]) -> Any:
        """The script's answer. Raises RedisError, OSError."""
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Call(script, keys, arguments, answer))
        if self._sending is None or self._sending.done():
            self._sending = spawn(self._send_all(), name="redis calls")
        return await answer

    async def close(self) -> None:
        """Returns when nothing is on its way any more."""
        if self._sending is not None:
            await self._sending

    async def _send_all(self) -> None:
        while self._waiting:
            calls = [self._waiting.popleft() for _ in range(min(MOST_AT_ONCE, len(self._waiting)))]
            for call, answer in zip(calls, await self._send(calls), strict=True):
                if call.answer.done():  # whoever asked is gone
                    continue
                if isinstance(answer, Exception):
                    call.answer.set_exception(answer)
                else:
                    call.answer.set_result(answer)

    async def _send(self, calls: list[_Call]) -> list[Any]:
        try:
            async with self._redis.pipeline(transaction=False) as pipeline:
                for call in calls:
                    await call.script(keys=call.keys, args=call.arguments, client=pipeline)
                return list(await pipeline.execute(raise_on_error=False))
        except (RedisError, OSError) as failure:
            return [failure] * len(calls)
