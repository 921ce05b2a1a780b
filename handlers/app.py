"""/appws: what an app's frontend talks to."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from background import spawn
from handlers.base import Method, ProtocolSocket, Transport, ack
from protocol.errors import CloseCode, InvalidMessage, Overloaded
from protocol.frame import text_frame
from protocol.message import Message, clip, encode
from services.hub import Hub
from services.jobs import Terms, job_of, output_of
from services.leaderboard import Leaderboard
from services.live import LiveOutput
from services.modes import Modes
from services.repeats import Repeats
from services.store import StoreUnavailable
from services.tasks import Tasks, Update


def _chunk(stream: str, text: str, id: str | int | None) -> Message:
    return Message("outputChunk", {"stream": stream, "text": text}, id=id)


Default = TypeVar("Default", str, None)
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
DEFAULT_ROOM = "default"


@dataclass(frozen=True, slots=True)
class AppServices:
    """What the product does, for both paths."""

    modes: Modes
    terms: Terms
    tasks: Tasks
    leaderboard: Leaderboard
    hub: Hub


class AppSocket(ProtocolSocket):
    """Runs, tasks and games."""

    games = "app"
    """Rooms of this path; what is played on the other one is apart."""

    def initialize(self, transport: Transport, services: AppServices) -> None:
        """Tornado's constructor."""
        self.connect(transport)
        self._modes = services.modes
        self._terms = services.terms
        self._leaderboard = services.leaderboard
        self._hub = services.hub
        self._repeats = Repeats()
        room, session = self._named("room", DEFAULT_ROOM), self._named("session", None)
        self._bad_name = next((name for name in (room, session) if name is not None and not NAME.fullmatch(name)), None)
        self._room = f"{self.games}/{room}"
        self._tasks = services.tasks.of(self, session and f"{self.games}/{session}", self)

    def _named(self, what: str, default: Default) -> str | Default:
        """A name in the address; what is no UTF-8 stays recognisable as bad."""
        values = self.request.query_arguments.get(what)
        return values[-1].decode("utf-8", "replace") if values else default

    @property
    def actions(self) -> Mapping[str, Method]:
        """One method each."""
        return {
            "runCode": self.run_code,
            "cancelRun": self.cancel_run,
            "sendInput": self.send_input,
            "startTasks": self.start_tasks,
            "cancelTasks": self.cancel_tasks,
            "getTasks": self.get_tasks,
            "startGame": self.start_game,
            "updateScore": self.update_score,
            "getLeaderboard": self.get_leaderboard,
        }

    def open(self, *args: str, **kwargs: str) -> None:
        """Enters the room. A page cannot read why an address is refused, so a bad one is told over the socket."""
        super().open(*args, **kwargs)
        if self._bad_name is None:
            self._hub.join(self._room, self)
        else:
            said = f"room and session in the address must match {NAME.pattern}, not {clip(self._bad_name)}"
            self.refuse(InvalidMessage(said), None)
            self.close_with(CloseCode.BAD_MESSAGES)

    def left(self) -> None:
        """Ends this connection's runs and tasks."""
        self._hub.leave(self._room, self)
        self._modes.leave(self)
        spawn(self._tasks.leave(), name="leave tasks")

    # Runs

    async def run_code(self, message: Message) -> Message:
        """Runs a program."""
        data, id = message.data, message.id
        job = job_of(data, self._terms)
        if data.get("interactive") and id is None:
            raise InvalidMessage("an interactive run needs an id, by which sendInput names it", path="/id")
        live = LiveOutput(lambda stream, text: self.deliver(_chunk(stream, text, id))) if data.get("stream") else None

        def tell(status: str, position: int | None) -> None:
            told = {"status": status} if position is None else {"status": status, "position": position}
            self.tell(text_frame(encode(Message("runStatus", told, id=id))))

        outcome, queue_ms = await self._modes.run(
            data["mode"], job, self, id,
            emit=live.emit if live else None, interactive=data.get("interactive", False), tell=tell if live else None,
        )  # fmt: skip
        if live:
            await live.finish(outcome)
        return Message("output", output_of(outcome, queue_ms, job, streamed=live is not None), id=message.id)

    async def cancel_run(self, message: Message) -> Message | None:
        """Ends a run of this connection."""
        if not self._repeats.was_applied(message):
            self._modes.cancel(self, message.data["run"])
            self._repeats.applied(message)
        return ack(message)

    async def send_input(self, message: Message) -> Message | None:
        """Feeds a run of this connection."""
        data = message.data
        if not self._repeats.was_applied(message):
            self._modes.feed(self, data["run"], data.get("text", ""), end=data.get("end", False))
            self._repeats.applied(message)
        return ack(message)

    # Tasks

    async def start_tasks(self, message: Message) -> None:
        """Starts a batch, but for the tasks that are under way already."""
        for conflict in await self._tasks.start(message.data["tasks"], message.id):
            self.refuse(conflict, message)

    async def cancel_tasks(self, message: Message) -> Message | None:
        """Ends tasks of this connection."""
        self._tasks.cancel(message.data["ids"])
        return ack(message)

    async def get_tasks(self, message: Message) -> Message | None:
        """Tells the last update of each task."""
        try:
            updates = await self._tasks.updates()
        except StoreUnavailable as failure:
            raise Overloaded("the tasks of this session cannot be read at the moment") from failure
        for update in updates:
            await self.deliver(Message("taskUpdate", update, id=message.id))
        return ack(message)

    async def deliver_update(self, update: Update, id: str | int | None) -> None:
        """A task has begun or ended."""
        await self.deliver(Message("taskUpdate", update, id=id))

    def report_update(self, update: Update, id: str | int | None) -> None:
        """A task makes progress."""
        self.tell(text_frame(encode(Message("taskUpdate", update, id=id))), key=("taskUpdate", update["taskId"]))

    # Games

    async def start_game(self, message: Message) -> Message | None:
        """Begins a game in this connection's room."""
        await self._leaderboard.start_game(self._room, self._optional(message), message.id)
        return ack(message)

    async def update_score(self, message: Message) -> Message | None:
        """Adds to a player's score."""
        await self._leaderboard.update_score(self._room, message.data, message.id)
        return ack(message)

    async def get_leaderboard(self, message: Message) -> Message:
        """The board, or the part around one player, for this client alone."""
        board = await self._leaderboard.board(self._room, self._optional(message))
        return Message("leaderboardUpdate", board, id=message.id)

    def _optional(self, message: Message) -> Mapping[str, Any]:
        return message.data if isinstance(message.data, dict) else {}
