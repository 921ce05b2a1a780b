"""What one run on fork servers costs, step by step.

python -m bench.profile_run [--runs N]

The steps ahead of need are those of the slot that replaces a used one; they are taken beside the runs.
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import statistics
import time
from collections import defaultdict
from typing import Any

from sandbox.cgroup import Cgroups, Leaf
from sandbox.forkserver import ForkServerEngine
from sandbox.languages import LANGUAGES
from sandbox.model import Channel, Job, Language
from sandbox.process import Watch
from sandbox.ready import Ready
from sandbox.slot import Slot

HELLO: dict[Language, str] = {"python": "print('hello')", "javascript": "console.log('hello')"}
WARM_UP = 10
AHEAD = "ahead of need"
PATH = "on the path"
AFTER = "afterwards"
STEPS = {
    "make a control group": AHEAD,
    "fork, join the group, make namespaces and mounts, drop rights": AHEAD,
    "take a slot": PATH,
    "set its limits": PATH,
    "hand over the job": PATH,
    "read the job, write the files": PATH,
    "run the program": PATH,
    "hear of its end, drain its pipes, read what it used": PATH,
    "wait until its last process is gone": PATH,
    "remove the control group": AFTER,
}


class Stopwatch:
    """Durations by step, in µs."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = defaultdict(list)
        self.begun = 0.0
        self.started = 0.0
        self.ended = 0.0

    def add(self, step: str, begin: float, end: float) -> None:
        """One more."""
        self.times[step].append((end - begin) * 1e6)

    def measure(self, owner: Any, method: str, step: str) -> None:
        """From here on, each call of a method counts as a step."""
        original = getattr(owner, method)

        def measured(*arguments: Any, **more: Any) -> Any:
            begin = time.monotonic()
            answer = original(*arguments, **more)
            if not asyncio.iscoroutine(answer):
                self.add(step, begin, time.monotonic())
                return answer

            async def awaited() -> Any:
                result = await answer
                self.add(step, begin, time.monotonic())
                return result

            return awaited()

        setattr(owner, method, measured)

    def listen(self) -> None:
        """Hears of a program's start and end, at the times that the jail tells."""
        begin, started, ended, outcome = Slot.begin, Watch.started, Watch.ended, Watch.outcome

        def note_begin(slot: Slot, job: Job, task: bytes) -> None:
            begin(slot, job, task)
            self.begun = time.monotonic()

        def note_start(watch: Watch, at: float) -> None:
            self.started = at
            self.add("read the job, write the files", self.begun, at)
            started(watch, at)

        def note_end(watch: Watch, at: float, **facts: Any) -> bool:
            self.ended = at
            self.add("run the program", self.started, at)
            return ended(watch, at, **facts)

        async def note_outcome(watch: Watch) -> Any:
            result = await outcome(watch)
            self.add("hear of its end, drain its pipes, read what it used", self.ended, time.monotonic())
            return result

        for owner, name, noting in (
            (Slot, "begin", note_begin), (Watch, "started", note_start), (Watch, "ended", note_end),
            (Watch, "outcome", note_outcome),
        ):  # fmt: skip
            setattr(owner, name, noting)


async def main(runs: int) -> None:
    """Prints a table for each language."""
    stopwatch = Stopwatch()
    stopwatch.listen()
    stopwatch.measure(Cgroups, "leaf", "make a control group")
    stopwatch.measure(Slot, "fill", "fork, join the group, make namespaces and mounts, drop rights")
    stopwatch.measure(Ready, "take", "take a slot")
    stopwatch.measure(Leaf, "limit", "set its limits")
    stopwatch.measure(Slot, "begin", "hand over the job")
    stopwatch.measure(Slot, "gone", "wait until its last process is gone")
    stopwatch.measure(Slot, "discard", "remove the control group")
    engine = ForkServerEngine()
    await engine.open()
    try:
        for language in LANGUAGES:
            for _ in range(WARM_UP):
                await engine.run(Job(language, HELLO[language]), Channel())
            stopwatch.times.clear()
            before, begin = _cpu_s(), time.monotonic()
            for _ in range(runs):
                await engine.run(Job(language, HELLO[language]), Channel())
            took_ms, cpu_ms = (time.monotonic() - begin) * 1000 / runs, (_cpu_s() - before) * 1000 / runs
            print(f"\n{language}: {took_ms:.2f} ms a run, one after the other; {cpu_ms:.2f} ms of CPU in the server")
            for step, when in STEPS.items():
                print(f"{statistics.median(stopwatch.times[step]):>8.0f} µs  {when:<14} {step}")
    finally:
        await engine.close()


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.profile_run", description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=200)
    asyncio.run(main(parser.parse_args().runs))
