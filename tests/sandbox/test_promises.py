"""Each promise of docs/sandbox.md is tried by a program that wants to break it."""

from __future__ import annotations

import asyncio

import pytest

from sandbox.__main__ import check
from sandbox.model import Channel, Job
from sandbox.promises import PROMISES, Promise
from tests.conftest import JAILING, opened, within


@JAILING
def test_every_promise_is_kept_in_the_jail(engine_name: str) -> None:
    async def main() -> None:
        async with opened(engine_name) as engine:
            checks = await check(engine)
            assert [tried for tried in checks if not tried.kept] == []
            assert len(checks) == len(PROMISES) + 2

    asyncio.run(main())


@pytest.mark.parametrize("name", ["outside-user", "host-files", "processes-seen", "read-only", "network", "init"])
def test_a_probe_tells_where_its_promise_does_not_hold(name: str) -> None:
    promise = next(promise for promise in PROMISES if promise.name == name)

    async def main(promise: Promise) -> None:
        async with opened("subprocess") as engine:
            outcome = await within(engine.run(Job("python", promise.probe), Channel()), 60)
            assert outcome.stdout != "kept\n"

    asyncio.run(main(promise))
