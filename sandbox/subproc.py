"""SubprocessEngine: runs programs as plain child processes. For development: it limits, it does not contain."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from sandbox.child.collect import collect
from sandbox.engine import EngineUnavailable
from sandbox.interpreters import Interpreter, Wanted, find_node, find_python, runtime_folder
from sandbox.jail import end_with_server
from sandbox.languages import LANGUAGES, command, environment
from sandbox.model import Channel, Job, Language, Limits, Outcome
from sandbox.packages import prepare
from sandbox.pipes import widen
from sandbox.process import Pipes, Watch
from sandbox.sampled import ProcessTree
from sandbox.signals import signal_name


class SubprocessEngine:
    """Runs each Job in a session and a scratch folder of its own, with the server's user and full sight of the host."""

    name = "subprocess"

    def __init__(self, wanted: Wanted | None = None) -> None:
        self._wanted = wanted or Wanted()

    async def open(self) -> None:
        """Finds the interpreters. Raises EngineUnavailable."""
        self._interpreters: dict[Language, Interpreter] = {
            "python": find_python(self._wanted.python, True, runtime_folder()),
            "javascript": find_node(self._wanted.node, True, runtime_folder()),
        }
        lists = self._wanted.python_packages, self._wanted.node_packages
        self._packages = await asyncio.to_thread(prepare, *lists, self._interpreters, runtime_folder())

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
            if modules := self._packages.get("javascript"):
                (folder / "node_modules").symlink_to(modules)
            for name, text in {**job.files, LANGUAGES[job.language].file_name: job.code}.items():
                path = folder / "work" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(text.encode("utf-8", "surrogatepass"))
            outcome = await self._run_in(folder, job, channel)
            if job.return_files and outcome.facts.exit_code is not None:
                files, cut = await asyncio.to_thread(collect, str(folder / "work"), job.return_bytes)
                outcome = replace(outcome, facts=replace(outcome.facts, files=files, files_cut=cut))
            return outcome
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    async def close(self) -> None:
        """Nothing is kept between runs."""

    async def _run_in(self, folder: Path, job: Job, channel: Channel) -> Outcome:
        process = subprocess.Popen(  # noqa: ASYNC220 -- asyncio's own waits for pipes that a grandchild may hold
            command(job.language, str(self._interpreters[job.language].executable), job.args),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder / "work",
            env=environment(
                job.language, home=str(folder / "work"), scratch=str(folder / "tmp"),
                packages=str(self._packages.get("python", "")),
            ),
            preexec_fn=lambda: _limit_self(job.limits),
        )  # fmt: skip
        tree = ProcessTree()
        tree.limit(job.limits)
        tree.add(process.pid)
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


def _limit_self(limits: Limits) -> None:
    """In the child, before the interpreter: a session of its own, limits, and an end with the server's."""
    os.setsid()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits.open_files, limits.open_files))
    cpu_s = limits.cpu_ms // 1000 + 1
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limits.tmp_bytes, limits.tmp_bytes))
    end_with_server()


def _take_pipes(process: subprocess.Popen[bytes]) -> Pipes:
    """The pipes as bare descriptors, which the watch closes."""
    if process.stdin is None or process.stdout is None or process.stderr is None:
        raise EngineUnavailable("the child was started without pipes")
    ends = [os.dup(end.fileno()) for end in (process.stdin, process.stdout, process.stderr)]
    for end in (process.stdin, process.stdout, process.stderr):
        end.close()
    widen(*ends)
    return Pipes(*ends)
