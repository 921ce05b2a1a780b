"""One message, and its way from text and to text."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from protocol.errors import InvalidMessage, ParseError, Refusal


class _Absent:
    """The value of a field that a message does not have; JSON's null is None."""

    def __repr__(self) -> str:
        return "ABSENT"


ABSENT: Final[Any] = _Absent()
FIELDS = ("action", "data", "error", "details", "id")
MAX_DEPTH = 64
MAX_ID_LENGTH = 64
MAX_ID = 2**53 - 1
PIECE = 1 << 17
"""Characters that are encoded at once, in about a millisecond."""
CLIPPED = 60
"""How much of a client's own words an error repeats, in characters."""

STRING_OR_BRACKET = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[\]{}]', re.DOTALL)


@dataclass(frozen=True, slots=True)
class Message:
    """The envelope of everything that is sent, in both directions."""

    action: str
    data: Any = ABSENT
    error: str | None = None
    details: dict[str, Any] | None = None
    id: str | int | None = None


def decode(text: str) -> Message:
    """The message in `text`.

    Raises:
        ParseError: no JSON, not an object, NaN or an infinity, a key twice, or nested deeper than 64.
        InvalidMessage: an object, but not an envelope.
    """
    envelope = _parse(text)
    id = envelope.get("id")
    if "id" in envelope and not _is_id(id):
        raise InvalidMessage(
            f"id must be a string of 1 to {MAX_ID_LENGTH} characters or an integer, not {clip(id)}", path="/id"
        )
    if "action" not in envelope:
        raise InvalidMessage("the message has no action", path="", expected="action", id=id)
    action = envelope["action"]
    if not isinstance(action, str):
        raise InvalidMessage(f"action must be a string, not {clip(action)}", path="/action", id=id)
    for name in envelope:
        if name not in FIELDS:
            raise InvalidMessage(
                f"a message has no property {clip(name)}{nearest(name, FIELDS)}", path=pointer([name]), id=id
            )
    return Message(action, envelope.get("data", ABSENT), envelope.get("error"), envelope.get("details"), id)


def encode(message: Message) -> str:
    """The text of a message; what is not set is left out.

    Raises:
        ValueError: `data` holds NaN or an infinity.
    """
    text = _dumped(envelope_of(message))
    # A lone surrogate has no UTF-8: escaped, it is still JSON and still what the client wrote.
    return text.encode("utf-8", "backslashreplace").decode() if has_surrogate(text) else text


def is_large(message: Message) -> bool:
    """Whether it takes long to encode."""
    return isinstance(message.data, dict) and any(
        isinstance(value, str) and len(value) > PIECE for value in message.data.values()
    )


def encode_in_pieces(message: Message) -> bytes:
    """As `encode`, as UTF-8; for a thread, which between two pieces lets the others go on."""
    return b"".join(piece.encode("utf-8", "backslashreplace") for piece in _pieces(envelope_of(message)))


def _pieces(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for place, (name, inner) in enumerate(value.items()):
            yield f"{',' if place else '{'}{_dumped(name)}:"
            yield from _pieces(inner)
        yield "}" if value else "{}"
    elif isinstance(value, str) and len(value) > PIECE:
        yield '"'
        for start in range(0, len(value), PIECE):
            yield _dumped(value[start : start + PIECE])[1:-1]
        yield '"'
    else:
        yield _dumped(value)


def envelope_of(message: Message) -> dict[str, Any]:
    """The message as JSON has it; what is not set is left out."""
    envelope: dict[str, Any] = {"action": message.action}
    if message.data is not ABSENT:
        envelope["data"] = message.data
    for name in ("error", "details", "id"):
        if (value := getattr(message, name)) is not None:
            envelope[name] = value
    return envelope


_dumped = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def refusal_message(refusal: Refusal, refused: Message | None = None, **more: Any) -> Message:
    """The `error` message for a refusal of the message `refused`, if it could be read; `more` adds to the details."""
    details: dict[str, Any] = {"code": refusal.code, "retryable": refusal.retryable}
    if refused is not None:
        details["action"] = refused.action[:CLIPPED]
    id = refusal.id if refused is None else refused.id
    return Message("error", error=refusal.sentence, details={**details, **refusal.details, **more}, id=id)


def clip(value: Any) -> str:
    """A client's value as an error may repeat it: in JSON's spelling, and never long."""
    if isinstance(value, str):
        value = value[: CLIPPED + 1]
    elif isinstance(value, dict):
        return "an object"
    elif isinstance(value, list):
        return "an array"
    text = json.dumps(value)
    return text if len(text) <= CLIPPED else f"{text[:CLIPPED]}…"


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean X?)` for a name that is like a known one, else nothing."""
    close = difflib.get_close_matches(name[:CLIPPED], known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def pointer(parts: Iterable[str | int]) -> str:
    """A JSON Pointer (RFC 6901)."""
    return "".join("/" + clip_part(str(part)).replace("~", "~0").replace("/", "~1") for part in parts)


def clip_part(part: str) -> str:
    """One step of a path, never long."""
    return part if len(part) <= CLIPPED else f"{part[:CLIPPED]}…"


def _is_id(id: Any) -> bool:
    if isinstance(id, str):
        return 1 <= len(id) <= MAX_ID_LENGTH
    return isinstance(id, int) and not isinstance(id, bool) and abs(id) <= MAX_ID


def _parse(text: str) -> dict[str, Any]:
    if _too_deep(text):
        raise ParseError(f"the message is nested deeper than {MAX_DEPTH} levels", limit=MAX_DEPTH)
    try:
        value = DECODER.decode(text)
    except json.JSONDecodeError as failure:
        raise ParseError(
            f"the message is not JSON: {failure.msg} at character {failure.pos}", position=failure.pos
        ) from None
    except _NotJson as failure:
        raise ParseError(f"the message is not JSON: {failure}") from None
    if not isinstance(value, dict):
        raise ParseError(f"a message is a JSON object, not {clip(value)}", expected="object")
    return value


class _NotJson(Exception):
    """Python's parser takes it, but JSON or this protocol does not."""


def _no_constant(name: str) -> NoReturn:
    raise _NotJson(f"{name} is no number")


def _finite(literal: str) -> float:
    value = float(literal)
    if value in (float("inf"), float("-inf")):
        raise _NotJson(f"the number {clip_part(literal)} is too large")
    return value


def _parse_int(literal: str) -> int:
    if len(literal) > 400:  # no double is that large, and python's own bound would raise
        raise _NotJson(f"the number {clip_part(literal)} is too large")
    return int(literal)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise _NotJson(f"the key {clip(twice)} stands twice in one object")
    return found


DECODER = json.JSONDecoder(
    parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_unique, parse_int=_parse_int
)


def _too_deep(text: str) -> bool:
    """Whether brackets outside strings nest deeper than allowed; the parser itself would run out of stack."""
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return False
    depth = 0
    for token in STRING_OR_BRACKET.finditer(text):
        char = text[token.start()]
        if char in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                return True
        elif char in "]}":
            depth -= 1
    return False


def has_surrogate(text: str) -> bool:
    """Whether half a character is in it, which JSON can spell but UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
