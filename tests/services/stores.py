"""The stores of this machine, each in a world of its own."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

from services.store import Store
from services.store_redis import RedisStore
from services.store_sqlite import SqliteStore
from tests.services.redis_server import redis_server

MAX_PLAYERS = 50
Changes = list[str | None]


@asynccontextmanager
async def sqlite() -> AsyncIterator[tuple[Store, Changes]]:
    with tempfile.TemporaryDirectory(prefix="runboard-test-") as folder:
        changes: Changes = []
        store = SqliteStore(Path(folder), MAX_PLAYERS)
        await store.open(changes.append)
        try:
            yield store, changes
        finally:
            await store.close()


@asynccontextmanager
async def redis() -> AsyncIterator[tuple[Store, Changes]]:
    async with redis_server() as url:
        changes: Changes = []
        store = RedisStore(url, MAX_PLAYERS)
        await store.open(changes.append)
        try:
            yield store, changes
        finally:
            await store.close()


STORES: dict[str, Callable[[], AbstractAsyncContextManager[tuple[Store, Changes]]]] = {"sqlite": sqlite, "redis": redis}
