"""The store that several server processes, or machines, share: every change is one Lua call, so none is half done."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

from background import spawn
from services.redis_calls import CallsInOrder
from services.redis_scripts import ADD, BOARD, SAVE_TASKS, START
from services.store import (
    KEPT_SECONDS,
    MICROS,
    REPEAT_SECONDS,
    Changed,
    Player,
    Request,
    Row,
    StoreUnavailable,
    TaskRecord,
    no_game,
    not_on_board,
    not_on_roster,
    out_of_bounds,
    room_full,
    used_otherwise,
)

log = logging.getLogger(__name__)
PREFIX = "runboard"
CHANGED = f"{PREFIX}:changed"
CONNECTIONS = 32
ANSWER_SECONDS = 5.0
"""Redis answers within so long, or it is taken for gone."""
AGAIN_SECONDS = (0.1, 0.2, 0.5, 1.0)
"""Pauses before a lost connection is tried again; the last one from then on."""


class RedisStore:
    """Keys of a room carry its name in braces, so that a Redis Cluster keeps them together."""

    def __init__(self, url: str, max_players: int) -> None:
        self._url = url
        self._max_players = max_players
        self.instance = uuid.uuid4().hex

    async def open(self, changed: Changed) -> None:
        """Connects. Raises StoreUnavailable."""
        self._changed = changed
        try:
            pool = BlockingConnectionPool.from_url(
                self._url, max_connections=CONNECTIONS, timeout=ANSWER_SECONDS, decode_responses=True,
                # redis-py's own retries would apply a change again whose answer was lost.
                retry=Retry(NoBackoff(), 0), socket_timeout=ANSWER_SECONDS, socket_connect_timeout=ANSWER_SECONDS,
            )  # fmt: skip
        except ValueError as failure:
            raise StoreUnavailable(f"the address of Redis is not valid: {failure} (--store)") from failure
        self._redis = Redis(connection_pool=pool)
        self._calls = CallsInOrder(self._redis)
        self._start, self._add = self._redis.register_script(START), self._redis.register_script(ADD)
        self._board, self._save = self._redis.register_script(BOARD), self._redis.register_script(SAVE_TASKS)
        try:
            async with self._answering():
                await self._warn_if_forgetful()
        except StoreUnavailable:
            await self._redis.aclose()
            await pool.disconnect()
            raise
        listening = asyncio.Event()
        self._listener = spawn(self._listen(listening), name="listen to redis")
        await listening.wait()

    async def _warn_if_forgetful(self) -> None:
        try:
            found = await self._redis.config_get("append*")
        except ResponseError:  # a Redis of others may keep its settings to itself
            await self._redis.ping()
            return
        if (found.get("appendonly"), found.get("appendfsync")) != ("yes", "always"):
            log.warning(
                "Redis may forget what it acknowledged if it is killed: it wants `appendonly yes`, `appendfsync always`"
            )

    async def close(self) -> None:
        """Disconnects."""
        self._listener.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._listener
        await self._calls.close()
        await self._redis.aclose()
        await self._redis.connection_pool.disconnect()

    async def start_game(self, room: str, roster: Sequence[Player] | None, request: Request | None) -> None:
        """As the Store promises."""
        players = "" if roster is None else json.dumps([[str(player.id), player.name] for player in roster])
        answer = await self._call(self._start, room, request, [*_asked(request), CHANGED, room, players])
        if answer == "otherwise" and request is not None:
            raise used_otherwise(request)

    async def add(self, room: str, player: int, micros: int, request: Request | None) -> None:
        """As the Store promises."""
        whole, rest = divmod(micros, MICROS)
        asked = [*_asked(request), CHANGED, room, player, whole, rest, self._max_players]
        match await self._call(self._add, room, request, asked):
            case "otherwise" if request is not None:
                raise used_otherwise(request)
            case "no game":
                raise no_game()
            case "not on roster":
                raise not_on_roster(player)
            case "out of bounds":
                raise out_of_bounds(player)
            case "room full":
                raise room_full(self._max_players)

    async def board(self, room: str, limit: int, around: int | None = None) -> list[Row]:
        """As the Store promises."""
        found = await self._call(self._board, room, None, [limit, "" if around is None else around])
        if found == "nobody":
            raise not_on_board(around or 0)
        (rank, first), *entries = found
        rows: list[Row] = []
        for place, (id, whole, rest, name) in enumerate(entries, int(first) + 1):
            score = int(whole) * MICROS + int(rest)
            if rows and rows[-1].score != score:
                rank = place
            rows.append(Row(int(rank), int(id), name, score))
        return rows

    async def save_tasks(self, session: str, updates: Sequence[dict[str, Any]]) -> None:
        """As the Store promises."""
        records = [[update["taskId"], json.dumps([self.instance, update])] for update in updates]
        async with self._answering():
            await self._save(keys=_task_keys(session), args=[KEPT_SECONDS, json.dumps(records)])

    async def tasks(self, session: str) -> list[TaskRecord]:
        """As the Store promises."""
        data, order = _task_keys(session)
        async with self._answering():
            ids = [str(id) for id in await self._redis.zrange(order, 0, -1)]
            texts = await self._redis.hmget(data, ids) if ids else []
        records = (json.loads(text) for text in texts if text is not None)
        return [TaskRecord(update, owner) for owner, update in records]

    async def is_alive(self, owner: str) -> bool:
        """Every server process listens to a channel of its own, and Redis knows at once when its connection ends."""
        async with self._answering():
            [(_, listeners)] = await self._redis.pubsub_numsub(_presence(owner))
        return int(listeners) > 0

    async def _call(self, script: Any, room: str, request: Request | None, arguments: list[Any]) -> Any:
        keys = [f"{PREFIX}:{{{room}}}:{part}" for part in ("game", "players", "board")]
        keys.append(f"{PREFIX}:{{{room}}}:request:{request.id if request else ''}")
        async with self._answering():
            return await self._calls.call(script, keys, arguments)

    async def _listen(self, listening: asyncio.Event) -> None:
        """Passes on what has changed, anywhere; after each new connection, anything may have."""
        pauses = iter(AGAIN_SECONDS)
        while True:
            with contextlib.suppress(RedisError, OSError):
                async with self._redis.pubsub() as channel:
                    await channel.subscribe(CHANGED, _presence(self.instance))
                    async for message in _messages(channel):
                        if message["type"] == "message":
                            self._changed(message["data"])
                        elif message["channel"] == CHANGED:
                            pauses = iter(AGAIN_SECONDS)
                            listening.set()
                            self._changed(None)
            await asyncio.sleep(next(pauses, AGAIN_SECONDS[-1]))

    @asynccontextmanager
    async def _answering(self) -> AsyncIterator[None]:
        try:
            yield
        except (RedisError, OSError) as failure:
            raise StoreUnavailable(f"Redis: {failure} (--store)") from failure


async def _messages(channel: Any) -> AsyncIterator[dict[str, Any]]:
    """What comes, for as long as the connection lasts; silence is no failure."""
    while True:
        message = await channel.get_message(timeout=None)
        if message is not None:
            yield message


def _asked(request: Request | None) -> list[Any]:
    return [request.what if request else "", REPEAT_SECONDS]


def _presence(instance: str) -> str:
    return f"{PREFIX}:instance:{instance}"


def _task_keys(session: str) -> list[str]:
    return [f"{PREFIX}:{{session {session}}}:{part}" for part in ("tasks", "order")]
