"""/appws: what an app's frontend talks to."""

from __future__ import annotations

from collections.abc import Mapping

from handlers.base import Method, ProtocolSocket, Transport
from protocol.errors import UnknownAction
from protocol.message import Message
from services.jobs import Terms, job_of, output_of
from services.runs import Runs


class AppSocket(ProtocolSocket):
    """Runs, tasks and games."""

    def initialize(self, transport: Transport, runs: Runs, terms: Terms) -> None:
        """Tornado's constructor."""
        self.connect(transport)
        self._runs = runs
        self._terms = terms

    @property
    def actions(self) -> Mapping[str, Method]:
        """One method each."""
        return {
            "runCode": self.run_code,
            "cancelRun": self.cancel_run,
            "sendInput": self.not_yet,
            "startTasks": self.not_yet,
            "cancelTasks": self.not_yet,
            "getTasks": self.not_yet,
            "startGame": self.not_yet,
            "updateScore": self.not_yet,
            "getLeaderboard": self.not_yet,
        }

    def left(self) -> None:
        """Ends this connection's runs."""
        self._runs.leave(self)

    async def run_code(self, message: Message) -> Message:
        """Runs a program."""
        job = job_of(message.data, self._terms)
        outcome, queue_ms = await self._runs.run(job, owner=self, name=message.id)
        return Message("output", output_of(outcome, queue_ms), id=message.id)

    async def cancel_run(self, message: Message) -> None:
        """Ends a run of this connection."""
        self._runs.cancel(self, message.data["run"])

    async def not_yet(self, message: Message) -> Message:
        """A good message whose service this release does not have."""
        raise UnknownAction(f"{message.action} is part of the protocol, but this server does not offer it yet")
