"""What a task action is: a name, the schema of its params, and a function."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import inspect
import threading
from collections.abc import Awaitable, Callable, Hashable, Iterable, Mapping
from typing import Any, Protocol

from protocol.schema import Shape

Params = Mapping[str, Any]


class Report(Protocol):
    """What a function is given to say how far it is."""

    owner: Hashable
    """The connection that the task is for: whose turn its runs take in the queue."""

    def __call__(self, percent: float) -> None:
        """0 to 100."""


class Failed(Exception):
    """A task that did not reach its aim. Its text is for people, `code` and `result` are for programs."""

    def __init__(self, sentence: str, code: str = "FAILED", result: Mapping[str, Any] | None = None) -> None:
        super().__init__(sentence)
        self.code = code
        self.result = result


class BadTaskModule(Exception):
    """A module of --task-modules has no usable actions; the text says why."""


class TaskAction:
    """`function(params, progress)` gives the task's result, which must be JSON, or raises Failed.

    A coroutine function runs on the server's loop and must not block it. A plain function runs in a thread of its
    own; when its task is cancelled, its next call of `progress` raises.
    """

    def __init__(
        self,
        name: str,
        params: Mapping[str, Any] | Shape,
        function: Callable[[Params, Report], Any],
        check: Callable[[Params, str], None] | None = None,
    ) -> None:
        self.name = name
        self._shape = params if isinstance(params, Shape) else Shape(params)
        self._function = function
        self._check = check

    def check(self, params: Params, at: str) -> None:
        """Returns when the params are good. `at` is their JSON Pointer.

        Raises:
            InvalidMessage: they are not.
        """
        self._shape.check(params, at)
        if self._check is not None:
            self._check(params, at)

    async def run(self, params: Params, progress: Report) -> Any:
        """The function's result."""
        if inspect.iscoroutinefunction(self._function):
            awaitable: Awaitable[Any] = self._function(params, progress)
            return await awaitable
        return await _in_thread(self._function, params, progress)


async def _in_thread(function: Callable[[Params, Report], Any], params: Params, progress: Report) -> Any:
    """A thread of its own, because one from a pool that never ends would be missing there for ever."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[Any] = loop.create_future()
    relay = _Relay(progress, loop)

    def settle(value: Any, failure: BaseException | None) -> None:
        if not result.done():
            if failure is None:
                result.set_result(value)
            else:
                result.set_exception(failure)

    def main() -> None:
        outcome: tuple[Any, BaseException | None]
        try:
            outcome = function(params, relay), None
        except BaseException as failure:
            outcome = None, failure
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server is gone
            loop.call_soon_threadsafe(settle, *outcome)

    threading.Thread(target=main, daemon=True, name="task").start()
    try:
        return await result
    finally:
        relay.cancelled = True


class _Relay:
    """A thread's way to the progress, which lives on the loop."""

    def __init__(self, progress: Report, loop: asyncio.AbstractEventLoop) -> None:
        self.owner = progress.owner
        self.cancelled = False
        self._progress = progress
        self._loop = loop

    def __call__(self, percent: float) -> None:
        if self.cancelled:
            raise Failed("the task was cancelled", "CANCELLED")
        self._loop.call_soon_threadsafe(self._progress, percent)


def load_actions(modules: Iterable[str]) -> list[TaskAction]:
    """The `ACTIONS` of each of these Python modules.

    Raises:
        BadTaskModule: one cannot be imported, or has no such list.
    """
    found: list[TaskAction] = []
    for name in modules:
        try:
            actions = importlib.import_module(name).ACTIONS
        except AttributeError:
            raise BadTaskModule(f"the module {name} has no list ACTIONS (--task-modules)") from None
        except Exception as failure:
            raise BadTaskModule(
                f"the module {name} cannot be imported: {type(failure).__name__}: {failure} (--task-modules)"
            ) from failure
        if not all(isinstance(action, TaskAction) for action in actions):
            raise BadTaskModule(f"ACTIONS of the module {name} must hold TaskAction objects only (--task-modules)")
        found += actions
    return found
