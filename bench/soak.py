"""Hours of use in minutes: runs, cancels, disconnects and hostile programs; what the server holds must stay flat.

python -m bench.soak [--minutes M] [--engine NAME]    (make soak; MINUTES=30 by default)
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil
from websockets.exceptions import ConnectionClosed

from bench.client import server, to

CLIENTS = 8
PROGRAMS = Path(__file__).parent.parent / "tests" / "hostile" / "programs"
GROWTH_BYTES = 32 << 20
"""What the server may have grown since it was warm, and still be called flat."""


def request(number: int) -> str:
    """Some run: short ones, floods, sleepers, and every tenth a hostile one."""
    language, code = "python", random.choice(("print(1)", "print('x' * 10**6)", "import time; time.sleep(0.2)", "1/0"))
    if number % 10 == 0:
        program = random.choice(sorted(PROGRAMS.iterdir()))
        language, code = "python" if program.suffix == ".py" else "javascript", program.read_text()
    elif number % 3 == 0:
        language, code = "javascript", "console.log('hi')"
    limits = {"timeMs": 500, "cpuMs": 500}
    data = {"language": language, "code": code, "mode": "standalone", "stream": number % 2 == 0, "limits": limits}
    return json.dumps({"action": "runCode", "id": number, "data": data})


async def visit(port: int, end: float) -> int:
    """One client after another: each runs some programs, cancels some, and leaves, at times without a word."""
    outputs = 0
    while time.monotonic() < end:
        try:
            async with to(port, f"/appws?room=soak{random.randrange(3)}") as connection:
                await connection.send('{"action":"startGame"}')
                waiting = set()
                for number in range(random.randrange(1, 12)):
                    await connection.send(request(number))
                    waiting.add(number)
                    await connection.send(
                        json.dumps({"action": "updateScore", "data": {"playerId": number, "change": 1}})
                    )
                    if random.random() < 0.2:
                        await connection.send(json.dumps({"action": "cancelRun", "data": {"run": number}}))
                if random.random() < 0.3:
                    connection.transport.abort()
                    continue
                while waiting:
                    message = json.loads(await connection.recv())
                    if message["action"] == "output":
                        waiting.discard(message["id"])
                        outputs += 1
        except ConnectionClosed:
            continue
    return outputs


def held(process: psutil.Process) -> dict[str, Any]:
    """What a quiet server has."""
    opened = [path.readlink() for path in Path(f"/proc/{process.pid}/fd").iterdir()]
    groups = list(Path("/sys/fs/cgroup").rglob(f"runboard-{process.pid}/run-*"))
    return {
        "memory": process.memory_info().rss,
        # Those of groups are opened as they are needed, and stay open for the next run: groups are counted themselves.
        "descriptors": sum(not str(file).startswith(("/sys/fs/cgroup", "anon_inode:[eventfd]")) for file in opened),
        "processes": len(process.children(recursive=True)),
        "groups": len({group.name for group in groups if group.is_dir()}),
        "threads": process.num_threads(),
    }


async def quiet(port: int) -> None:
    """Waits until nothing is under way; what clients have left behind is over within a second or so."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz") as answer:
            health = json.load(answer)
        await asyncio.sleep(1)  # also for jails that are made in the background
        if health["running"] == health["queued"] == 0:
            return
    print(f"still busy after 60 s: {health}")


async def main(minutes: float, engine: str) -> int:
    """Gives 0 when nothing has grown."""
    async with server(f"--engine={engine}") as port:
        process = next(
            child for child in psutil.Process().children() if any("server.py" in word for word in child.cmdline())
        )
        seen: list[dict[str, Any]] = []
        for part in range(4):
            end = time.monotonic() + minutes * 60 / 4
            outputs = sum(await asyncio.gather(*(visit(port, end) for _ in range(CLIENTS))))
            await quiet(port)
            seen.append(held(process))
            print(f"after {(part + 1) * minutes / 4:.1f} min, {outputs} outputs: {seen[-1]}", flush=True)
    warm, last = seen[0], seen[-1]
    grown = [name for name in ("descriptors", "processes", "groups", "threads") if last[name] > warm[name]]
    grown += ["memory"] if last["memory"] - warm["memory"] > GROWTH_BYTES else []
    print(f"grown: {', '.join(grown)}" if grown else "flat")
    return 1 if grown else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--engine", default="auto")
    options = parser.parse_args()
    sys.exit(asyncio.run(main(options.minutes, options.engine)))
