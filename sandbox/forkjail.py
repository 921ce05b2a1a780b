"""Fork servers as the server sees them: a jail each with a warm interpreter in it, and a few to take in turn."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sandbox.engine import EngineUnavailable
from sandbox.jail import JailGroup, before_exec
from sandbox.model import Limits
from sandbox.world import Parent

log = logging.getLogger(__name__)
START_SECONDS = 20.0
REPLY_BYTES = 1 << 16
OWN_LIMITS = Limits(memory_bytes=1 << 30, processes=1 << 14)
"""Of a fork server, with the first process of each run; programs join the groups of their runs before they are any."""


class ForkServer:
    """One jail whose first process forks on request. `parent` is what it has told of itself."""

    def __init__(
        self, nsjail: Path, config: str, setup: bytes, leaf: JailGroup, give_back: Callable[[], None], *, warded: bool
    ) -> None:
        """Starts it and waits until it is ready. `setup` is its first message; `give_back` is called when it is gone.

        Raises:
            EngineUnavailable: it did not start; the text has its own last words.
        """
        self.forks = self.slots = 0
        self.parent = Parent(0, (0, 0), ())
        self._is_lost = False
        self._turn = asyncio.Lock()
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
                word, *numbers = self._control.recv(REPLY_BYTES).split() or [b""]
                if word != b"ready":
                    raise EngineUnavailable(f"a fork server did not start: {self._last_words()}")
                base, generator, size, *inherited = map(int, numbers)
                self.parent = Parent(base, (generator, size), tuple(inherited))
                self._control.setblocking(False)
            except OSError as failure:
                words = self._last_words()
                self.close()
                raise EngineUnavailable(f"a fork server did not start: {failure}; {words}") from failure
            except EngineUnavailable:
                self.close()
                raise

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

    async def fork(self, request: bytes, descriptors: Sequence[int]) -> None:
        """Asks for a child, which is given the descriptors. Raises BrokenPipeError when the fork server is gone."""
        async with self._turn:
            while True:
                try:
                    socket.send_fds(self._control, [request], descriptors)
                    return
                except BlockingIOError:
                    await self._room()

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
        self._process.kill()
        asyncio.run(self._leaf.remove())
        self._process.wait()
        self._control.close()
        os.close(self._log)
        self._give_back()

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
