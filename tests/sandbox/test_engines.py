"""The conformance suite: every engine that the machine has keeps the same promises."""

from __future__ import annotations

import asyncio

import pytest

from sandbox.model import Channel, Job, Limits, Outcome, Status
from tests.conftest import ENGINES, opened, within

pytestmark = pytest.mark.parametrize("name", ENGINES)


def run(name: str, job: Job, channel: Channel | None = None) -> Outcome:
    async def main() -> Outcome:
        async with opened(name) as engine:
            outcome = await within(engine.run(job, channel or Channel()), 60)
            assert isinstance(outcome, Outcome)
            return outcome

    return asyncio.run(main())


def test_a_good_program_is_ok(name: str) -> None:
    outcome = run(name, Job("python", "import time; print('hällo'); time.sleep(0.2)"))  # or psutil may not see it

    assert (outcome.status, outcome.stdout, outcome.stderr, outcome.error) == (Status.OK, "hällo\n", "", None)
    assert outcome.facts.exit_code == 0
    assert outcome.facts.usage.wall_ms > 0
    assert 1 << 20 < outcome.facts.usage.memory_bytes < 30 << 20


def test_javascript_is_a_language_too(name: str) -> None:
    outcome = run(name, Job("javascript", "console.log(await Promise.resolve('hällo'))"))

    assert (outcome.status, outcome.stdout, outcome.error) == (Status.OK, "hällo\n", None)


def test_what_node_prints_just_before_it_exits_is_not_lost(name: str) -> None:
    outcome = run(name, Job("javascript", "console.log('x'.repeat(500_000)); process.exit(3)"))

    assert (len(outcome.stdout), outcome.facts.exit_code) == (500_001, 3)


def test_standard_input_and_arguments_arrive(name: str) -> None:
    code = "import sys; print(sys.argv[1:], sys.stdin.read())"
    outcome = run(name, Job("python", code, stdin="in\n", args=("a b", "ü")))

    assert outcome.stdout == "['a b', 'ü'] in\n\n"


def test_input_at_the_end_of_the_file_raises(name: str) -> None:
    outcome = run(name, Job("python", "input()"))

    assert outcome.status is Status.ERROR
    assert "EOFError" in (outcome.error or "")


def test_a_traceback_names_the_file_and_shows_the_line(name: str) -> None:
    outcome = run(name, Job("python", "x = 1\nx / 0"))

    assert outcome.facts.exit_code == 1
    assert "main.py" in outcome.stderr
    assert "x / 0" in outcome.stderr
    assert outcome.error == outcome.stderr


def test_an_uncaught_javascript_error_names_the_file(name: str) -> None:
    outcome = run(name, Job("javascript", "const x = 1\nthrow new Error('bad')"))

    assert outcome.status is Status.ERROR
    assert "main.js:2" in outcome.stderr


@pytest.mark.parametrize("code", [3, 137, 255])
def test_exit_codes_are_kept(name: str, code: int) -> None:
    outcome = run(name, Job("python", f"raise SystemExit({code})"))

    assert (outcome.status, outcome.facts.exit_code) == (Status.ERROR, code)


def test_what_is_written_to_the_null_device_is_gone(name: str) -> None:
    code = "import os; print(open('/dev/null', 'w').write('x'), os.system('echo y > /dev/null'))"
    assert run(name, Job("python", code)).stdout == "1 0\n"


def test_a_signal_is_named(name: str) -> None:
    outcome = run(name, Job("python", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"))

    assert (outcome.status, outcome.facts.signal) == (Status.KILLED, "SIGSEGV")


def test_a_sleeper_is_ended_by_the_wall_limit(name: str) -> None:
    outcome = run(name, Job("python", "print(1, flush=True)\nimport time; time.sleep(1e6)", limits=Limits(wall_ms=500)))

    assert outcome.status is Status.TIMEOUT
    assert outcome.stdout == "1\n"
    assert outcome.error == "Time limit exceeded: 0.5 s of wall time"
    assert outcome.facts.usage.wall_ms >= 500


def test_a_spinner_is_ended_by_the_cpu_limit(name: str) -> None:
    outcome = run(name, Job("javascript", "for (;;) {}", limits=Limits(cpu_ms=400, wall_ms=30_000)))

    assert outcome.status is Status.CPU_LIMIT
    assert outcome.facts.usage.cpu_ms >= 400


def test_a_memory_bomb_is_ended_by_the_memory_limit(name: str) -> None:
    code = "x = []\nwhile True: x.append(bytearray(1 << 20))"
    outcome = run(name, Job("python", code, limits=Limits(memory_bytes=64 << 20)))

    assert outcome.status is Status.MEMORY_LIMIT
    assert outcome.error is not None
    assert outcome.error.startswith("Memory limit exceeded: 64 MiB")


def test_a_memory_limit_below_any_program_is_reached_at_once(name: str) -> None:
    outcome = run(name, Job("python", "import time; time.sleep(5)", limits=Limits(memory_bytes=1)))

    assert outcome.status is Status.MEMORY_LIMIT
    assert (outcome.error or "").startswith("Memory limit exceeded: 1 bytes")


def test_endless_output_is_cut_and_what_came_before_is_kept(name: str) -> None:
    outcome = run(name, Job("python", "while True: print('x' * 99)", limits=Limits(output_bytes=10_000)))

    assert outcome.status is Status.OUTPUT_LIMIT
    assert outcome.stdout == ("x" * 99 + "\n") * 100


def test_output_of_exactly_the_limit_is_not_cut(name: str) -> None:
    outcome = run(name, Job("python", "print('x' * 9999)", limits=Limits(output_bytes=10_000)))

    assert (outcome.status, len(outcome.stdout)) == (Status.OK, 10_000)


def test_bytes_that_are_no_text_are_shown_as_such(name: str) -> None:
    outcome = run(name, Job("python", "import os; os.write(1, b'a\\xffb')"))

    assert outcome.stdout == "a\ufffdb"


def test_a_cancelled_run_gives_its_outcome(name: str) -> None:
    async def main() -> Outcome:
        started = asyncio.Event()
        channel = Channel(emit=lambda stream, chunk: started.set())
        async with opened(name) as engine:
            code = "import os, time; os.write(1, b'1\\n'); time.sleep(1e6)"
            running = asyncio.ensure_future(engine.run(Job("python", code), channel))
            await within(started.wait())
            channel.cancel.set()
            await within(running)
            return running.result()

    outcome = asyncio.run(main())

    assert outcome.status is Status.CANCELLED
    assert outcome.stdout == "1\n"


def test_children_that_left_the_session_end_with_the_run(name: str) -> None:
    code = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(1e6)\nprint('done')"
    outcome = run(name, Job("python", code))

    assert (outcome.status, outcome.stdout) == (Status.OK, "done\n")


def test_many_runs_at_once_do_not_mix(name: str) -> None:
    async def main() -> list[Outcome]:
        async with opened(name) as engine:
            return await asyncio.gather(*(engine.run(Job("python", f"print({n})"), Channel()) for n in range(8)))

    assert [outcome.stdout for outcome in asyncio.run(main())] == [f"{n}\n" for n in range(8)]
