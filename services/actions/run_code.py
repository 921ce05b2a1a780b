"""The task action `runCode`: one run, whose result is what `output` would carry."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from protocol.errors import InvalidMessage
from protocol.schema import Schemas
from sandbox.model import Status
from services.jobs import LIVE, Terms, job_of, output_of
from services.modes import Modes
from services.task_action import Failed, Params, Report, TaskAction


def run_code_action(schemas: Schemas, modes: Modes, terms: Terms) -> TaskAction:
    """The action; params are the data of the message `runCode`."""

    def check(params: Params, at: str) -> None:
        for name in LIVE:
            if params.get(name):
                raise InvalidMessage(f"a task cannot have {name}; the message runCode can", path=f"{at}/{name}")
        job_of(params, terms, at)

    async def run_code(params: Params, progress: Report) -> dict[str, Any]:
        job = replace(job_of(params, terms), batch=True)
        outcome, queue_ms = await modes.run(params["mode"], job, progress.owner, of_task=True)
        output = output_of(outcome, queue_ms, job)
        if outcome.status is not Status.OK:
            raise Failed(output["error"], code_of(outcome.status), output)
        return output

    return TaskAction("runCode", schemas.shape("tasks/runCode.json"), run_code, check)


def code_of(status: Status) -> str:
    """A status as the code of a failed task: memoryLimit → MEMORY_LIMIT."""
    return re.sub(r"(?=[A-Z])", "_", status.value).upper()
