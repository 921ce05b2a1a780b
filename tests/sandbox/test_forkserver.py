"""What only fork servers can get wrong: what children share, what they could do to their parent, and its death."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import os
import random
import re
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from sandbox.engine import EngineUnavailable
from sandbox.forkserver import SEEDS, ForkServerEngine
from sandbox.model import Channel, Job, Language, Limits, Outcome, Status
from sandbox.policy import bind, tree
from tests.conftest import CGROUPS, SECOND, children, leaves, opened, opened_files, until, within

RUNS = 12
HELLO: dict[Language, str] = {"python": "print('hello')", "javascript": "console.log('hello')"}
ETERNAL: dict[Language, str] = {
    "python": "import os, time; os.write(1, b'1\\n'); time.sleep(1e6)",
    "javascript": "console.log(1); setInterval(() => {}, 1e6)",
}
INTERPRETERS: dict[Language, str] = {"python": "python", "javascript": "node"}


async def run(engine: object, code: str, language: Language = "python", **more: object) -> Outcome:
    assert isinstance(engine, ForkServerEngine)
    outcome = await within(engine.run(Job(language, code, **more), Channel()), 60)  # type: ignore[arg-type]
    assert isinstance(outcome, Outcome)
    return outcome


def outputs(code: str, language: Language = "python", runs: int = RUNS, seeds: int = 1) -> list[str]:
    """What so many runs of one program print, one after the other."""

    async def main() -> list[str]:
        engine = ForkServerEngine(seeds=seeds)
        await engine.open()
        try:
            done = [await run(engine, code, language) for _ in range(runs)]
            assert {outcome.status for outcome in done} == {Status.OK}, done[0].error
            return [outcome.stdout for outcome in done]
        finally:
            await engine.close()

    return asyncio.run(main())


@pytest.mark.parametrize(
    "code",
    [
        "import random; print(random.random())",
        "import random; print(random.Random().random())",
        "import uuid; print(uuid.uuid4())",
        "import uuid; print(uuid.uuid1())",
        "import secrets; print(secrets.token_hex())",
        "import tempfile; print(tempfile.mktemp())",
        "import ssl; print(ssl.RAND_bytes(8))",
        "import os; print(os.urandom(8))",
        "import time; print(time.time_ns(), time.perf_counter_ns())",
    ],
)
def test_random_values_of_python_differ_from_run_to_run(code: str) -> None:
    assert len(set(outputs(code))) == RUNS


def test_hashes_differ_from_one_run_to_the_next() -> None:
    hashes = outputs("print(hash('a'))", runs=2 * SEEDS, seeds=SEEDS)

    assert all(first != second for first, second in itertools.pairwise(hashes))
    assert len(set(hashes)) >= SEEDS


@pytest.mark.parametrize(
    "code",
    [
        "console.log(Math.random())",
        "for (let i = 0; i < 1000; i++) Math.random(); console.log(Math.random())",
        "console.log(require('crypto').randomUUID())",
        "console.log(require('crypto').randomBytes(8).toString('hex'))",
        "console.log(crypto.getRandomValues(new Uint8Array(8)).join())",
        "console.log(require('fs').mkdtempSync('/tmp/x'))",
        "console.log(require('vm').runInNewContext('Math.random()'))",
        "new (require('worker_threads').Worker)('console.log(Math.random())', { eval: true })",
    ],
)
def test_random_values_of_javascript_differ_from_run_to_run(code: str) -> None:
    assert len(set(outputs(code, "javascript"))) == RUNS


def test_nothing_of_one_run_is_seen_by_a_later_one() -> None:
    leave = """
import builtins, gc, json, os, signal, sys, threading
builtins.left = json.left = sys.left = os.environ["LEFT"] = "left"
for place in ("/tmp/left", "/work/left", "/dev/shm/left"):
    open(place, "w").close()
os.umask(0o77)
os.nice(5)
os.sched_setaffinity(0, {0})
signal.signal(signal.SIGTERM, signal.SIG_IGN)
gc.disable()
sys.setrecursionlimit(77)
threading.stack_size(1 << 20)
import socket
name = socket.socket(socket.AF_UNIX); name.bind("\\0left"); name.listen()
if os.fork() == 0:
    os.setsid(); __import__("time").sleep(1e6)
"""
    look = """
