"""startTasks, cancelTasks and getTasks, as a client meets them."""

from __future__ import annotations

import asyncio
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import GEN_TEST, SECOND, until
from tests.handlers.client import Client, connected, serving
from tests.handlers.test_app import jailed

pytestmark = GEN_TEST
ETERNAL = {"language": "python", "code": "import time; time.sleep(1e6)", "mode": "standalone"}


def program(code: str, language: str = "python") -> dict[str, Any]:
    return {"language": language, "code": code, "mode": "standalone"}


def task(id: str, action: str = "sleep", **params: Any) -> dict[str, Any]:
    return {"id": id, "action": action, "params": params}


async def ends(client: Client, ids: set[str]) -> dict[str, list[dict[str, Any]]]:
    """All updates of these tasks, until each has ended; checks order on the way."""
    heard: dict[str, list[dict[str, Any]]] = {id: [] for id in ids}
    live = set(ids)
    while live:
        message = await client.hear(60)
        assert message["action"] == "taskUpdate", message
        update = message["data"]
        before = heard[update["taskId"]]
        assert update["taskId"] in live, "an update after the end"
        if not before:
            assert update == {"taskId": update["taskId"], "status": "running", "progress": 0}
        else:
            assert update.get("progress", 0) >= before[-1].get("progress", 0)
        before.append(update)
        if update["status"] != "running":
            live.discard(update["taskId"])
    return heard


async def test_a_task_begins_makes_progress_and_ends_once() -> None:
    async with serving() as server, connected(server) as client:
        await client.send("startTasks", {"tasks": [task("a", seconds=0.5 * SECOND)]}, id="r")
        updates = (await ends(client, {"a"}))["a"]

        assert len(updates) > 3
        assert updates[-1] == {
            "taskId": "a", "status": "completed", "progress": 100, "result": {"seconds": 0.5 * SECOND},
        }  # fmt: skip
        assert (await client.ask("echo"))["details"]["code"] == "UNKNOWN_ACTION"


async def test_updates_carry_the_id_of_the_request() -> None:
    async with serving() as server, connected(server) as client:
        await client.send("startTasks", {"tasks": [task("a", seconds=0)]}, id=5)

        assert (await client.hear())["id"] == 5
        assert (await client.hear())["id"] == 5


async def test_a_run_as_a_task_completes_with_the_output() -> None:
    async with serving() as server, connected(server) as client:
        await client.send("startTasks", {"tasks": [task("a", "runCode", **program("print(6 * 7)"))]})
        end = (await ends(client, {"a"}))["a"][-1]

        assert (end["status"], end["result"]["output"], end["result"]["error"]) == ("completed", "42\n", None)


@pytest.mark.parametrize(
    ("code", "limits", "said", "status"),
    [
        ("print('x'); 1/0", {}, "ZeroDivisionError", "error"),
        ("while 1: pass", {"timeMs": 200}, "Time limit", "timeout"),
    ],
)
async def test_a_run_that_is_not_ok_is_a_failed_task(code: str, limits: Any, said: str, status: str) -> None:
    async with serving() as server, connected(server) as client:
        await client.send("startTasks", {"tasks": [task("a", "runCode", **program(code), limits=limits)]})
        result = (await ends(client, {"a"}))["a"][-1]["result"]

        assert said in result["error"]
        assert (result["code"], result["status"]) == (status.upper(), status)


@pytest.mark.parametrize(
    ("bad", "path"),
    [
        (task("b", "slep"), "/data/tasks/1/action"),
        (task("b", seconds="x"), "/data/tasks/1/params/seconds"),
        ({"id": "b", "action": "sleep"}, "/data/tasks/1/params"),
        (task("a", seconds=0), "/data/tasks/1/id"),
        ({"id": "b"}, "/data/tasks/1"),
        (task("\ud800", seconds=0), "/data/tasks/1/id"),
        (task("b", "runCode", **program(""), limits={"timeMs": 10**9}), "/data/tasks/1/params/limits/timeMs"),
        (task("b", "runCode", **program(""), stream=True), "/data/tasks/1/params/stream"),
        (task("b", "runCode", **program(""), files={"../x": ""}), "/data/tasks/1/params/files/..~1x"),
        (task("b", "gradeCode", language="python", code="", tests=[]), "/data/tasks/1/params/tests"),
    ],
)
async def test_one_bad_task_and_none_of_the_batch_starts(bad: Any, path: str) -> None:
    async with serving() as server, connected(server) as client:
        answer = await client.ask("startTasks", {"tasks": [task("a", seconds=0), bad]}, id=1)

        assert (answer["action"], answer["details"]["code"], answer["details"]["path"]) == (
            "error", "INVALID_MESSAGE", path,
        )  # fmt: skip
        assert (await client.ask("getTasks", id=2))["action"] == "ack"


