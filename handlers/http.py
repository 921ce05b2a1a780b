"""Plain HTTP beside the sockets: health, the schemas, and a start page that says what is here."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from tornado.web import HTTPError, RequestHandler

JSON_TYPE = "application/json; charset=utf-8"


class HealthHandler(RequestHandler):
    """GET /healthz: 200 while the server takes work, 503 when it is about to stop."""

    def initialize(self, health: Callable[[], Mapping[str, object]]) -> None:
        """`health` gives what is shown; its `status` is `ok` or something else."""
        self._health = health

    def get(self) -> None:
        """Answers in JSON."""
        health = self._health()
        self.set_status(200 if health["status"] == "ok" else 503)
        self.set_header("Content-Type", JSON_TYPE)
        self.set_header("Cache-Control", "no-store")
        self.finish(json.dumps(health))


class SchemaHandler(RequestHandler):
    """GET /schemas/ lists the schema files, GET /schemas/client/runCode.json gives one. With an ETag, for any page."""

    def initialize(self, documents: Mapping[str, bytes]) -> None:
        """`documents`: file name → content."""
        self._documents = documents

    def set_default_headers(self) -> None:
        """Everybody may read the contract, from any page; an ETag tells whether it has changed."""
        self.set_header("Access-Control-Allow-Origin", "*")
        self.set_header("Cache-Control", "no-cache")
        self.set_header("Content-Type", JSON_TYPE)

    def get(self, name: str) -> None:
        """One file, or the list of all."""
        if not name:
            self.finish(json.dumps({"schemas": [f"/schemas/{document}" for document in self._documents]}))
        elif name in self._documents:
            self.finish(self._documents[name])
        else:
            raise HTTPError(404, "there is no such schema")

    def head(self, name: str) -> None:
        """As GET, without the content."""
        self.get(name)

    def write_error(self, status_code: int, **kwargs: object) -> None:
        """Errors are JSON too."""
        self.finish(json.dumps({"error": f"there is no such schema; /schemas/ lists them ({status_code})"}))


class StartHandler(RequestHandler):
    """GET /: one page of plain text for whoever opens the address in a browser."""

    def get(self) -> None:
        """Says what is here."""
        self.set_header("Content-Type", "text/plain; charset=utf-8")
        self.finish(
            "Runboard\n\n"
            "  /appws     WebSocket for apps\n"
            "  /devws     WebSocket for development\n"
            "  /schemas/  every message as a JSON Schema\n"
            "  /healthz   health\n"
        )
