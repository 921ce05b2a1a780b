"""A request that comes twice is applied once."""

from __future__ import annotations

import pytest

from protocol.message import Message
from services.repeats import MOST_REMEMBERED, Repeats
from services.store import REPEAT_SECONDS


def test_the_same_request_is_known_for_two_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("services.repeats.time.monotonic", lambda: now)
    repeats = Repeats()
    message = Message("sendInput", {"run": 1, "text": "x"}, id="a")
    assert not repeats.was_applied(message)
    repeats.applied(message)
    assert repeats.was_applied(message)
    assert not repeats.was_applied(Message("sendInput", {"run": 1, "text": "y"}, id="a"))
    assert not repeats.was_applied(Message("sendInput", {"run": 1, "text": "x"}, id="b"))
    now += REPEAT_SECONDS

    assert not repeats.was_applied(message)


def test_a_request_without_an_id_is_never_a_repeat() -> None:
    repeats = Repeats()
    repeats.applied(Message("cancelRun", {"run": 1}))

    assert not repeats.was_applied(Message("cancelRun", {"run": 1}))


def test_what_is_remembered_is_bounded() -> None:
    repeats = Repeats()
    for number in range(MOST_REMEMBERED + 1):
        repeats.applied(Message("cancelRun", {"run": 1}, id=number))

    assert not repeats.was_applied(Message("cancelRun", {"run": 1}, id=0))
    assert repeats.was_applied(Message("cancelRun", {"run": 1}, id=1))
