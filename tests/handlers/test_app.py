"""runCode and cancelRun, as a client meets them."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import psutil
import pytest

from tests.conftest import GEN_TEST, until
from tests.handlers.client import Client, connected, serving

pytestmark = GEN_TEST
SLEEPER = {"language": "python", "code": "import time; time.sleep(1e6)", "mode": "standalone"}


def jailed() -> int:
    """How many processes there are of runs of this server, and of slots that wait for one."""
    count = 0
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            count += "main.py" in " ".join(child.cmdline())
    return count


@pytest.mark.parametrize(("language", "code"), [("python", "print('hi')"), ("javascript", "console.log('hi')")])
async def test_a_program_is_run_and_answered_with_all_fields_of_the_seed(language: str, code: str) -> None:
    async with serving() as server, connected(server) as client:
        data = await client.run(code, language)

        assert (data["output"], data["error"], data["status"]) == ("hi\n", None, "ok")
        assert data["executionTime"] > 0
        assert data["memoryUsed"] > 1 << 20
        assert (data["exitCode"], data["signal"], data["truncated"]) == (0, None, [])


async def test_what_a_good_program_wrote_to_standard_error_is_not_lost() -> None:
    async with serving() as server, connected(server) as client:
        data = await client.run("import sys; print('out'); print('err', file=sys.stderr)")

        assert (data["error"], data["output"], data["stderr"]) == (None, "out\nerr\n", "err\n")


async def test_a_failing_program_is_an_output_not_an_error() -> None:
    async with serving() as server, connected(server) as client:
        data = await client.run("print('before')\n1 / 0")

        assert data["output"] == "before\n"
        assert "ZeroDivisionError" in data["error"]
        assert data["status"] == "error"


async def test_answers_carry_the_ids_of_their_requests() -> None:
    async with serving(max_runs=4) as server, connected(server) as client:
        for number in range(8):
            code = {"language": "python", "code": f"print({number})", "mode": "standalone"}
            await client.send("runCode", code, id=number)
        answers = [await client.hear() for _ in range(8)]

        assert {answer["id"]: answer["data"]["output"] for answer in answers} == {n: f"{n}\n" for n in range(8)}


async def test_limits_may_be_lowered() -> None:
    async with serving() as server, connected(server) as client:
        data = await client.run("import time; time.sleep(1e6)", limits={"timeMs": 300})

        assert (data["status"], data["error"]) == ("timeout", "Time limit exceeded: 0.3 s of wall time")


@pytest.mark.parametrize("name", ["timeMs", "cpuMs", "memoryBytes", "outputBytes", "processes"])
async def test_a_limit_of_zero_or_less_or_above_the_maximum_is_refused(name: str) -> None:
    async with serving() as server, connected(server) as client:
        for value in (0, -1, 10**12):
            answer = await client.ask("runCode", {**SLEEPER, "limits": {name: value}})

            assert answer["details"]["code"] == "INVALID_MESSAGE"
            assert answer["details"]["path"] == f"/data/limits/{name}"
            assert str(value) in answer["error"]
        assert "--max-" in answer["error"]


async def test_a_full_queue_refuses_at_once() -> None:
    async with serving(max_runs=1, queue_size=1) as server, connected(server) as client:
        for number in range(3):
            await client.send("runCode", SLEEPER, id=number)
        answer = await client.hear()

        assert (answer["id"], answer["details"]["code"], answer["details"]["retryable"]) == (2, "OVERLOADED", True)
        assert "--queue-size" in answer["error"]


async def test_a_client_with_many_runs_does_not_starve_the_next() -> None:
    async with serving(max_runs=1) as server, connected(server) as many, connected(server) as one:
        order: list[str] = []

        async def listen(name: str, client: Client, count: int) -> None:
            for _ in range(count):
                await client.hear()
                order.append(name)

        for _ in range(20):
            await many.send("runCode", {**SLEEPER, "code": "print(1)"})
        listening = asyncio.ensure_future(listen("many", many, 20))
        await until(lambda: order)
        await one.send("runCode", {**SLEEPER, "code": "print(1)"})
        await listen("one", one, 1)

        assert len(order) < 10
        await listening


async def test_cancel_ends_a_run_and_both_are_answered() -> None:
    async with serving() as server, connected(server) as client:
        await client.send("runCode", SLEEPER, id="long")
        await until(jailed)
        await client.send("cancelRun", {"run": "long"}, id="stop")
        answers = {answer["id"]: answer for answer in [await client.hear(), await client.hear()]}

        assert answers["long"]["data"]["status"] == "cancelled"
        assert answers["stop"]["action"] == "ack"


async def test_a_queued_run_can_be_cancelled() -> None:
    async with serving(max_runs=1) as server, connected(server) as client:
        await client.send("runCode", SLEEPER, id=1)
        await client.send("runCode", SLEEPER, id=2)
        await client.send("cancelRun", {"run": 2})
        answer = await client.hear()

        assert (answer["id"], answer["data"]["status"]) == (2, "cancelled")


async def test_a_run_that_is_not_there_cannot_be_cancelled() -> None:
    async with serving() as server, connected(server) as client:
        assert (await client.ask("cancelRun", {"run": 1}))["details"]["code"] == "NOT_FOUND"


async def test_an_id_is_unique_among_the_runs_of_a_connection() -> None:
    async with serving() as server, connected(server) as client:
        await client.send("runCode", SLEEPER, id=1)

        assert (await client.ask("runCode", SLEEPER, id=1))["details"]["code"] == "CONFLICT"


async def test_a_run_ends_with_its_connection() -> None:
    async with serving() as server:
        idle = jailed()
        async with connected(server) as client:
            await client.send("runCode", SLEEPER)
            await until(lambda: jailed() > idle)
        await until(lambda: jailed() == idle, seconds=1)


async def test_two_hundred_runs_of_fifty_connections_are_all_right() -> None:
    async with serving(max_runs=4) as server:
        idle = jailed()

        async def four_runs(number: int) -> list[Any]:
            async with connected(server) as client:
                return [(await client.run(f"print({number} * {turn})"))["output"] for turn in range(4)]

        answers = await asyncio.gather(*(four_runs(number) for number in range(50)))

        assert answers == [[f"{number * turn}\n" for turn in range(4)] for number in range(50)]
        await until(lambda: jailed() == idle)
