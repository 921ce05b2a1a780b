"""The smallest program here: the first process of a forked run's pid namespace."""

from __future__ import annotations

import asyncio
import os
import platform
import signal
from pathlib import Path

import pytest

from sandbox.first_process import CODE, IGNORE, executable
from tests.conftest import until

HERE = platform.machine()


def ignores_children(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    ignored = int(status.partition("SigIgn:")[2].split()[0], 16)
    return bool(ignored >> (signal.SIGCHLD - 1) & 1)


def test_it_reaps_what_it_adopts_and_sleeps(tmp_path: Path) -> None:
    program = tmp_path / "init"
    program.write_bytes(executable(HERE))
    program.chmod(0o500)
    pid = os.posix_spawn(program, ["init"], {}, setpgroup=0)
    try:
        asyncio.run(until(lambda: ignores_children(pid)))  # a moment later
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.mark.parametrize("machine", CODE)
def test_it_is_an_elf_file_for_its_machine_and_ends_with_its_data(machine: str) -> None:
    content = executable(machine)

    assert content[:4] == b"\x7fELF"
    assert int.from_bytes(content[18:20], "little") == CODE[machine][0]
    assert content.endswith(IGNORE)
    assert len(content) < 512


def test_a_machine_that_it_does_not_know_is_named() -> None:
    with pytest.raises(OSError, match="no first process for vax, only for x86_64 and aarch64"):
        executable("vax")
