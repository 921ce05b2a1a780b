"""The envelope: whatever text comes, it is a message or a refusal."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tornado.websocket import WebSocketProtocol13

from protocol.errors import InvalidMessage, ParseError, Refusal
from protocol.frame import text_frame
from protocol.message import MAX_DEPTH, Message, decode, encode, encode_in_pieces, is_large, refusal_message

texts = st.text(st.characters(codec=None, exclude_categories=()), max_size=20)
numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=20,
)
ids = st.none() | st.integers(-(2**53) + 1, 2**53 - 1) | st.text(min_size=1, max_size=64)


@given(st.text(max_size=20), values, ids)
def test_what_is_encoded_is_decoded_to_the_same(action: str, data: object, id: str | int | None) -> None:
    message = Message(action, data, id=id)

    assert decode(encode(message)) == message


@given(st.text() | values.map(json.dumps))
def test_any_text_is_a_message_or_a_refusal_and_never_long(text: str) -> None:
    said = "a message"
    try:
        decode(text)
    except Refusal as refusal:
        said = refusal.sentence
    assert 0 < len(said) < 300


@pytest.mark.parametrize("brackets", ["[]", "{}"])
def test_nesting_is_allowed_to_its_limit_and_not_beyond(brackets: str) -> None:
    def nested(depth: int) -> str:
        opening = "[" if brackets == "[]" else '{"k":'
        return '{"action":"a","data":' + opening * (depth - 1) + "1" + brackets[1] * (depth - 1) + "}"

    assert decode(nested(MAX_DEPTH)).action == "a"
    with pytest.raises(ParseError, match="nested deeper than 64"):
        decode(nested(MAX_DEPTH + 1))
    with pytest.raises(ParseError, match="nested deeper"):
        decode("[" * 1_000_000)


def test_brackets_in_strings_do_not_nest() -> None:
    text = "[{" * 1000 + '\\"' + "[" * 100

    assert decode(json.dumps({"action": "a", "data": text})).data == text


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "nul", "[1]", "1", '"a"', '{"action":"a","data":NaN}', '{"action":"a","data":-Infinity}',
        '{"action":"a","data":1e999}', '{"action":"a","action":"b"}', '{"action":"a","data":{"x":1,"x":2}}',
        '{"action":"a","data":' + "9" * 5000 + "}", "\ufeff{}",
    ],
)  # fmt: skip
def test_what_is_no_json_is_a_parse_error(text: str) -> None:
    with pytest.raises(ParseError):
        decode(text)


def test_a_parse_error_tells_the_position() -> None:
    with pytest.raises(ParseError) as caught:
        decode('{"action": oops}')

    assert caught.value.details["position"] == 11


@pytest.mark.parametrize("id", ["", "x" * 65, 1.5, True, None, [], {}, 2**53])
def test_an_id_is_a_short_string_or_an_integer(id: object) -> None:
    with pytest.raises(InvalidMessage) as caught:
        decode(json.dumps({"action": "a", "id": id}))

    assert caught.value.details["path"] == "/id"


def test_an_unknown_property_is_told_with_the_nearest_known_one() -> None:
    with pytest.raises(InvalidMessage, match="did you mean data"):
        decode('{"action":"a","dat":1}')


@pytest.mark.parametrize("text", ['{"data":1}', '{"action":7}', '{"action":null}'])
def test_an_action_is_a_string(text: str) -> None:
    with pytest.raises(InvalidMessage):
        decode(text)


def test_a_refusal_becomes_an_error_with_the_id_of_what_it_refuses() -> None:
    message = refusal_message(InvalidMessage("no", path="/x"), Message("runCode", id=4))

    assert (message.action, message.error, message.id) == ("error", "no", 4)
    assert message.details == {"code": "INVALID_MESSAGE", "retryable": False, "action": "runCode", "path": "/x"}


PIECES = st.lists(st.sampled_from(["x" * 1000, "\u0000" * 7, "ä𝄞", '"', "\\", "\ud800", "\n"]), max_size=9)


@given(PIECES, st.integers(1, 9), st.none() | st.integers())
def test_what_is_encoded_in_pieces_is_what_is_encoded_at_once(texts: list[str], piece: int, id: int | None) -> None:
    message = Message("output", {"output": "".join(texts), "n": 1.5, "files": {"a": "b"}, "none": {}}, id=id)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("protocol.message.PIECE", piece)

        assert encode_in_pieces(message) == encode(message).encode()
        assert is_large(message) == (len("".join(texts)) > piece)


class Stream:
    """Stands in for the socket of Tornado's own framing, to compare with it."""

    def __init__(self) -> None:
        self.written = b""

    def write(self, frame: bytes) -> None:
        self.written += frame


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65535, 65536, 100_000])
def test_a_frame_has_the_bytes_of_tornados_own(size: int) -> None:
    text = "ü" * (size // 2) + "x" * (size % 2)
    protocol, protocol.stream = (made := WebSocketProtocol13.__new__(WebSocketProtocol13)), Stream()
    made.mask_outgoing = False
    made._wire_bytes_out = 0
    made._write_frame(True, 0x1, text.encode())

    assert text_frame(text) == made.stream.written
