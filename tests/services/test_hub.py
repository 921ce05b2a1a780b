"""The outbox is bounded and in order, the hub tells whom it should."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Hashable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.message import Message
from services.hub import Hub, Outbox, SlowClient
from tests.conftest import SECOND, within

LIMIT = 20
puts = st.tuples(st.just("put"), st.integers(0, 12), st.none() | st.sampled_from("ab"))


@given(st.lists(puts | st.tuples(st.just("take"), st.just(0), st.none()), max_size=40))
def test_an_outbox_gives_in_order_the_newest_of_each_key_and_keeps_its_bound(steps: list[tuple]) -> None:
    async def main() -> None:
        outbox = Outbox(LIMIT)
        model: list[tuple[Hashable, bytes]] = []
        for number, (step, size, key) in enumerate(steps):
            if step == "take":
                if model:
                    assert await outbox.take() == model.pop(0)[1]
                continue
            frame = bytes([number]) * size
            places = [place for place, (known, _) in enumerate(model) if key is not None and known == key]
            others = sum(len(waiting) for place, (_, waiting) in enumerate(model) if place not in places)
            fits = others + size <= LIMIT or len(model) == len(places)
            if not fits:
                with pytest.raises(SlowClient):
                    outbox.put(frame, key)
            elif places:
                outbox.put(frame, key)
                model[places[0]] = key, frame
            else:
                outbox.put(frame, key)
                model.append((key, frame))
        assert outbox.is_empty == (not model)

    asyncio.run(main())


def test_an_answer_waits_for_room_and_gives_up_on_a_client_that_reads_nothing() -> None:
    async def main() -> None:
        outbox = Outbox(LIMIT)
        outbox.put(b"x" * LIMIT)
        waiting = asyncio.create_task(outbox.put_when_room(b"answer", 60 * SECOND))
        await asyncio.sleep(0)
        assert not waiting.done()
        await outbox.take()
        await within(waiting)
        assert await outbox.take() == b"answer"

        outbox.put(b"x" * LIMIT)
        with pytest.raises(SlowClient, match="nothing of 20 bytes was read"):
            await outbox.put_when_room(b"answer", 0.01)

    asyncio.run(main())


class Listener:
    def __init__(self) -> None:
        self.heard: list[tuple[bytes, Hashable]] = []

    def tell(self, frame: bytes, key: Hashable) -> None:
        self.heard.append((frame, key))


def test_a_message_goes_to_the_members_of_its_room_as_one_frame() -> None:
    hub, one, two, other = Hub(), Listener(), Listener(), Listener()
    for room, member in (("a", one), ("a", two), ("b", other)):
        hub.join(room, member)
    hub.publish("a", Message("echo", 1), key="k")
    hub.publish("nobody", Message("echo", 1))

    assert one.heard == two.heard
    assert one.heard[0][0] is two.heard[0][0]
    assert json.loads(one.heard[0][0][2:]) == {"action": "echo", "data": 1}
    assert other.heard == []


def test_who_has_left_hears_nothing_and_an_empty_room_is_forgotten() -> None:
    hub, member = Hub(), Listener()
    hub.join("a", member)
    hub.leave("a", member)
    hub.leave("a", member)
    hub.publish("a", Message("echo", 1))

    assert member.heard == []
    assert hub.rooms() == []
    assert not hub.has_members("a")
