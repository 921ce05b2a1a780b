"""From the data of runCode to a Job, and from an Outcome to the data of output."""

from __future__ import annotations

from dataclasses import replace

import pytest

from protocol.errors import InvalidMessage, PayloadTooLarge
from sandbox.languages import LANGUAGES
from sandbox.model import Facts, Job, Limits, Usage
from sandbox.verdict import conclude
from services.jobs import LANGUAGE_FILES, MAX_CODE_BYTES, TERMS, Terms, job_of, output_of

CODE = {"language": "python", "code": "", "mode": "standalone"}
OFFERED = Terms(Limits(), Limits(60_000, 60_000, 1 << 30, 8 << 20, 256))


def test_what_is_not_asked_for_is_the_default() -> None:
    assert job_of(CODE, OFFERED) == Job("python", "")


@pytest.mark.parametrize("name", TERMS)
def test_a_limit_may_be_set_up_to_its_maximum(name: str) -> None:
    term = TERMS[name]
    most = getattr(OFFERED.maxima, term.field)

    assert getattr(job_of({**CODE, "limits": {name: most}}, OFFERED).limits, term.field) == most
    with pytest.raises(InvalidMessage) as caught:
        job_of({**CODE, "limits": {name: most + 1}}, OFFERED, "/data/tasks/2/params")
    assert caught.value.sentence == (
        f"data.tasks.2.params.limits.{name} must be at most {most} {term.unit}, not {most + 1};"
        f" {term.setting} changes that"
    )
    assert caught.value.details["path"] == f"/data/tasks/2/params/limits/{name}"


def test_code_is_bounded_in_bytes() -> None:
    job_of({**CODE, "code": "x" * MAX_CODE_BYTES}, OFFERED)
    with pytest.raises(PayloadTooLarge, match="262146 bytes, and the limit is 262144 bytes"):
        job_of({**CODE, "code": "ü" * (MAX_CODE_BYTES // 2 + 1)}, OFFERED)


def test_both_modes_run_the_same_job() -> None:
    assert job_of({**CODE, "mode": "cluster"}, OFFERED) == job_of(CODE, OFFERED)


def test_an_output_names_the_worker_if_there_was_one() -> None:
    job = Job("python", "")
    outcome = conclude(job, Facts(exit_code=0), b"", b"")

    assert "worker" not in output_of(outcome, 1.0, job)
    assert output_of(replace(outcome, worker="w"), 1.0, job)["worker"] == "w"


def test_an_output_has_the_streams_apart_when_the_run_failed_and_together_when_it_was_ok() -> None:
    usage = Usage(1.23456, 2.34567, 7)
    good = output_of(
        conclude(Job("python", ""), Facts(exit_code=0, usage=usage), b"out", b"err"), 1.0, Job("python", "")
    )
    bad = output_of(
        conclude(Job("python", ""), Facts(exit_code=1, usage=usage), b"out", b"err"), 1.0, Job("python", "")
    )

    assert (good["output"], good["stderr"], good["error"]) == ("outerr", "err", None)
    assert (bad["output"], bad["stderr"], bad["error"]) == ("out", "err", "err")
    assert (good["executionTime"], good["cpuTime"], good["memoryUsed"]) == (1.235, 2.346, 7)


def test_the_names_of_programs_are_those_of_the_sandbox() -> None:
    assert {name: spec.file_name for name, spec in LANGUAGES.items()} == LANGUAGE_FILES


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/passwd", "a/../../x", "", ".", "..", "a//b", "a/", "./a", "x\0y", "\ud800", "x" * 256, "main.py",
     "main.py/x", "/".join("a" * 17)],
)  # fmt: skip
def test_a_file_that_would_not_be_in_the_folder_is_refused(name: str) -> None:
    with pytest.raises(InvalidMessage, match="cannot be used") as caught:
        job_of({**CODE, "files": {"good.txt": "", name: ""}}, OFFERED)

    assert caught.value.details["path"].startswith("/data/files/")


def test_a_file_cannot_stand_where_a_folder_is_needed() -> None:
    with pytest.raises(InvalidMessage, match="another file stands"):
        job_of({**CODE, "files": {"a": "", "a/b": ""}}, OFFERED)