import builtins, gc, json, os, signal, sys, threading
print([hasattr(owner, "left") for owner in (builtins, json, sys)], "LEFT" in os.environ,
      [os.path.exists(place) for place in ("/tmp/left", "/work/left", "/dev/shm/left")],
      oct(os.umask(0)), os.nice(0), len(os.sched_getaffinity(0)) == os.cpu_count(),
      signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, gc.isenabled(), sys.getrecursionlimit(),
      threading.stack_size(), "left" in open("/proc/net/unix").read(), os.listdir("/work"),
      len([name for name in os.listdir("/proc") if name.isdigit()]))
"""

    async def main() -> tuple[set[str], set[str]]:
        async with opened("forkserver") as engine:
            before = {(await run(engine, look)).stdout for _ in range(SEEDS)}
            left = await asyncio.gather(*(run(engine, leave) for _ in range(SEEDS)))
            assert {outcome.status for outcome in left} == {Status.OK}, left
            return before, {(await run(engine, look)).stdout for _ in range(SEEDS)}

    before, after = asyncio.run(main())
    assert before == after
    assert len(after) == 1


ATTACKS = {
    "kills all that it sees": "import os\nfor n in range(1, 65): os.kill(-1, n) if n not in (9, 19, 32, 33) else None",
    "kills all for good": "import os; os.kill(-1, 9)",
    "kills the first process": "import os\nfor n in range(1, 65):\n    try: os.kill(1, n)\n    except OSError: pass",
    "traces": "import ctypes; c = ctypes.CDLL(None)\nfor pid in range(9): c.ptrace(16, pid, 0, 0)",
    "writes to every descriptor": (
        "import os\nfor fd in range(1024):\n"
        "    for word in (b'ended 1 0', b'ready', b'init', b''):\n"
        "        try: os.write(fd, word)\n        except OSError: pass"
    ),
    "closes every descriptor": "import os; os.closerange(0, 1024)",
    "reads the first process": "open('/proc/1/mem', 'rb')",
    "bombs with forks": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "takes all memory": "x = []\nwhile True: x.append(bytearray(1 << 22))",
    "fills the scratch folders": (
        "for place in ('/tmp', '/work', '/dev/shm'):\n"
        "    try:\n        with open(place + '/full', 'wb') as f:\n            while True: f.write(bytes(1 << 20))\n"
        "    except OSError: pass"
    ),
    "stops itself": "import os; os.kill(os.getpid(), 19)",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_on_the_fork_server_hurts_only_the_attacker(attack: str) -> None:
    limits = Limits(wall_ms=int(1000 * SECOND), memory_bytes=96 << 20)

    async def main() -> None:
        async with opened("forkserver") as engine:
            before = fork_servers()
            victim = asyncio.ensure_future(run(engine, "import time; time.sleep(0.3); print('unhurt')"))
            await asyncio.gather(*(run(engine, ATTACKS[attack], limits=limits) for _ in range(2)))
            assert (await victim).stdout == "unhurt\n"
            assert (await run(engine, "print('next')")).stdout == "next\n"
            assert (await run(engine, "console.log('next')", "javascript")).stdout == "next\n"
            assert fork_servers() == before

    asyncio.run(main())


def fork_servers() -> set[int]:
    """The jails that fork, by process id."""
    return {child.pid for child in psutil.Process().children() if child.name() == "nsjail"}


def jailed() -> Iterable[psutil.Process]:
    for jail in fork_servers():
        yield from psutil.Process(jail).children()


def test_a_fork_server_is_in_its_group_before_it_starts() -> None:
    async def main() -> None:
        async with opened("forkserver"):
            in_groups: dict[Path, set[int]] = {}
            for leaf in leaves():
                if leaf.name.startswith("run-"):
                    in_groups.setdefault(leaf.parent, set()).update(
                        int(pid) for pid in (leaf / "cgroup.procs").read_text().split()
                    )
            assert all({process.pid for process in jailed()} <= pids for pids in in_groups.values()), in_groups

    asyncio.run(main())


@pytest.mark.parametrize("language", ["python", "javascript"])
def test_a_killed_fork_server_ends_its_runs_and_is_replaced(language: Language) -> None:
    async def main() -> None:
        async with opened("forkserver") as engine:
            started = Counter[str]()
            channel = Channel(emit=lambda stream, chunk: started.update([stream]))
            job = Job(language, ETERNAL[language], limits=Limits(wall_ms=int(60_000 * SECOND)))
            running = [asyncio.ensure_future(engine.run(job, channel)) for _ in range(50)]
            await until(lambda: started["stdout"] >= 50, 60)
            for process in jailed():
                process.kill()
            ended = [await within(one, 60) for one in running]

            assert {outcome.status for outcome in ended} == {Status.INTERNAL_ERROR}  # type: ignore[attr-defined]
            assert {outcome.stdout for outcome in ended} == {"1\n"}  # type: ignore[attr-defined]
            assert (await run(engine, HELLO[language], language)).stdout == "hello\n"

    asyncio.run(main())


@pytest.mark.parametrize("language", ["python", "javascript"])
def test_a_fork_server_that_cannot_fork_any_more_goes_on_with_what_it_has(
    language: Language, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sandbox.forkjail.OWN_LIMITS", Limits(memory_bytes=1 << 30, processes=12))

    async def main() -> None:
        async with opened("forkserver") as engine:
            before = fork_servers()
            channel = Channel()
            job = Job(language, ETERNAL[language], limits=Limits(wall_ms=int(60_000 * SECOND)))
            running = [asyncio.ensure_future(engine.run(job, channel)) for _ in range(20)]
            await until(lambda: any(one.done() for one in running), 30)
            channel.cancel.set()
            ended = await asyncio.gather(*running, return_exceptions=True)
            refused = [one for one in ended if isinstance(one, OSError)]
            assert refused
            assert all("Resource temporarily unavailable" in str(one) or "error 11" in str(one) for one in refused)
            assert {one.status for one in ended if isinstance(one, Outcome)} == {Status.CANCELLED}
            assert fork_servers() == before
            assert (await run(engine, "print('next')")).stdout == "next\n"

    asyncio.run(main())


@pytest.mark.parametrize("language", ["python", "javascript"])
def test_a_fork_server_that_does_not_answer_is_replaced(language: Language, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sandbox.slot.SETUP_SECONDS", 1.0 * SECOND)

    async def main() -> None:
        async with opened("forkserver") as engine:
            started = asyncio.Event()
            channel = Channel(emit=lambda stream, chunk: started.set())
            running = asyncio.ensure_future(engine.run(Job(language, ETERNAL[language]), channel))
            await within(started.wait())
            stopped = [process for process in jailed() if INTERPRETERS[language] in process.cmdline()[0]]
            for process in stopped:
                process.suspend()
            channel.cancel.set()
            outcome = await within(running)
            assert isinstance(outcome, Outcome)
            assert outcome.status is Status.CANCELLED
            await until(lambda: not any(process.is_running() for process in stopped))
            assert (await run(engine, HELLO[language], language)).stdout == "hello\n"

    asyncio.run(main())


def test_why_a_program_could_not_be_started_is_told() -> None:
    async def main() -> None:
        async with opened("forkserver") as engine:
            for language, name in (("python", "main.py"), ("javascript", "main.js")):
                outcome = await run(engine, "1", language, files={f"{name}/x": ""})  # type: ignore[arg-type]
                assert outcome.status is Status.INTERNAL_ERROR
                assert "exist" in (outcome.error or "").lower() or "EEXIST" in (outcome.error or ""), outcome

    asyncio.run(main())


def test_a_slot_that_is_not_wanted_any_more_is_given_back() -> None:
    async def main() -> None:
        async with opened("forkserver") as engine:
            await run(engine, "1", limits=Limits(tmp_bytes=8 << 20))
            before = count_of_others()
            for _ in range(8):
                running = asyncio.ensure_future(run(engine, "1", limits=Limits(tmp_bytes=8 << 20)))
                await asyncio.sleep(0)
                await asyncio.sleep(0.001)
                running.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await running
            await until(lambda: count_of_others() <= before)

    asyncio.run(main())


def test_many_runs_leave_nothing_that_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    """With every kind of end, and more of them than a fork server lasts."""
    monkeypatch.setattr("sandbox.forkserver.MOST_FORKS", 250)
    programs: list[tuple[Language, str]] = [
        ("python", "print(1)"),
        ("python", "raise SystemExit(3)"),
        ("python", "1 / 0"),
        ("javascript", "console.log(1)"),
        ("javascript", "throw new Error('x')"),
        ("javascript", "process.kill(process.pid, 'SIGKILL')"),
    ]

    async def some(engine: ForkServerEngine, count: int) -> None:
        for _ in range(count):
            language, code = random.choice(programs)
            assert (await run(engine, code, language)).status is not Status.INTERNAL_ERROR

    async def at_rest(engine: ForkServerEngine) -> Held:
        """A fork server that is worn out stays for the slots that wait in it: they are used up first."""
        for _ in range(20):
            await run(engine, "print(1)")
            with contextlib.suppress(AssertionError, psutil.NoSuchProcess):  # one that has just ended
                await until(lambda: held().processes == others + AT_REST and is_at_rest(engine), 2)
                return held()
        seen = [(process.ppid(), process.name(), process.cmdline()) for process in children()]
        raise AssertionError(f"{held()} is never at rest: {seen}")

    others = len(children())

    async def main() -> None:
        async with opened("forkserver") as engine:
            assert isinstance(engine, ForkServerEngine)
            await asyncio.gather(*(some(engine, 25) for _ in range(4)))
            before = await at_rest(engine)
            await asyncio.gather(*(some(engine, MANY // 4) for _ in range(4)))
            after = await at_rest(engine)
            networks = count_of_networks()

        assert (after.descriptors, after.mounts, after.zombies) == (before.descriptors, before.mounts, 0)
        assert after.groups <= MOST_GROUPS
        assert networks <= MOST_NETWORKS
        assert after.memory < before.memory + GROWTH_BYTES
        assert after.memory_of_node < before.memory_of_node + GROWTH_BYTES

    asyncio.run(main())


def count_of_others() -> int:
    """Open descriptors, but for those of what is used again: control groups and network namespaces."""
    kept = str(CGROUPS), "anon_inode:[eventfd]", "net:["
    return sum(not what.startswith(kept) for what in opened_files().values())


def count_of_networks() -> int:
    return sum(what.startswith("net:[") for what in opened_files().values())


def is_at_rest(engine: ForkServerEngine) -> bool:
    """Whether nothing is being made or given back."""
    return not engine._leaving and not any(slots._in_making for slots in engine._slots.values())


MANY = int(os.environ.get("TEST_RUNS", "1000"))
GROWTH_BYTES = 8 << 20
"""Less than 1 KiB for each of 10,000 runs."""
FORK_SERVERS = 2
WARM = 2
AT_REST = 1 + 2 * FORK_SERVERS + 2 * WARM
"""Processes: the warden, each nsjail with its fork server, each slot with its init."""
MOST_GROUPS = FORK_SERVERS + WARM + 8
"""One for each fork server and slot, and those that four clients have used and that wait to be used again."""


MOST_NETWORKS = MOST_GROUPS + 8
"""Those of a fork server that is worn out stay until its last slot is gone."""


class Held(NamedTuple):
    """What an engine has."""

    groups: int
    processes: int
    zombies: int
    descriptors: int
    mounts: int
    memory: int
    memory_of_node: int


def held() -> Held:
    """By this process, with all that came of it."""
    tree = children()
    states = [process.status() for process in tree]
    node = [process.memory_info().rss for process in jailed() if "node" in process.cmdline()[0]]
    return Held(
        groups=len({path.name for path in leaves() if path.name.startswith("run-")}),
        processes=len(tree),
        zombies=states.count(psutil.STATUS_ZOMBIE),
        descriptors=count_of_others(),
        mounts=len(Path("/proc/self/mountinfo").read_text().splitlines()),
        memory=psutil.Process().memory_info().rss,
        memory_of_node=node[0],
    )


def test_limits_that_are_not_the_usual_ones_hold_too() -> None:
    code = "import os, resource; print(os.statvfs('/tmp').f_blocks * 4096, resource.getrlimit(resource.RLIMIT_NOFILE))"

    async def main() -> None:
        async with opened("forkserver") as engine:
            outcome = await run(engine, code, limits=Limits(tmp_bytes=8 << 20, open_files=32))
            assert outcome.stdout == f"{8 << 20} (32, 32)\n"

    asyncio.run(main())


def test_modules_are_imported_ahead_and_a_file_of_the_same_name_comes_first() -> None:
    async def main() -> None:
        engine = ForkServerEngine(preload=("decimal",))
        await engine.open()
        try:
            assert (await run(engine, "import sys; print('decimal' in sys.modules)")).stdout == "True\n"
            own = {"decimal.py": "mine = 'mine'"}
            assert (await run(engine, "import decimal; print(decimal.mine)", files=own)).stdout == "mine\n"
        finally:
            await engine.close()

    asyncio.run(main())


def test_python_is_not_forked_before_it_has_looked_for_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """When it starts, it asks its path hooks about the folder of packages too, unless something was imported ahead."""
    inside = outputs("import site; print(site.getsitepackages()[0])", runs=1)[0].strip()

    async def main(folder: str) -> None:
        monkeypatch.setattr(
            "sandbox.forkserver.tree", lambda host, users=1: [*tree(host, users), bind(Path(folder), inside)]
        )
        engine = ForkServerEngine(preload=())
        await engine.open()
        try:
            assert (await run(engine, "import beside; print(beside.here)")).stdout == "here\n"
        finally:
            await engine.close()

    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:  # which jails can reach
        Path(folder, "beside.py").write_text("here = 'here'")
        Path(folder).chmod(0o755)
        asyncio.run(main(folder))


def test_a_file_of_the_name_of_what_python_has_imported_is_not_looked_at() -> None:
    files = {"os.py": "1 / 0", "sys.py": "1 / 0", "io.py": "1 / 0"}

    async def main() -> None:
        async with opened("forkserver") as engine:
            assert (
                await run(engine, "import io, os, sys; print(sys.argv, os.sep)", files=files)
            ).stdout == "['main.py'] /\n"

    asyncio.run(main())


def test_a_run_that_is_cancelled_twice_gives_everything_back() -> None:
    async def main() -> None:
        async with opened("forkserver") as engine:
            assert isinstance(engine, ForkServerEngine)
            for _ in range(5):
                running = asyncio.ensure_future(run(engine, ETERNAL["python"]))
                await until(lambda: len(engine._slots["python"]._ready) == 1)
                await asyncio.sleep(0.02 * SECOND)
                running.cancel()
                await asyncio.sleep(0)
                running.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await running
            await until(lambda: is_at_rest(engine))
            assert sum(server.slots for server in engine._servers["python"]._servers) == 1

    asyncio.run(main())


def test_without_descriptors_a_slot_is_not_made_and_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with opened("forkserver") as engine:
            assert isinstance(engine, ForkServerEngine)
            await until(lambda: is_at_rest(engine))
            before = count_of_others()
            failing = OSError(24, "Too many open files")
            with monkeypatch.context() as patch:
                patch.setattr("sandbox.cgroup.Leaf.entrances", lambda leaf: (_ for _ in ()).throw(failing))
                for _ in range(3):
                    with pytest.raises(OSError, match="Too many open files"):
                        await engine._make_slot(engine._host, "python", engine._usual)  # type: ignore[arg-type]
            with monkeypatch.context() as patch:
                patch.setattr(engine._host.groups, "leaf", lambda: (_ for _ in ()).throw(failing))  # type: ignore[union-attr]
                with pytest.raises(OSError, match="Too many open files"):
                    await engine._make_slot(engine._host, "python", engine._usual)  # type: ignore[arg-type]
            assert count_of_others() == before
            assert sum(server.slots for server in engine._servers["python"]._servers) == 1

    asyncio.run(main())


def test_a_child_that_cannot_make_its_world_leaves_nothing() -> None:
    async def main() -> None:
        async with opened("forkserver") as engine:
            assert isinstance(engine, ForkServerEngine)
            await until(lambda: is_at_rest(engine))
            before = len(children())
            for _ in range(8):
                with pytest.raises(OSError, match="did not start: prlimit64: Operation not permitted"):
                    await engine._make_slot(engine._host, "python", Limits(open_files=1 << 40))  # type: ignore[arg-type]
            await until(lambda: len(children()) <= before)

    asyncio.run(main())


def test_descriptors_that_do_not_arrive_end_what_they_are_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the server has too many open, and the kernel leaves out what it sends."""

    async def main() -> None:
        async with opened("forkserver") as engine:
            assert isinstance(engine, ForkServerEngine)
            lost = engine._servers["javascript"]._servers[0]
            with monkeypatch.context() as patch:
                patch.setattr("sandbox.forkjail.DESCRIPTORS", struct.Struct("<3i"))
                with pytest.raises(OSError, match="a child's descriptors did not arrive"):
                    await engine._make_slot(engine._host, "javascript", engine._usual)  # type: ignore[arg-type]
            assert not lost.is_alive()
            assert (await run(engine, HELLO["javascript"], "javascript")).stdout == "hello\n"

    asyncio.run(main())


