"""The store of a single server process: boards in memory, every change in a SQLite file before it is acknowledged."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import queue
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from services.board import Board, Standing
from services.store import (
    KEPT_SECONDS,
    REPEAT_SECONDS,
    Changed,
    Player,
    Request,
    Row,
    StoreUnavailable,
    TaskRecord,
    used_otherwise,
)

FILE = "runboard.sqlite3"
MIGRATIONS = (
    """
    CREATE TABLE rooms (room TEXT PRIMARY KEY, fixed INTEGER NOT NULL) WITHOUT ROWID;
    -- A score is text, because millionths of 2^53 points are more than an INTEGER of SQLite holds.
    CREATE TABLE players (
        room TEXT, id INTEGER, name TEXT NOT NULL, score TEXT NOT NULL, reached INTEGER NOT NULL,
        joined INTEGER NOT NULL, PRIMARY KEY (room, id)
    ) WITHOUT ROWID;
    CREATE TABLE requests (
        room TEXT, id TEXT, what TEXT NOT NULL, at REAL NOT NULL, PRIMARY KEY (room, id)
    ) WITHOUT ROWID;
    CREATE INDEX requests_by_age ON requests (at);
    CREATE TABLE tasks (
        session TEXT, id TEXT, data TEXT NOT NULL, owner TEXT NOT NULL, at REAL NOT NULL,
        UNIQUE (session, id)
    );
    CREATE INDEX tasks_by_age ON tasks (at);
    """,
)
"""The n-th brings a file of `user_version` n to n + 1."""
MOST_BOARDS = 1000
"""Boards in memory; what has not been used for longest is read again when it is."""
TIDY_SECONDS = 30.0

Result = TypeVar("Result")


@dataclass(eq=False, slots=True)
class _Game:
    """A room in memory. `broken`: a write failed, so memory is ahead of the file and nothing of it may be written."""

    board: Board
    recent: dict[str, _Recent]
    broken: bool = False


@dataclass(eq=False, slots=True)
class _Recent:
    """A request of the last two minutes; `done` until it is durable."""

    what: str
    at: float
    done: asyncio.Future[None] | None = None


@dataclass(eq=False, slots=True)
class _Order:
    """One thing for the writer: done inside its transaction, answered after it."""

    work: Callable[[sqlite3.Connection], Any]
    answer: asyncio.Future[Any]
    game: _Game | None = None
    result: Any = None
    failure: Exception | None = None


class SqliteStore:
    """One thread has the file. It takes all that waits into one transaction, so that many updates cost one fsync."""

    def __init__(self, folder: Path, max_players: int) -> None:
        self._folder = folder
        self._max_players = max_players
        self._orders: queue.SimpleQueue[_Order | None] = queue.SimpleQueue()
        self._games: dict[str, _Game] = {}
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # of rooms that are being read
        self._lock: int | None = None
        self.instance = uuid.uuid4().hex

    async def open(self, changed: Changed) -> None:
        """Opens or makes the file.

        Raises:
            StoreUnavailable: the folder cannot be written, is another server's, or has a newer file.
        """
        self._changed = changed
        self._loop = asyncio.get_running_loop()
        self._lock = _locked(self._folder)
        try:
            db = _connect(self._folder / FILE)
        except (sqlite3.Error, StoreUnavailable) as failure:
            self._unlock()
            raise StoreUnavailable(f"{self._folder / FILE}: {failure}") from failure
        self._thread = threading.Thread(target=self._write, args=(db,), name="sqlite")
        self._thread.start()

    async def close(self) -> None:
        """Writes what waits, and closes the file."""
        self._orders.put(None)
        await self._loop.run_in_executor(None, self._thread.join)
        self._unlock()

    async def start_game(self, room: str, roster: Sequence[Player] | None, request: Request | None) -> None:
        """As the Store promises."""
        game = await self._game(room)
        if await self._is_repeat(game, request):
            return
        standings = game.board.start(roster)
        rows = [_row(room, standing) for standing in standings]
        fixed = game.board.fixed

        def write(db: sqlite3.Connection) -> None:
            db.execute("REPLACE INTO rooms VALUES (?, ?)", (room, fixed))
            db.execute("DELETE FROM players WHERE room = ?", (room,))
            db.executemany("INSERT INTO players VALUES (?, ?, ?, ?, ?, ?)", rows)

        await self._change(room, game, write, request)

    async def add(self, room: str, player: int, micros: int, request: Request | None) -> None:
        """As the Store promises."""
        game = await self._game(room)
        if await self._is_repeat(game, request):
            return
        row = _row(room, game.board.add(player, micros, self._max_players))

        def write(db: sqlite3.Connection) -> None:
            db.execute("REPLACE INTO players VALUES (?, ?, ?, ?, ?, ?)", row)

        await self._change(room, game, write, request)

    async def board(self, room: str, limit: int, around: int | None = None) -> list[Row]:
        """As the Store promises."""
        return (await self._game(room)).board.rows(limit, around)

    async def save_tasks(self, session: str, updates: Sequence[dict[str, Any]]) -> None:
        """As the Store promises."""
        now = time.time()
        rows = [(session, update["taskId"], json.dumps(update), self.instance, now) for update in updates]

        def write(db: sqlite3.Connection) -> None:
            db.executemany(
                "INSERT INTO tasks VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE"
                " SET data = excluded.data, owner = excluded.owner, at = excluded.at",
                rows,
            )

        await self._order(write)

    async def tasks(self, session: str) -> list[TaskRecord]:
        """As the Store promises."""
        rows = await self._order(
            lambda db: db.execute(
                "SELECT data, owner FROM tasks WHERE session = ? ORDER BY rowid", (session,)
            ).fetchall()
        )
        return [TaskRecord(json.loads(data), owner) for data, owner in rows]

    async def is_alive(self, owner: str) -> bool:
        """The folder is locked, so every other owner is gone."""
        return owner == self.instance

    # Rooms in memory

    async def _game(self, room: str) -> _Game:
        """The room, read when it is needed first. Who asks first gets it first: changes are made in that order."""
        if room in self._turns or not self._has(room):
            turn = self._turns.setdefault(room, asyncio.Lock())
            async with turn:
                if not self._has(room):
                    await self._load(room)
        game = self._games[room] = self._games.pop(room)  # the last used is the last to be forgotten
        return game

    def _has(self, room: str) -> bool:
        game = self._games.get(room)
        return game is not None and not game.broken

    async def _load(self, room: str) -> None:
        self._games.pop(room, None)
        game: _Game = await self._order(lambda db: _read_game(db, room))
        while len(self._games) >= MOST_BOARDS:  # its writes that still wait come before it is read again
            del self._games[next(iter(self._games))]
        self._games[room] = game

    async def _is_repeat(self, game: _Game, request: Request | None) -> bool:
        """Whether the request is known; then it is durable, too, when this returns."""
        if request is None or (seen := game.recent.get(request.id)) is None:
            return False
        if time.time() - seen.at > REPEAT_SECONDS:
            del game.recent[request.id]
            return False
        if seen.what != request.what:
            raise used_otherwise(request)
        if seen.done is not None:
            await asyncio.shield(seen.done)
        return True

    async def _change(
        self, room: str, game: _Game, write: Callable[[sqlite3.Connection], None], request: Request | None
    ) -> None:
        """Has a change, which memory has already, written together with its request."""
        done = self._loop.create_future()
        now = time.time()
        order = _Order(write, done, game)
        seen = None
        if request is not None:
            _forget_old(game.recent, now)
            seen = game.recent[request.id] = _Recent(request.what, now, done)

            def write_both(db: sqlite3.Connection) -> None:
                write(db)
                db.execute("REPLACE INTO requests VALUES (?, ?, ?, ?)", (room, request.id, request.what, now))

            order.work = write_both
        self._orders.put(order)
        done.add_done_callback(lambda written: self._written(room, written, seen))
        await asyncio.shield(done)  # whoever asked may be gone before it is written; it is written all the same

    def _written(self, room: str, written: asyncio.Future[None], seen: _Recent | None) -> None:
        if seen is not None:
            seen.done = None
        if written.exception() is None:
            self._changed(room)

    # The writer

    async def _order(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        answer: asyncio.Future[Result] = self._loop.create_future()
        self._orders.put(_Order(work, answer))
        return await answer

    def _write(self, db: sqlite3.Connection) -> None:
        """The thread: batch after batch, until a None comes."""
        tidied = time.monotonic()
        closing = False
        while not closing:
            batch = []
            order = self._orders.get()
            while order is not None:
                batch.append(order)
                try:
                    order = self._orders.get_nowait()
                except queue.Empty:
                    break
            closing = order is None
            _commit(db, batch)
            self._loop.call_soon_threadsafe(_answer, batch)
            if time.monotonic() - tidied > TIDY_SECONDS:
                tidied = time.monotonic()
                _tidy(db)
        db.close()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _commit(db: sqlite3.Connection, batch: list[_Order]) -> None:
    """One transaction. If it fails, nothing of it is in the file, and every order of it fails."""
    try:
        db.execute("BEGIN IMMEDIATE")
        for order in batch:
            if order.game is not None and order.game.broken:
                order.failure = StoreUnavailable("an earlier change of this room could not be written")
            else:
                order.result = order.work(db)
        db.execute("COMMIT")
    except (sqlite3.Error, ValueError) as failure:
        if db.in_transaction:
            db.execute("ROLLBACK")
        for order in batch:
            order.failure = StoreUnavailable(f"the file of scores cannot be written: {failure}")
            if order.game is not None:
                order.game.broken = True


def _answer(batch: list[_Order]) -> None:
    for order in batch:
        if order.answer.done():
            continue
        if order.failure is None:
            order.answer.set_result(order.result)
        else:
            order.answer.set_exception(order.failure)
            order.answer.exception()  # whoever asked may be gone; then nobody else looks


def _tidy(db: sqlite3.Connection) -> None:
    try:
        with db:
            db.execute("DELETE FROM requests WHERE at < ?", (time.time() - REPEAT_SECONDS,))
            db.execute("DELETE FROM tasks WHERE at < ?", (time.time() - KEPT_SECONDS,))
    except sqlite3.Error:
        pass  # a full disk is told to whoever writes next; tidying comes again


def _locked(folder: Path) -> int:
    """A descriptor that keeps other servers out of the folder for as long as it is open."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as failure:
        raise StoreUnavailable(f"{folder} cannot be used: {failure.strerror} (--data-dir)") from failure
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as failure:
        os.close(descriptor)
        raise StoreUnavailable(
            f"{folder} is in use by another server; give this one its own --data-dir, or share a --store redis://…"
        ) from failure
    return descriptor


