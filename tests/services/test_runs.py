"""The admission queue: bounded, fair, with an end for every run. Its engine here does as the test says."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from protocol.errors import ClusterUnavailable, Conflict, NotFound, Overloaded, ShuttingDown
from sandbox.engine import EngineAway, never_started
from sandbox.model import Channel, Facts, Job, Outcome, Status
from sandbox.verdict import conclude
from services.runs import Bounds, Runs
from tests.conftest import within

JOB = Job("python", "")
MIB = 1 << 20


class TestEngine:
    """Each run lasts until it is let go, in the order in which they began."""

    __test__ = False
    name = "test"

    def __init__(self) -> None:
        self.begun: list[str] = []
        self._ends: list[asyncio.Future[Outcome]] = []

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    def warnings(self) -> list[str]:
        return []

    async def run(self, job: Job, channel: Channel) -> Outcome:
        self.begun.append(job.code)
        if job.code == "fail":
            raise RuntimeError("broken")
        if job.code == "ends early":
            channel.ended()
        end: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._ends.append(end)
        cancelled = asyncio.ensure_future(channel.cancel.wait())
        try:
            await asyncio.wait({end, cancelled}, return_when=asyncio.FIRST_COMPLETED)
            return never_started(job) if cancelled.done() else conclude(job, Facts(exit_code=0), b"", b"")
        finally:
            cancelled.cancel()

    def let_go(self) -> None:
        self._ends.pop(0).set_result(conclude(JOB, Facts(exit_code=0), b"", b""))


def on(test: Callable[[Runs, TestEngine], Awaitable[None]], max_runs: int = 1, queue_size: int = 10) -> None:
    async def main() -> None:
        engine = TestEngine()
        runs = Runs(engine, Bounds(max_runs, queue_size, MIB, max_runs, 1000))
        await within(test(runs, engine))
        await within(runs.close(0))
        assert runs.counts == {"running": 0, "queued": 0}
        assert not runs._entries
        assert not runs._named
        assert not runs._queues

    asyncio.run(main())


async def begun(engine: TestEngine, count: int) -> None:
    while len(engine.begun) < count:
        await asyncio.sleep(0)


def start(runs: Runs, owner: str, code: str = "", **more: object) -> asyncio.Task[tuple[Outcome, float]]:
    return asyncio.create_task(runs.run(Job("python", code), owner, **more))  # type: ignore[arg-type]


def test_connections_take_turns_however_much_one_asks_for() -> None:
    async def test(runs: Runs, engine: TestEngine) -> None:
        waiting = [start(runs, "greedy", f"greedy {n}") for n in range(5)]
        await asyncio.sleep(0)
        waiting += [start(runs, "modest", "modest"), start(runs, "other", "other")]
        for count in range(1, 8):
            await begun(engine, count)
            engine.let_go()
        await asyncio.gather(*waiting)

        assert engine.begun[:4] == ["greedy 0", "greedy 1", "modest", "other"]

    on(test)


def test_the_next_begins_when_a_program_has_ended_though_its_outcome_is_not_there() -> None:
    async def test(runs: Runs, engine: TestEngine) -> None:
        waiting = [start(runs, "a", "ends early"), start(runs, "a", "second"), start(runs, "b", "third")]
        await begun(engine, 2)
        assert runs.counts == {"running": 1, "queued": 1}
        engine.let_go()
        assert (await waiting[0])[0].status is Status.OK
        assert runs.counts == {"running": 1, "queued": 1}  # it is not counted twice
        engine.let_go()
        await begun(engine, 3)
        engine.let_go()
        await asyncio.gather(*waiting)

    on(test)


def test_a_full_queue_refuses_at_once_and_names_the_setting() -> None:
    async def test(runs: Runs, engine: TestEngine) -> None:
        waiting = [start(runs, "a"), start(runs, "a"), start(runs, "b")]
        await begun(engine, 1)
        with pytest.raises(Overloaded, match=r"the limit is 2 \(--queue-size") as caught:
            await runs.run(JOB, "c")
        assert caught.value.details == {"limit": 2, "retryAfterMs": 1000}
        waiting.append(start(runs, "c", of_task=True))
        for count in range(1, 5):
            await begun(engine, count)
            engine.let_go()
        assert all(outcome.status is Status.OK for outcome, _ in await asyncio.gather(*waiting))

    on(test, queue_size=2)


def test_a_run_can_be_cancelled_in_the_queue_and_under_way() -> None:
    async def test(runs: Runs, engine: TestEngine) -> None:
        first, second = start(runs, "a", name="first"), start(runs, "a", name="second")
        await begun(engine, 1)
        with pytest.raises(Conflict):
            await runs.run(JOB, "a", "first")
        with pytest.raises(NotFound):
            runs.cancel("b", "first")
        runs.cancel("a", "second")
        assert (await second)[0].status is Status.CANCELLED
        runs.cancel("a", "first")
        assert (await first)[0].status is Status.CANCELLED
        with pytest.raises(NotFound):
            runs.cancel("a", "first")
        assert engine.begun == [""]

    on(test)


def test_all_runs_of_a_connection_end_with_it_and_no_others() -> None:
    async def test(runs: Runs, engine: TestEngine) -> None:
        gone = [start(runs, "gone") for _ in range(3)]
        stays = start(runs, "stays", "stays")
        await begun(engine, 1)
        runs.leave("gone")
        await asyncio.gather(*gone)
        await begun(engine, 2)
        assert engine.begun[-1] == "stays"
        engine._ends.pop(0)
        engine.let_go()
        assert (await stays)[0].status is Status.OK

    on(test)


def test_an_engine_that_fails_gives_an_internal_error_and_the_next_run_has_its_turn() -> None:
    async def test(runs: Runs, engine: TestEngine) -> None:
        outcome, _ = await runs.run(Job("python", "fail"), "a")
        assert outcome.status is Status.INTERNAL_ERROR
        after = start(runs, "a")
        await begun(engine, 2)
        engine.let_go()
        assert (await after)[0].status is Status.OK

    on(test)


def test_whoever_waits_and_is_cancelled_frees_the_place() -> None:
    async def test(runs: Runs, engine: TestEngine) -> None:
        first, second, third = start(runs, "a"), start(runs, "a"), start(runs, "a", "third")
        await begun(engine, 1)
        second.cancel()
        first.cancel()
        await asyncio.gather(first, second, return_exceptions=True)
        await begun(engine, 2)
        assert engine.begun[-1] == "third"
        engine._ends.pop(0)
        engine.let_go()
        await third

    on(test)


def test_a_closed_queue_takes_nothing_and_ends_what_is_under_way() -> None:
    async def test(runs: Runs, engine: TestEngine) -> None:
        waiting = [start(runs, "a"), start(runs, "b")]
        await begun(engine, 1)
        await runs.close(0)
        assert all(outcome.status is Status.CANCELLED for outcome, _ in await asyncio.gather(*waiting))
        with pytest.raises(ShuttingDown):
            await runs.run(JOB, "a")

    on(test)


def test_what_waits_is_bounded_in_bytes_too() -> None:
    async def main() -> None:
        engine = TestEngine()
        runs = Runs(engine, Bounds(running=1, queued=100, queued_bytes=1000, running_of_one=1, queued_of_one=100))
        large = Job("python", "x" * 600, stdin="y" * 300)
        waiting = [asyncio.ensure_future(runs.run(job, "a")) for job in (large, large)]
        await begun(engine, 1)
        with pytest.raises(
            Overloaded, match=r"have 900 bytes .* 101 more .* the limit of 1000 bytes \(--queue-bytes\)"
        ):
            await runs.run(Job("python", "é" * 50 + "x"), "b")
        waiting.append(asyncio.ensure_future(runs.run(Job("python", "x" * 100), "b")))
        for count in (2, 3):
            engine.let_go()
            await begun(engine, count)
        engine.let_go()
        await asyncio.gather(*waiting)
        assert runs._queued_bytes == 0

    asyncio.run(main())


def test_one_connection_has_no_more_than_its_share() -> None:
    async def main() -> None:
        engine = TestEngine()
        runs = Runs(engine, Bounds(running=3, queued=100, queued_bytes=MIB, running_of_one=2, queued_of_one=2))
        waiting = [start(runs, "greedy", f"greedy {n}") for n in range(4)]
        await begun(engine, 2)
        with pytest.raises(Overloaded, match=r"2 runs of this connection wait already.*--max-queued-per-connection"):
            await runs.run(JOB, "greedy")
        waiting.append(start(runs, "modest", "modest"))
        await begun(engine, 3)
        assert engine.begun == ["greedy 0", "greedy 1", "modest"]
        for count in range(4, 9):
            engine.let_go()
            await begun(engine, min(count, 5))
        await asyncio.gather(*waiting)
        assert not runs._running_of

    asyncio.run(main())


def test_whoever_waits_is_told_the_turns_until_its_own() -> None:
    async def test(runs: Runs, engine: TestEngine) -> None:
        heard: list[tuple[str, str, int | None]] = []

        def teller(name: str) -> Callable[[str, int | None], None]:
            return lambda status, position: heard.append((name, status, position))

        order = ("a1", "a2", "a3", "b1", "c1", "b2")
        waiting = []
        for name in order:
            waiting.append(start(runs, name[0], name, tell=teller(name)))
            await asyncio.sleep(0)
        assert heard == [
            ("a1", "running", None), ("a2", "queued", 1), ("a3", "queued", 2), ("b1", "queued", 2), ("c1", "queued", 3),
            ("b2", "queued", 5),
        ]  # fmt: skip
        for count in range(1, 7):
            await begun(engine, count)
            engine.let_go()
        await asyncio.gather(*waiting)
        assert [name for name, status, _ in heard if status == "running"] == ["a1", "a2", "b1", "c1", "a3", "b2"]

    on(test)


def test_an_engine_that_is_away_refuses_at_once_and_those_that_wait_are_told() -> None:
    async def main() -> None:
        engine = TestEngine()
        reason: list[str] = []
        runs = Runs(engine, Bounds(1, 10, MIB, 1, 1000), lambda: reason[0] if reason else None)
        under_way, waiting = start(runs, "a"), start(runs, "b")
        await begun(engine, 1)
        reason.append("the scheduler is gone")
        runs.refuse_waiting(reason[0])
        with pytest.raises(ClusterUnavailable, match="the scheduler is gone"):
            await within(waiting)
        with pytest.raises(ClusterUnavailable):
            await runs.run(JOB, "c")
        engine.let_go()
        assert (await under_way)[0].status is Status.OK
        assert runs.counts == {"running": 0, "queued": 0}

    asyncio.run(main())


def test_an_engine_that_is_away_when_the_turn_comes_is_a_refusal() -> None:
    class AwayEngine(TestEngine):
        async def run(self, job: Job, channel: Channel) -> Outcome:
            raise EngineAway("gone")

    async def main() -> None:
        runs = Runs(AwayEngine(), Bounds(1, 10, MIB, 1, 1000))
        with pytest.raises(ClusterUnavailable, match="gone; mode standalone is there"):
            await runs.run(JOB, "a")
        assert runs.counts == {"running": 0, "queued": 0}

    asyncio.run(main())


def test_more_room_gives_turns_at_once_and_less_room_ends_nothing() -> None:
    async def test(runs: Runs, engine: TestEngine) -> None:
        started = [start(runs, f"owner {n}") for n in range(4)]
        await begun(engine, 1)
        assert runs.counts == {"running": 1, "queued": 3}
        runs.resize(Bounds(3, 10, MIB, 3, 10))
        await begun(engine, 3)
        runs.resize(Bounds(1, 10, MIB, 1, 10))
        for _ in range(2):
            engine.let_go()
        await asyncio.wait(started, return_when=asyncio.FIRST_COMPLETED)
        assert len(engine.begun) == 3
        engine.let_go()
        await begun(engine, 4)
        engine.let_go()
        await asyncio.gather(*started)

    on(test)
