"""What the server adds to a run: the same jail through the WebSocket and bare, side by side.

python -m bench.cold [--runs N] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from bench.bare import plain_command, same_command
from bench.client import ask, server, to
from bench.rates import rate_of_command, rate_of_server
from sandbox.languages import LANGUAGES
from sandbox.model import Job
from sandbox.nsjail import NsjailEngine

HELLO = {"python": "print('hello')", "javascript": "console.log('hello')"}
AT_ONCE = 4


async def main(runs: int, file: Path | None) -> None:
    """Measures both languages and prints a table."""
    engine = NsjailEngine()
    await engine.open()
    result: dict[str, Any] = {}
    try:
        async with server("--engine=nsjail", f"--max-runs={AT_ONCE}") as port:
            for language in LANGUAGES:
                result[language] = await _measure(engine, port, Job(language, HELLO[language]), runs)
    finally:
        await engine.close()
    _print(result)
    if file is not None:
        file.write_text(json.dumps(result, indent=2) + "\n")


async def _measure(engine: NsjailEngine, port: int, job: Job, runs: int) -> dict[str, Any]:
    bare = {"same command": same_command(engine, job, "hello\n"), "plain nsjail": plain_command(engine, job, "hello\n")}
    times: dict[str, list[float]] = {"server": [], **{name: [] for name in bare}}
    async with to(port) as connection:
        request = {"language": job.language, "code": job.code, "mode": "standalone"}
        for number in range(-3, runs):  # the first few warm the caches of the machine
            for name in times:
                begin = time.perf_counter()
                if name == "server":
                    answer = await ask(connection, "runCode", request)
                    assert answer["data"]["output"] == "hello\n", answer
                else:
                    bare[name]()
                if number >= 0:
                    times[name].append((time.perf_counter() - begin) * 1000)
    rates = [rate_of_command(run, AT_ONCE, runs) for run in bare.values()]
    rates.insert(0, await rate_of_server(port, request, "hello\n", AT_ONCE, runs))
    return {
        name: {"p50_ms": statistics.median(ms), "p99_ms": statistics.quantiles(ms, n=100)[98], "runs_per_s": rate}
        for (name, ms), rate in zip(times.items(), rates, strict=True)
    }


def _print(result: dict[str, Any]) -> None:
    print(f"{'language':<12}{'how':<16}{'p50 ms':>8}{'p99 ms':>8}{'runs/s':>8}   ({AT_ONCE} clients)")
    for language, rows in result.items():
        for name, row in rows.items():
            print(f"{language:<12}{name:<16}{row['p50_ms']:>8.1f}{row['p99_ms']:>8.1f}{row['runs_per_s']:>8.1f}")
        added = rows["server"]["p50_ms"] - rows["same command"]["p50_ms"]
        print(f"{language:<12}the server adds {added:.1f} ms at the median (at most 3 are wanted)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.cold", description=__doc__)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(sys.argv[1:])
    asyncio.run(main(options.runs, options.json))
