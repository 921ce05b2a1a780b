"""Programs that mean harm, each with what must become of it: `expect: STATUS|STATUS [out=FIRST LINE]`."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from sandbox.model import Channel, Job, Language, Limits, Status
from tests.conftest import JAILING, SECOND, opened, within

PROGRAMS = sorted((Path(__file__).parent / "programs").iterdir())
HEADER = re.compile(r"(?:#|//) expect: (?P<statuses>\S+)(?: out=(?P<out>.*))?\n")
LIMITS = Limits(wall_ms=int(2000 * SECOND), cpu_ms=int(1500 * SECOND), memory_bytes=192 << 20)


@JAILING
@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_a_hostile_program_gets_what_it_deserves(path: Path, engine_name: str) -> None:
    code = path.read_text()
    header = HEADER.match(code)
    assert header is not None
    language: Language = "python" if path.suffix == ".py" else "javascript"

    async def main() -> None:
        async with opened(engine_name) as engine:
            outcome = await within(engine.run(Job(language, code, limits=LIMITS), Channel()), 60)
            assert outcome.status in header["statuses"].split("|"), (
                outcome.status,
                outcome.error,
                outcome.stdout[:500],
            )
            if header["out"] is not None:
                assert outcome.stdout.splitlines()[:1] == [header["out"]]
            assert len(outcome.stdout) <= LIMITS.output_bytes
            assert outcome.facts.usage.memory_bytes <= LIMITS.memory_bytes
            after = await within(engine.run(Job("python", "print('fine')"), Channel()), 60)
            assert (after.status, after.stdout) == (Status.OK, "fine\n")

    asyncio.run(main())
