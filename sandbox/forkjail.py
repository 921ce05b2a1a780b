"""Fork servers as the server sees them: a jail each with a warm interpreter in it, and a few to take in turn."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from sandbox.engine import EngineUnavailable
from sandbox.jail import JailGroup, before_exec
from sandbox.model import Limits
from sandbox.networks import Networks
from sandbox.snapshot import snapshot
from sandbox.syscalls import Image
from sandbox.world import ENDED, FORKED, LISTENING, TOLD, Parent

log = logging.getLogger(__name__)
START_SECONDS = 20.0
END_SECONDS = 1.0
REPLY_BYTES = 1 << 16
OWN_LIMITS = Limits(memory_bytes=1 << 30, processes=1 << 14)
"""Of a fork server, with the first process of each run; programs join the groups of their runs before they are any."""
MAPS = b"maps\n"
DESCRIPTORS = struct.Struct("<2i")


class ForkServerLost(OSError):
    """A fork server did not answer."""


class End(NamedTuple):
    """Of a child: when (seconds, monotonic clock), and what `wait` says of it."""

    at: float
    status: int


class Child:
    """A forked interpreter. `descriptors` are for the first process of its pid namespace and for itself, and are to be
    closed when it is over. `over` will be its end, or None when its fork server is gone, and it with that."""

    def __init__(self, first: int, itself: int) -> None:
        self.first = first
        self.descriptors = first, itself
        self._is_closed = False
        self.over: asyncio.Future[End | None] = asyncio.get_running_loop().create_future()

    def kill(self) -> None:
        """The kernel ends a pid namespace with its first process."""
        if not self._is_closed:  # else the number may be that of another
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.first, signal.SIGKILL)

    def close(self, _: object = None) -> None:
        """Closes its descriptors."""
        if not self._is_closed:
            self._is_closed = True
            for descriptor in self.descriptors:
                os.close(descriptor)


class ForkServer:
    """One jail whose first process forks on request. `parent` is what it has told of itself."""

    def __init__(
        self, nsjail: Path, config: str, setup: bytes, shared: Callable[[Parent], bytes], leaf: JailGroup,
        give_back: Callable[[], None], *, warded: bool,
    ) -> None:  # fmt: skip
        """Starts it and waits until it is ready. `setup` is its first message, and `shared` gives the next, when it has
        told of itself; `give_back` is called when it is gone.

        Raises:
            EngineUnavailable: it did not start; the text has its own last words.
        """
        self.forks = self.slots = 0
        self.parent = Parent(0, (0, 0), ())
        self.networks = Networks(-1)
        self._is_lost = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._turn = asyncio.Lock()
        self._asked: deque[tuple[Image, asyncio.Future[Child]]] = deque()
        self._children: dict[int, Child] = {}
        self._leaf = leaf
        self._give_back = give_back
        leaf.limit(OWN_LIMITS)
        self._control, far_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._log, their_log = os.pipe()  # as a program's streams: python notes whether they can be sought in
        os.set_blocking(self._log, False)
        config_fd, config_end = os.pipe()  # nsjail waits for it, and so forks nothing before it is in its group
        with open(config_end, "wb", buffering=0) as configuration:
            try:
                command = [str(nsjail), "--config", f"/proc/self/fd/{config_fd}"]
                self._process = subprocess.Popen(
                    command, stdin=far_end.fileno(), stdout=their_log, stderr=their_log, env={}, cwd="/",
                    pass_fds=(config_fd,), preexec_fn=before_exec(warded=warded),
                )  # fmt: skip
            finally:
                far_end.close()
                os.close(config_fd)
                os.close(their_log)
            try:
                leaf.add(self._process.pid)
                configuration.write(config.encode())
                configuration.close()
                self._control.settimeout(START_SECONDS)
                self._control.send(setup)
                word, *numbers = self._told().split() or [b""]
                if word != b"ready":
                    raise EngineUnavailable(f"a fork server did not start: {self._last_words()}")
                base, generator, size, *inherited = map(int, numbers)
                self.parent = Parent(base, (generator, size), tuple(inherited))
                self._control.send(shared(self.parent))
                self.networks = Networks(self._listener())
                self._control.setblocking(False)
            except OSError as failure:
                words = self._last_words()
                self.close()
                raise EngineUnavailable(f"a fork server did not start: {failure}; {words}") from failure
            except EngineUnavailable:
                self.close()
                raise

    def _told(self) -> bytes:
        """What it tells of itself, if it is ready; before, it may ask how to put its memory into a file."""
        told = self._control.recv(REPLY_BYTES)
        if told.startswith(MAPS):
            self._control.send(snapshot(told.removeprefix(MAPS).decode()))
            told = self._control.recv(REPLY_BYTES)
        return told

    def _listener(self) -> int:
        """The descriptor at which the kernel asks before a socket is made, or -1."""
        told, ancillary, _, _ = self._control.recvmsg(TOLD.size, socket.CMSG_SPACE(DESCRIPTORS.size))
        if not told or TOLD.unpack(told)[0] != LISTENING:
            raise EngineUnavailable(f"a fork server did not start: {self._last_words()}")
        return int.from_bytes(ancillary[0][2], sys.byteorder) if ancillary else -1

    def is_alive(self) -> bool:
        """Whether it can be asked to fork."""
        return not self._is_lost and self._process.poll() is None

    def lost(self) -> None:
        """It was found not to answer, perhaps before its jail has ended."""
        self._is_lost = True

    def kill(self) -> None:
        """Ends it and all its children, because it does not do its work any more."""
        log.error("a fork server did not see a run to its end in time, and is killed")
        self.lost()
        self._leaf.kill()

    async def fork(self, request: Image, descriptors: Sequence[int]) -> Child:
        """A child, which is given the descriptors.

        Raises:
            ForkServerLost: the fork server is gone.
            OSError: it could not do it; the text says why.
        """
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self._control, self._heard)
            self.networks.listen()
        async with self._turn:
            while True:
                try:
                    socket.send_fds(self._control, [request.bytes], descriptors)
                    break
                except BlockingIOError:
                    await self._room()
                except ConnectionError as failure:
                    raise ForkServerLost("a fork server is gone") from failure
            child: asyncio.Future[Child] = self._loop.create_future()
            self._asked.append((request, child))
        return await child

    def _heard(self) -> None:
        """Takes what the fork server tells: of children, in the order in which they were asked for, and of ends."""
        try:
            told, ancillary, _, _ = self._control.recvmsg(TOLD.size, socket.CMSG_SPACE(DESCRIPTORS.size))
        except BlockingIOError:
            return
        except OSError:
            told = b""
        if not told:
            self._gone()
            return
        what, number, address, status, seconds, nanoseconds = TOLD.unpack(told)
        if what == ENDED:  # or a first process has
            if child := self._children.pop(number, None):
                child.over.set_result(End(seconds + nanoseconds / 1e9, status))
            return
        request, answer = self._asked.popleft()
        content = ancillary[0][2] if ancillary else b""
        if what == FORKED and len(content) < DESCRIPTORS.size:
            for (descriptor,) in struct.iter_unpack("i", content):
                os.close(descriptor)
            self.lost()  # and with it the child
            if not answer.done():
                answer.set_exception(ForkServerLost("a child's descriptors did not arrive: too many files are open"))
        elif what == FORKED:
            self._children[number] = child = Child(*DESCRIPTORS.unpack(content))
            if answer.done():  # it is not wanted any more
                child.kill()
                child.over.add_done_callback(child.close)
            else:
                answer.set_result(child)
        elif not answer.done():
            answer.set_exception(OSError(f"a fork server could not fork: {request.failure(address, -number)}"))

    def _gone(self) -> None:
        """It will tell nothing more."""
        assert self._loop is not None
        self._loop.remove_reader(self._control)
        self.networks.close()
        self.lost()
        while self._asked:
            _, answer = self._asked.popleft()
            if not answer.done():
                answer.set_exception(ForkServerLost("a fork server is gone"))
        while self._children:
            _, child = self._children.popitem()
            child.over.set_result(None)

    async def _room(self) -> None:
        """Waits until another request can be sent."""
        loop = asyncio.get_running_loop()
        room = loop.create_future()
        loop.add_writer(self._control, room.set_result, None)
        try:
            await room
        finally:
            loop.remove_writer(self._control)

    def close(self) -> None:
        """Ends it and with it every process that it ever forked. Blocks."""
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):  # it ends by itself, sooner than if it is killed
            self._control.shutdown(socket.SHUT_RDWR)
            self._process.wait(END_SECONDS)
        self._process.kill()
        asyncio.run(self._leaf.remove())
        self._process.wait()
        if self._loop is not None:
            gone = asyncio.run_coroutine_threadsafe(self._left(), self._loop)
            gone.result()
        self.networks.close()
        self._control.close()
        os.close(self._log)
        self._give_back()

    async def _left(self) -> None:
        self._gone()

    def _last_words(self) -> str:
        """The end of what it, or nsjail around it, has written; it is called when the jail has ended or hangs."""
        try:
            text = os.read(self._log, 1 << 16).decode(errors="replace")
        except BlockingIOError:
            text = ""
        lines = [line for line in text.splitlines() if line.strip() and not line.startswith("[I]")]
        errors = [line for line in lines if "Error" in line]
        return " / ".join(errors[-1:] or lines[-3:]) or "without a word"


class ForkServers:
    """A few fork servers of one language, taken in turn. One that is worn out or dead is replaced."""

    def __init__(self, make: Callable[[], ForkServer], count: int, most_forks: int) -> None:
        """`make` blocks until one is ready."""
        self._make = make
        self._count = count
        self._most_forks = most_forks
        self._servers: list[ForkServer] = []
        self._retired: list[ForkServer] = []
        self._turns = itertools.count()
        self._lock = threading.Lock()
        self._replacing = threading.Lock()
        self._threads = ThreadPoolExecutor(max(2, os.cpu_count() or 1), thread_name_prefix="fork servers")

    def start(self) -> None:
        """Starts all. Blocks. Raises EngineUnavailable."""
        starts = [self._threads.submit(self._make) for _ in range(self._count)]
        failure: BaseException | None = None
        for start in starts:
            try:
                self._servers.append(start.result())
            except EngineUnavailable as problem:
                failure = problem
        if failure is not None:
            self.close()
            raise failure

    async def take(self) -> ForkServer:
        """The next in turn; `give_back` it when its slot is gone. One that is dead is replaced first."""
        while True:
            with self._lock:
                server = self._servers[next(self._turns) % len(self._servers)]
                if server.is_alive():
                    server.slots += 1
                    server.forks += 1
                    if server.forks == self._most_forks:
                        self._threads.submit(self._replace, server)
                    return server
            await asyncio.wrap_future(self._threads.submit(self._replace, server))

    def give_back(self, server: ForkServer) -> None:
        """A slot of `server` is gone."""
        with self._lock:
            server.slots -= 1
            worn_out = server in self._retired and not server.slots
            if worn_out:
                self._retired.remove(server)
        if worn_out:
            self._threads.submit(server.close)

    def close(self) -> None:
        """Ends all, and whatever they have forked. Blocks."""
        self._threads.shutdown()
        for server in [*self._servers, *self._retired]:
            server.close()
        self._servers.clear()
        self._retired.clear()

    def _replace(self, old: ForkServer) -> None:
        with self._replacing:
            if old not in self._servers:
                return
            new = self._make()
            with self._lock:
                self._servers[self._servers.index(old)] = new
                idle = not old.slots
                if not idle:
                    self._retired.append(old)
            if idle:
                old.close()
