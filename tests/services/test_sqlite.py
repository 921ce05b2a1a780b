"""What only the SQLite store promises: one server for a folder, old files are read, a full disk loses nothing."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from services import store_sqlite
from services.store import Request, Store, StoreUnavailable
from services.store_sqlite import FILE, SqliteStore


async def opened(folder: Path) -> SqliteStore:
    store = SqliteStore(folder, 100)
    await store.open(lambda room: None)
    return store


def test_games_and_requests_survive_a_restart(tmp_path: Path) -> None:
    async def main() -> None:
        store: Store = await opened(tmp_path)
        await store.start_game("r", None, None)
        await store.add("r", 2, 5, Request("1", "x"))
        await store.add("r", 1, 5, None)
        await store.close()
        store = await opened(tmp_path)
        await store.add("r", 2, 5, Request("1", "x"))
        await store.add("r", 3, 5, None)

        assert [(row.id, row.score) for row in await store.board("r", 9)] == [(2, 5), (1, 5), (3, 5)]
        await store.close()

    asyncio.run(main())


def test_a_folder_serves_one_server(tmp_path: Path) -> None:
    async def main() -> None:
        store = await opened(tmp_path)
        with pytest.raises(StoreUnavailable, match="in use by another server"):
            await opened(tmp_path)
        await store.close()
        await (await opened(tmp_path)).close()

    asyncio.run(main())


def test_a_file_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / FILE) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()

    with pytest.raises(StoreUnavailable, match="newer Runboard"):
        asyncio.run(opened(tmp_path))


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("not a database" * 100)

    with pytest.raises(StoreUnavailable, match=FILE):
        asyncio.run(opened(tmp_path))


def test_what_cannot_be_written_is_refused_and_forgotten(tmp_path: Path) -> None:
    async def main() -> None:
        store = await opened(tmp_path)
        await store.start_game("r", None, None)
        await store.add("r", 1, 5, None)
        other = sqlite3.connect(tmp_path / FILE)
        other.execute("CREATE TRIGGER full BEFORE INSERT ON players BEGIN SELECT RAISE(ABORT, 'disk full'); END")
        other.commit()
        failed = await asyncio.gather(
            *(store.add("r", n, 1, Request(str(n), "x")) for n in (1, 2, 3)), return_exceptions=True
        )
        other.execute("DROP TRIGGER full")
        other.commit()
        other.close()

        assert all(isinstance(failure, StoreUnavailable) and "disk full" in str(failure) for failure in failed)
        assert [(row.id, row.score) for row in await store.board("r", 9)] == [(1, 5)]
        await store.add("r", 1, 1, Request("1", "x"))
        assert [(row.id, row.score) for row in await store.board("r", 9)] == [(1, 6)]
        await store.close()

    asyncio.run(main())


def test_forgotten_boards_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_sqlite, "MOST_BOARDS", 3)

    async def main() -> None:
        store = await opened(tmp_path)
        for n in range(10):
            await store.start_game(f"r{n}", None, None)
        await asyncio.gather(*(store.add(f"r{n % 10}", 1, 1, None) for n in range(200)))

        assert [(await store.board(f"r{n}", 1))[0].score for n in range(10)] == [20] * 10
        assert len(store._games) <= 3
        await store.close()

    asyncio.run(main())


KILLED = """
import asyncio, sys
from pathlib import Path
from services.store import Request
from services.store_sqlite import SqliteStore

async def update(store, n):
    await store.add("r", n % 5, 1, Request(str(n), "x"))
    print(n, flush=True)

async def main():
    store = SqliteStore(Path(sys.argv[1]), 100)
    await store.open(lambda room: None)
    await store.start_game("r", None, None)
    for first in range(0, 100_000, 50):
        await asyncio.gather(*(update(store, n) for n in range(first, first + 50)))

asyncio.run(main())
"""


def test_what_was_acknowledged_is_there_once_after_kill_9(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2], text=True
    )
    assert process.stdout is not None
    acknowledged = [int(process.stdout.readline()) for _ in range(1000)]
    process.kill()
    acknowledged += [int(line) for line in process.stdout.read().splitlines()]
    process.wait()
    process.stdout.close()

    async def main() -> None:
        store = await opened(tmp_path)
        before = sum(row.score for row in await store.board("r", 9))
        assert before >= len(acknowledged)
        sent = max(acknowledged) + 51
        for n in range(sent):  # a client that does not know what became of them sends all again
            await store.add("r", n % 5, 1, Request(str(n), "x"))
        assert sum(row.score for row in await store.board("r", 9)) == sent
        await store.close()

    asyncio.run(main())
