"""One client's connection: frames come in and are answered, and nothing that a client does makes another one wait."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

from tornado.iostream import StreamClosedError
from tornado.websocket import WebSocketClosedError, WebSocketHandler

from background import spawn
from handlers.wire import Wire
from protocol.errors import CloseCode, Internal, InvalidMessage, ParseError, RateLimited, Refusal, UnknownAction
from protocol.frame import text_frame
from protocol.message import Message, decode, encode, encode_in_pieces, is_large, refusal_message
from protocol.schema import Schemas
from services.hub import Outbox, SlowClient

log = logging.getLogger(__name__)

Method = Callable[[Message], Awaitable[Message | None]]

Argument = TypeVar("Argument")
Result = TypeVar("Result")
LARGE_FRAME = 64 << 10
"""Characters; from here on, a frame is parsed and checked in a thread."""
BAD_MESSAGES = 20
BAD_MESSAGES_SECONDS = 10.0
LAST_WORDS_SECONDS = 1.0
"""How long a client that is to be closed for bad messages still gets an answer to each, so that it can tell why."""
PATIENCE_SECONDS = 20.0
"""How long an answer waits for room in the outbox of a client that reads nothing."""
ROOM_SECONDS = 0.5
"""How long a client with too many requests under way is not read before the next one is refused."""
SILENT_PINGS = 2.5
"""A client of whom nothing, not even a pong, was heard for so many ping intervals is gone."""


@dataclass(frozen=True, slots=True)
class Transport:
    """What all connections share: the contract, the bounds, and the set of those that are open."""

    schemas: Schemas
    outbox_bytes: int
    max_requests: int
    ping_s: float
    allowed_origins: tuple[str, ...]
    open_sockets: set[ProtocolSocket] = field(default_factory=set)
    _left: asyncio.Event = field(default_factory=asyncio.Event)

    def discard(self, socket: ProtocolSocket) -> None:
        """A connection is over."""
        self.open_sockets.discard(socket)
        self._left.set()

    async def deserted(self) -> None:
        """Returns when no connection is open."""
        while self.open_sockets:
            self._left.clear()
            await self._left.wait()


def ack(message: Message) -> Message | None:
    """The answer to an action that has none of its own: the request has taken effect, if anyone wants to know."""
    return None if message.id is None else Message("ack", id=message.id)


def _large_frame(message: Message) -> bytes:
    return text_frame(encode_in_pieces(message))


class ProtocolSocket(WebSocketHandler):
    """The transport of both paths. A subclass gives `actions`: an action's name → the method that answers it.

    A method gets a checked message and gives its answer, or None if there is none, or none yet. What it raises becomes
    an `error`.
    """

    dev = False

    def connect(self, transport: Transport) -> None:
        """What a subclass's `initialize` calls first."""
        self.transport = transport
        self._outbox = Outbox(transport.outbox_bytes)
        self._wire = Wire(self)
        self._bad: deque[float] = deque(maxlen=BAD_MESSAGES)
        self._under_way = 0
        self._answered = asyncio.Event()
        self._heard = time.monotonic()
        self._chores: list[asyncio.Task[None]] = []
        self._last_words: asyncio.TimerHandle | None = None
        self._gone = False

    @property
    def actions(self) -> Mapping[str, Method]:
        """What this path answers."""
        raise NotImplementedError

    def left(self) -> None:
        """The client is gone: ends what was under way for it."""

    # Tornado's events

    def prepare(self) -> None:
        """Refuses an origin that is no address, at which Tornado would stumble."""
        try:
            urlsplit(self.request.headers.get("Origin", ""))
        except ValueError:
            self.refuse_page("the Origin is no address")

    def refuse_page(self, reason: str) -> None:
        """Answers 403 instead of opening a socket."""
        if not self._finished:
            self.set_status(403)
            self.finish(f"{reason}\n")

    def check_origin(self, origin: str) -> bool:
        """Asked for pages of another origin than the server's own."""
        allowed = self.transport.allowed_origins
        if "*" in allowed or origin in allowed:
            return True
        log.warning("refused a page of %s; to allow it, start with --allowed-origins %s", ascii(origin), ascii(origin))
        return False

    def open(self, *args: str, **kwargs: str) -> None:
        """A client has connected."""
        self.set_nodelay(True)
        self._wire.bound()
        self.transport.open_sockets.add(self)
        self._chores = [spawn(self._send(), name="send"), spawn(self._beat(), name="heartbeat")]

    async def on_message(self, frame: str | bytes) -> None:
        """Checks a frame and has it answered; Tornado reads the next one, pongs too, only when this returns."""
        self._heard = time.monotonic()
        message: Message | None = None
        try:
            if isinstance(frame, bytes):
                raise ParseError("a binary frame is no message; send JSON as a text frame")
            message = await self._in_time(len(frame), decode, frame)
            await self._in_time(len(frame), self._check, message)
            if not self._gone:
                await self._begin(message)
        except Refusal as refusal:
            self.refuse(refusal, message)
        await asyncio.sleep(0)  # frames that are here already must not keep the other connections waiting

    async def _in_time(self, size: int, work: Callable[[Argument], Result], argument: Argument) -> Result:
        """Done at once, or in a thread where it would keep the other connections waiting."""
        return await asyncio.to_thread(work, argument) if size > LARGE_FRAME else work(argument)

    def _check(self, message: Message) -> None:
        self.transport.schemas.check(message, dev=self.dev)

    def on_pong(self, data: bytes) -> None:
        """The client lives."""
        self._heard = time.monotonic()

    def on_close(self) -> None:
        """The connection is over, whoever ended it."""
        self._gone = True
        self.transport.discard(self)
        for chore in self._chores:
            chore.cancel()
        if self._last_words is not None:
            self._last_words.cancel()
        self.left()

    # Sending

    def tell(self, frame: bytes, key: Hashable = None) -> None:
        """Sends a framed message, or puts it into the outbox; a client that lets it fill is closed."""
        if self._outbox.is_empty and self._wire.send_now(frame):
            return
        try:
            self._outbox.put(frame, key)
        except SlowClient as slow:
            self._give_up(slow)

    async def deliver(self, message: Message) -> None:
        """Sends a message that must arrive; waits for room in the outbox of a client that only takes its time."""
        frame = await asyncio.to_thread(_large_frame, message) if is_large(message) else text_frame(encode(message))
        if self._outbox.is_empty and self._wire.send_now(frame):
            return
        try:
            await self._outbox.put_when_room(frame, PATIENCE_SECONDS)
        except SlowClient as slow:
            self._give_up(slow)

    def close_with(self, code: CloseCode) -> None:
        """Closes the connection and says why."""
        self.close(code.value, code.meaning)

    async def _send(self) -> None:
        """Sends what did not go out at once: each frame is on its way before the next one is taken."""
        while True:
            frame = await self._outbox.take()
            try:
                await asyncio.wait_for(self._wire.send(frame), PATIENCE_SECONDS)
            except StreamClosedError:
                return
            except TimeoutError:
                return self._give_up(SlowClient(f"nothing was read for {PATIENCE_SECONDS:g} s"))

    async def _beat(self) -> None:
        """Pings, and closes when nothing comes back."""
        ping_s = self.transport.ping_s
        while True:
            await asyncio.sleep(ping_s)
            if time.monotonic() - self._heard > SILENT_PINGS * ping_s:
                return self.close_with(CloseCode.SILENT)
            try:
                self.ping()
            except WebSocketClosedError:
                return

    def _give_up(self, slow: SlowClient) -> None:
        log.warning("closed a slow client: %s (--outbox-bytes)", slow)
        self.close_with(CloseCode.OVERLOAD)

    # Answering

    async def _begin(self, message: Message) -> None:
        limit = self.transport.max_requests
        if self._under_way >= limit:
            self._answered.clear()
            with contextlib.suppress(TimeoutError):  # what has just been asked for is often about to be answered
                await asyncio.wait_for(self._answered.wait(), ROOM_SECONDS)
        if self._under_way >= limit:
            raise RateLimited(
                f"{self._under_way} requests of this connection are under way; the limit is {limit} (--max-requests)",
                limit=limit, retryAfterMs=1000,
            )  # fmt: skip
        self._under_way += 1
        spawn(self._answer(message), name=f"answer {message.action}")

    async def all_answered(self) -> None:
        """Returns when no request is under way."""
        while self._under_way:
            self._answered.clear()
            await self._answered.wait()

    async def _answer(self, message: Message) -> None:
        try:
            answer = await self.actions[message.action](message)
            if answer is not None:
                await self.deliver(answer)
        except Refusal as refusal:
            self.refuse(refusal, message)
        except Exception as fault:
            log.exception("%s failed", message.action)
            self.refuse(Internal("the server failed; its log has more", **self.confession(fault)), message)
        finally:
            self._under_way -= 1
            self._answered.set()

    def refuse(self, refusal: Refusal, message: Message | None) -> None:
        """Answers a message with an error; too many bad ones close the connection."""
        self.tell(text_frame(encode(refusal_message(refusal, message, **self.explain(refusal, message)))))
        if isinstance(refusal, ParseError | InvalidMessage | UnknownAction):
            self._count_bad()

    def explain(self, refusal: Refusal, message: Message | None) -> dict[str, Any]:
        """More details for an error; none here."""
        return {}

    def confession(self, fault: Exception) -> dict[str, Any]:
        """What a client may see of a fault of ours: nothing here."""
        return {}

    def _count_bad(self) -> None:
        now = time.monotonic()
        self._bad.append(now)
        if len(self._bad) == BAD_MESSAGES and now - self._bad[0] <= BAD_MESSAGES_SECONDS and self._last_words is None:
            loop = asyncio.get_running_loop()
            self._last_words = loop.call_later(LAST_WORDS_SECONDS, self.close_with, CloseCode.BAD_MESSAGES)
