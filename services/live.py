"""Live output: what a run prints reaches its client while it lasts, in whole characters and not too many messages."""

from __future__ import annotations

import asyncio
import codecs
import contextlib
from collections.abc import Awaitable, Callable

from background import spawn
from sandbox.model import Outcome, Stream

PAUSE_SECONDS = 0.02
"""Between two chunks of one stream; what is printed meanwhile is in the next."""

Send = Callable[[Stream, str], Awaitable[None]]


class LiveOutput:
    """One run's. `emit` is its channel's; `finish` is awaited before its output is sent.

    A client that takes its time is waited for; what is printed meanwhile is kept, up to the run's own output limit.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._decoders: dict[Stream, codecs.IncrementalDecoder] = {
            stream: codecs.getincrementaldecoder("utf-8")("replace") for stream in ("stdout", "stderr")
        }
        self._waiting: dict[Stream, list[str]] = {}
        self._sending: asyncio.Task[None] | None = None
        self._over = asyncio.Event()

    def emit(self, stream: Stream, chunk: bytes) -> None:
        """Bytes that the run has just printed."""
        self._add(stream, self._decoders[stream].decode(chunk))

    async def finish(self, outcome: Outcome) -> None:
        """The run is over: sends the rest at once, so that all chunks together are its output."""
        self._over.set()
        for stream, decoder in self._decoders.items():
            self._add(stream, decoder.decode(b"", final=stream not in outcome.facts.output_cut))
        if self._sending is not None:
            await self._sending

    def _add(self, stream: Stream, text: str) -> None:
        if text:
            self._waiting.setdefault(stream, []).append(text)
            if self._sending is None or self._sending.done():
                self._sending = spawn(self._send_all(), name="live output")

    async def _send_all(self) -> None:
        while self._waiting:
            waiting, self._waiting = self._waiting, {}
            for stream, texts in waiting.items():
                await self._send(stream, "".join(texts))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._over.wait(), PAUSE_SECONDS)
