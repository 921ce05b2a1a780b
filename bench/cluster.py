"""Mode cluster beside standalone: latency, runs per second, how tasks spread, a worker killed, and what it all costs.

python -m bench.cluster [--runs N] [--tasks N]

The cluster is the embedded one: scheduler in the server's process, workers as its children, TLS between them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import signal
import statistics
import time
from collections import Counter
from typing import Any

import psutil
from websockets.asyncio.client import ClientConnection

from bench.client import ask, server, to
from bench.rates import rate_of_server

HELLO = {"language": "python", "code": "print('hello')"}
MODES = ("standalone", "cluster")
CLIENTS = 4
SLOTS = 2
WARM_UP = 10
ROUNDS = 3
PAUSE_S = 0.2
"""After such a pause, a run in the cluster needs a new lease."""
KILL_RUNS = 200
WANTED_MS = 15.0
"""What the cluster may add to a run at the median."""


async def main(runs: int, tasks: int) -> None:
    """Prints a line for each measurement."""
    print(
        f"{os.cpu_count()} processors, Linux {platform.release()}, {time.strftime('%Y-%m-%d')}; {SLOTS} runs a worker"
    )
    slots = f"--cluster-runs-per-worker={SLOTS}"
    async with server("--cluster-workers=2", slots) as port:
        process = _server_process()
        async with to(port) as connection:
            await _run(connection, "standalone")
            await _cost(connection, process)
            await _latency(connection, runs, 0.0)
            await _latency(connection, runs // 2, PAUSE_S)
            await _spread(connection, tasks)
            async with server("--cluster-workers=1", slots) as other, to(other) as warm:
                await _run(warm, "cluster")
                ways = {"standalone": (port, "standalone"), "1 worker": (other, "cluster")}
                await _rates(runs, {**ways, "2 workers": (port, "cluster")})
            await _kill(connection, process)


async def _run(connection: ClientConnection, mode: str) -> dict[str, Any]:
    answer = await ask(connection, "runCode", {**HELLO, "mode": mode})
    assert answer["data"]["output"] == "hello\n", answer
    data: dict[str, Any] = answer["data"]
    return data


async def _cost(connection: ClientConnection, process: psutil.Process) -> None:
    """The start of the embedded cluster, and what server and workers hold more afterwards."""
    before, begin = _held(process), time.perf_counter()
    await _run(connection, "cluster")
    first_s = time.perf_counter() - begin
    await asyncio.sleep(1)
    after, workers = _held(process), [_held(worker) for worker in _workers(process)]
    print(f"the first run starts the embedded cluster and is answered after {first_s:.1f} s")
    print(
        f"memory when idle: server {before} MiB without it, {after} MiB with its scheduler;"
        f" workers {' and '.join(map(str, workers))} MiB, with what they keep warm {_below(process)} MiB in all"
    )


async def _latency(connection: ClientConnection, runs: int, pause_s: float) -> None:
    times: dict[str, list[float]] = {mode: [] for mode in MODES}
    for number in range(-WARM_UP, runs):
        for mode in MODES:
            await asyncio.sleep(pause_s)
            begin = time.perf_counter()
            await _run(connection, mode)
            if number >= 0:
                times[mode].append((time.perf_counter() - begin) * 1000)
    medians = {mode: statistics.median(times[mode]) for mode in MODES}
    shown = ", ".join(
        f"{mode} {medians[mode]:.1f} ms p50, {statistics.quantiles(times[mode], n=100)[98]:.1f} ms p99"
        for mode in MODES
    )
    added = medians["cluster"] - medians["standalone"]
    how = f"one run after the other, with pauses of {pause_s * 1000:.0f} ms" if pause_s else "one run after the other"
    print(f"{how}: {shown}; the cluster adds {added:.1f} ms p50 (at most {WANTED_MS:g} wanted)", flush=True)


async def _rates(runs: int, ways: dict[str, tuple[int, str]]) -> None:
    """In rounds, so that all share whatever else the machine does."""
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(ROUNDS):
        for way, (port, mode) in ways.items():
            rates[way].append(await rate_of_server(port, {**HELLO, "mode": mode}, "hello\n", CLIENTS, runs))
    shown = ", ".join(f"{way} {statistics.median(rates[way]):.0f}" for way in ways)
    print(f"runs/s with {CLIENTS} clients: {shown}; all share the {os.cpu_count()} processors", flush=True)


async def _spread(connection: ClientConnection, tasks: int) -> None:
    batch = [{"id": str(n), "action": "runCode", "params": {**HELLO, "mode": "cluster"}} for n in range(tasks)]
    begin = time.perf_counter()
    await connection.send(json.dumps({"action": "startTasks", "data": {"tasks": batch}}))
    ended: Counter[str] = Counter()
    workers: Counter[str] = Counter()
    while sum(ended.values()) < tasks:
        update = json.loads(await connection.recv())["data"]
        if update["status"] != "running":
            ended[update["status"]] += 1
            workers[update["result"].get("worker", "none")] += 1
            if update["status"] == "failed":
                print(f"failed: {update['result']['error']}")
    seconds = time.perf_counter() - begin
    print(f"{tasks} tasks in {seconds:.1f} s: {dict(ended)}; by worker: {dict(sorted(workers.items()))}")


async def _kill(connection: ClientConnection, process: psutil.Process) -> None:
    """Runs of which one worker is killed half-way: each must have one output, and those that were in it a fault."""
    code = "import time; time.sleep(0.05); print('hello')"
    for number in range(KILL_RUNS):
        request = {**HELLO, "code": code, "mode": "cluster"}
        await connection.send(json.dumps({"action": "runCode", "data": request, "id": number}))
    seen: Counter[int] = Counter()
    statuses: Counter[str] = Counter()
    while len(seen) < KILL_RUNS:
        answer = json.loads(await connection.recv())
        seen[answer["id"]] += 1
        statuses[answer["data"]["status"]] += 1
        if len(seen) == KILL_RUNS // 4:
            _workers(process)[0].send_signal(signal.SIGKILL)
    twice = [number for number, count in seen.items() if count > 1]
    print(f"a worker killed among {KILL_RUNS} runs: {sum(seen.values())} outputs, {dict(statuses)}, twice: {twice}")


def _server_process() -> psutil.Process:
    return next(child for child in psutil.Process().children() if any("server.py" in word for word in child.cmdline()))


def _workers(process: psutil.Process) -> list[psutil.Process]:
    return [child for child in process.children() if "spawn_main" in " ".join(child.cmdline())]


def _held(process: psutil.Process) -> int:
    """Memory of one process in MiB; what it shares counts in part."""
    return int(process.memory_full_info().pss) >> 20


def _below(process: psutil.Process) -> int:
    return sum(_held(one) for worker in _workers(process) for one in (worker, *worker.children(recursive=True)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.cluster", description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--tasks", type=int, default=1000)
    options = parser.parse_args()
    asyncio.run(main(options.runs, options.tasks))
