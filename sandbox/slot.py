"""One forked interpreter: ready in namespaces of its own, waiting for the one job that it will ever see."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import socket
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from background import spawn
from sandbox.child.collect import collect
from sandbox.forkjail import ForkServer
from sandbox.jail import SETUP_SECONDS, JailGroup
from sandbox.model import Channel, Job, Outcome
from sandbox.pipes import Descriptors
from sandbox.process import Watch
from sandbox.report import REPORT_BYTES, Reports
from sandbox.syscalls import Image

CREDENTIALS = struct.Struct("3i")
Value = TypeVar("Value")


class ForkServerLost(OSError):
    """A fork server did not answer."""


class Slot:
    """Made ahead of the run that will use it."""

    def __init__(self, server: ForkServer, leaf: JailGroup, uid: int, give_back: Callable[[], None]) -> None:
        """`uid` is the slot's user outside; `give_back` is called when it is gone. Raises OSError."""
        self.leaf = leaf
        self._server = server
        self._uid = uid
        self._folder = -1
        self._left_files = False
        self._collecting: asyncio.Task[tuple[dict[str, bytes], bool]] | None = None
        self._give_back = give_back
        self._fds = Descriptors()
        try:
            self._theirs, self._pipes = self._fds.standard_streams(uid)
            self._job = self._fds.keep(os.memfd_create("job", os.MFD_CLOEXEC))
            self._end, self._far_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError:
            self._fds.close_all()
            raise
        self._end.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._end.setblocking(False)

    async def fill(self, request: Image) -> None:
        """Has its interpreter forked, and waits until that is ready for a job.

        Raises:
            ForkServerLost: the fork server is gone.
            TimeoutError: it does not answer.
            OSError: it could not do it; the text says why.
        """
        try:
            entrances = self.leaf.entrances()
            async with asyncio.timeout(SETUP_SECONDS):
                descriptors = [self._far_end.fileno(), self._job, *self._theirs, *entrances]
                await self._server.fork(request.bytes, descriptors)
                self._far_end.close()
                self._fds.close(*self._theirs)
                init, self._program = await self._announced(request)
            self._pidfd = self._fds.keep(os.pidfd_open(init))
            if not entrances:
                self.leaf.add(init)
                self.leaf.add(self._program)
        except OSError:
            self._far_end.close()
            self._end.close()
            self._fds.close_all()
            raise

    def is_good(self) -> bool:
        """Whether it still waits."""
        return not _readable(self._pidfd)

    def begin(self, job: Job, task: bytes) -> None:
        """Gives it the job, which `task` describes."""
        left = memoryview(task)
        while left:
            left = left[os.pwrite(self._job, left, len(task) - len(left)) :]  # the shared offset stays at 0
        with contextlib.suppress(ConnectionError, FileNotFoundError):  # it is gone, which the watch will find
            if job.return_files:
                self._folder = self._fds.keep(os.open(f"/proc/{self._program}/cwd", os.O_PATH | os.O_CLOEXEC))
                if os.geteuid() == 0 and os.fstat(self._folder).st_uid != self._uid:
                    return  # it is gone, and its number is somebody else's
            self._end.send(str(len(task)).encode())

    async def watch(self, job: Job, channel: Channel) -> Outcome:
        """The run, to the end of its program, and of whatever it has left running when this end was reported."""
        loop = asyncio.get_running_loop()
        self._fds.give(*self._pipes)
        watch = Watch(job, channel, self.leaf, self._pipes, self._kill)
        setup = loop.call_later(SETUP_SECONDS, lambda: watch.failed("the program was not started in time"))

        def started(at: float) -> None:
            setup.cancel()
            watch.started(at)

        def ended(at: float, **facts: Any) -> None:
            self._left_files = watch.ended(at, **facts) and self._folder >= 0

        reports = Reports(self._end, 0, started, ended, watch.failed)
        loop.add_reader(self._end.fileno(), lambda: self._heard(reports, watch))
        try:
            return await watch.outcome()
        finally:
            setup.cancel()
            loop.remove_reader(self._end.fileno())

    async def files(self, job: Job, outcome: Outcome) -> Outcome:
        """The outcome, with the files that the program has left, once nobody is at work there any more."""
        if not self._left_files:
            return outcome
        place = f"/proc/self/fd/{self._folder}"
        self._collecting = spawn(asyncio.to_thread(collect, place, job.return_bytes), name="collect files")
        files, cut = await asyncio.shield(self._collecting)
        self._fds.close(self._folder)  # until then what it holds is in the group
        return replace(outcome, facts=replace(outcome.facts, files=files, files_cut=cut))

    async def gone(self) -> None:
        """Ends whatever is left of it and waits for the last process to go."""
        if not _readable(self._pidfd):
            self._kill()
            loop = asyncio.get_running_loop()
            over: asyncio.Future[None] = loop.create_future()
            loop.add_reader(self._pidfd, _settle, over, None)
            late = loop.call_later(SETUP_SECONDS, self._server.kill)
            try:
                await over
            finally:
                late.cancel()
                loop.remove_reader(self._pidfd)

    async def discard(self) -> None:
        """Ends whatever is left of it and gives everything back."""
        await self.gone()
        self._end.close()
        if self._collecting is not None:
            await asyncio.wait({self._collecting})
        try:
            await self.leaf.release()
        finally:
            self._fds.close_all()
            self._give_back()

    def _kill(self) -> None:
        """The kernel ends a pid namespace with its first process."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def _announced(self, request: Image) -> tuple[int, int]:
        """The ids outside of the first process of the pid namespace and of the program's, both of which tell them."""
        loop = asyncio.get_running_loop()
        over: asyncio.Future[tuple[int, int]] = loop.create_future()
        pids: dict[bytes, int] = {}

        def hear() -> None:
            word, ancillary, _, _ = self._end.recvmsg(REPORT_BYTES, socket.CMSG_SPACE(CREDENTIALS.size))
            if word in (b"init", b"ready"):
                pids[word], _, _ = CREDENTIALS.unpack(ancillary[0][2])
                if len(pids) == 2:
                    _settle(over, (pids[b"init"], pids[b"ready"]))
            elif not over.done():
                why = request.failure(word.decode(errors="replace").removeprefix("failed: "))
                failure = OSError(f"a fork server's child did not start: {why}")
                over.set_exception(failure if word else ForkServerLost("a fork server is gone"))

        loop.add_reader(self._end.fileno(), hear)
        try:
            return await over
        finally:
            loop.remove_reader(self._end.fileno())

    def _heard(self, reports: Reports, watch: Watch) -> None:
        if not reports.heard():
            asyncio.get_running_loop().remove_reader(self._end.fileno())
            watch.lost(lambda: "the fork server ended, and the run with it")


def _settle(over: asyncio.Future[Value], value: Value) -> None:
    if not over.done():
        over.set_result(value)


def _readable(pidfd: int) -> bool:
    """Whether the process has ended."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))
