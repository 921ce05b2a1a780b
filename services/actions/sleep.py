"""The task action `sleep`: waits and reports how far it is. For trying out a progress bar."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from protocol.schema import Schemas
from services.task_action import Params, Report, TaskAction

STEP_SECONDS = 0.1


def sleep_action(schemas: Schemas) -> TaskAction:
    """The action; params are {seconds}."""
    return TaskAction("sleep", schemas.shape("tasks/sleep.json"), _sleep)


async def _sleep(params: Params, progress: Report) -> dict[str, Any]:
    seconds = params["seconds"]
    begin = time.monotonic()
    while (passed := time.monotonic() - begin) < seconds:
        progress(100 * passed / seconds)
        await asyncio.sleep(min(STEP_SECONDS, seconds - passed))
    return {"seconds": seconds}
