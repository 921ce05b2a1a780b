"""SubprocessEngine: runs programs as plain child processes. For development: it limits, it does not contain."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from sandbox.engine import EngineUnavailable
from sandbox.interpreters import Interpreter, find_node, find_python
from sandbox.languages import LANGUAGES, command, environment
from sandbox.model import Channel, Job, Language, Limits, Outcome
from sandbox.nsjail import RUNTIME
from sandbox.process import Pipes, Watch
from sandbox.signals import signal_name

SAMPLE_SECONDS = 0.01
PR_SET_PDEATHSIG = 1


class SubprocessEngine:
    """Runs each Job in a session and a scratch folder of its own, with the server's user and full sight of the host."""

    name = "subprocess"

    def __init__(self, python: Path | None = None, node: Path | None = None) -> None:
        self._wanted_python, self._wanted_node = python, node

    async def open(self) -> None:
        """Finds the interpreters. Raises EngineUnavailable."""
        self._interpreters: dict[Language, Interpreter] = {
            "python": find_python(self._wanted_python, True, RUNTIME),
            "javascript": find_node(self._wanted_node, True, RUNTIME),
        }

    def warnings(self) -> list[str]:
        """What this engine does not enforce, which is most."""
        return [
            "programs run as the server's user: they can read its files, use its network and signal its processes",
            "memory is sampled, not limited by the kernel: a fast allocation may pass the limit before it is seen",
            "disk space is not limited",
        ]

    async def run(self, job: Job, channel: Channel) -> Outcome:
        """Runs `job` as a child process."""
        folder = Path(tempfile.mkdtemp(prefix="runboard-"))
        try:
            (folder / "tmp").mkdir()
            program = folder / LANGUAGES[job.language].file_name
            program.write_bytes(job.code.encode("utf-8", "surrogatepass"))
            return await self._run_in(folder, job, channel)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    async def close(self) -> None:
        """Nothing is kept between runs."""

    async def _run_in(self, folder: Path, job: Job, channel: Channel) -> Outcome:
        process = subprocess.Popen(  # noqa: ASYNC220 -- asyncio's own waits for pipes that a grandchild may hold
            command(job.language, str(self._interpreters[job.language].executable), job.args),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder,
            env=environment(job.language, home=str(folder), scratch=str(folder / "tmp")),
            preexec_fn=lambda: _limit_self(job.limits),
        )  # fmt: skip
        tree = ProcessTree(process.pid, job.limits)
        try:
            watch = Watch(job, channel, tree, _take_pipes(process))
            watch.started(time.monotonic())
            ended = _Exit(process, watch)
            try:
                return await watch.outcome()
            finally:
                ended.close()
        finally:
            await tree.remove()
            process.kill()
            process.wait()


class _Exit:
    """Tells the watch of the child's exit, without reaping it: its id must not be given to another meanwhile."""

    def __init__(self, process: subprocess.Popen[bytes], watch: Watch) -> None:
        self._fd = os.pidfd_open(process.pid)
        self._process, self._watch = process, watch
        asyncio.get_running_loop().add_reader(self._fd, self._exited)

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._fd)
        os.close(self._fd)

    def _exited(self) -> None:
        asyncio.get_running_loop().remove_reader(self._fd)
        end = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        if end is None or end.si_code == os.CLD_EXITED:
            self._watch.ended(time.monotonic(), exit_code=end.si_status if end else None)
        else:
            self._watch.ended(time.monotonic(), signal=signal_name(end.si_status))


class ProcessTree:
    """A child and all that comes of it, followed with psutil: by parenthood, and by session for what was orphaned."""

    def __init__(self, pid: int, limits: Limits) -> None:
        self._root = psutil.Process(pid)
        self._limits = limits
        self._known: dict[int, psutil.Process] = {pid: self._root}
        self._cpu_s: dict[int, float] = {}
        self._peak = 0
        self._over = 0
        self._sampler: asyncio.TimerHandle | None = None
        self._on_oom: Callable[[], None] = lambda: None

    def watch_oom(self, on_oom: Callable[[], None]) -> None:
        """Samples memory from now on and calls `on_oom` when it is over the limit."""
        self._on_oom = on_oom
        self._sample()

    def cpu_ms(self) -> float:
        """CPU time of every process that was seen."""
        self._look()
        return sum(self._cpu_s.values()) * 1000

    def peak_bytes(self) -> int:
        """The most resident memory that was seen at once."""
        return self._peak

    def oom_kills(self) -> int:
        """1 when the run was over its memory."""
        return self._over

    def refused_forks(self) -> int:
        """Not known here: the limit is the user's, not the run's."""
        return 0

    def kill(self) -> None:
        """Ends the tree, again until nothing new turns up."""
        while living := self._look():
            for process in living:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs([process for process in living if process != self._root], timeout=0.05)
            if all(process == self._root for process in living):
                break

    async def remove(self) -> None:
        """Ends the tree and stops sampling."""
        if self._sampler is not None:
            self._sampler.cancel()
        self.kill()

    def _sample(self) -> None:
        used = 0
        for process in self._look():
            with contextlib.suppress(psutil.Error):
                used += process.memory_info().rss
        self._peak = max(self._peak, used)
        if used > self._limits.memory_bytes:
            self._over = 1
            self._on_oom()
            return
        self._sampler = asyncio.get_running_loop().call_later(SAMPLE_SECONDS, self._sample)

    def _look(self) -> list[psutil.Process]:
        """The living processes of the tree."""
        for process in list(self._known.values()):
            with contextlib.suppress(psutil.Error):
                self._known.update({child.pid: child for child in process.children(recursive=True)})
        for process in psutil.process_iter():  # those whose parent has gone, but whose session is a known one
            if process.pid not in self._known:
                with contextlib.suppress(OSError):
                    if os.getsid(process.pid) in self._known:
                        self._known[process.pid] = process
        living = []
        for process in self._known.values():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                self._cpu_s[process.pid] = times.user + times.system
                if process.status() != psutil.STATUS_ZOMBIE:
                    living.append(process)
        return living


def _limit_self(limits: Limits) -> None:
    """In the child, before the interpreter: a session of its own, limits, and an end with the server's."""
    os.setsid()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits.open_files, limits.open_files))
    cpu_s = limits.cpu_ms // 1000 + 1
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limits.tmp_bytes, limits.tmp_bytes))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _take_pipes(process: subprocess.Popen[bytes]) -> Pipes:
    """The pipes as bare descriptors, which the watch closes."""
    if process.stdin is None or process.stdout is None or process.stderr is None:
        raise EngineUnavailable("the child was started without pipes")
    ends = [os.dup(end.fileno()) for end in (process.stdin, process.stdout, process.stderr)]
    for end in (process.stdin, process.stdout, process.stderr):
        end.close()
    return Pipes(*ends)