def _connect(file: Path) -> sqlite3.Connection:
    db = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
    try:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        version: int = db.execute("PRAGMA user_version").fetchone()[0]
        if version > len(MIGRATIONS):
            raise StoreUnavailable(f"made by a newer Runboard (version {version}, this one knows {len(MIGRATIONS)})")
        for number, script in enumerate(MIGRATIONS[version:], version + 1):
            db.executescript(f"BEGIN; {script} PRAGMA user_version = {number}; COMMIT;")
    except BaseException:
        db.close()
        raise
    return db


def _read_game(db: sqlite3.Connection, room: str) -> _Game:
    found = db.execute("SELECT fixed FROM rooms WHERE room = ?", (room,)).fetchone()
    rows = db.execute("SELECT id, name, score, reached, joined FROM players WHERE room = ?", (room,))
    standings = [Standing(id, name, int(score), reached, joined) for id, name, score, reached, joined in rows]
    since = time.time() - REPEAT_SECONDS
    requests = db.execute("SELECT id, what, at FROM requests WHERE room = ? AND at > ? ORDER BY at", (room, since))
    recent = {id: _Recent(what, at) for id, what, at in requests}
    return _Game(Board(standings, started=found is not None, fixed=bool(found and found[0])), recent)


def _forget_old(recent: dict[str, _Recent], now: float) -> None:
    while recent and now - recent[oldest := next(iter(recent))].at > REPEAT_SECONDS:
        del recent[oldest]


def _row(room: str, standing: Standing) -> tuple[str, int, str, str, int, int]:
    return room, standing.id, standing.name, str(standing.score), standing.reached, standing.joined
