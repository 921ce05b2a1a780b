"""The two ways to run a program, `standalone` and `cluster`: each has a queue of its own, for one set of names."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, Final, Literal

from protocol.errors import Conflict
from sandbox.model import Job, Outcome
from services.runs import Runs

Mode = Literal["standalone", "cluster"]
STANDALONE: Final = "standalone"
CLUSTER: Final = "cluster"


class Modes:
    """The queues of all modes. To a connection they are one: its runs have different names, and end with it."""

    def __init__(self, queues: Mapping[str, Runs]) -> None:
        self._queues = queues

    async def run(
        self, mode: str, job: Job, owner: Hashable, name: str | int | None = None, **how: Any
    ) -> tuple[Outcome, float]:
        """As `Runs.run`, in the queue of `mode`."""
        if name is not None and any(queue.has(owner, name) for queue in self._queues.values()):
            raise Conflict(f"this connection has a run {name!r} under way already", path="/id")
        return await self._queues[mode].run(job, owner, name, **how)

    def cancel(self, owner: Hashable, name: str | int) -> None:
        """As `Runs.cancel`."""
        self._queue_of(owner, name).cancel(owner, name)

    def feed(self, owner: Hashable, name: str | int, text: str, *, end: bool) -> None:
        """As `Runs.feed`."""
        self._queue_of(owner, name).feed(owner, name, text, end=end)

    def leave(self, owner: Hashable) -> None:
        """Ends all runs of a connection that is gone."""
        for queue in self._queues.values():
            queue.leave(owner)

    def _queue_of(self, owner: Hashable, name: str | int) -> Runs:
        """The one that has the run; if none has, the first, which then says so."""
        queues = list(self._queues.values())
        return next((queue for queue in queues if queue.has(owner, name)), queues[0])
