"""The way of a frame into a client's socket: directly where the kernel takes it at once, else through Tornado.

Of 1,000 clients nearly all can take a board at once. Handing the frame to the kernel costs a third of what Tornado's
own `write_message` does, which makes a Future, a frame and an asyncio Task for each (bench/broadcast.py).
"""

from __future__ import annotations

import asyncio
import socket

from tornado.iostream import IOStream, StreamClosedError
from tornado.websocket import WebSocketHandler

SEND_BUFFER_BYTES = 256 << 10


class Wire:
    """One connection's."""

    def __init__(self, handler: WebSocketHandler) -> None:
        self._handler = handler

    def bound(self) -> None:
        """Limits what the kernel holds for a client that does not read; by itself it would hold megabytes."""
        if (stream := self._stream()) is not None:
            stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)

    def send_now(self, frame: bytes) -> bool:
        """Whether the frame is on its way. What the kernel does not take of it, Tornado keeps and sends."""
        stream = self._stream()
        # An exact IOStream: a TLS stream has to encrypt first, and does not know what went around it.
        if type(stream) is not IOStream or stream.closed() or stream.writing():
            return False
        try:
            sent = stream.socket.send(frame)
        except OSError:  # it takes nothing now, or nothing ever again: the slow way finds out which
            return False
        if sent < len(frame):
            stream.write(frame[sent:])
        return True

    def send(self, frame: bytes) -> asyncio.Future[None]:
        """Has the frame sent; done when the kernel has all of it. From here on nothing can overtake it.

        Raises:
            StreamClosedError: the connection is over; the Future may have it too.
        """
        stream = self._stream()
        if stream is None:
            raise StreamClosedError
        return asyncio.shield(stream.write(frame))  # a Future of Tornado's must not be cancelled

    def _stream(self) -> IOStream | None:
        connection = self._handler.ws_connection
        if connection is None or connection.is_closing():
            return None
        return connection.stream
