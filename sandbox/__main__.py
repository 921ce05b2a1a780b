"""`python -m sandbox program.py` runs one program; `python -m sandbox --check` tries what the sandbox promises here."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import sys
from pathlib import Path

from sandbox.engine import Engine, EngineUnavailable
from sandbox.forkserver import ForkServerEngine
from sandbox.interpreters import Wanted
from sandbox.model import Channel, Check, Job, Language, Outcome, Status, Stream
from sandbox.nsjail import NsjailEngine
from sandbox.promises import PROMISES, Promise
from sandbox.subproc import SubprocessEngine

LANGUAGE_OF: dict[str, Language] = {".py": "python", ".js": "javascript", ".mjs": "javascript"}
ENGINES: dict[str, type[ForkServerEngine | NsjailEngine | SubprocessEngine]] = {
    "forkserver": ForkServerEngine,
    "nsjail": NsjailEngine,
    "subprocess": SubprocessEngine,
}


async def check(engine: Engine) -> list[Check]:
    """Tries each promise once."""
    tried = [await _try(engine, promise) for promise in PROMISES]
    return [*tried, await _nothing_is_seen_by_the_next(engine), await _nothing_outlives(engine)]


async def _try(engine: Engine, promise: Promise) -> Check:
    outcome = await engine.run(Job("python", promise.probe, limits=promise.limits), Channel())
    kept = outcome.status is promise.status and (promise.status is not Status.OK or outcome.stdout == "kept\n")
    said = (outcome.error or outcome.stdout).strip().splitlines() or ["nothing"]
    return Check(promise.sentence, kept, promise.feature if kept else f"{outcome.status}: {said[-1][:200]}")


async def _nothing_is_seen_by_the_next(engine: Engine) -> Check:
    """Two runs, one after the other, on the same folders."""
    leave = "for place in ('/tmp', '/work', '/dev/shm'): open(f'{place}/left', 'w').close()"
    look = "import os; print([p for p in ('/tmp', '/work', '/dev/shm') if os.path.exists(f'{p}/left')])"
    await engine.run(Job("python", leave), Channel())
    outcome = await engine.run(Job("python", look), Channel())
    kept = outcome.stdout == "[]\n"
    detail = "tmpfs made for each run" if kept else f"found in {outcome.stdout.strip()}"
    return Check("What one run writes, the next does not see", kept, detail)


async def _nothing_outlives(engine: Engine) -> Check:
    """A child that left session and group, and whose name is looked for on the host afterwards."""
    mark = f"left{os.getpid()}"
    code = (
        "import ctypes, os, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        f"    ctypes.CDLL(None).prctl(15, b'{mark}', 0, 0, 0)\n"
        "    time.sleep(1e6)\n"
    )
    await engine.run(Job("python", code), Channel())
    left = _processes_called(mark)
    detail = f"processes {', '.join(left)} live on" if left else "the control group is emptied"
    return Check("No process outlives its run, whatever it forked", not left, detail)


def _processes_called(name: str) -> list[str]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (folder / "comm").read_text().strip() == name:
                found.append(folder.name)
    return found


def main(argv: list[str]) -> int:
    """Gives the exit code: the program's; 1 when a promise is broken; 2 when nothing can be run."""
    options = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING)
    engine: Engine = ENGINES[options.engine](Wanted(options.python, options.node))
    try:
        if options.check:
            return asyncio.run(_print_checks(engine))
        return asyncio.run(_run(engine, options))
    except (EngineUnavailable, OSError) as missing:
        print(f"sandbox: {missing}", file=sys.stderr)
        return 2


async def _print_checks(engine: Engine) -> int:
    await engine.open()
    try:
        checks = await check(engine)
        for tried in checks:
            print(f"{'kept  ' if tried.kept else 'BROKEN'}  {tried.promise} ({tried.detail})")
        for warning in engine.warnings():
            print(f"note    {warning}")
        return 0 if all(tried.kept for tried in checks) else 1
    finally:
        await engine.close()


async def _run(engine: Engine, options: argparse.Namespace) -> int:
    language = LANGUAGE_OF.get(options.program.suffix)
    if language is None:
        raise OSError(f"{options.program} is neither .py nor .js")
    job = Job(
        language, options.program.read_text(), "" if sys.stdin.isatty() else sys.stdin.read(), tuple(options.args)
    )

    def show(stream: Stream, chunk: bytes) -> None:
        (sys.stdout if stream == "stdout" else sys.stderr).buffer.write(chunk)

    await engine.open()
    try:
        outcome = await engine.run(job, Channel(emit=show))
    finally:
        await engine.close()
    sys.stdout.flush()
    print(_summary(outcome), file=sys.stderr)
    return 0 if outcome.status is Status.OK else outcome.facts.exit_code or 1


def _summary(outcome: Outcome) -> str:
    usage = outcome.facts.usage
    how = f"exit code {outcome.facts.exit_code}" if outcome.facts.signal is None else outcome.facts.signal
    return (
        f"{outcome.status}: {how}, {usage.wall_ms:.1f} ms of wall time, {usage.cpu_ms:.1f} ms of CPU time,"
        f" {usage.memory_bytes / (1 << 20):.1f} MiB at the peak"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sandbox", description=__doc__)
    parser.add_argument("program", type=Path, nargs="?", help="a .py or .js file")
    parser.add_argument("args", nargs="*", help="the program's arguments")
    parser.add_argument("--check", action="store_true", help="try each promise on this machine, a line each")
    parser.add_argument("--engine", choices=list(ENGINES), default="nsjail", help="how to run (default: nsjail)")
    parser.add_argument("--python", type=Path, help="the python that programs run on")
    parser.add_argument("--node", type=Path, help="the node that programs run on")
    return parser


if __name__ == "__main__":
    if len(sys.argv) == 1:
        _parser().print_help()
        sys.exit(2)
    sys.exit(main(sys.argv[1:]))
