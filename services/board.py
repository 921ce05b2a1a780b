"""The board of one room in memory: scores, who reached them first, ranks. No input, no output."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sortedcontainers import SortedList

from services.store import (
    MICROS,
    MOST,
    Player,
    Row,
    no_game,
    not_on_board,
    not_on_roster,
    out_of_bounds,
    room_full,
)


@dataclass(slots=True)
class Standing:
    """A player's place. `joined` and `reached` count the moves of the game: when it came, when it got its score."""

    id: int
    name: str
    score: int
    reached: int
    joined: int


_Key = tuple[int, int, int]
_LAST: _Key = (MOST * MICROS + 1, 0, 0)
"""After every standing."""


@dataclass(frozen=True, slots=True)
class _Top:
    """The best `limit` rows as they were last asked for, and the key of the last one."""

    rows: list[Row]
    limit: int
    last: _Key


class Board:
    """Ranks by score, and equal scores by who reached them first. A change costs O(log n), a rank too."""

    def __init__(self, standings: Iterable[Standing] = (), *, started: bool = False, fixed: bool = False) -> None:
        self.started = started
        self.fixed = fixed
        self._players = {standing.id: standing for standing in standings}
        self._ranked = SortedList(map(_key, self._players.values()))
        self._moves = max((standing.reached for standing in self._players.values()), default=0)
        self._top = _Top([], 0, _LAST)

    def __len__(self) -> int:
        return len(self._players)

    def start(self, roster: Sequence[Player] | None) -> list[Standing]:
        """Begins a game at 0; gives all its standings. Ties are in the order of the roster, or of joining."""
        known = sorted(self._players.values(), key=lambda standing: standing.joined)
        players = roster if roster is not None else [Player(standing.id, standing.name) for standing in known]
        self.started = True
        self.fixed = roster is not None
        self._players = {player.id: Standing(player.id, player.name, 0, n, n) for n, player in enumerate(players, 1)}
        self._ranked = SortedList(map(_key, self._players.values()))
        self._top = _Top([], 0, _LAST)
        self._moves = len(self._players)
        return list(self._players.values())

    def add(self, player: int, micros: int, max_players: int) -> Standing:
        """Adds to a score; gives the new standing. Refuses as `Store.add` does, and then nothing has changed."""
        if not self.started:
            raise no_game()
        standing = self._players.get(player)
        if standing is None:
            if self.fixed:
                raise not_on_roster(player)
            if len(self._players) >= max_players:
                raise room_full(max_players)
        total = micros + (standing.score if standing else 0)
        if abs(total) > MOST * MICROS:
            raise out_of_bounds(player)
        if standing is None:
            self._moves += 1
            standing = Standing(player, f"Player {player}", total, self._moves, self._moves)
            self._players[player] = standing
            self._enter(standing)
        elif micros:
            self._leave(standing)
            self._moves += 1
            standing.score, standing.reached = total, self._moves
            self._enter(standing)
        return standing

    def rank(self, player: int) -> int:
        """1 for the best; one more than there are better ones."""
        return self._better_than(self._players[player].score) + 1

    def rows(self, limit: int, around: int | None = None) -> list[Row]:
        """The best `limit`, or as many with the player `around` in their middle."""
        if around is None:
            if self._top.limit != limit:
                rows = self._rows(0, limit)
                last = self._ranked[len(rows) - 1] if len(rows) == limit else _LAST
                self._top = _Top(rows, limit, last)
            return list(self._top.rows)
        if around not in self._players:
            raise not_on_board(around)
        place = self._ranked.index(_key(self._players[around]))
        return self._rows(max(0, min(place - limit // 2, len(self._ranked) - limit)), limit)

    def _rows(self, first: int, limit: int) -> list[Row]:
        keys = list(self._ranked.islice(first, first + limit))
        if not keys:
            return []
        players, before = self._players, keys[0][0]
        rank = self._better_than(-before) + 1
        rows: list[Row] = []
        for place, (minus, _, id) in enumerate(keys, first + 1):
            if minus != before:
                rank, before = place, minus
            # The short way to Row(rank, …): a board is read after each change, a hundred rows of it.
            rows.append(tuple.__new__(Row, (rank, id, players[id].name, -minus)))
        return rows

    def _enter(self, standing: Standing) -> None:
        self._ranked.add(key := _key(standing))
        self._forget_top(key)

    def _leave(self, standing: Standing) -> None:
        self._ranked.remove(key := _key(standing))
        self._forget_top(key)

    def _forget_top(self, changed: _Key) -> None:
        """A change below the last row of the top leaves the top as it was."""
        if changed <= self._top.last:
            self._top = _Top([], 0, _LAST)

    def _better_than(self, score: int) -> int:
        return self._ranked.bisect_left((-score, 0, 0))


def _key(standing: Standing) -> _Key:
    return -standing.score, standing.reached, standing.id
