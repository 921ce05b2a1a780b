"""One nsjail process: started inside its run's control group, listened to, and cleared away."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from sandbox.model import Channel, Job, Limits, Outcome
from sandbox.pipes import Descriptors
from sandbox.process import Group, Watch
from sandbox.report import Reports

SETUP_SECONDS = 10.0
PR_SET_PDEATHSIG = 1


class JailGroup(Group, Protocol):
    """The group that a jail's processes are put into."""

    def add(self, pid: int) -> None: ...
    def entrances(self) -> list[int]: ...
    def limit(self, limits: Limits, extra_processes: int = 0) -> None: ...
    async def release(self) -> None: ...
    async def remove(self) -> None: ...


def end_with_server() -> None:
    """For a child, before it becomes another program: the kernel kills it when the server is gone."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def before_exec(*, warded: bool) -> Callable[[], None] | None:
    """What a jail's process does before it becomes nsjail. Nothing, if it can be: then it is started faster."""
    ignored = [number for number in signal.valid_signals() if signal.getsignal(number) is signal.SIG_IGN]
    ignored = [number for number in ignored if number not in (signal.SIGPIPE, signal.SIGXFSZ)]  # Popen sees to these
    if warded and not ignored:
        return None

    def prepare() -> None:
        for number in ignored:  # as nohup does with SIGHUP: programs are not to ignore it too
            signal.signal(number, signal.SIG_DFL)
        if not warded:
            end_with_server()

    return prepare


class Jail:
    """One nsjail process, in its control group already, with the pipes to it. It waits for its configuration.

    Moving another process into a group makes the kernel wait for all processors to take note, for some milliseconds. So
    a jail is started ahead of the run that will use it, in a thread.
    """

    def __init__(self, nsjail: Path, leaf: JailGroup, uid: int, *, warded: bool) -> None:
        """Blocks. Raises OSError."""
        self.leaf = leaf
        self.uid = uid
        self._log = bytearray()
        self._fds = Descriptors()
        (stdin, stdout, stderr), self._pipes = self._fds.standard_streams(uid)
        self._their_log, self._log_fd = self._fds.pipe(write_end_is_ours=False)
        config_fd, self._config = self._fds.pipe(write_end_is_ours=True)
        self._job_fd = self._fds.keep(os.memfd_create("job", os.MFD_CLOEXEC))
        self._report, report = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._report.setblocking(False)
        self._report_number = report.fileno()
        try:
            self._process = subprocess.Popen(
                [nsjail, "--config", f"/proc/self/fd/{config_fd}"],
                stdin=stdin, stdout=stdout, stderr=stderr, env={}, cwd="/",
                pass_fds=(self._their_log, config_fd, self._job_fd, self._report_number),
                preexec_fn=before_exec(warded=warded),
            )  # fmt: skip
            leaf.add(self._process.pid)
        except OSError:
            self._report.close()
            self._fds.close_all()  # without a configuration, nsjail ends by itself
            raise
        finally:
            report.close()
        self._fds.close(stdin, stdout, stderr, config_fd, self._their_log)

    def is_good(self) -> bool:
        """Whether nsjail still waits."""
        return self._process.poll() is None

    def begin(self, config: Callable[[int, int, int], str], job: bytes) -> None:
        """Tells nsjail what to do. `config` is given the numbers of the descriptors for job, report and log."""
        left = memoryview(job)
        while left:
            left = left[os.pwrite(self._job_fd, left, len(job) - len(left)) :]  # the shared offset stays at 0
        self._fds.close(self._job_fd)
        text = config(self._job_fd, self._report_number, self._their_log)
        # Never more than the pipe holds at once would be right for a small policy only: feed it as nsjail reads.
        os.set_blocking(self._config, False)
        self._feed(memoryview(text.encode()))

    async def watch(self, job: Job, channel: Channel) -> Outcome:
        """The run, from nsjail's start to its end."""
        loop = asyncio.get_running_loop()
        self._fds.give(*self._pipes)
        watch = Watch(job, channel, self.leaf, self._pipes)
        setup = loop.call_later(SETUP_SECONDS, lambda: watch.failed("the jail was not ready in time"))

        def started(at: float) -> None:
            setup.cancel()
            watch.started(at)

        reports = Reports(self._report, job.return_bytes, started, watch.ended, watch.failed)
        loop.add_reader(self._report, lambda: self._heard(reports, watch))
        loop.add_reader(self._log_fd, self._read_log)
        try:
            return await watch.outcome()
        finally:
            setup.cancel()
            loop.remove_reader(self._report)
            loop.remove_reader(self._log_fd)

    async def discard(self) -> None:
        """Ends whatever is left of the jail and gives everything back."""
        try:
            self._process.kill()
            await self.leaf.remove()
        finally:
            self._process.wait()
            self._report.close()
            if self._fds.has(self._config):
                asyncio.get_running_loop().remove_writer(self._config)
            self._fds.close_all()

    def _heard(self, reports: Reports, watch: Watch) -> None:
        """An end of file without a report of the program's end means that the jail was not made or did not last."""
        if not reports.heard():
            asyncio.get_running_loop().remove_reader(self._report)
            watch.lost(lambda: f"the jail could not be made: {self._reason()}")

    def _read_log(self) -> None:
        self._log += os.read(self._log_fd, 1 << 16)

    def _reason(self) -> str:
        """What nsjail said of its failure: its errors, else its warnings."""
        with contextlib.suppress(OSError):
            os.set_blocking(self._log_fd, False)
            self._log += os.read(self._log_fd, 1 << 16)
        lines = self._log.decode(errors="replace").splitlines()
        for level in ("[F]", "[E]", "[W]"):
            if said := [re.sub(r"^(\[[^]]*\])+\s*", "", line) for line in lines if line.startswith(level)]:
                return "; ".join(said[:3])
        return "nsjail ended without a word"

    def _feed(self, left: memoryview) -> None:
        loop = asyncio.get_running_loop()
        try:
            left = left[os.write(self._config, left) :]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            left = left[:0]
        loop.remove_writer(self._config)
        if left:
            loop.add_writer(self._config, self._feed, left)
        else:
            self._fds.close(self._config)
