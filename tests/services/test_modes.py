"""Two queues that are one to a connection."""

from __future__ import annotations

import asyncio

import pytest

from protocol.errors import Conflict, NotFound
from sandbox.model import Job, Status
from services.modes import CLUSTER, STANDALONE, Modes
from services.runs import Bounds, Runs
from tests.conftest import within
from tests.services.test_runs import TestEngine, begun

JOB = Job("python", "")


def test_names_are_unique_in_both_and_each_run_is_found_where_it_is() -> None:
    async def main() -> None:
        engines = TestEngine(), TestEngine()
        queues = [Runs(engine, Bounds(2, 10, 1 << 20, 2, 10)) for engine in engines]
        modes = Modes(dict(zip((STANDALONE, CLUSTER), queues, strict=True)))
        here = asyncio.create_task(modes.run(STANDALONE, JOB, "a", "here"))
        there = asyncio.create_task(modes.run(CLUSTER, JOB, "a", "there", interactive=True))
        for engine in engines:
            await begun(engine, 1)
        for mode, taken in ((STANDALONE, "there"), (CLUSTER, "here")):
            with pytest.raises(Conflict):
                await modes.run(mode, JOB, "a", taken)
        with pytest.raises(NotFound):
            modes.cancel("b", "here")
        with pytest.raises(Conflict, match="not started with interactive"):
            modes.feed("a", "here", "x", end=False)
        modes.feed("a", "there", "x", end=True)
        modes.cancel("a", "there")
        assert (await within(there))[0].status is Status.CANCELLED  # type: ignore[index]
        modes.leave("a")
        assert (await within(here))[0].status is Status.CANCELLED  # type: ignore[index]

    asyncio.run(main())
