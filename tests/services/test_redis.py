"""What only the Redis store promises: several servers share it, and it may go away for a while."""

from __future__ import annotations

import asyncio

import pytest

from services.store import Request, StoreUnavailable
from services.store_redis import RedisStore
from tests.conftest import until
from tests.services.redis_server import running_redis


def test_two_servers_add_to_the_same_scores_and_hear_of_each_other() -> None:
    async def main() -> None:
        async with running_redis() as redis:
            heard: list[str | None] = []
            one, two = RedisStore(redis.url, 100), RedisStore(redis.url, 100)
            await one.open(lambda room: None)
            await two.open(heard.append)
            await one.start_game("r", None, None)
            await until(lambda: "r" in heard)
            await asyncio.gather(*((one, two)[n % 2].add("r", n % 10, n, Request(str(n), "x")) for n in range(2000)))

            assert sum(row.score for row in await two.board("r", 10)) == sum(range(2000))
            assert await one.is_alive(two.instance)
            await two.close()
            await until_gone(one, two.instance)
            await one.close()

    async def until_gone(store: RedisStore, owner: str) -> None:
        while await store.is_alive(owner):
            await asyncio.sleep(0.005)

    asyncio.run(main())


def test_nothing_acknowledged_is_lost_when_redis_is_stopped_and_started_again() -> None:
    async def main() -> None:
        async with running_redis() as redis:
            heard: list[str | None] = []
            store = RedisStore(redis.url, 100)
            await store.open(heard.append)
            await store.start_game("r", None, None)
            acknowledged: set[int] = set()
            refused: set[int] = set()

            async def update(n: int) -> None:
                try:
                    await store.add("r", 1, 1, Request(str(n), "x"))
                    acknowledged.add(n)
                except StoreUnavailable:
                    refused.add(n)

            before = [asyncio.create_task(update(n)) for n in range(3000)]
            await until(lambda: len(acknowledged) > 100)
            await redis.stop()
            await asyncio.gather(*before)
            assert refused
            with pytest.raises(StoreUnavailable, match="Redis"):
                await store.board("r", 1)
            heard.clear()
            await redis.start()
            await until(lambda: None in heard, 60)  # it has connected again, and tells that anything may have changed

            assert (await store.board("r", 1))[0].score >= len(acknowledged)
            for n in range(3000):
                await store.add("r", 1, 1, Request(str(n), "x"))
            assert (await store.board("r", 1))[0].score == 3000
            await store.close()

    asyncio.run(main())


@pytest.mark.parametrize("url", ["redis://127.0.0.1:1", "unix:///nowhere/redis.sock", "redis://127.0.0.1:x"])
def test_a_redis_that_cannot_be_had_is_told(url: str) -> None:
    async def main() -> None:
        with pytest.raises(StoreUnavailable, match="--store"):
            await RedisStore(url, 100).open(lambda room: None)

    asyncio.run(main())
