"""Things made ahead: taken once, replaced, and made again after a failure."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from sandbox.ready import Ready
from tests.conftest import until


class Thing:
    def __init__(self, number: int) -> None:
        self.number = number
        self.good = True
        self.discarded = False

    def is_good(self) -> bool:
        return self.good

    async def discard(self) -> None:
        self.discarded = True


class Maker:
    def __init__(self) -> None:
        self.made: list[Thing] = []
        self.broken = False
        self._numbers = itertools.count()

    async def __call__(self) -> Thing:
        if self.broken:
            raise OSError("no more descriptors")
        self.made.append(Thing(next(self._numbers)))
        return self.made[-1]


def test_each_thing_is_taken_once_and_replaced() -> None:
    async def main() -> None:
        maker = Maker()
        ready = Ready(maker, 2)
        await ready.fill()
        taken = [await ready.take() for _ in range(5)]
        await until(lambda: len(ready._ready) == 2)
        await ready.close()

        assert len({thing.number for thing in taken}) == 5
        assert not any(thing.discarded for thing in taken)
        assert all(thing.discarded for thing in maker.made if thing not in taken)

    asyncio.run(main())


def test_what_has_gone_bad_is_discarded_and_another_one_given() -> None:
    async def main() -> None:
        maker = Maker()
        ready = Ready(maker, 1)
        await ready.fill()
        bad = maker.made[0]
        bad.good = False

        assert (await ready.take()) is not bad
        assert bad.discarded
        await ready.close()

    asyncio.run(main())


def test_after_a_failure_things_are_kept_ready_again(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        maker = Maker()
        ready = Ready(maker, 2)
        await ready.fill()
        maker.broken = True
        await ready.take()
        await ready.take()
        with pytest.raises(OSError, match="no more descriptors"):
            await ready.take()
        await until(lambda: not ready._in_making)  # the ones in the background have failed too
        maker.broken = False
        await ready.take()
        await until(lambda: len(ready._ready) == 2)
        await ready.close()

    asyncio.run(main())


def test_without_any_ready_ones_each_is_made_when_it_is_wanted() -> None:
    async def main() -> None:
        ready = Ready(Maker(), 0)
        await ready.fill()
        assert (await ready.take()).number == 0
        await ready.close()

    asyncio.run(main())


def test_who_waits_gets_the_first_that_is_made_and_one_who_left_does_not_lose_it() -> None:
    async def main() -> None:
        go = asyncio.Event()
        maker = Maker()

        async def slowly() -> Thing:
            await go.wait()
            return await maker()

        ready = Ready(slowly, 1)
        waiting = [asyncio.ensure_future(ready.take()) for _ in range(3)]
        await until(lambda: len(ready._waiting) == 3)
        waiting[0].cancel()
        go.set()
        taken = [await waiting[1], await waiting[2]]
        with pytest.raises(asyncio.CancelledError):
            await waiting[0]
        await until(lambda: not ready._in_making)
        await ready.close()

        assert [thing.number for thing in taken] == [0, 1]
        assert [thing.discarded for thing in maker.made] == [False, False, *[True] * (len(maker.made) - 2)]

    asyncio.run(main())


def test_who_leaves_some_for_others_gets_one_that_is_made_for_it() -> None:
    async def main() -> None:
        ready = Ready(Maker(), 1)
        await ready.fill()
        assert (await ready.take(leave=1)).number == 1
        assert (await ready.take()).number == 0
        await until(lambda: not ready._in_making)
        await ready.close()

    asyncio.run(main())
