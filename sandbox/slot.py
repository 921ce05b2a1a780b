"""One forked interpreter: ready in namespaces of its own, waiting for the one job that it will ever see."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
import struct
from collections.abc import Callable

from sandbox.forkjail import ForkServer
from sandbox.jail import SETUP_SECONDS, JailGroup
from sandbox.model import Channel, Job, Outcome
from sandbox.pipes import Descriptors
from sandbox.process import Watch
from sandbox.report import REPORT_BYTES, Reports

OWN_PROCESSES = 1
"""The first process of its pid namespace is in a run's control group beside the program."""
CREDENTIALS = struct.Struct("3i")


class ForkServerLost(OSError):
    """A fork server did not answer."""


class Slot:
    """Made ahead of the run that will use it, in a thread."""

    def __init__(
        self, server: ForkServer, leaf: JailGroup, uid: int, request: bytes, give_back: Callable[[], None]
    ) -> None:
        """`uid` is the slot's user outside; `request` is for the fork server; `give_back` is called when it is gone.

        Blocks.

        Raises:
            ForkServerLost: it is gone.
            OSError: it could not do it; the text says why.
        """
        self.leaf = leaf
        self._give_back = give_back
        self._fds = Descriptors()
        theirs, self._pipes = self._fds.standard_streams(uid)
        self._job = self._fds.keep(os.memfd_create("job", os.MFD_CLOEXEC))
        entrances = leaf.entrances()
        self._end, far_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._end.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            self._end.settimeout(SETUP_SECONDS)
            server.fork(request, [far_end.fileno(), self._job, *theirs, *entrances])
            far_end.close()
            self._fds.close(*theirs)
            pid = self._hear(b"init")
            self._pidfd = self._fds.keep(os.pidfd_open(pid))
            if not entrances:
                leaf.add(pid)
            self._hear(b"ready")
        except OSError:
            far_end.close()
            self._end.close()
            self._fds.close_all()
            raise
        self._end.setblocking(False)

    def is_good(self) -> bool:
        """Whether it still waits."""
        return not _readable(self._pidfd)

    def begin(self, task: bytes) -> None:
        """Gives it the job."""
        left = memoryview(task)
        while left:
            left = left[os.pwrite(self._job, left, len(task) - len(left)) :]  # the shared offset stays at 0
        with contextlib.suppress(OSError):  # it is gone, which the watch will find
            self._end.send(b"g")

    async def watch(self, job: Job, channel: Channel) -> Outcome:
        """The run, to its end; its last process is gone by then."""
        loop = asyncio.get_running_loop()
        self._fds.give(*self._pipes)
        watch = Watch(job, channel, self.leaf, self._pipes)
        setup = loop.call_later(SETUP_SECONDS, lambda: watch.failed("the program was not started in time"))
        reports = Reports(self._end, job.return_bytes, setup.cancel)
        loop.add_reader(self._end, lambda: self._heard(reports, watch))
        try:
            return await watch.outcome()
        finally:
            setup.cancel()
            loop.remove_reader(self._end)

    async def gone(self) -> None:
        """Ends whatever is left of it and waits until the last process is gone."""
        if not _readable(self._pidfd):
            self.leaf.kill()
            loop = asyncio.get_running_loop()
            over: asyncio.Future[None] = loop.create_future()
            loop.add_reader(self._pidfd, _settle, over)
            try:
                await over
            finally:
                loop.remove_reader(self._pidfd)

    async def discard(self) -> None:
        """Gives everything back."""
        self._end.close()
        try:
            await self.leaf.release()
        finally:
            self._fds.close_all()
            self._give_back()

    def _hear(self, expected: bytes) -> int:
        """Waits for one word of the slot's; gives the process id, outside, of the one who said it."""
        word, ancillary, _, _ = self._end.recvmsg(REPORT_BYTES, socket.CMSG_SPACE(CREDENTIALS.size))
        if not word:
            raise ForkServerLost("a fork server is gone")
        if word != expected:
            raise OSError(f"a fork server's child did not start: {word.decode(errors='replace')}")
        pid, _, _ = CREDENTIALS.unpack(ancillary[0][2])
        return int(pid)

    def _heard(self, reports: Reports, watch: Watch) -> None:
        if not reports.heard(watch):
            asyncio.get_running_loop().remove_reader(self._end)
            watch.lost(lambda: "the fork server ended, and the run with it")


def _settle(over: asyncio.Future[None]) -> None:
    if not over.done():
        over.set_result(None)


def _readable(pidfd: int) -> bool:
    """Whether the process has ended."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))