async def test_an_empty_batch_is_an_error() -> None:
    async with serving() as server, connected(server) as client:
        assert (await client.ask("startTasks", {"tasks": []}))["details"]["path"] == "/data/tasks"


async def test_the_id_of_a_live_task_is_a_conflict_and_the_rest_runs() -> None:
    async with serving() as server, connected(server) as client:
        await client.send("startTasks", {"tasks": [task("a", seconds=1000)]})
        await client.hear()
        await client.send("startTasks", {"tasks": [task("a", seconds=0), task("b", seconds=0)]}, id=9)
        heard = [await client.hear() for _ in range(3)]

        conflict = next(message for message in heard if message["action"] == "error")
        assert (conflict["details"]["code"], conflict["details"]["path"]) == ("CONFLICT", "/data/tasks/0/id")
        assert [m["data"]["status"] for m in heard if m["action"] == "taskUpdate"] == ["running", "completed"]


async def test_the_id_of_an_ended_task_may_be_used_again() -> None:
    async with serving() as server, connected(server) as client:
        for _ in range(3):
            await client.send("startTasks", {"tasks": [task("a", seconds=0)]})
            assert (await ends(client, {"a"}))["a"][-1]["status"] == "completed"


async def test_cancelled_tasks_fail_with_cancelled_whether_queued_or_running() -> None:
    async with serving(tasks_at_once=2) as server, connected(server) as client:
        idle = jailed()
        ids = [f"t{n}" for n in range(5)]
        await client.send("startTasks", {"tasks": [task(id, "runCode", **ETERNAL) for id in ids]})
        await client.hear()
        await client.hear()
        await until(lambda: jailed() >= idle + 2)
        await client.send("cancelTasks", {"ids": [*ids, "unknown"]}, id="c")
        heard = [await client.hear() for _ in range(3 + 5 + 1)]

        assert sum(message["action"] == "ack" for message in heard) == 1
        ended = {m["data"]["taskId"]: m["data"] for m in heard if m["action"] == "taskUpdate"}
        assert {id: (u["status"], u["result"]["code"]) for id, u in ended.items()} == dict.fromkeys(
            ids, ("failed", "CANCELLED")
        )
        await until(lambda: jailed() == idle)


async def test_get_tasks_tells_the_last_update_of_each_and_then_acknowledges() -> None:
    async with serving() as server, connected(server) as client:
        await client.send("startTasks", {"tasks": [task("a", seconds=0), task("b", seconds=1000)]})
        for _ in range(3):
            await client.hear()
        await client.send("getTasks", id="g")
        heard = [await client.hear() for _ in range(3)]

        assert {m["data"]["taskId"]: m["data"]["status"] for m in heard[:2]} == {"a": "completed", "b": "running"}
        assert heard[2] == {"action": "ack", "id": "g"}
        assert all(message["id"] == "g" for message in heard)


async def test_a_thousand_tasks_all_end_and_leave_others_their_turn() -> None:
    async with serving(queue_size=10) as server, connected(server) as client, connected(server) as other:
        ids = {f"t{n}" for n in range(1000)}
        await client.send("startTasks", {"tasks": [task(id, seconds=0) for id in ids]})
        many = [task(f"r{n}", "runCode", **program(f"print({n})")) for n in range(40)]
        await client.send("startTasks", {"tasks": many})
        assert (await other.run("print(1)"))["output"] == "1\n"
        updates = await ends(client, ids | {task["id"] for task in many})

        assert all(updates[id][-1]["status"] == "completed" for id in updates)
        assert all(updates[f"r{n}"][-1]["result"]["output"] == f"{n}\n" for n in range(40))


async def test_tasks_end_with_their_connection() -> None:
    async with serving() as server:
        idle = jailed()
        async with connected(server) as client:
            await client.send("startTasks", {"tasks": [task("a", "runCode", **ETERNAL)]})
            await until(lambda: jailed() > idle)
        await until(lambda: jailed() == idle)


async def test_a_session_finds_its_ended_and_its_interrupted_tasks_again() -> None:
    async with serving() as server:
        async with connected(server, "/appws?session=me") as client:
            await client.send("startTasks", {"tasks": [task("a", seconds=0), task("b", seconds=1000)]})
            for _ in range(3):
                await client.hear()
        async with connected(server, "/appws?session=me") as client, connected(server, "/appws?session=you") as other:
            found: dict[str, Any] = {}
            while found.get("b", {}).get("status") != "failed":  # the server hears of the close in its own time
                await client.send("getTasks", id="g")
                while (message := await client.hear())["action"] == "taskUpdate":
                    found[message["data"]["taskId"]] = message["data"]

            assert found["a"]["status"] == "completed"
            assert found["b"]["result"]["code"] == "INTERRUPTED"
            assert (await other.ask("getTasks", id=1))["action"] == "ack"


