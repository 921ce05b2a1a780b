"""A client's tasks: each begins once, makes progress that never falls, and ends once.

queued ──► running ──► completed
   │          └──────► failed
   └─► running ──────► failed      (cancelled before its turn)
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from background import spawn
from protocol.errors import Conflict, InvalidMessage, Overloaded, Refusal
from protocol.message import clip, has_surrogate, nearest
from services.store import Store, StoreUnavailable
from services.task_action import Failed, TaskAction

log = logging.getLogger(__name__)
Update = dict[str, Any]
"""The data of a taskUpdate."""

NEXT: Final = {None: ("running",), "running": ("running", "completed", "failed"), "completed": (), "failed": ()}
"""What may follow each status of a task."""
PROGRESS_SECONDS = 0.1
"""Between two reports of one task's progress."""
KEPT = 1000
"""Ended tasks of a connection whose last update is kept, and how much of it."""
KEPT_BYTES = 8 << 20


class Listener(Protocol):
    """Who hears of tasks: a client's connection."""

    async def deliver_update(self, update: Update, id: str | int | None) -> None:
        """Sends an update that must arrive; waits until there is room for it."""

    def report_update(self, update: Update, id: str | int | None) -> None:
        """Sends an update that a later one of the same task may replace."""


@dataclass(frozen=True, slots=True)
class Tasks:
    """What all connections share: the actions, the store of sessions, and how many tasks each may have at work."""

    actions: Mapping[str, TaskAction]
    store: Store
    at_once: int

    def of(self, owner: Hashable, session: str | None, listener: Listener) -> ClientTasks:
        """The tasks of one connection."""
        return ClientTasks(self, owner, session, listener)


class ClientTasks:
    """The tasks of one connection. They end with it."""

    def __init__(self, tasks: Tasks, owner: Hashable, session: str | None, listener: Listener) -> None:
        self._actions = tasks.actions
        self._store = tasks.store
        self._turns = asyncio.Semaphore(tasks.at_once)
        self._owner = owner
        self._session = session
        self._listener = listener
        self._live: dict[str, _Task] = {}
        self._ended: dict[str, tuple[Update, int]] = {}
        self._ended_bytes = 0

    async def start(self, batch: list[Mapping[str, Any]], id: str | int | None) -> list[Conflict]:
        """Starts a checked batch; gives a refusal for each task whose id is that of a live one.

        Raises:
            InvalidMessage: one task of it is bad, and none was started.
            Overloaded: the store of its session does not answer, and none was started.
        """
        self._check(batch)
        conflicts, begun = [], []
        for place, asked in enumerate(batch):
            if asked["id"] in self._live:
                conflicts.append(
                    Conflict(f"the task {clip(asked['id'])} is under way already", path=f"/data/tasks/{place}/id")
                )
            else:
                task = _Task(asked["id"], self._actions[asked["action"]], asked.get("params", {}), id)
                self._live[task.id] = task
                self._ended_bytes -= self._ended.pop(task.id, ({}, 0))[1]
                begun.append(task)
        try:
            await self._save([task.update for task in begun])
        except StoreUnavailable as failure:
            for task in begun:
                self._live.pop(task.id, None)
            log.warning("tasks cannot be kept for their session: %s", failure)
            raise Overloaded("the tasks of this session cannot be kept at the moment; none was started") from failure
        for task in begun:
            if task.id in self._live:  # else the client left while its tasks were saved
                task.asyncio_task = spawn(self._see_through(task), name=f"task {task.action.name}")
        return conflicts

    def cancel(self, ids: list[str]) -> None:
        """Ends tasks, queued or running; one that has ended stays as it is."""
        for id in ids:
            if (task := self._live.get(id)) is not None:
                task.cancel()

    async def updates(self) -> list[Update]:
        """The last update of each task of this connection, and of its session's earlier ones."""
        found: dict[str, Update] = {}
        if self._session is not None:
            alive: dict[str, bool] = {}
            for record in await self._store.tasks(self._session):
                owner, update = record.owner, record.update
                if update["status"] == "running" and owner not in alive:
                    alive[owner] = await self._store.is_alive(owner)
                lost = update["status"] == "running" and not alive[owner]
                found[update["taskId"]] = interrupted(update) if lost else update
        found |= {id: update for id, (update, _) in self._ended.items()}
        found |= {task.id: task.update for task in self._live.values()}
        return list(found.values())

    async def leave(self) -> None:
        """The connection is gone: ends its tasks. Whoever comes with the same session finds them interrupted."""
        left = list(self._live.values())
        self._live.clear()
        for task in left:
            task.leave()
        with contextlib.suppress(StoreUnavailable):
            await self._save([interrupted(task.update) for task in left])

    def _check(self, batch: list[Mapping[str, Any]]) -> None:
        seen: set[str] = set()
        for place, asked in enumerate(batch):
            at = f"/data/tasks/{place}"
            if asked["id"] in seen:
                raise InvalidMessage(f"the task {clip(asked['id'])} is twice in the batch", path=f"{at}/id")
            if has_surrogate(asked["id"]):
                raise InvalidMessage("the id of a task has half a character in it", path=f"{at}/id")
            seen.add(asked["id"])
            action = self._actions.get(asked["action"])
            if action is None:
                name, known = clip(asked["action"]), ", ".join(self._actions)
                hint = nearest(asked["action"], self._actions)
                raise InvalidMessage(f"there is no task action {name}{hint}", path=f"{at}/action", expected=known)
            action.check(asked.get("params", {}), f"{at}/params")

    async def _see_through(self, task: _Task) -> None:
        """One task, from its turn to its end."""
        update: Update
        try:
            async with self._turns:
                await self._begin(task)
                update = await task.perform(self._owner, self._listener)
        except asyncio.CancelledError:
            if task.left:
                raise
            await self._begin(task)
            update = task.failed("the task was cancelled", "CANCELLED")
        if task.left:
            return
        try:
            await self._save([update])
        except StoreUnavailable as failure:
            log.warning("the end of a task is not kept for its session: %s", failure)
        if not task.left:
            task.become(update)
            del self._live[task.id]
            self._keep(update)
            await self._listener.deliver_update(update, task.request_id)

    async def _begin(self, task: _Task) -> None:
        if not task.begun:
            task.begun = True
            await self._listener.deliver_update(task.update, task.request_id)

    async def _save(self, updates: list[Update]) -> None:
        if self._session is not None and updates:
            await self._store.save_tasks(self._session, updates)

    def _keep(self, update: Update) -> None:
        size = len(json.dumps(update))
        self._ended[update["taskId"]] = update, size
        self._ended_bytes += size
        while len(self._ended) > KEPT or (self._ended_bytes > KEPT_BYTES and len(self._ended) > 1):
            oldest = next(iter(self._ended))
            self._ended_bytes -= self._ended.pop(oldest)[1]