def test_a_run_whose_task_is_cancelled_ends_nobody_else() -> None:
    """At the moment when its program has started and the server has not heard of it."""

    async def main() -> None:
        async with opened("forkserver") as engine:
            for _ in range(10):
                job = Job("python", "import time; time.sleep(60)", limits=Limits(wall_ms=int(1000 * SECOND)))
                running = asyncio.ensure_future(engine.run(job, Channel()))
                await asyncio.sleep(0)
                time.sleep(0.01)
                running.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await running
            code = f"import time; time.sleep({2 * SECOND}); print('fine')"
            assert [one.stdout for one in await asyncio.gather(*(run(engine, code) for _ in range(6)))] == [
                "fine\n"
            ] * 6

    asyncio.run(main())


def test_a_module_that_cannot_be_imported_ahead_is_named() -> None:
    with pytest.raises(EngineUnavailable, match="No module named 'no_such_module'"):
        asyncio.run(ForkServerEngine(preload=("no_such_module",)).open())


def test_without_koffi_node_is_started_ahead(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("sandbox.forkserver.find_koffi", lambda *where: None)
    code = "console.log(process.argv.slice(2), require('fs').readdirSync('.'))"

    async def main() -> None:
        async with opened("forkserver") as engine:
            outcome = await run(engine, code, "javascript", args=("a",), files={"b/c.txt": "d"})
            assert (outcome.status, outcome.stdout) == (Status.OK, "[ 'a' ] [ 'b', 'main.js' ]\n")

    asyncio.run(main())
    assert "koffi is not installed" in caplog.text


def test_where_node_cannot_be_forked_it_is_started_ahead(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr("sandbox.forkserver.find_koffi", lambda *where: tmp_path)  # no koffi is in there

    async def main() -> None:
        async with opened("forkserver") as engine:
            assert (await run(engine, HELLO["javascript"], "javascript")).stdout == "hello\n"

    asyncio.run(main())
    assert "node is started ahead, not forked: a fork server did not start: " in caplog.text


ENDS = {
    "a finalizer": "class A:\n    def __del__(self): print('gone', A, os.getpid() > 1)\nimport os\na = A()",
    "a finalizer in a cycle": "class A:\n    def __del__(self): print('gone')\na = A(); a.a = a",
    "an exit handler": "import atexit\natexit.register(print, 'first')\natexit.register(print, 'last')",
    "a thread that goes on": (
        "import threading, time\nthreading.Thread(target=lambda: (time.sleep(.1), print('late'))).start()"
    ),
    "text in C's own buffer": "import ctypes; ctypes.CDLL(None).printf(b'from C\\n')",
    "a closed standard output": "import sys; sys.stdout.close()",
    "a full standard output": "import sys; sys.stdout = open('/dev/full', 'w'); print('x')",
    "an exit with a text": "raise SystemExit('words')",
    "an exit in an exit handler": "import atexit, sys; atexit.register(sys.exit, 5)",
    "an exit handler that knows what is to be finalized": (
        "import atexit\nclass A:\n    def __del__(self): print('gone')\na = A()\n"
        "atexit.register(lambda: print('bye', bool(a)))"
    ),
    "a module that is finalized, with others removed and put elsewhere": (
        "import sys, types\nclass A:\n    def __del__(self): print('gone')\nm = types.ModuleType('m')\nm.a = A()\n"
        "sys.modules['m'] = m\nsys.modules['json'] = sys.modules.pop('json', m)\n"
        "sys.modules['sitecustomize'] = sys.modules.pop('sitecustomize', m)"
    ),
    "an exit in a thread": "import threading; threading.Thread(target=exit).start()",
    "an interrupt": "raise KeyboardInterrupt",
    "an error in a finalizer": "class A:\n    def __del__(self): 1 / 0\na = A()",
    "an excepthook": "import sys; sys.excepthook = lambda *a: print('hook', a[0])\n1 / 0",
    "an earlier interactive error": "import sys; sys.last_type = ValueError; print('fine')",
    "text in an open file": "f = open('a', 'w')\ndef g(): f.write('text')\ng()\nimport os; os.write(1, b'x')",
    "text in a stream of its own": "import os; f = os.fdopen(os.dup(1), 'w')\ndef g(): f.write('text')\ng()",
    "standard output in new clothes": (
        "import io, sys; sys.stdout = io.TextIOWrapper(sys.stdout.buffer, encoding='utf-8'); print('x')"
    ),
    "standard output set up anew": "import sys; sys.stdout.reconfigure(write_through=False); print('x')",
    "an exit without its file's name": "import sys\ndel __file__; sys.exit(3)",
    "an exit without its names": "globals().clear(); raise SystemExit(3)",
    "an exit of another main module": "import sys; sys.modules['__main__'] = sys; sys.exit(3)",
    "an end without modules": "import sys; print(1); sys.modules.clear()",
    "an error that nobody remembers": (
        "import sys\ndef hook(*a): del sys.last_type, sys.last_value\nsys.excepthook = hook\n1 / 0"
    ),
    "its own frame": "import sys, traceback; traceback.print_stack(); print(sys._getframe().f_back, __file__)",
    "its own name": "print(__name__, __spec__, __loader__.__class__.__name__, __builtins__.__name__, __doc__)",
    "its place": "import sys, os; print(sys.argv, sys.orig_argv[1:], sys.path[0], os.getcwd(), sys.flags)",
    "its parent": "import os, posix; print(os.getpid(), os.getppid(), posix.getppid())",
    "its environment": "import os; print(sorted(os.environ.items()))",
}


@pytest.mark.parametrize("name", ENDS)
def test_python_begins_and_ends_as_when_it_is_started_afresh(name: str) -> None:
    assert seen(outcomes_of("forkserver", "python")[name]) == seen(outcomes_of("nsjail", "python")[name])


JAVASCRIPT = {
    "handlers of signals": (
        "process.on('SIGUSR2', () => { console.log('got'); clearInterval(i) });"
        "const i = setInterval(() => {}, 1000); process.kill(process.pid, 'SIGUSR2')"
    ),
    "a signal without a handler": "process.kill(process.pid, 'SIGTERM'); setTimeout(() => {}, 1000)",
    "an exit code": "process.on('exit', (c) => console.log('bye', c)); process.exitCode = 3",
    "an exit in an exit handler": "process.on('exit', () => process.exit(7))",
    "an error in an exit handler": "process.on('exit', () => { throw new Error('x') })",
    "an exit": "process.on('exit', (c) => console.log('bye', c)); process.exit(4); console.log('never')",
    "an uncaught error": "process.on('exit', (c) => console.log('bye', c)); throw new TypeError('x')",
    "a caught uncaught error": "process.on('uncaughtException', (e) => console.log(e.message)); throw Error('x')",
    "an unhandled rejection": "Promise.reject(new Error('x'))",
    "a syntax error": "let x = ;",
    "an await that nothing settles": "await new Promise(() => {})",
    "no listeners left": "process.removeAllListeners(); console.log(1)",
    "an emit of its own": "const e = process.emit; process.emit = (...a) => e.apply(process, a); console.log(1)",
    "an abort": "process.on('exit', () => console.log('never')); process.kill(process.pid, 'SIGABRT')",
    "a module of its own": "console.log(require.main === module, module.children, module.paths, __filename, __dirname)",
    "require beside an await": "const fs = await import('fs'); console.log(typeof fs.readFileSync)",
    "what it is": "console.log(process.argv, process.execArgv, process.title, process.pid, process.ppid)",
    "its environment": "console.log(Object.entries(process.env).sort())",
    "its cache": "console.log(Object.keys(require.cache))",
    "a stack": "console.log(new Error('x').stack)",
    "workers": (
        "const { Worker } = require('worker_threads');"
        "new Worker('console.log(require(\"os\").EOL.length, process.argv.length)', { eval: true })"
    ),
    "a forked child": (
        "if (process.argv[2]) console.log('child', process.execArgv);"
        "else require('child_process').fork(__filename, ['x'])"
    ),
    "fetch without a network": "fetch('http://127.0.0.1:1').catch((e) => console.log(e.cause.code))",
    "webassembly": (
        "WebAssembly.instantiate(Uint8Array.from([0, 97, 115, 109, 1, 0, 0, 0])).then((w) => console.log(w.module))"
    ),
    "what is open at the start": "console.log(process.getActiveResourcesInfo())",
    "what happens beside it": (
        "const fs = require('fs'); const seen = []; require('async_hooks').createHook({"
        "before: (id) => seen.push(id < first), after: (id) => seen.push(id < first)}).enable();"
        "const first = require('async_hooks').executionAsyncId() + 1;"
        "setTimeout(() => { seen.length > 9 && fs.writeSync(1, 'much') }, 20)"
    ),
    "the parent of a worker": (
        "const { Worker } = require('worker_threads'); new Worker('process.kill(process.ppid || 0, 0); console.log(1)',"
        "{ eval: true })"
    ),
    "async files": "require('fs').readFile('main.js', 'utf8', (e, t) => console.log(e, t.length))",
    "waiting": "Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 50); console.log('waited')",
    "timers": (
        "setTimeout(() => console.log(3)); setImmediate(() => console.log(4));"
        "console.log(1); process.nextTick(console.log, 2)"
    ),
    "much garbage": "let x; for (let i = 0; i < 3e6; i++) x = [x && i, { i }]; console.log(x.length)",
    "standard input": "process.stdin.on('data', (d) => console.log(String(d))).on('end', () => console.log('end'))",
}


@pytest.mark.parametrize("name", JAVASCRIPT)
def test_javascript_begins_and_ends_as_when_it_is_started_afresh(name: str) -> None:
    assert seen(outcomes_of("forkserver", "javascript")[name]) == seen(outcomes_of("nsjail", "javascript")[name])


def seen(outcome: Outcome) -> tuple[object, ...]:
    """What a client sees of it, but for addresses, one frame of ours below 'exit' handlers, and excerpts of source,
    which a python that was started afresh can no longer show when it ends."""
    errors = [line for line in outcome.stderr.splitlines() if "/forkserver/" not in line and line[:4] != "    "]
    errors = [re.sub("0x[0-9a-f]+", "0x", line) for line in errors]
    return outcome.status, outcome.stdout, errors, outcome.facts.exit_code, outcome.facts.signal


@functools.cache
def outcomes_of(engine_name: str, language: Language) -> dict[str, Outcome]:
    """What becomes of all programs of a language on one engine, which is started once for all of them."""

    async def main() -> dict[str, Outcome]:
        limits = Limits(wall_ms=int(10_000 * SECOND))
        async with opened(engine_name) as engine:
            return {
                name: await engine.run(Job(language, code, stdin="in", limits=limits), Channel())
                for name, code in {"python": ENDS, "javascript": JAVASCRIPT}[language].items()
            }

    return asyncio.run(main())


def test_an_error_in_a_handler_of_errors_ends_node_with_its_code() -> None:
    code = "process.on('uncaughtException', () => { throw new Error('again') }); throw new Error('x')"

    async def main() -> None:
        async with opened("forkserver") as engine:
            outcome = await run(engine, code, "javascript")
            assert (outcome.status, outcome.facts.exit_code) == (Status.ERROR, 7)
            assert "again" in outcome.stderr

    asyncio.run(main())


LEAVE_IN_DESCRIPTORS = """
const fs = require('fs')
for (let fd = 3; fd < 64; fd++) try { fs.writeSync(fd, 'A'.repeat(16)) } catch {}
console.log(fs.readFileSync('/proc/self/maps', 'utf8').split('\\n').filter((line) => line.includes('rw-s')).length)
process.exit()
"""
LOOK_INTO_DESCRIPTORS = """
const fs = require('fs')
const seen = []
for (let fd = 3; fd < 64; fd++) {
  let place
  try { place = fs.readlinkSync(`/proc/self/fd/${fd}`) } catch { continue }
  if (place.startsWith('pipe:')) seen.push(place)
}
console.log(seen.join())
"""


def test_forked_nodes_share_no_open_file_with_each_other_or_with_their_fork_server() -> None:
    async def main() -> None:
        async with opened("forkserver") as engine:
            before = fork_servers()
            for _ in range(3):
                assert (await run(engine, LEAVE_IN_DESCRIPTORS, "javascript")).stdout == "0\n"
            looks = [(await run(engine, LOOK_INTO_DESCRIPTORS, "javascript")).stdout.strip() for _ in range(2)]
            first, second = (set(look.split(",")) for look in looks)
            assert first
            assert not first & second
            assert fork_servers() == before

    asyncio.run(main())


def test_no_descriptor_of_ours_is_left_to_a_program() -> None:
    code = """
        const fs = require('fs')
        for (const fd of fs.readdirSync('/proc/self/fd').filter((fd) => fd > 2)) {
          try { console.log(fs.readlinkSync(`/proc/self/fd/${fd}`).replace(/[0-9]/g, '')) } catch {}
        }
    """
    libuvs = {"/dev/null", "pipe:[]", "anon_inode:[eventpoll]", "anon_inode:[eventfd]"}

    assert set(outputs(code, "javascript", runs=1)[0].split()) <= libuvs
    assert outputs("import os; print(os.listdir('/proc/self/fd'))", runs=1) == ["['0', '1', '2', '3']\n"]


def test_a_slot_of_a_dead_fork_server_is_not_used() -> None:
    async def main() -> None:
        async with opened("forkserver") as engine:
            for process in jailed():
                process.kill()
            await until(lambda: not list(jailed()))
            assert (await run(engine, "print('hello')")).stdout == "hello\n"

    asyncio.run(main())


def test_runs_at_once_have_different_users_outside() -> None:
    async def main() -> None:
        async with opened("forkserver") as engine:
            sleep = "import os, time; os.write(1, b'x'); time.sleep(1e6)"
            started = Counter[str]()
            channel = Channel(emit=lambda stream, chunk: started.update([stream]))
            running = [asyncio.ensure_future(engine.run(Job("python", sleep), channel)) for _ in range(6)]
            await until(lambda: started["stdout"] >= 6, 30)
            users = [
                process.uids().real
                for server in jailed()
                for process in server.children()
                if process.status() != psutil.STATUS_ZOMBIE and process.cmdline() != ["init"]
            ]
            assert len(set(users)) == len(users) >= 6
            assert min(users) > 0
            channel.cancel.set()
            await asyncio.gather(*running)

    if os.geteuid() == 0:
        asyncio.run(main())
