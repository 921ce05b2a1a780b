"""What a server and a worker say to each other about one run, over a connection between the two: both ends of it.

server ─► {op: RUN, id, job, live, interactive}      once; a worker without a lease of that id answers {refused}
server ─► {fed: bytes, end} | {cancel} | {over}      as it comes; `over` is the last word, for the connection lives on
worker ─► {printed: [[stream, bytes], …], unread}    in order; `unread` bytes of standard input wait for the program
worker ─► {outcome}                                  once, after all that was printed
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from distributed.comm.core import Comm, CommClosedError
from distributed.protocol.serialize import to_serialize

from background import spawn
from sandbox.model import Channel, Feed, Job, Outcome, Stream, silent

RUN = "runboard-run"
BACKSTOP_SECONDS = 30.0
"""A worker that has not answered so long after the run's time is up is taken for lost."""
Message = dict[str, Any]


class NotStarted(Exception):
    """The worker cannot be reached, or does not know the lease (any more): the run may begin elsewhere."""


class WorkerLost(Exception):
    """The worker was lost after it was given the job: what became of the run is not known."""


class ServerEnd:
    """The server's end: hands the job over, passes on what the channel brings, and waits for the Outcome."""

    def __init__(self, comm: Comm, lease_id: str, job: Job, channel: Channel) -> None:
        self._comm = comm
        self._id = lease_id
        self._job = job
        self._channel = channel
        self._sent = self._read = 0
        self._waiting: list[Message] = []
        self._wake = asyncio.Event()
        self.printed: dict[Stream, bytearray] = {"stdout": bytearray(), "stderr": bytearray()}

    async def outcome(self) -> Outcome:
        """The run, from the job's way to the worker to its Outcome's way back.

        Raises:
            NotStarted: the worker has refused it.
            WorkerLost: it may have started.
        """
        feed = self._channel.feed
        await self._begin(
            {"op": RUN, "id": self._id, "job": to_serialize(self._job), "live": self._channel.emit is not silent,
             "interactive": feed is not None},
        )  # fmt: skip
        backstop = asyncio.get_running_loop().call_later(
            self._job.limits.wall_ms / 1000 + BACKSTOP_SECONDS, self._comm.abort
        )
        telling = spawn(self._tell(), name="tell a worker")
        heeding = spawn(self._heed_cancel(), name="heed cancel")
        if feed is not None:
            feed.attach(self._pass_on)
            self._pass_on()
        listening = spawn(self._listen(), name="listen to a worker")
        try:
            ended = await asyncio.shield(listening)  # to break a read off would spoil the connection
            if isinstance(ended, Exception):
                raise ended
            return ended
        except asyncio.CancelledError:
            self._say({"cancel": True})
            await asyncio.wait({listening})  # whoever cancels may rely on the processes being gone
            raise
        finally:
            backstop.cancel()
            heeding.cancel()
            if feed is not None:
                feed.attach(lambda: None)
            self._say({"over": True})
            await telling

    async def _begin(self, message: Message) -> None:
        """A message that may have got through, even if it was broken off, counts as got through."""
        try:
            await self._comm.write(message)
        except OSError as failure:
            raise WorkerLost from failure

    async def _listen(self) -> Outcome | NotStarted | WorkerLost:
        while True:
            try:
                said = await self._comm.read()
            except OSError as failure:
                return WorkerLost(str(failure))
            if "refused" in said:
                return NotStarted(said["refused"])
            for stream, chunk in said.get("printed", ()):
                self.printed[stream] += chunk
                self._channel.emit(stream, chunk)
            if "unread" in said and self._channel.feed is not None:
                read = max(self._read, self._sent - said["unread"])
                self._channel.feed.taken(read - self._read)
                self._read = read
            if "outcome" in said:
                outcome: Outcome = said["outcome"]
                return outcome

    def _pass_on(self) -> None:
        """Sends what is new in the feed. It stays there until the program has read it, so that it is bounded."""
        feed = self._channel.feed
        assert feed is not None
        known = self._sent - self._read
        fresh = feed.take(len(feed))[known:]
        self._sent += len(fresh)
        self._say({"fed": fresh, "end": feed.ended})

    async def _heed_cancel(self) -> None:
        await self._channel.cancel.wait()
        self._say({"cancel": True})

    def _say(self, message: Message) -> None:
        self._waiting.append(message)
        self._wake.set()

    async def _tell(self) -> None:
        """Writes what is to be said; a write is never broken off, which would spoil the connection."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            waiting, self._waiting = self._waiting, []
            for message in waiting:
                try:
                    await self._comm.write(message)
                except OSError:
                    return
                if "over" in message:
                    return


class _CountedFeed(Feed):
    """Tells when the program has read some of it."""

    def __init__(self, wake: asyncio.Event) -> None:
        super().__init__()
        self._changed = wake

    def taken(self, count: int) -> None:
        super().taken(count)
        self._changed.set()


class WorkerEnd:
    """The worker's end: a channel for its engine, and the way of what comes out of it."""

    def __init__(self, comm: Comm, live: bool, interactive: bool) -> None:
        self._comm = comm
        self._wake = asyncio.Event()
        self._printed: list[tuple[Stream, bytes]] = []
        self._writing = asyncio.Lock()
        self._ended = False
        self.cut = self.deserted = False
        feed = _CountedFeed(self._wake) if interactive else None
        self.channel = Channel(self._print, feed=feed) if live else Channel(feed=feed)
        self._listening = spawn(self._listen(), name="listen to a server")
        self._telling = spawn(self._tell(), name="tell a server")

    @staticmethod
    async def until_over(comm: Comm) -> None:
        """Reads what a server still says that was refused, so that the connection is free again."""
        with contextlib.suppress(CommClosedError):
            while "over" not in await comm.read():
                pass

    async def end(self, outcome: Outcome) -> None:
        """Sends the Outcome after all else; the connection is free when the server has heard it, or it is gone.

        At once, before the loop turns to what the engine has left to do.
        """
        await self._send(outcome)
        self._telling.cancel()
        await self._listening

    def cut_off(self) -> None:
        """Ends the run because the worker goes, which is not what its server has asked for."""
        self.cut = not self.channel.cancel.is_set()
        self.channel.cancel.set()

    def _print(self, stream: Stream, chunk: bytes) -> None:
        self._printed.append((stream, chunk))
        self._wake.set()

    async def _listen(self) -> None:
        """Does what the server says. A server that is gone wants no run any more."""
        feed = self.channel.feed
        while True:
            try:
                said = await self._comm.read()
            except CommClosedError:
                self.deserted = True
                self.channel.cancel.set()
                return
            if "over" in said:
                return
            if "cancel" in said:
                self.channel.cancel.set()
            if "fed" in said and feed is not None:
                feed.push(said["fed"])
                if said["end"]:
                    feed.end()

    async def _tell(self) -> None:
        while True:
            await self._wake.wait()
            await self._send(None)

    async def _send(self, outcome: Outcome | None) -> None:
        """Sends what there is to send; one message after the other."""
        async with self._writing:
            self._wake.clear()
            printed, self._printed = self._printed, []
            message: Message = {}
            if printed:
                message["printed"] = printed
            if self.channel.feed is not None:
                message["unread"] = len(self.channel.feed)
            if outcome is not None:
                message["outcome"] = to_serialize(outcome)
            try:
                if message and not self._ended:
                    self._ended = outcome is not None
                    await self._comm.write(message)
            except CommClosedError:
                self.channel.cancel.set()