class _Task:
    """One task and its last update."""

    def __init__(self, id: str, action: TaskAction, params: Mapping[str, Any], request_id: str | int | None) -> None:
        self.id = id
        self.action = action
        self.request_id = request_id
        self.begun = False
        self.left = False
        self.asyncio_task: asyncio.Task[None] | None = None
        self.update: Update = {}
        self._params = params
        self._cancelled = False
        self.become({"taskId": id, "status": "running", "progress": 0})

    def become(self, update: Update) -> None:
        """The one way from a status to the next."""
        now, then = self.update.get("status"), update["status"]
        if then not in NEXT[now]:
            raise RuntimeError(f"a task that is {now} cannot be {then}")
        self.update = update

    def cancel(self) -> None:
        """Ends it, once."""
        if not self._cancelled and self.asyncio_task is not None:
            self._cancelled = True
            self.asyncio_task.cancel()

    def leave(self) -> None:
        """Ends it without a word."""
        self.left = True
        if self.asyncio_task is not None:
            self.asyncio_task.cancel()

    async def perform(self, owner: Hashable, listener: Listener) -> Update:
        """Does what the action says; gives the update of its end."""
        progress = Progress(self, owner, listener)
        try:
            result = await self.action.run(self._params, progress)
            json.dumps(result, allow_nan=False)
        except Failed as failure:
            return self.failed(str(failure), failure.code, failure.result)
        except Refusal as refusal:
            return self.failed(refusal.sentence, refusal.code)
        except Exception:
            log.exception("the task action %s failed", self.action.name)
            return self.failed("the task action failed; the server's log has more", "INTERNAL")
        finally:
            progress.end()
        return {"taskId": self.id, "status": "completed", "progress": 100, "result": result}

    def failed(self, error: str, code: str, result: Mapping[str, Any] | None = None) -> Update:
        """The update of a failure, with all that the action has to say of it."""
        return {**self.update, "status": "failed", "result": {**(result or {}), "error": error, "code": code}}


class Progress:
    """What an action calls with a percentage. What does not rise, or comes too late, is left out."""

    def __init__(self, task: _Task, owner: Hashable, listener: Listener) -> None:
        self.owner = owner
        self._task = task
        self._listener = listener
        self._next_at = time.monotonic() + PROGRESS_SECONDS
        self._timer: asyncio.TimerHandle | None = None
        self._over = False

    def __call__(self, percent: float) -> None:
        """Reports, 0 to 100, at most ten times a second; the latest wins."""
        percent = round(min(100.0, float(percent)), 2)
        if self._over or not percent > self._task.update["progress"]:
            return
        shown = int(percent) if percent.is_integer() else percent
        self._task.become({**self._task.update, "progress": shown})
        if self._timer is None:
            wait = max(0.0, self._next_at - time.monotonic())
            self._timer = asyncio.get_running_loop().call_later(wait, self._send)

    def end(self) -> None:
        """From here on, nothing is reported."""
        self._over = True
        if self._timer is not None:
            self._timer.cancel()

    def _send(self) -> None:
        self._timer = None
        self._next_at = time.monotonic() + PROGRESS_SECONDS
        self._listener.report_update(self._task.update, self._task.request_id)


def interrupted(update: Update) -> Update:
    """What became of a task whose connection or server is gone."""
    return {
        **update,
        "status": "failed",
        "result": {"error": "the task ended with its connection, or with the server", "code": "INTERRUPTED"},
    }
