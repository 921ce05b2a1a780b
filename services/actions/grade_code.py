"""The task action `gradeCode`: one program, many inputs, and a verdict for each output."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from background import spawn
from protocol.schema import Schemas
from sandbox.model import Job, Outcome, Status
from services.actions.compare import COMPARISONS, difference
from services.actions.run_code import code_of
from services.jobs import Terms, job_of
from services.modes import STANDALONE, Modes
from services.task_action import Failed, Params, Report, TaskAction

DEFAULT_COMPARISON = "trim"
Test = dict[str, Any]


def grade_code_action(schemas: Schemas, modes: Modes, terms: Terms, at_once: int) -> TaskAction:
    """The action; `at_once` tests of one task run beside each other."""

    def check(params: Params, at: str) -> None:
        job_of(_program(params), terms, at)

    async def grade_code(params: Params, progress: Report) -> dict[str, Any]:
        return await _Grading(params, progress, modes, job_of(_program(params), terms), at_once).grade()

    return TaskAction("gradeCode", schemas.shape("tasks/gradeCode.json"), grade_code, check)


def _program(params: Params) -> dict[str, Any]:
    own = ("tests", "compare", "stopOnFirstFailure")
    return {"mode": STANDALONE, **{name: value for name, value in params.items() if name not in own}}


class _Grading:
    """One task of it."""

    def __init__(self, params: Params, progress: Report, modes: Modes, job: Job, at_once: int) -> None:
        self._tests: list[Test] = params["tests"]
        self._right = COMPARISONS[params.get("compare", DEFAULT_COMPARISON)]
        self._stop = params.get("stopOnFirstFailure", False)
        self._progress = progress
        self._modes = modes
        self._mode: str = params.get("mode", STANDALONE)
        self._job = replace(job, batch=True)
        self._turns = asyncio.Semaphore(at_once)
        self._results: dict[int, Test] = {}

    async def grade(self) -> dict[str, Any]:
        """The result of the task: {passed, total, verdict, tests}."""
        self._asyncio_tasks = [
            spawn(self._try(number, test), name="grade a test") for number, test in enumerate(self._tests)
        ]
        try:
            ended = await asyncio.gather(*self._asyncio_tasks, return_exceptions=True)
        finally:
            for asyncio_task in self._asyncio_tasks:
                asyncio_task.cancel()
        for failure in ended:
            if isinstance(failure, Exception):
                raise failure
        tests = self._in_order()
        wrong = [test["status"] for test in tests if test["status"] != "passed"]
        return {
            "passed": len(tests) - len(wrong),
            "total": len(tests),
            "verdict": wrong[0] if wrong else "passed",
            "tests": tests,
        }

    async def _try(self, number: int, test: Test) -> None:
        async with self._turns:
            job = replace(self._job, stdin=test.get("stdin", ""))
            outcome, _ = await self._modes.run(self._mode, job, self._progress.owner, of_task=True)
        if outcome.status is Status.INTERNAL_ERROR:
            raise Failed(f"test {number + 1}: {outcome.error}", code_of(outcome.status))
        result = self._results[number] = self._judged(number, test, outcome)
        self._progress(100 * len(self._results) / len(self._tests))
        if self._stop and result["status"] != "passed":
            for later in self._asyncio_tasks[number + 1 :]:
                later.cancel()

    def _judged(self, number: int, test: Test, outcome: Outcome) -> Test:
        usage = outcome.facts.usage
        result = {
            "name": test.get("name", f"test {number + 1}"),
            "status": outcome.status.value,
            "executionTime": round(usage.wall_ms, 3),
            "memoryUsed": usage.memory_bytes,
        }
        if outcome.status is not Status.OK:
            return {**result, "error": outcome.error}
        if self._right(test["expected"], outcome.stdout):
            return {**result, "status": "passed"}
        return {**result, "status": "wrongAnswer", "difference": difference(test["expected"], outcome.stdout)}

    def _in_order(self) -> list[Test]:
        """All tests; with stopOnFirstFailure the ones after the first failure count as skipped, run or not."""
        shown: list[Test] = []
        stopped = False
        for number, test in enumerate(self._tests):
            result = self._results.get(number)
            if stopped or result is None:
                result = {"name": test.get("name", f"test {number + 1}"), "status": "skipped"}
            stopped = stopped or (self._stop and result["status"] != "passed")
            shown.append(result)
        return shown
