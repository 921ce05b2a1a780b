"""Runs per second with so many clients at once: through the server, and of a bare command."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

from bench.bare import Run
from bench.client import ask, to


def rate_of_command(run: Run, clients: int, runs: int) -> float:
    """`clients` threads share `runs` runs of a bare command."""
    with ThreadPoolExecutor(clients) as pool:
        begin = time.perf_counter()
        for ended in [pool.submit(run) for _ in range(runs)]:
            ended.result()
        return runs / (time.perf_counter() - begin)


async def rate_of_server(port: int, request: dict[str, str], expected: str, clients: int, runs: int) -> float:
    """`clients` connections share `runs` runs, each connection one after the other. Every answer is looked at."""
    left = iter(range(runs))

    async def client() -> None:
        async with to(port) as connection:
            ready.append(connection)
            await start.wait()
            for _ in left:
                answer = await ask(connection, "runCode", request)
                assert answer["data"]["output"] == expected, answer

    start, ready = asyncio.Event(), list[object]()
    visits = [asyncio.ensure_future(client()) for _ in range(clients)]  # noqa: TID251 -- a measurement
    while len(ready) < clients:
        await asyncio.sleep(0.001)
    begin = time.perf_counter()
    start.set()
    await asyncio.gather(*visits)
    return runs / (time.perf_counter() - begin)
