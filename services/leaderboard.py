"""Games: checks what a change of score asks for, and tells a room when its board has changed."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Mapping
from decimal import ROUND_HALF_EVEN, Decimal
from typing import Any

from background import spawn
from protocol.errors import InvalidMessage, Overloaded
from protocol.message import Message, has_surrogate
from services.hub import Hub
from services.store import (
    MICROS,
    MOST,
    RETRY_AFTER_MS,
    Player,
    Request,
    Row,
    Store,
    StoreUnavailable,
    out_of_bounds,
    room_full,
    score_shown,
)

log = logging.getLogger(__name__)
SHOWN = 100
"""Rows of a board that are published."""
PAUSE_SECONDS = 0.1
"""Between two boards of one room; what changes meanwhile is in the next."""


class Leaderboard:
    """The games of all rooms. What a method has returned from is durable."""

    def __init__(self, store: Store, hub: Hub, max_players: int) -> None:
        self._store = store
        self._hub = hub
        self._max_players = max_players
        self._changed: set[str] = set()
        self._publishing: dict[str, asyncio.Task[None]] = {}

    async def start_game(self, room: str, data: Mapping[str, Any], id: str | int | None) -> None:
        """Begins a game; `data` may have `players`.

        Raises:
            InvalidMessage: a player twice.
            Conflict: the `id` stood for another request a moment ago.
            Overloaded: more players than a room holds, or the store does not answer.
        """
        roster = None
        if "players" in data:
            roster = [Player(int(player["id"]), player["name"]) for player in data["players"]]
            _check_roster(roster, self._max_players)
        try:
            await self._store.start_game(room, roster, _request(id, ["startGame", data]))
        except StoreUnavailable as failure:
            raise _unavailable(failure) from failure

    async def update_score(self, room: str, data: Mapping[str, Any], id: str | int | None) -> None:
        """Adds `change` to the score of `playerId`. Raises what `Store.add` does, and Overloaded without a store."""
        player = int(data["playerId"])
        micros = _micros(player, data["change"])
        try:
            await self._store.add(room, player, micros, _request(id, ["updateScore", player, micros]))
        except StoreUnavailable as failure:
            raise _unavailable(failure) from failure

    async def board(self, room: str, data: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The best `limit` players, or those `around` one. Raises NotFound, and Overloaded without a store."""
        around = int(data["around"]) if "around" in data else None
        try:
            return _shown(await self._store.board(room, int(data.get("limit", SHOWN)), around))
        except StoreUnavailable as failure:
            raise _unavailable(failure) from failure

    def changed(self, room: str | None) -> None:
        """Called by the store: has the board published, at once or when the pause since the last one is over."""
        rooms = [room] if room is not None else self._hub.rooms()
        for each in rooms:
            if self._hub.has_members(each):
                self._changed.add(each)
                if each not in self._publishing:
                    self._publishing[each] = spawn(self._publish(each), name=f"publish {each}")

    async def close(self) -> None:
        """Publishes nothing more; to be called before the store is closed."""
        publishing = list(self._publishing.values())
        for asyncio_task in publishing:
            asyncio_task.cancel()
        await asyncio.gather(*publishing, return_exceptions=True)

    async def _publish(self, room: str) -> None:
        try:
            while room in self._changed:
                self._changed.discard(room)
                rows = await self._store.board(room, SHOWN)
                self._hub.publish(room, Message("leaderboardUpdate", _shown(rows)), key="leaderboardUpdate")
                await asyncio.sleep(PAUSE_SECONDS)
        except StoreUnavailable as failure:  # it says that everything has changed as soon as it is back
            log.warning("the board of %s waits for the store: %s", room, str(failure))
        finally:
            del self._publishing[room]


def _check_roster(roster: list[Player], max_players: int) -> None:
    if len(roster) > max_players:
        raise room_full(max_players)
    seen: set[int] = set()
    for place, player in enumerate(roster):
        if player.id in seen:
            raise InvalidMessage(f"player {player.id} stands twice in the roster", path=f"/data/players/{place}/id")
        seen.add(player.id)
        if has_surrogate(player.name):
            raise InvalidMessage(
                f"the name of player {player.id} has half a character in it", path=f"/data/players/{place}/name"
            )


def _micros(player: int, change: int | float) -> int:
    """A change in millionths; more than 6 decimal places are rounded."""
    if abs(change) > 2 * MOST:
        raise out_of_bounds(player)
    return int((Decimal(repr(change)) * MICROS).to_integral_value(ROUND_HALF_EVEN))


def _request(id: str | int | None, what: list[Any]) -> Request | None:
    if id is None:
        return None
    digest = hashlib.blake2b(json.dumps(what, sort_keys=True).encode(), digest_size=16)
    return Request(json.dumps(id), digest.hexdigest())


def _shown(rows: list[Row]) -> list[dict[str, Any]]:
    return [{"id": row.id, "name": row.name, "score": score_shown(row.score), "rank": row.rank} for row in rows]


def _unavailable(failure: StoreUnavailable) -> Overloaded:
    log.warning("the store: %s", str(failure))  # not itself: a kept record would keep its connection
    return Overloaded(
        "the scores cannot be written at the moment; send the request again, with the same id so that it counts once",
        retryAfterMs=RETRY_AFTER_MS,
    )
