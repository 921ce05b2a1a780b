"""What a room's board must be after any sequence of moves, in the plainest Python: the stores are compared with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from decimal import Decimal

from services.store import MICROS, MOST, Row


@dataclass
class Model:
    """One room."""

    started: bool = False
    fixed: bool = False
    names: dict[int, str] = field(default_factory=dict)  # in the order of joining
    scores: dict[int, Decimal] = field(default_factory=dict)
    history: list[int] = field(default_factory=list)  # players in the order in which they got their present score

    def start(self, roster: list[tuple[int, str]] | None) -> None:
        self.started = True
        self.fixed = roster is not None
        if roster is not None:
            self.names = dict(roster)
        self.scores = dict.fromkeys(self.names, Decimal(0))
        self.history = list(self.names)

    def add(self, player: int, micros: int) -> str | None:
        """The code of the refusal, or None."""
        if not self.started or (self.fixed and player not in self.names):
            return "NOT_FOUND"
        total = self.scores.get(player, Decimal(0)) + Decimal(micros) / MICROS
        if abs(total) > MOST:
            return "INVALID_MESSAGE"
        if player not in self.names or micros:
            self.history = [other for other in self.history if other != player] + [player]
        self.names.setdefault(player, f"Player {player}")
        self.scores[player] = total
        return None

    def rows(self) -> list[Row]:
        ranked = sorted(self.history, key=lambda player: -self.scores[player])
        return [
            Row(
                1 + sum(score > self.scores[player] for score in self.scores.values()),
                player,
                self.names[player],
                int(self.scores[player] * MICROS),
            )
            for player in ranked
        ]
