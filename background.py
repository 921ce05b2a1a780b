"""The only place that creates asyncio Tasks: each one is named, kept until it ends, and heard when it fails."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

log = logging.getLogger(__name__)
Result = TypeVar("Result")

# asyncio itself holds only weak references to its Tasks: one that nobody keeps may vanish half-way.
_running: set[asyncio.Task[Any]] = set()


def spawn(work: Coroutine[Any, Any, Result], *, name: str) -> asyncio.Task[Result]:
    """Starts `work` beside the caller and returns its asyncio Task.

    A failure that nobody awaits is logged with its traceback under `name`.
    """
    task = asyncio.get_running_loop().create_task(work, name=name)
    _running.add(task)
    task.add_done_callback(_ended)
    return task


def _ended(task: asyncio.Task[Any]) -> None:
    _running.discard(task)
    if not task.cancelled() and (failure := task.exception()) is not None:
        log.error("%s failed", task.get_name(), exc_info=failure)
