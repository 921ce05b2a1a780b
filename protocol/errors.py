"""Every way in which the server says no.

    Refusal
     ├── ParseError           the text is no JSON, or no message
     ├── InvalidMessage       a message that its schema does not allow
     ├── UnknownAction        an action that does not exist
     ├── Unauthenticated      a token is missing or expired
     ├── Forbidden            not for this client
     ├── NotFound             what the message names does not exist
     ├── Conflict             what the message names is there already
     ├── PayloadTooLarge      over a limit in bytes
     ├── RateLimited          too much in too short a time
     ├── Overloaded           the server has no room now
     ├── ClusterUnavailable   `mode: cluster` without a cluster
     ├── ShuttingDown         the server is about to stop
     └── Internal             a fault of the server

What a user's program did is never a refusal: it is an `output`.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, ClassVar


class Refusal(Exception):
    """A protocol error. Its text is one short sentence for people; `details` are for programs.

    `details` may have: `path` (JSON Pointer), `expected`, `limit`, `retryAfterMs`, `position` (characters into the
    text). `id` is the refused message's, where it could be read.
    """

    code: ClassVar[str]
    retryable: ClassVar[bool] = False

    def __init__(self, sentence: str, *, id: str | int | None = None, **details: Any) -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.id = id
        self.details = details


class ParseError(Refusal):
    """The text is no JSON, or no message."""

    code = "PARSE_ERROR"


class InvalidMessage(Refusal):
    """A message that its schema, or a limit, does not allow."""

    code = "INVALID_MESSAGE"


class UnknownAction(Refusal):
    """An action that does not exist, or not here."""

    code = "UNKNOWN_ACTION"


class Unauthenticated(Refusal):
    """A token is missing or expired."""

    code = "UNAUTHENTICATED"


class Forbidden(Refusal):
    """Not for this client."""

    code = "FORBIDDEN"


class NotFound(Refusal):
    """What the message names does not exist."""

    code = "NOT_FOUND"


class Conflict(Refusal):
    """What the message names is there already."""

    code = "CONFLICT"


class PayloadTooLarge(Refusal):
    """Over a limit in bytes."""

    code = "PAYLOAD_TOO_LARGE"


class RateLimited(Refusal):
    """Too much in too short a time."""

    code = "RATE_LIMITED"
    retryable = True


class Overloaded(Refusal):
    """The server has no room now."""

    code = "OVERLOADED"
    retryable = True


class ClusterUnavailable(Refusal):
    """`mode: cluster` without a cluster."""

    code = "CLUSTER_UNAVAILABLE"
    retryable = True


class ShuttingDown(Refusal):
    """The server is about to stop."""

    code = "SHUTTING_DOWN"
    retryable = True


class Internal(Refusal):
    """A fault of the server."""

    code = "INTERNAL"


REFUSALS: tuple[type[Refusal], ...] = tuple(Refusal.__subclasses__())


class CloseCode(IntEnum):
    """Why the server closes a connection, and whether a client should come back."""

    meaning: str
    reconnect: str

    def __new__(cls, code: int, meaning: str, reconnect: str) -> CloseCode:
        """The code with its two explanations."""
        member = int.__new__(cls, code)
        member._value_ = code
        member.meaning = meaning
        member.reconnect = reconnect
        return member

    DONE = 1000, "done; never an error", "no"
    GOING_AWAY = 1001, "the server or the page goes away", "yes"
    TOO_BIG = 1009, "a message over the size limit", "yes, with smaller messages"
    SERVER_ERROR = 1011, "a fault of the server", "yes, later"
    RESTART = 1012, "the server restarts", "yes, after a random pause"
    OVERLOAD = 1013, "the client reads too slowly, or the server is overloaded", "yes, later"
    BAD_MESSAGES = 4400, "20 bad messages within 10 s, or a bad address", "no, the client is broken"
    UNAUTHENTICATED = 4401, "a token is missing or expired", "yes, with a new token"
    FORBIDDEN = 4403, "not allowed", "no"
    SILENT = 4408, "nothing was heard of the client", "yes"
    TOO_MANY = 4429, "too many connections or messages", "yes, later"


def refusal_table() -> list[tuple[str, str, str]]:
    """Rows of (code, retryable, meaning) for the documentation."""
    return [(kind.code, "yes" if kind.retryable else "no", (kind.__doc__ or "").rstrip(".")) for kind in REFUSALS]


def close_table() -> list[tuple[str, str, str]]:
    """Rows of (close code, meaning, reconnect?) for the documentation."""
    return [(str(code.value), code.meaning, code.reconnect) for code in CloseCode]
