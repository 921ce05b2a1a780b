"""What a store keeps: the games of all rooms, and the tasks of sessions. SQLite and Redis are equals behind this."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from protocol.errors import Conflict, InvalidMessage, NotFound, Overloaded
from protocol.message import clip

MICROS = 10**6
"""Scores are kept as whole millionths: 0.1 + 0.2 is 0.3 then, and every total that a double can show is exact."""
MOST = 2**53 - 1
"""No total is larger, on either side of zero: beyond it, JavaScript cannot tell two neighbours apart."""
REPEAT_SECONDS = 120
"""For so long the same request, sent again, is known and not applied again."""
KEPT_SECONDS = 24 * 3600
"""For so long the tasks of a session are kept."""
RETRY_AFTER_MS = 1000

Changed = Callable[[str | None], None]
"""Told the room whose board has changed for good; None when any may have."""


@dataclass(frozen=True, slots=True)
class Player:
    """One of a roster."""

    id: int
    name: str


class Row(NamedTuple):
    """One line of a board. `score` is in millionths; equal scores share a rank."""

    rank: int
    id: int
    name: str
    score: int


@dataclass(frozen=True, slots=True)
class Request:
    """A request that its client may send again: the id that it gave, in JSON's spelling, and a digest of all
    that it asked for."""

    id: str
    what: str


@dataclass(frozen=True, slots=True)
class TaskRecord:
    """The last update of a session's task, and the server process that has it in hand."""

    update: dict[str, Any]
    owner: str


class StoreUnavailable(Exception):
    """The store cannot be had, or does not answer; the text says why."""


class Store(Protocol):
    """A store. Each method may raise StoreUnavailable; what it has returned from is durable."""

    async def open(self, changed: Changed) -> None:
        """Makes it ready; `changed` is called from then on."""

    async def close(self) -> None:
        """Lets go of everything, after what was asked for."""

    async def start_game(self, room: str, roster: Sequence[Player] | None, request: Request | None) -> None:
        """Sets every score to 0. With a roster, its players and only they play; else whoever comes joins.

        Raises:
            Conflict: the request's id stood for something else a moment ago.
        """

    async def add(self, room: str, player: int, micros: int, request: Request | None) -> None:
        """Adds to a player's score, atomically.

        Raises:
            NotFound: no game has been started, or the player is not on its roster.
            InvalidMessage: the total would be beyond the bounds.
            Overloaded: a new player, and the room is full.
            Conflict: as above.
        """

    async def board(self, room: str, limit: int, around: int | None = None) -> list[Row]:
        """The best `limit` players, or as many with the player `around` in their middle.

        Raises:
            NotFound: there is no such player.
        """

    @property
    def instance(self) -> str:
        """The name of this server process, as an owner of tasks."""

    async def save_tasks(self, session: str, updates: Sequence[dict[str, Any]]) -> None:
        """Keeps the last update of each of these tasks, this process being their owner."""

    async def tasks(self, session: str) -> list[TaskRecord]:
        """All that is kept of a session, in the order in which the tasks were first saved."""

    async def is_alive(self, owner: str) -> bool:
        """Whether that server process still runs."""


def no_game() -> NotFound:
    """A score is changed where nobody plays."""
    return NotFound("no game has been started in this room; send startGame first")


def not_on_roster(player: int) -> NotFound:
    """A score is changed of someone who does not play."""
    return NotFound(f"player {player} is not on the roster of this game", path="/data/playerId")


def not_on_board(player: int) -> NotFound:
    """A board is asked for around someone who is not on it."""
    return NotFound(f"player {player} is not on the board of this room", path="/data/around")


def out_of_bounds(player: int) -> InvalidMessage:
    """A change that is too large."""
    return InvalidMessage(
        f"the score of player {player} would be beyond {MOST} points (2^53 - 1, fixed by the protocol)",
        path="/data/change", limit=MOST,
    )  # fmt: skip


def used_otherwise(request: Request) -> Conflict:
    """One id, two requests: one of them would be lost if it were taken for a repeat."""
    return Conflict(
        f"the id {clip(request.id)} stood for another request in this room within the last {REPEAT_SECONDS} s;"
        " give each request an id of its own",
        path="/id",
    )


def room_full(most: int) -> Overloaded:
    """One more player than a room holds."""
    return Overloaded(
        f"this room has {most} players, and the limit is {most} players (--max-players)", limit=most, path="/data"
    )


def score_shown(micros: int) -> int | float:
    """A score as a message shows it: whole where it is whole, else with at most 6 decimal places."""
    whole, rest = divmod(micros, MICROS)
    return whole if rest == 0 else micros / MICROS
