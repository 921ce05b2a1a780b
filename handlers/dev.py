"""/devws: the same for developers, who are told more."""

from __future__ import annotations

import json
import traceback
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from handlers.app import AppServices, AppSocket
from handlers.base import Method, Transport
from protocol.errors import InvalidMessage, Refusal
from protocol.message import CLIPPED, Message, decode

LOCAL_NAMES = ("localhost", "127.0.0.1", "::1", "[::1]")


class DevSocket(AppSocket):
    """Adds `describe`, `validate` and `echo`; open on the developer's own machine, elsewhere only with --dev."""

    dev = True

    games = "dev"

    def initialize(
        self, transport: Transport, services: AppServices, is_open: bool = False, is_local: bool = False
    ) -> None:
        """Tornado's constructor. `is_local`: open only to this machine."""
        super().initialize(transport, services)
        self._is_open = is_open
        self._is_local = is_local

    def prepare(self) -> None:
        """Refuses everyone on a server for others, and a page whose host's name only pretends to be this machine's."""
        super().prepare()
        if not self._is_open:
            self._close_to("this server listens beyond this machine")
        elif self._is_local and self.request.host_name not in LOCAL_NAMES:
            self._close_to(f"{self.request.host_name[:CLIPPED]} is not a name of this machine")

    def _close_to(self, reason: str) -> None:
        self.refuse_page(f"/devws is closed, because {reason}; --dev opens it")

    def check_origin(self, origin: str) -> bool:
        """Pages of this machine, on any port, are welcome."""
        return urlsplit(origin).hostname in LOCAL_NAMES or super().check_origin(origin)

    @property
    def actions(self) -> Mapping[str, Method]:
        """Those of /appws, and three more."""
        return {**super().actions, "describe": self.describe, "validate": self.validate, "echo": self.echo}

    async def describe(self, message: Message) -> Message:
        """All actions with their schemas."""
        schemas = self.transport.schemas
        return Message("describe", {"actions": {name: schemas.schema(name) for name in self.actions}}, id=message.id)

    async def validate(self, message: Message) -> Message:
        """Whether a message would be accepted, without doing what it says."""
        violations = self._violations_of(json.dumps(message.data["message"]))
        return Message("validate", {"valid": not violations, "violations": violations}, id=message.id)

    async def echo(self, message: Message) -> Message:
        """The same data again."""
        return Message("echo", message.data, id=message.id)

    def _violations_of(self, text: str) -> list[dict[str, Any]]:
        tried = None
        try:
            tried = decode(text)
            self.transport.schemas.check(tried, dev=True)
        except Refusal as refusal:
            if tried is not None and isinstance(refusal, InvalidMessage):
                return self.transport.schemas.violations(tried)
            return [{"error": refusal.sentence, **refusal.details}]
        return []

    def explain(self, refusal: Refusal, message: Message | None) -> dict[str, Any]:
        """Every violation of the schema, and a good message to compare with."""
        if message is None or not isinstance(refusal, InvalidMessage):
            return {}
        schemas = self.transport.schemas
        return {"violations": schemas.violations(message), "example": schemas.example(message.action)}

    def confession(self, fault: Exception) -> dict[str, Any]:
        """The traceback."""
        return {"traceback": "".join(traceback.format_exception(fault))}
