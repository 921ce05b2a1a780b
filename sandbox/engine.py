"""The one interface of every way to run a Job."""

from __future__ import annotations

from typing import Protocol

from sandbox.model import Channel, Facts, Job, Outcome
from sandbox.verdict import conclude


class EngineUnavailable(Exception):
    """This machine cannot run the engine; the text says in a sentence what is missing."""


class EngineAway(EngineUnavailable):
    """The engine cannot run anything now, and may later; nothing has started."""


class Engine(Protocol):
    """A way to run Jobs. Everything a program does is an Outcome; an exception is always a fault of ours.

    Cancelling the asyncio Task that awaits `run` ends the run too, and then there is no Outcome. In both cases every
    process of the run is gone before `run` returns or raises.
    """

    name: str

    async def open(self) -> None:
        """Makes ready. Raises EngineUnavailable."""

    async def run(self, job: Job, channel: Channel) -> Outcome:
        """Runs `job` to its end; any number at once. Raises EngineAway."""

    def warnings(self) -> list[str]:
        """What this machine does not let the engine enforce, a sentence each."""

    async def close(self) -> None:
        """Ends what still runs and gives everything back."""


def never_started(job: Job) -> Outcome:
    """The Outcome of a run that was cancelled before its turn."""
    return conclude(job, Facts(cancelled=True), b"", b"")


def did_not_fit(job: Job) -> Outcome:
    """The Outcome of a run whose memory limit is below what it takes to be started."""
    return conclude(job, Facts(oom_kills=1), b"", b"")


def failed_outcome(job: Job, sentence: str) -> Outcome:
    """The Outcome of a run that an engine could not bring to an end."""
    return conclude(job, Facts(engine_failure=sentence), b"", b"")
