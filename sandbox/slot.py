"""One forked interpreter: ready in namespaces of its own, waiting for the one job that it will ever see."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from background import spawn
from sandbox.child.collect import collect
from sandbox.forkjail import Child, End, ForkServer, ForkServerLost
from sandbox.jail import SETUP_SECONDS, JailGroup
from sandbox.model import Channel, Job, Outcome
from sandbox.pipes import Descriptors
from sandbox.placing import STARTED
from sandbox.process import Watch
from sandbox.report import REPORT_BYTES, how
from sandbox.syscalls import JOB_AT, Image, failed_step

CREDENTIALS = struct.Struct("3i")


class Slot:
    """Made ahead of the run that will use it."""

    def __init__(self, server: ForkServer, leaf: JailGroup, uid: int, give_back: Callable[[], None]) -> None:
        """`uid` is the slot's user outside; `give_back` is called when it is gone. Raises OSError.

        `network`: its network namespace, if it is to be used again.
        """
        self.leaf = leaf
        self.parent = server.parent
        self._server = server
        self._uid = uid
        self._folder = -1
        self._left_files = False
        self._request: Image
        self._child: Child
        self._program = 0
        self._hears = False
        self._collecting: asyncio.Task[tuple[dict[str, bytes], bool]] | None = None
        self._give_back = give_back
        self._fds = Descriptors()
        self._ready: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._watch: Watch | None = None
        try:
            self._theirs, self._pipes = self._fds.standard_streams(uid)
            self._job = self._fds.keep(os.memfd_create("job", os.MFD_CLOEXEC))
            self._end, self._far_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError:
            self._fds.close_all()
            raise
        self.network = server.networks.take()
        self._end.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._end.setblocking(False)

    async def fill(self, request: Image) -> None:
        """Has its interpreter forked, and waits until that is ready for a job.

        Raises:
            ForkServerLost: the fork server is gone.
            TimeoutError: it does not answer.
            OSError: it could not do it; the text says why.
        """
        child = None
        try:
            entrances = self.leaf.entrances()
            async with asyncio.timeout(SETUP_SECONDS):
                descriptors = [self._far_end.fileno(), self._job, *self._theirs, *entrances]
                if self.network is not None:
                    descriptors.append(self.network.file)
                self._child = child = await self._server.fork(request, descriptors)
                self._far_end.close()
                self._fds.close(*self._theirs)
                self._request, self._hears = request, True
                asyncio.get_running_loop().add_reader(self._end, self._heard)
                self._child.over.add_done_callback(self._ended)
                self._program = await self._ready
            if self.network is None:
                self.network = self._server.networks.of(self._program)
                if self.network is not None and _readable(self._child.descriptors[1]):  # it may be another's
                    self.network.is_used = True
            if not entrances:
                self.leaf.add(_pid(self._child.first))
                self.leaf.add(self._program)
        except OSError:
            if self.network is not None:  # where a child may be
                self.network.is_used = True
            if child is not None:
                child.kill()
                child.over.add_done_callback(child.close)
            self._close()
            raise

    def is_good(self) -> bool:
        """Whether it still waits."""
        return not self._child.over.done() and not _readable(self._child.first)

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
        self._watch = watch = Watch(job, channel, self.leaf, self._pipes, self._child.kill)
        self._setup = loop.call_later(SETUP_SECONDS, lambda: watch.failed("the program was not started in time"))
        if self._child.over.done():
            self._ended(self._child.over)
        try:
            return await watch.outcome()
        finally:
            self._setup.cancel()

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
        over, first = self._child.over, self._child.first
        if over.done() and _readable(first):
            return
        self._child.kill()
        loop = asyncio.get_running_loop()
        late = loop.call_later(SETUP_SECONDS, self._server.kill)
        last: asyncio.Future[None] = loop.create_future()
        loop.add_reader(first, _settle, last)
        try:
            await last
            await asyncio.wait({over})  # or the fork server, which looks at the descriptors, would not see it
        finally:
            late.cancel()
            loop.remove_reader(first)

    async def discard(self) -> None:
        """Ends whatever is left of it and gives everything back."""
        await self.gone()
        if self._collecting is not None:
            await asyncio.wait({self._collecting})
        try:
            await self.leaf.release()
        finally:
            self._close()
            self._child.close()
            self._give_back()

    def _heard(self) -> None:
        """Takes what the child says; when that is all, its end is what counts."""
        try:
            said, ancillary, _, _ = self._end.recvmsg(REPORT_BYTES, socket.CMSG_SPACE(CREDENTIALS.size))
        except BlockingIOError:
            self._hears = not self._child.over.done()
            return
        except OSError:
            said = b""
        word, _, content = said.partition(b" ")
        if word == b"ready" and not self._ready.done():
            pid, _, _ = CREDENTIALS.unpack(ancillary[0][2])
            self._ready.set_result(pid)
            return
        self._hears = False
        asyncio.get_running_loop().remove_reader(self._end)
        if word == b"started" and self._watch is not None:
            self._setup.cancel()
            _, seconds, nanoseconds = STARTED.unpack(said)
            self._watch.started(seconds + nanoseconds / 1e9)
        elif word == b"failed:":
            self._failed(content.decode(errors="replace"))

    def _failed(self, text: str) -> None:
        """`text` is an error of the interpreter's, or of a step of what was asked for."""
        why = self._why(*failed_step(int(text))) if text.isdecimal() else text
        if not self._ready.done():
            self._ready.set_exception(OSError(f"a fork server's child did not start: {why}"))
        elif self._watch is not None:
            self._watch.failed(why)

    def _why(self, address: int, error: int) -> str:
        if address >= JOB_AT:
            return f"cannot write its files: {os.strerror(error)}"
        return self._request.failure(address, error)

    def _ended(self, over: asyncio.Future[End | None]) -> None:
        while self._hears:  # what the child has said before
            self._heard()
        end = over.result()
        if not self._ready.done():
            lost = ForkServerLost("a fork server is gone")
            self._ready.set_exception(OSError("a fork server's child ended before it was ready") if end else lost)
        elif self._watch is not None and end is None:
            self._watch.lost(lambda: "the fork server ended, and the run with it")
        elif self._watch is not None and end is not None:
            self._left_files = self._watch.ended(end.at, **how(end.status)) and self._folder >= 0

    def _close(self) -> None:
        self._hears = False
        asyncio.get_running_loop().remove_reader(self._end)
        self._end.close()
        self._far_end.close()
        self._fds.close_all()
        if self.network is not None:
            self._server.networks.give_back(self.network)
            self.network = None


def _settle(over: asyncio.Future[None]) -> None:
    if not over.done():
        over.set_result(None)


def _pid(pidfd: int) -> int:
    """The process that a descriptor is for."""
    _, _, text = Path(f"/proc/self/fdinfo/{pidfd}").read_text().partition("Pid:")
    return int(text.split()[0])


def _readable(pidfd: int) -> bool:
    """Whether the process has ended."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))
