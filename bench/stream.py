"""Live output: how soon the first byte arrives, how soon a run is cancelled, and quiet clients beside a flood.

python -m bench.stream [--rounds N] [--engine NAME] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import time
from pathlib import Path
from typing import Any

from websockets.asyncio.client import ClientConnection

from bench.client import server, to

STAMPED = "import time; t = time.time(); print(f'{t:.6f}'); time.sleep(0.3)"
PRINTER = "import os\nwhile True:\n    os.write(1, b'x' * 65536)\n"
QUIET = 20


def run(code: str, id: str, **more: Any) -> str:
    """A streaming runCode."""
    data = {"language": "python", "code": code, "mode": "standalone", "stream": True, **more}
    return json.dumps({"action": "runCode", "id": id, "data": data})


async def next_of(connection: ClientConnection, action: str) -> dict[str, Any]:
    """The next message of that action."""
    while (message := json.loads(await connection.recv()))["action"] != action:
        pass
    return dict(message)


async def first_byte(port: int, rounds: int) -> float:
    """Median of ms from a program's print, by its own clock, to the client."""
    times = []
    async with to(port) as connection:
        for number in range(rounds):
            await connection.send(run(STAMPED, str(number)))
            chunk = await next_of(connection, "outputChunk")
            times.append((time.time() - float(chunk["data"]["text"])) * 1000)
            await next_of(connection, "output")
    return statistics.median(times)


async def cancelled(port: int, rounds: int) -> float:
    """Median of ms from cancelRun to the output."""
    times = []
    async with to(port) as connection:
        for number in range(rounds):
            await connection.send(run("print(1)\nwhile True: pass", str(number)))
            await next_of(connection, "outputChunk")
            begin = time.perf_counter()
            await connection.send(json.dumps({"action": "cancelRun", "data": {"run": str(number)}}))
            assert (await next_of(connection, "output"))["data"]["status"] == "cancelled"
            times.append((time.perf_counter() - begin) * 1000)
    return statistics.median(times)


def flooded(port: int, seconds: float, output_bytes: int) -> None:
    """Runs a program that prints without end, again and again."""

    async def flood() -> None:
        end = time.monotonic() + seconds
        async with to(port) as connection:
            while time.monotonic() < end:
                await connection.send(run(PRINTER, "flood", limits={"outputBytes": output_bytes}))
                await next_of(connection, "output")

    asyncio.run(flood())


async def beside_a_flood(port: int, seconds: float, output_bytes: int) -> float:
    """p99 of ms for the echo of 20 quiet clients while one program prints as fast as it can, run after run."""
    times: list[float] = []
    end = time.monotonic() + seconds

    async def quiet() -> None:
        async with to(port, "/devws") as connection:
            while time.monotonic() < end:
                begin = time.perf_counter()
                await connection.send('{"action":"echo","data":1}')
                await connection.recv()
                times.append((time.perf_counter() - begin) * 1000)
                await asyncio.sleep(0.05)

    # In a process of its own: what its client has to parse is not to keep the quiet ones waiting.
    flood = multiprocessing.get_context("spawn").Process(target=flooded, args=(port, seconds, output_bytes))
    flood.start()
    await asyncio.gather(*(quiet() for _ in range(QUIET)))
    await asyncio.to_thread(flood.join)
    return statistics.quantiles(times, n=100)[98]


async def hellos(port: int, rounds: int) -> float:
    """Median of ms for a short run, one after the other."""
    times = []
    async with to(port) as connection:
        for number in range(rounds):
            begin = time.perf_counter()
            await connection.send(run("print(1)", str(number), stream=False))
            await next_of(connection, "output")
            times.append((time.perf_counter() - begin) * 1000)
    return statistics.median(times)


async def beside_a_queue(port: int, rounds: int) -> float:
    """The same while another connection has 1,000 runs in the queue."""
    async with to(port) as greedy:
        for number in range(1000):
            await greedy.send(run("print(1)", str(number), stream=False))
        await next_of(greedy, "output")
        return await hellos(port, rounds)


SPINNER = {"python": "while True: pass", "javascript": "for (;;);"}


async def beside_spinners(port: int, seconds: float) -> float:
    """p99 of ms for the echo of a quiet client while both languages spin on all processors."""
    times: list[float] = []
    async with to(port) as spinning, to(port, "/devws") as connection:
        for number in range(os.cpu_count() or 1):
            language = ("python", "javascript")[number % 2]
            data = {"language": language, "code": SPINNER[language], "mode": "standalone", "stream": True,
                    "limits": {"timeMs": int(seconds * 1000) + 5000, "cpuMs": 60_000}}  # fmt: skip
            await spinning.send(json.dumps({"action": "runCode", "id": number, "data": data}))
            await next_of(spinning, "runStatus")
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            begin = time.perf_counter()
            await connection.send('{"action":"echo","data":1}')
            await connection.recv()
            times.append((time.perf_counter() - begin) * 1000)
            await asyncio.sleep(0.01)
    return statistics.quantiles(times, n=100)[98]


async def main(rounds: int, engine: str, file: Path | None) -> None:
    """Measures, and prints a line for each."""
    async with server(f"--engine={engine}") as port:
        result: dict[str, Any] = {
            "alone_ms": await hellos(port, rounds),
            "beside_a_queue_ms": await beside_a_queue(port, rounds),
            "beside_spinners_p99_ms": await beside_spinners(port, 5.0),
            "first_byte_ms": await first_byte(port, rounds),
            "cancel_ms": await cancelled(port, rounds),
            "echo_p99_ms": {f"{mib} MiB": await beside_a_flood(port, 5.0, mib << 20) for mib in (1, 8)},
        }
    print(f"a first byte arrives after {result['first_byte_ms']:.1f} ms (median)")
    print(f"a run is over {result['cancel_ms']:.1f} ms after cancelRun (median)")
    spinners = result["beside_spinners_p99_ms"]
    print(f"an echo beside programs that spin on all processors takes {spinners:.1f} ms (p99)")
    alone, beside = result["alone_ms"], result["beside_a_queue_ms"]
    print(
        f"a short run takes {alone:.1f} ms alone, and {beside:.1f} ms beside 1,000 queued runs of another client",
        end="",
    )
    print(f": {beside / alone:.1f} x (medians)")
    for size, p99 in result["echo_p99_ms"].items():
        print(
            f"{QUIET} quiet clients beside a program that prints {size} as fast as it can: echo in {p99:.1f} ms (p99)"
        )
    if file is not None:
        file.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.stream", description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    asyncio.run(main(options.rounds, options.engine, options.json))
