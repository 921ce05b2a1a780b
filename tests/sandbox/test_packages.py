"""Packages for programs: installed once, found by every engine, changed by nobody."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from sandbox.engine import Engine, EngineUnavailable
from sandbox.forkserver import PRELOAD, ForkServerEngine
from sandbox.interpreters import Wanted
from sandbox.local import Local
from sandbox.model import Channel, Job, Language, Outcome, Status
from tests.conftest import within

ENGINES = pytest.mark.parametrize("name", ["forkserver", "nsjail", "subprocess"])
NUMPY = "numpy>=2,<3\nsix\n"


@pytest.fixture
def wanted(tmp_path: Path) -> Wanted:
    requirements, manifest = tmp_path / "requirements.txt", tmp_path / "package.json"
    requirements.write_text(NUMPY)
    manifest.write_text('{"private": true, "dependencies": {"ms": "2.1.3", "nanoid": "^5.0.0"}}')
    return Wanted(python_packages=requirements, node_packages=manifest)


def on(engine: Engine, *programs: tuple[Language, str]) -> list[Outcome]:
    """What becomes of the programs, one after the other."""

    async def main() -> list[Outcome]:
        await engine.open()
        try:
            outcomes = [await within(engine.run(Job(*program), Channel()), 60) for program in programs]
            assert all(isinstance(outcome, Outcome) for outcome in outcomes)
            return outcomes  # type: ignore[return-value]
        finally:
            await engine.close()

    return asyncio.run(main())


@ENGINES
def test_programs_can_import_what_is_installed_and_nothing_else(name: str, wanted: Wanted) -> None:
    outcomes = on(
        Local(wanted).make(name, 0),
        ("python", "import six; print(six.moves.range(3))"),
        ("python", "import requests"),
        ("javascript", "console.log(require('ms')('2 days'))"),
        ("javascript", "import { nanoid } from 'nanoid'; console.log(nanoid().length)"),
        ("javascript", "require('express')"),
    )

    assert [outcome.stdout for outcome in outcomes] == ["range(0, 3)\n", "", "172800000\n", "21\n", ""]
    assert "ModuleNotFoundError: No module named 'requests'" in outcomes[1].stderr
    assert "Cannot find module 'express'" in outcomes[4].stderr


def test_numpy_works_within_the_default_limits(wanted: Wanted) -> None:
    code = "import numpy as np; print(int((np.ones((200, 200)) @ np.ones((200, 200))).sum()), np.random.rand())"
    cold, warm, warm_too = (
        on(Local(wanted).make("nsjail", 0), ("python", code))[0],
        *on(ForkServerEngine(wanted, preload=(*PRELOAD, "numpy")), ("python", code), ("python", code)),
    )

    for outcome in (cold, warm, warm_too):
        assert outcome.status is Status.OK, outcome.error
        assert outcome.stdout.startswith("8000000 ")
    assert len({outcome.stdout for outcome in (cold, warm, warm_too)}) == 3  # its random numbers are not shared


def test_packages_are_read_only(wanted: Wanted) -> None:
    code = (
        "import os, six\nfor place in (os.path.dirname(six.__file__), '/node_modules'):\n"
        "    try: open(f'{place}/mine', 'w')\n    except OSError as failure: print(failure.errno)"
    )
    assert on(Local(wanted).make("forkserver", 0), ("python", code))[0].stdout == "30\n30\n"


@pytest.mark.parametrize(
    ("packages", "text", "said"),
    [
        ("python_packages", "no-such-package-of-runboard==9.9", "--python-packages"),
        ("node_packages", "{ no json", "--node-packages"),
        ("python_packages", None, "--python-packages"),
    ],
)
def test_what_cannot_be_installed_is_told(packages: str, text: str | None, said: str, tmp_path: Path) -> None:
    file = tmp_path / "package.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(EngineUnavailable, match=said):
        on(Local(Wanted(**{packages: file})).make("nsjail", 0))
