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

from sandbox.model import Channel, Job, Outcome
from sandbox.process import Group, Pipes, Watch
from sandbox.signals import signal_name

SETUP_SECONDS = 10.0
PR_SET_PDEATHSIG = 1


class JailGroup(Group, Protocol):
    """The group that a jail's processes are put into."""

    def add(self, pid: int) -> None: ...


def end_with_server() -> None:
    """For a child, before it becomes another program: the kernel kills it when the server is gone."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


class Jail:
    """One nsjail process with the pipes to it."""

    def __init__(self, nsjail: Path, policy: str, leaf: JailGroup, *, warded: bool) -> None:
        self._warded = warded
        self._nsjail = nsjail
        self._policy = policy
        self._leaf = leaf
        self._process: subprocess.Popen[bytes] | None = None
        self._log = bytearray()
        self._open: set[int] = set()

    def start(self, complete: Callable[[int, int, int], str], job_fd: int, uid: int) -> None:
        """Starts nsjail, which waits for its configuration until it is in the run's control group."""
        stdin, self._stdin = self._pipe(write_end_is_ours=True)
        stdout, self._stdout = self._pipe(write_end_is_ours=False)
        stderr, self._stderr = self._pipe(write_end_is_ours=False)
        log_fd, self._log_fd = self._pipe(write_end_is_ours=False)
        config_fd, config_in = self._pipe(write_end_is_ours=True)
        report, self._report = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._report.setblocking(False)
        self._open.add(job_fd)
        if os.geteuid() == 0:  # so that a program may open /dev/stdout by its name
            for end in (stdin, stdout, stderr):
                os.fchown(end, uid, uid)
        theirs = (log_fd, config_fd, job_fd, report.fileno())
        self._process = subprocess.Popen(
            [self._nsjail, "--config", f"/proc/self/fd/{config_fd}"],
            stdin=stdin, stdout=stdout, stderr=stderr, pass_fds=theirs, env={}, cwd="/",
            preexec_fn=None if self._warded else end_with_server,
        )  # fmt: skip
        self._leaf.add(self._process.pid)
        config = self._policy + complete(job_fd, report.fileno(), log_fd)
        report.close()
        for fd in (stdin, stdout, stderr, log_fd, config_fd, job_fd):
            self._close(fd)
        # Never more than the pipe holds at once would be right for a small policy only: feed it as nsjail reads.
        os.set_blocking(config_in, False)
        self._feed(config_in, memoryview(config.encode()))

    async def watch(self, job: Job, channel: Channel) -> Outcome:
        """The run, from nsjail's start to its end."""
        loop = asyncio.get_running_loop()
        pipes = Pipes(self._stdin, self._stdout, self._stderr)
        self._open -= {self._stdin, self._stdout, self._stderr}  # the watch closes them
        watch = Watch(job, channel, self._leaf, pipes)
        setup = loop.call_later(SETUP_SECONDS, lambda: watch.failed("the jail was not ready in time"))
        loop.add_reader(self._report, lambda: self._heard(watch, setup))
        loop.add_reader(self._log_fd, self._read_log)
        try:
            return await watch.outcome()
        finally:
            setup.cancel()
            loop.remove_reader(self._report)
            loop.remove_reader(self._log_fd)

    def reap(self) -> None:
        """Takes nsjail's end off the process table and closes what is open; its group is empty by now."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._report.close()
        for fd in list(self._open):
            self._close(fd)

    def _heard(self, watch: Watch, setup: asyncio.TimerHandle) -> None:
        """A report of init.py; an end of file without one means that the jail was not made or did not last."""
        try:
            words = self._report.recv(256).split()
        except BlockingIOError:
            return
        except OSError:
            words = []
        match words:
            case [b"started", nanoseconds]:
                setup.cancel()
                watch.started(int(nanoseconds) / 1e9)
            case [b"ended", nanoseconds, status]:
                code = os.waitstatus_to_exitcode(int(status))
                at = int(nanoseconds) / 1e9
                if code >= 0:
                    watch.ended(at, exit_code=code)
                else:
                    watch.ended(at, signal=signal_name(-code))
            case _:
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

    def _feed(self, fd: int, left: memoryview) -> None:
        loop = asyncio.get_running_loop()
        try:
            left = left[os.write(fd, left) :]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            left = left[:0]
        loop.remove_writer(fd)
        if left:
            loop.add_writer(fd, self._feed, fd, left)
        else:
            self._close(fd)

    def _pipe(self, *, write_end_is_ours: bool) -> tuple[int, int]:
        """A pipe as (their end, our end)."""
        read_end, write_end = os.pipe()
        self._open |= {read_end, write_end}
        return (read_end, write_end) if write_end_is_ours else (write_end, read_end)

    def _close(self, fd: int) -> None:
        if fd in self._open:
            self._open.discard(fd)
            asyncio.get_running_loop().remove_writer(fd)
            os.close(fd)
