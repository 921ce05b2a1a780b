"""A board that remembers its top gives the same rows as one that does not."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.board import Board, Standing
from services.store import Player, Row

PLAYERS = 8
changes = st.tuples(st.integers(0, PLAYERS - 1), st.integers(-3, 3))


@given(st.lists(changes | st.none() | st.just([Player(1, "Ada"), Player(2, "Bo")]), max_size=40), st.integers(1, 5))
def test_the_top_is_right_after_every_change(moves: list[tuple[int, int] | list[Player] | None], limit: int) -> None:
    board = Board()
    board.start(None)
    standings: dict[int, Standing] = {}
    for move in moves:
        if isinstance(move, tuple):
            if board.fixed and move[0] not in standings:
                continue
            standing = board.add(*move, PLAYERS)
            standings[standing.id] = standing
        else:
            standings = {standing.id: standing for standing in board.start(move)}
        best = sorted(standings.values(), key=lambda standing: (-standing.score, standing.reached))
        scores = [standing.score for standing in best]
        expected = [
            Row(scores.index(standing.score) + 1, standing.id, standing.name, standing.score) for standing in best
        ]

        assert board.rows(limit) == expected[:limit]
        assert board.rows(100) == expected
        assert board.rows(limit) == expected[:limit]
