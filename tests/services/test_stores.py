"""The conformance suite of the stores: SQLite and Redis keep the same promises."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import Conflict, InvalidMessage, NotFound, Overloaded, Refusal
from services.store import MICROS, MOST, Player, Request, Row, Store, TaskRecord
from tests.conftest import until, within
from tests.services.model import Model
from tests.services.stores import MAX_PLAYERS, STORES, Changes

pytestmark = pytest.mark.parametrize("name", STORES)
Test = Callable[[Store, Changes], Awaitable[None]]


def on(name: str, test: Test) -> None:
    async def main() -> None:
        async with STORES[name]() as (store, changes):
            await within(test(store, changes), 60)

    asyncio.run(main())


def test_a_score_before_the_game_is_refused(name: str) -> None:
    async def test(store: Store, changes: Changes) -> None:
        with pytest.raises(NotFound, match="no game has been started"):
            await store.add("r", 1, 5, None)
        assert await store.board("r", 10) == []

    on(name, test)


def test_scores_add_up_and_are_ranked_with_shared_ranks(name: str) -> None:
    async def test(store: Store, changes: Changes) -> None:
        await store.start_game("r", None, None)
        for player, micros in ((1, 5), (2, 7), (3, 5), (4, 1), (1, 2)):
            await store.add("r", player, micros, None)

        assert await store.board("r", 10) == [
            Row(1, 2, "Player 2", 7), Row(1, 1, "Player 1", 7), Row(3, 3, "Player 3", 5), Row(4, 4, "Player 4", 1),
        ]  # fmt: skip
        assert len(await store.board("r", 2)) == 2

    on(name, test)


def test_changes_that_are_asked_for_at_once_are_made_in_that_order(name: str) -> None:
    async def test(store: Store, changes: Changes) -> None:
        for room in map(str, range(10)):
            begin = asyncio.ensure_future(store.start_game(room, None, None))
            later: list[asyncio.Future[None]] = []
            while not begin.done():  # also while the room is being read, and just after
                if len(later) < MAX_PLAYERS:
                    later.append(asyncio.ensure_future(store.add(room, len(later), 1, None)))
                await asyncio.sleep(0)
            await asyncio.gather(begin, *later)
            rows = await store.board(room, 10)

            assert [row.id for row in rows] == list(range(min(10, len(later))))

    on(name, test)


def test_only_those_on_a_roster_play_and_a_new_game_opens_it(name: str) -> None:
    async def test(store: Store, changes: Changes) -> None:
        await store.start_game("r", [Player(7, "Ada | Lovelace\n"), Player(8, "Bö 🎲")], None)
        with pytest.raises(NotFound, match="player 9 is not on the roster"):
            await store.add("r", 9, 1, None)
        await store.add("r", 8, 3, None)
        assert await store.board("r", 10) == [Row(1, 8, "Bö 🎲", 3), Row(2, 7, "Ada | Lovelace\n", 0)]

        await store.start_game("r", None, None)
        await store.add("r", 9, 1, None)
        assert [(row.id, row.score) for row in await store.board("r", 10)] == [(9, 1), (7, 0), (8, 0)]

    on(name, test)


def test_totals_are_exact_up_to_the_bounds_and_refused_beyond(name: str) -> None:
    async def test(store: Store, changes: Changes) -> None:
        await store.start_game("r", None, None)
        for player, sign in ((1, 1), (2, -1)):
            await store.add("r", player, sign * (MOST * MICROS - 1), None)
            await store.add("r", player, sign, None)
            with pytest.raises(InvalidMessage, match=str(MOST)):
                await store.add("r", player, sign, None)
        with pytest.raises(InvalidMessage):
            await store.add("r", 3, 2 * MOST * MICROS, None)

        assert [(row.id, row.score) for row in await store.board("r", 9)] == [(1, MOST * MICROS), (2, -MOST * MICROS)]

    on(name, test)


def test_a_full_room_takes_no_new_player(name: str) -> None:
    async def test(store: Store, changes: Changes) -> None:
        await store.start_game("r", [Player(n, "x") for n in range(MAX_PLAYERS)], None)
        await store.start_game("r", None, None)
        with pytest.raises(Overloaded, match=f"the limit is {MAX_PLAYERS} players .--max-players"):
            await store.add("r", 1000, 1, None)
        await store.add("r", 1, 1, None)

    on(name, test)


def test_a_request_sent_again_is_applied_once(name: str) -> None:
    async def test(store: Store, changes: Changes) -> None:
        start, update = Request('"s"', "start"), Request('"u"', "update")
        await store.start_game("r", None, start)
        await asyncio.gather(*(store.add("r", 1, 5, update) for _ in range(20)))
        await store.start_game("r", None, start)
        await store.start_game("other", None, start)
        await store.add("other", 1, 4, update)

        assert (await store.board("r", 1))[0].score == 5
        assert (await store.board("other", 1))[0].score == 4

    on(name, test)


def test_one_id_for_two_requests_is_a_conflict(name: str) -> None:
    async def test(store: Store, changes: Changes) -> None:
        await store.start_game("r", None, Request("1", "start"))
        with pytest.raises(Conflict, match="stood for another request"):
            await store.add("r", 1, 5, Request("1", "update"))
        await store.add("r", 1, 5, Request('"1"', "update"))

        assert (await store.board("r", 1))[0].score == 5

    on(name, test)


def test_a_refused_request_may_be_sent_again(name: str) -> None:
    async def test(store: Store, changes: Changes) -> None:
        request = Request("1", "update")
        with pytest.raises(NotFound):
            await store.add("r", 1, 5, request)
        await store.start_game("r", None, None)
        await store.add("r", 1, 5, request)

        assert (await store.board("r", 1))[0].score == 5

    on(name, test)


def test_a_board_around_a_player_has_it_in_the_middle(name: str) -> None:
    async def test(store: Store, changes: Changes) -> None:
        await store.start_game("r", [Player(n, "x") for n in range(20)], None)
        for n in range(20):
            await store.add("r", n, 100 - n // 2, None)
        ids = {around: [row.id for row in await store.board("r", 5, around)] for around in (0, 10, 19)}

        assert ids == {0: [0, 1, 2, 3, 4], 10: [8, 9, 10, 11, 12], 19: [15, 16, 17, 18, 19]}
        assert [row.rank for row in await store.board("r", 5, 10)] == [9, 9, 11, 11, 13]
        assert [row.rank for row in await store.board("r", 4, 11)] == [9, 11, 11, 13]
        with pytest.raises(NotFound, match="player 99 is not on the board"):
            await store.board("r", 5, 99)

    on(name, test)


def test_every_change_is_told(name: str) -> None:
    async def test(store: Store, changes: Changes) -> None:
        await store.start_game("r", None, None)
        await until(lambda: "r" in changes)
        changes.clear()
        await store.add("r", 1, 1, None)
        await until(lambda: "r" in changes)

    on(name, test)


def test_concurrent_changes_of_many_players_all_count(name: str) -> None:
    async def test(store: Store, changes: Changes) -> None:
        await store.start_game("r", None, None)
        await asyncio.gather(*(store.add("r", n % 7, n, None) for n in range(700)))

        assert sum(row.score for row in await store.board("r", 10)) == sum(range(700))

    on(name, test)


def test_the_tasks_of_a_session_are_kept_in_order_with_their_owner(name: str) -> None:
    async def test(store: Store, changes: Changes) -> None:
        first, second = {"taskId": "b", "status": "running"}, {"taskId": "a", "status": "running"}
        ended = {"taskId": "b", "status": "completed", "result": {"text": "ü\ud800"}}
        await store.save_tasks("s", [first, second])
        await store.save_tasks("s", [ended])

        assert await store.tasks("s") == [TaskRecord(ended, store.instance), TaskRecord(second, store.instance)]
        assert await store.tasks("other") == []
        assert await store.is_alive(store.instance)
        assert not await store.is_alive("somebody else")

    on(name, test)


players = st.integers(1, 6) | st.sampled_from([-1, 0, 2**53 - 1, -(2**53) + 1])
micros = st.integers(-3, 3) | st.integers(-3 * MICROS, 3 * MICROS) | st.integers(-2 * MOST * MICROS, 2 * MOST * MICROS)
names = st.text(min_size=1, max_size=8)
moves = st.one_of(
    st.tuples(st.just("add"), players, micros),
    st.tuples(st.just("add"), players, micros),
    st.tuples(st.just("start"), st.none() | st.lists(st.tuples(players, names), unique_by=lambda pair: pair[0])),
)
room = itertools.count()


@settings(max_examples=60, deadline=None)
@given(st.lists(moves, max_size=40), players, st.integers(1, 5))
def test_a_board_equals_the_model_after_any_moves(name: str, moves: list[tuple], around: int, limit: int) -> None:
    async def test(store: Store, changes: Changes) -> None:
        model, here = Model(), f"r{next(room)}"
        for kind, *details in moves:
            if kind == "start":
                model.start(details[0])
                roster = details[0] and [Player(*pair) for pair in details[0]]
                await store.start_game(here, roster, None)
            else:
                try:
                    await store.add(here, *details, None)
                    refused = None
                except Refusal as refusal:
                    refused = refusal.code
                assert refused == model.add(*details)
        rows = model.rows()
        assert await store.board(here, 100) == rows
        if around in model.names:
            place = [row.id for row in rows].index(around)
            first = max(0, min(place - limit // 2, len(rows) - limit))
            assert await store.board(here, limit, around) == rows[first : first + limit]

    on(name, test)