async def test_a_bad_session_or_room_is_told_and_closed() -> None:
    async with serving() as server:
        for query in ("session=a/b", "room=", "room=" + "x" * 65):
            async with connected(server, f"/appws?{query}") as client:
                assert (await client.hear())["details"]["code"] == "INVALID_MESSAGE"
                assert await client.close_code() == 4400


GRADED = "n = int(input())\nif n == 3: raise SystemExit(1)\nprint(n * 2)"


async def grade(client: Client, tests: list[dict[str, str]], **more: Any) -> dict[str, Any]:
    params = {"language": "python", "code": GRADED, "tests": tests, **more}
    await client.send("startTasks", {"tasks": [task("g", "gradeCode", **params)]})
    end = (await ends(client, {"g"}))["g"][-1]
    assert end["status"] == "completed", end
    result: dict[str, Any] = end["result"]
    return result


async def test_grading_tells_of_each_test_and_shows_the_difference() -> None:
    async with serving() as server, connected(server) as client:
        tests = [
            {"stdin": "2", "expected": "4"},
            {"stdin": "5", "expected": "11", "name": "five"},
            {"stdin": "3", "expected": "6"},
        ]
        result = await grade(client, tests)

        assert (result["passed"], result["total"], result["verdict"]) == (1, 3, "wrongAnswer")
        assert [test["status"] for test in result["tests"]] == ["passed", "wrongAnswer", "error"]
        assert result["tests"][1]["name"] == "five"
        assert result["tests"][1]["difference"] == 'line 1: expected "11", got "10"'
        assert all(test["executionTime"] > 0 and test["memoryUsed"] > 0 for test in result["tests"])


async def test_grading_stops_at_the_first_failure_if_asked_to() -> None:
    async with serving() as server, connected(server) as client:
        tests = [{"stdin": n, "expected": "4"} for n in ("2", "3", "2", "2")]
        result = await grade(client, tests, stopOnFirstFailure=True)

        assert [test["status"] for test in result["tests"]] == ["passed", "error", "skipped", "skipped"]
        assert (result["passed"], result["verdict"]) == (1, "error")


async def test_actions_of_ones_own_run_on_the_loop_or_in_a_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_actions.py").write_text(
        textwrap.dedent("""
            import asyncio, time
            from services.task_action import Failed, TaskAction

            async def coroutine(params, progress):
                progress(50)
                return {"got": params}

            def blocking(params, progress):
                time.sleep(params["seconds"])
                progress(50)
                return "slept"

            async def failing(params, progress):
                raise Failed("no luck", "NO_LUCK", {"tries": 3})

            async def broken(params, progress):
                return {1, 2}

            NOTHING = {"type": "object"}
            ACTIONS = [
                TaskAction("coroutine", NOTHING, coroutine), TaskAction("blocking", NOTHING, blocking),
                TaskAction("failing", NOTHING, failing), TaskAction("broken", NOTHING, broken),
            ]
        """)
    )
    monkeypatch.syspath_prepend(tmp_path)
    async with serving(task_modules=("own_actions",)) as server, connected(server) as client:
        batch = [
            task("a", "coroutine", x=1), task("b", "blocking", seconds=0.3 * SECOND), task("c", "failing"),
            task("d", "broken"),
        ]  # fmt: skip
        await client.send("startTasks", {"tasks": batch})
        updates = await ends(client, set("abcd"))

        assert updates["a"][-1]["result"] == {"got": {"x": 1}}
        assert updates["b"][-1]["result"] == "slept"
        assert updates["c"][-1]["result"] == {"tries": 3, "error": "no luck", "code": "NO_LUCK"}
        assert updates["d"][-1]["result"]["code"] == "INTERNAL"


async def test_progress_is_sent_at_most_ten_times_a_second_and_never_falls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hasty_actions.py").write_text(
        textwrap.dedent("""
            import asyncio
            from services.task_action import TaskAction

            async def hasty(params, progress):
                for n in range(100_000):
                    progress(n % 100 + n / 100_000)
                    progress(float("nan"))
                    if n % 1000 == 0:
                        await asyncio.sleep(0)
                progress(1e9)

            ACTIONS = [TaskAction("hasty", {}, hasty)]
        """)
    )
    monkeypatch.syspath_prepend(tmp_path)
    async with serving(task_modules=("hasty_actions",)) as server, connected(server) as client:
        begin = asyncio.get_running_loop().time()
        await client.send("startTasks", {"tasks": [{"id": "a", "action": "hasty"}]})
        updates = (await ends(client, {"a"}))["a"]
        took = asyncio.get_running_loop().time() - begin

        assert len(updates) <= 3 + took * 10
        assert updates[-1]["progress"] == 100
