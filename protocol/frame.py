"""A message's text as one WebSocket frame (RFC 6455), so that it is framed once for however many clients."""

from __future__ import annotations

TEXT = 0x81
"""A text frame that is not continued."""


def text_frame(text: str | bytes) -> bytes:
    """The whole frame as a server sends it: not masked, not compressed. `text` may be UTF-8 already."""
    payload = text.encode() if isinstance(text, str) else text
    size = len(payload)
    if size < 126:
        return bytes((TEXT, size)) + payload
    if size < 1 << 16:
        return bytes((TEXT, 126)) + size.to_bytes(2, "big") + payload
    return bytes((TEXT, 127)) + size.to_bytes(8, "big") + payload
