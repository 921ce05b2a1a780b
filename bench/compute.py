"""A program that computes for a second: forked inside a jail, and as a plain child process, one after the other.

python -m bench.compute [--rounds N]
"""

from __future__ import annotations

import argparse
import asyncio
import statistics

from sandbox.engine import Engine
from sandbox.forkserver import ForkServerEngine
from sandbox.languages import LANGUAGES
from sandbox.model import Channel, Job, Language, Limits
from sandbox.subproc import SubprocessEngine

ARITHMETIC: dict[Language, str] = {
    "python": "import time\nt = time.perf_counter()\nx = 0\nfor i in range(8_000_000): x += i * i % 7\n"
    "print(time.perf_counter() - t)",
    "javascript": "const t = process.hrtime.bigint(); let x = 0\n"
    "for (let i = 0; i < 3e8; i++) x = (x + i * 7) % 1000003\n"
    "console.log(Number(process.hrtime.bigint() - t) / 1e9)",
}
"""Each prints how many seconds it took, by its own clock."""
LIMITS = Limits(wall_ms=60_000, cpu_ms=60_000)
WANTED = 1.05


async def main(rounds: int) -> None:
    """Prints a line for each language."""
    engines: tuple[Engine, Engine] = ForkServerEngine(), SubprocessEngine()
    for engine in engines:
        await engine.open()
    try:
        for language in LANGUAGES:
            times: list[tuple[float, ...]] = []
            for _ in range(rounds):
                outcomes = [
                    await engine.run(Job(language, ARITHMETIC[language], limits=LIMITS), Channel())
                    for engine in engines
                ]
                times.append(tuple(float(outcome.stdout) for outcome in outcomes))
            inside, outside = (statistics.median(one) for one in zip(*times, strict=True))
            ratio = statistics.median(one / other for one, other in times)
            figures = f"{inside:.2f} s inside, {outside:.2f} s outside, {ratio:.2f} x"
            print(f"{language}: {figures} (at most {WANTED} is wanted)")
    finally:
        for engine in engines:
            await engine.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.compute", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=11)
    asyncio.run(main(parser.parse_args().rounds))
