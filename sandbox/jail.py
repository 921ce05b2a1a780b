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
from sandbox.process import Group, Pipes, Watch
from sandbox.signals import signal_name

SETUP_SECONDS = 10.0
REPORT_BYTES = 1 << 16
PR_SET_PDEATHSIG = 1


class JailGroup(Group, Protocol):
    """The group that a jail's processes are put into."""

    def add(self, pid: int) -> None: ...
    def limit(self, limits: Limits, extra_processes: int) -> None: ...
    async def remove(self) -> None: ...


def end_with_server() -> None:
    """For a child, before it becomes another program: the kernel kills it when the server is gone."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


class Jail:
    """One nsjail process, in its control group already, with the pipes to it. It waits for its configuration.

    Moving a process into a group makes the kernel wait for all processors to take note: 2 ms for each controller of
    version 1. So a jail is started ahead of the run that will use it, in a thread.
    """

    def __init__(self, nsjail: Path, leaf: JailGroup, uid: int, *, warded: bool) -> None:
        """Blocks. Raises OSError."""
        self.leaf = leaf
        self.uid = uid
        self._log = bytearray()
        self._files: dict[str, bytearray] = {}
        self._files_cut = False
        self._room = 0
        self._open: set[int] = set()
        stdin, self._stdin = self._pipe(write_end_is_ours=True)
        stdout, self._stdout = self._pipe(write_end_is_ours=False)
        stderr, self._stderr = self._pipe(write_end_is_ours=False)
        self._their_log, self._log_fd = self._pipe(write_end_is_ours=False)
        config_fd, self._config = self._pipe(write_end_is_ours=True)
        self._job_fd = os.memfd_create("job", os.MFD_CLOEXEC)
        self._open.add(self._job_fd)
        self._report, report = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._report.setblocking(False)
        self._report_number = report.fileno()
        if os.geteuid() == 0:  # so that a program may open /dev/stdout by its name
            for end in (stdin, stdout, stderr):
                os.fchown(end, uid, uid)
        try:
            self._process = subprocess.Popen(
                [nsjail, "--config", f"/proc/self/fd/{config_fd}"],
                stdin=stdin, stdout=stdout, stderr=stderr, env={}, cwd="/",
                pass_fds=(self._their_log, config_fd, self._job_fd, self._report_number),
                preexec_fn=None if warded else end_with_server,
            )  # fmt: skip
            leaf.add(self._process.pid)
        except OSError:
            self._report.close()
            for fd in list(self._open):
                self._close(fd)  # without a configuration, nsjail ends by itself
            raise
        finally:
            report.close()
        for fd in (stdin, stdout, stderr, config_fd, self._their_log):
            self._close(fd)

    def is_good(self) -> bool:
        """Whether nsjail still waits."""
        return self._process.poll() is None

    def begin(self, config: Callable[[int, int, int], str], job: bytes) -> None:
        """Tells nsjail what to do. `config` is given the numbers of the descriptors for job, report and log."""
        left = memoryview(job)
        while left:
            left = left[os.pwrite(self._job_fd, left, len(job) - len(left)) :]  # the shared offset stays at 0
        self._close(self._job_fd)
        text = config(self._job_fd, self._report_number, self._their_log)
        # Never more than the pipe holds at once would be right for a small policy only: feed it as nsjail reads.
        os.set_blocking(self._config, False)
        self._feed(memoryview(text.encode()))

    async def watch(self, job: Job, channel: Channel) -> Outcome:
        """The run, from nsjail's start to its end."""
        self._room = job.limits.output_bytes if job.return_files else 0
        loop = asyncio.get_running_loop()
        pipes = Pipes(self._stdin, self._stdout, self._stderr)
        self._open -= {self._stdin, self._stdout, self._stderr}  # the watch closes them
        watch = Watch(job, channel, self.leaf, pipes)
        setup = loop.call_later(SETUP_SECONDS, lambda: watch.failed("the jail was not ready in time"))
        loop.add_reader(self._report, lambda: self._heard(watch, setup))
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
            if self._config in self._open:
                asyncio.get_running_loop().remove_writer(self._config)
            for fd in list(self._open):
                self._close(fd)

    def _heard(self, watch: Watch, setup: asyncio.TimerHandle) -> None:
        """A report of init.py; an end of file without one means that the jail was not made or did not last."""
        try:
            report = self._report.recv(REPORT_BYTES)
        except BlockingIOError:
            return
        except OSError:
            report = b""
        kind, _, content = report.partition(b" ")
        match [kind, *content.split()] if kind in (b"started", b"ended") else [kind]:
            case [b"file"]:
                self._files[content.decode("utf-8", "replace")] = bytearray()
            case [b"data"] if self._files:
                self._room -= len(content)
                if self._room >= 0:  # init.py keeps to it, but whether it does is not ours to believe
                    self._files[next(reversed(self._files))] += content
            case [b"cut"]:
                self._files_cut = True
            case [b"started", nanoseconds]:
                setup.cancel()
                watch.started(int(nanoseconds) / 1e9)
            case [b"ended", nanoseconds, status]:
                code = os.waitstatus_to_exitcode(int(status))
                at = int(nanoseconds) / 1e9
                how = {"exit_code": code} if code >= 0 else {"signal": signal_name(-code)}
                files = {name: bytes(text) for name, text in self._files.items()}
                watch.ended(at, files=files, files_cut=self._files_cut, **how)
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
            self._close(self._config)

    def _pipe(self, *, write_end_is_ours: bool) -> tuple[int, int]:
        """A pipe as (their end, our end)."""
        read_end, write_end = os.pipe()
        self._open |= {read_end, write_end}
        return (read_end, write_end) if write_end_is_ours else (write_end, read_end)

    def _close(self, fd: int) -> None:
        if fd in self._open:
            self._open.discard(fd)
            os.close(fd)
