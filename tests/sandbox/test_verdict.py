"""The one function that names a status: it has an answer for all facts, and the right one."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from sandbox.model import Facts, Job, Limits, Status, Usage
from sandbox.verdict import conclude, judge

flags = st.booleans()
facts_of_any_run = st.builds(
    Facts,
    exit_code=st.none() | st.integers(0, 255),
    signal=st.none() | st.sampled_from(["SIGKILL", "SIGSEGV"]),
    wall_cut=flags,
    cpu_cut=flags,
    output_cut=st.sampled_from([(), ("stdout",), ("stderr",), ("stdout", "stderr")]),
    cancelled=flags,
    oom_kills=st.integers(0, 2),
    refused_forks=st.integers(0, 2),
    engine_failure=st.none() | st.just("nsjail is gone"),
    usage=st.builds(Usage, st.floats(0, 1e6), st.floats(0, 2e4), st.integers(0, 1 << 30)),
)
LIMITS = Limits()


@given(facts_of_any_run, st.binary(max_size=50), st.binary(max_size=50))
def test_there_is_an_error_exactly_when_a_run_is_not_ok(facts: Facts, out: bytes, err: bytes) -> None:
    outcome = conclude(Job("python", ""), facts, out, err)

    assert (outcome.error is None) == (outcome.status is Status.OK)
    assert outcome.error is None or outcome.error.strip()


@given(facts_of_any_run)
def test_ok_means_exit_code_0_inside_every_limit(facts: Facts) -> None:
    ended_well = facts.exit_code == 0 and facts.usage.cpu_ms <= LIMITS.cpu_ms
    cut = facts.wall_cut or facts.cpu_cut or facts.output_cut or facts.cancelled or facts.oom_kills
    expected = bool(ended_well and not cut and facts.engine_failure is None)

    assert (judge(facts, LIMITS) is Status.OK) == expected


@given(facts_of_any_run)
def test_our_own_fault_is_told_before_all_others_and_cancel_next(facts: Facts) -> None:
    assert judge(replace(facts, engine_failure="x"), LIMITS) is Status.INTERNAL_ERROR
    assert judge(replace(facts, engine_failure=None, cancelled=True), LIMITS) is Status.CANCELLED


@given(facts_of_any_run)
def test_a_program_that_we_ended_is_never_told_to_have_failed_by_itself(facts: Facts) -> None:
    if facts.wall_cut or facts.cpu_cut or facts.output_cut:
        assert judge(facts, LIMITS) not in (Status.OK, Status.ERROR, Status.KILLED, Status.PROCESS_LIMIT)


def test_sentences_name_the_limit_and_its_unit() -> None:
    def said(**of_run: object) -> str:
        return conclude(Job("python", ""), Facts(signal="SIGKILL", **of_run), b"", b"tail\n").error or ""  # type: ignore[arg-type]

    assert said(wall_cut=True) == "Time limit exceeded: 10 s of wall time\ntail\n"
    assert said(cpu_cut=True) == "CPU limit exceeded: 10 s of CPU time\ntail\n"
    assert said(oom_kills=1) == "Memory limit exceeded: 256 MiB\ntail\n"
    assert said(output_cut=("stdout",)) == "Output limit exceeded: 1024 KiB on standard output\ntail\n"
    assert said(refused_forks=1) == "Process limit exceeded: 64 processes and threads\ntail\n"
    assert said() == "Ended by signal SIGKILL\ntail\n"


def test_bytes_that_are_no_text_are_shown_and_a_cut_character_is_not() -> None:
    whole = conclude(Job("python", ""), Facts(exit_code=0), b"a\xffb\xe2\x82", b"")
    cut = conclude(Job("python", ""), Facts(output_cut=("stdout",)), b"ab\xe2\x82", b"")

    assert whole.stdout == "a\ufffdb\ufffd"
    assert cut.stdout == "ab"
