"""Control groups: version 1 or 2 as this machine has it, and version 2 against files laid out as the kernel does."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sandbox.cgroup import V2, CgroupUnavailable, Leaf
from sandbox.cgroup_root import PREFIX, open_cgroups
from sandbox.model import Limits
from tests.conftest import until

NOBODYS_PID = 2**22 + 1
"""Above what the kernel gives out."""


@pytest.fixture
def version_2(tmp_path: Path) -> Path:
    """A machine with version 2 only, this process being in /app."""
    tree, proc = tmp_path / "cgroup", tmp_path / "proc"
    app = tree / "app"
    app.mkdir(parents=True)
    proc.mkdir()
    for name, text in {
        "cgroup.controllers": "cpu memory pids io",
        "cgroup.type": "domain",
        "cgroup.procs": "77\n",
    }.items():
        (app / name).write_text(text)
    (proc / "mountinfo").write_text(f"30 1 0:27 / {tree} rw,nosuid shared:9 - cgroup2 cgroup2 rw\n")
    (proc / "cgroup").write_text("0::/app\n")
    return tmp_path


def test_version_2_delegates_controllers_and_moves_the_server_aside(version_2: Path) -> None:
    app = version_2 / "cgroup" / "app"
    open_cgroups(version_2 / "proc", owner=5)

    assert (app / "server" / "cgroup.procs").read_text() == "77"
    assert (app / "cgroup.subtree_control").read_text() == "+memory +pids +cpu"
    assert (app / f"{PREFIX}5" / "cgroup.subtree_control").read_text() == "+memory +pids +cpu"


def test_version_2_without_a_controller_is_told(version_2: Path) -> None:
    (version_2 / "cgroup" / "app" / "cgroup.controllers").write_text("cpu memory")
    with pytest.raises(CgroupUnavailable, match="lacks the controllers pids"):
        open_cgroups(version_2 / "proc", owner=5)


def test_version_2_is_limited_and_read_by_its_own_names(tmp_path: Path) -> None:
    folder = tmp_path
    leaf = Leaf(V2, {"": folder})
    for name in ("memory.max", "memory.swap.max", "pids.max", "cgroup.procs"):
        (folder / name).touch()
    leaf.limit(Limits(memory_bytes=12345, processes=7), 2)
    leaf.add(99)
    (folder / "memory.peak").write_text("5000\n")
    (folder / "memory.events").write_text("low 0\nhigh 0\nmax 3\noom 1\noom_kill 2\n")
    (folder / "pids.events").write_text("max 4\n")
    (folder / "cpu.stat").write_text("usage_usec 1500\nuser_usec 1000\n")

    written = {name: (folder / name).read_text() for name in ("memory.max", "memory.swap.max", "pids.max")}
    assert written == {"memory.max": "12345", "memory.swap.max": "0", "pids.max": "9"}
    assert (folder / "cgroup.procs").read_text() == "99"
    assert (leaf.peak_bytes(), leaf.oom_kills(), leaf.refused_forks(), leaf.cpu_ms()) == (5000, 2, 4, 1.5)
    leaf.close()


def test_no_control_groups_at_all_are_told(tmp_path: Path) -> None:
    (tmp_path / "mountinfo").write_text("")
    (tmp_path / "cgroup").write_text("")
    with pytest.raises(CgroupUnavailable, match="no control groups"):
        open_cgroups(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may make control groups here")
def test_a_group_ends_and_counts_all_that_is_in_it() -> None:
    async def main() -> None:
        groups = open_cgroups()
        leaf = groups.leaf()
        leaf.limit(Limits(memory_bytes=64 << 20, processes=20))
        shell = subprocess.Popen(["/bin/sh", "-c", "read x; sleep 1000 & sleep 1000 & wait"], stdin=subprocess.PIPE)
        leaf.add(shell.pid)
        assert shell.stdin is not None
        shell.stdin.write(b"go\n")
        shell.stdin.close()
        await until(lambda: len(leaf.pids()) == 3)
        assert 0 < leaf.peak_bytes() < 64 << 20
        assert leaf.oom_kills() == leaf.refused_forks() == 0
        leaf.kill()
        assert shell.wait() == -9
        await leaf.remove()
        groups.close()

    asyncio.run(main())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may make control groups here")
def test_a_process_enters_a_group_by_itself() -> None:
    groups = open_cgroups()
    leaf = groups.leaf()
    enter = "import os, sys; [os.write(int(fd), b'0') for fd in sys.argv[1:]]; print(os.getpid(), flush=True); input()"
    command = [sys.executable, "-c", enter, *map(str, leaf.entrances())]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=leaf.entrances())
    assert child.stdout is not None

    assert int(child.stdout.readline()) == child.pid
    for folder in groups.folders.values():
        inside = next(folder.glob("run-*")) / "cgroup.procs"
        assert inside.read_text().split() == [str(child.pid)]
    child.communicate(b"\n")
    asyncio.run(leaf.remove())
    groups.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may make control groups here")
def test_what_a_dead_server_left_is_removed_and_a_living_ones_is_not() -> None:
    living, dead = open_cgroups(owner=1), open_cgroups(owner=NOBODYS_PID)
    left, kept = dead.leaf(), living.leaf()
    groups = open_cgroups()

    assert not any(folder.exists() for folder in dead.folders.values())
    assert all(folder.exists() for folder in living.folders.values())
    assert left is not kept
    asyncio.run(kept.remove())
    living.close()
    groups.close()
