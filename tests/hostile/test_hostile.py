"""Programs that mean harm, each with what must become of it: `expect: STATUS|STATUS [out=FIRST LINE]`."""

from __future__ import annotations

import asyncio
import functools
import re
from pathlib import Path

import pytest

from sandbox.model import Channel, Job, Limits, Outcome, Status
from tests.conftest import JAILING, SECOND, opened, within

PROGRAMS = sorted((Path(__file__).parent / "programs").iterdir())
HEADER = re.compile(r"(?:#|//) expect: (?P<statuses>\S+)(?: out=(?P<out>.*))?\n")
LIMITS = Limits(wall_ms=int(2000 * SECOND), cpu_ms=int(1500 * SECOND), memory_bytes=192 << 20)


@functools.cache
def outcomes(engine_name: str) -> dict[str, tuple[Outcome, Outcome]]:
    """What becomes of each program, and of a good one after it, on one engine that has to stand them all."""

    async def main() -> dict[str, tuple[Outcome, Outcome]]:
        done = {}
        async with opened(engine_name) as engine:
            for path in PROGRAMS:
                job = Job("python" if path.suffix == ".py" else "javascript", path.read_text(), limits=LIMITS)
                harmful = await within(engine.run(job, Channel()), 60)
                good = await within(engine.run(Job("python", "print('fine')"), Channel()), 60)
                assert isinstance(harmful, Outcome)
                assert isinstance(good, Outcome)
                done[path.name] = harmful, good
        return done

    return asyncio.run(main())


@JAILING
@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_a_hostile_program_gets_what_it_deserves(path: Path, engine_name: str) -> None:
    header = HEADER.match(path.read_text())
    assert header is not None
    outcome, after = outcomes(engine_name)[path.name]

    assert outcome.status in header["statuses"].split("|"), (outcome.status, outcome.error, outcome.stdout[:500])
    if header["out"] is not None:
        assert outcome.stdout.splitlines()[:1] == [header["out"]]
    assert len(outcome.stdout) <= LIMITS.output_bytes
    assert outcome.facts.usage.memory_bytes <= LIMITS.memory_bytes
    assert (after.status, after.stdout) == (Status.OK, "fine\n")
