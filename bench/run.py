"""Short runs, side by side: this server over its WebSocket, cold nsjail, and a cold child process without a jail.

python -m bench.run [--runs N] [--rounds N] [--engine NAME] [--json FILE]

Each round measures everything once, what is compared right after the other, so that all share whatever else the machine
does; what is printed is the median of the rounds, of ratios too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import uvloop

from bench.bare import Run, plain_command, unjailed_command
from bench.client import ask, server, to
from bench.rates import rate_of_command, rate_of_server
from sandbox.languages import LANGUAGES
from sandbox.model import Job, Language
from sandbox.nsjail import NsjailEngine

HELLO: dict[Language, str] = {"python": "print('hello')", "javascript": "console.log('hello')"}
HOWS = ("server", "cold nsjail", "cold subprocess")
CLIENTS = (1, 2, 4, 16, 64)
WARM_UP = 5
WANTED = {"python": (0.25, 4.0), "javascript": (0.25, 5.0)}
"""p50 beside cold nsjail at most, and runs per second with 4 clients at least."""

Row = dict[str, Any]


async def main(runs: int, rounds: int, engine_name: str, file: Path | None) -> None:
    """Measures both languages and prints a table."""
    engine = NsjailEngine()
    await engine.open()
    measured: dict[Language, list[dict[str, Row]]] = {language: [] for language in LANGUAGES}
    try:
        async with server(f"--engine={engine_name}") as port:
            for _ in range(rounds):
                for language in LANGUAGES:
                    measured[language].append(await _round(engine, port, Job(language, HELLO[language]), runs))
            held = _held()
    finally:
        await engine.close()
    rows = {
        language: {how: _median([one[how] for one in of_it]) for how in HOWS} for language, of_it in measured.items()
    }
    print(f"{rounds} rounds of {runs} runs, {_machine()}; the server and all its children hold {held} MiB when idle")
    _print(rows)
    for language, of_it in measured.items():
        _compare(language, of_it)
    if file is not None:
        file.write_text(json.dumps({"machine": _machine(), "held_mib": held, "languages": rows}, indent=2) + "\n")


async def _round(engine: NsjailEngine, port: int, job: Job, runs: int) -> dict[str, Row]:
    jailed, plain = plain_command(engine, job, "hello\n"), unjailed_command(engine, job, "hello\n")
    request = {"language": job.language, "code": job.code, "mode": "standalone"}
    async with to(port) as connection:

        async def over_websocket() -> None:
            answer = await ask(connection, "runCode", request)
            assert answer["data"]["output"] == "hello\n", answer

        ways: dict[str, Callable[[], Awaitable[None]]] = {
            "server": over_websocket, "cold nsjail": _awaited(jailed), "cold subprocess": _awaited(plain),
        }  # fmt: skip
        times: dict[str, list[float]] = {how: [] for how in HOWS}
        for number in range(-WARM_UP, runs):
            for how in HOWS:
                begin = time.perf_counter()
                await ways[how]()
                if number >= 0:
                    times[how].append((time.perf_counter() - begin) * 1000)
    commands = {"cold nsjail": jailed, "cold subprocess": plain}
    rows: dict[str, Row] = {
        how: {
            "p50_ms": statistics.median(times[how]),
            "p99_ms": statistics.quantiles(times[how], n=100)[98],
            "runs_per_s": {},
            "cpu_ms": 0.0,
        }
        for how in HOWS
    }
    for clients in CLIENTS:
        for how, row in rows.items():
            before = _busy_s()
            count = runs if how in commands else 4 * runs
            if how in commands:
                rate = await asyncio.to_thread(rate_of_command, commands[how], clients, count)
            else:
                rate = await rate_of_server(port, request, "hello\n", clients, count)
            row["runs_per_s"][str(clients)] = rate
            row["cpu_ms"] += (_busy_s() - before) * 1000 / count / len(CLIENTS)
    return rows


def _awaited(run: Run) -> Callable[[], Awaitable[None]]:
    async def awaited() -> None:
        run()

    return awaited


def _busy_s() -> float:
    """CPU time of the whole machine, the clients' too; what sandboxes use counts as nice."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system)


def _held() -> int:
    """Memory of the server and all that it keeps ready, in MiB; shared pages count once."""
    tree = [child for one in psutil.Process().children() for child in (one, *one.children(recursive=True))]
    total = 0
    for process in tree:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:  # it has just ended
            continue
    return total >> 20


def _median(rows: list[Row]) -> Row:
    middle: Row = {name: statistics.median(row[name] for row in rows) for name in ("p50_ms", "p99_ms", "cpu_ms")}
    rates = {
        clients: statistics.median(row["runs_per_s"][clients] for row in rows) for clients in rows[0]["runs_per_s"]
    }
    return {**middle, "runs_per_s": rates}


def _machine() -> str:
    return f"{os.cpu_count()} processors, Linux {platform.release()}, {time.strftime('%Y-%m-%d')}"


def _print(result: dict[Language, dict[str, Row]]) -> None:
    heads = "".join(f"{f'{clients}':>8}" for clients in CLIENTS)
    print(f"{'language':<12}{'how':<17}{'p50 ms':>8}{'p99 ms':>8}{'CPU ms':>8}   runs/s with so many clients:{heads}")
    for language, rows in result.items():
        for how, row in rows.items():
            rates = "".join(f"{rate:>8.0f}" for rate in row["runs_per_s"].values())
            figures = f"{row['p50_ms']:>8.2f}{row['p99_ms']:>8.2f}{row['cpu_ms']:>8.2f}"
            print(f"{language:<12}{how:<17}{figures}   {'':<28}{rates}")


def _compare(language: Language, rounds: list[dict[str, Row]]) -> None:
    slowness = statistics.median(one["server"]["p50_ms"] / one["cold nsjail"]["p50_ms"] for one in rounds)
    speed = statistics.median(
        one["server"]["runs_per_s"]["4"] / one["cold nsjail"]["runs_per_s"]["4"] for one in rounds
    )
    crowded = statistics.median(one["server"]["runs_per_s"]["64"] / one["server"]["runs_per_s"]["4"] for one in rounds)
    most, least = WANTED[language]
    print(
        f"{language}: p50 {slowness:.2f} x cold nsjail (at most {most} is wanted), runs/s at 4 clients"
        f" {speed:.1f} x (at least {least}), from 4 to 64 clients {crowded:.2f} x (at least 0.9)"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    uvloop.run(main(options.runs, options.rounds, options.engine, options.json))
