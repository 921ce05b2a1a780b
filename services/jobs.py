"""Turns the data of `runCode` into a Job, and an Outcome into the data of `output`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from protocol.errors import ClusterUnavailable, InvalidMessage, PayloadTooLarge
from sandbox.model import Job, Limits, Outcome

MAX_CODE_BYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class Terms:
    """What a client gets if it asks for nothing, and the most that it may ask for."""

    defaults: Limits
    maxima: Limits


@dataclass(frozen=True, slots=True)
class _Term:
    """One limit: its field in Limits, its unit, and the setting that changes its maximum."""

    field: str
    unit: str
    setting: str


TERMS = {
    "timeMs": _Term("wall_ms", "ms", "--max-wall-ms"),
    "cpuMs": _Term("cpu_ms", "ms", "--max-cpu-ms"),
    "memoryBytes": _Term("memory_bytes", "bytes", "--max-memory-bytes"),
    "outputBytes": _Term("output_bytes", "bytes", "--max-output-bytes"),
    "processes": _Term("processes", "processes", "--max-run-processes"),
}
NOT_YET = ("files", "returnFiles")
LIVE = ("stream", "interactive")
"""What only a connection can have, and so no task."""


def job_of(data: Mapping[str, Any], terms: Terms, at: str = "/data") -> Job:
    """The Job that a checked `runCode` asks for. `at` is where `data` stands in the message, a JSON Pointer.

    Raises:
        PayloadTooLarge: more code than 256 KiB.
        InvalidMessage: a limit above the server's maximum.
        ClusterUnavailable: `mode: cluster`, and there is none.
    """
    where = at[1:].replace("/", ".")
    size = len(data["code"].encode("utf-8", "surrogatepass"))
    if size > MAX_CODE_BYTES:
        raise PayloadTooLarge(
            f"{where}.code has {size} bytes, and the limit is {MAX_CODE_BYTES} bytes (fixed by the protocol)",
            path=f"{at}/code", limit=MAX_CODE_BYTES,
        )  # fmt: skip
    for name in NOT_YET:
        if data.get(name):
            raise InvalidMessage(f"{where}.{name} is not offered by this server yet", path=f"{at}/{name}")
    if data["mode"] == "cluster":
        raise ClusterUnavailable("this server has no cluster; use mode standalone", path=f"{at}/mode")
    return Job(
        language=data["language"],
        code=data["code"],
        stdin=data.get("stdin", ""),
        args=tuple(data.get("args", ())),
        limits=_limits(data.get("limits", {}), terms, f"{at}/limits"),
    )


def _limits(asked: Mapping[str, int | float], terms: Terms, at: str) -> Limits:
    limits = terms.defaults
    for name, value in asked.items():
        term = TERMS[name]
        most = getattr(terms.maxima, term.field)
        if value > most:
            raise InvalidMessage(
                f"{at[1:].replace('/', '.')}.{name} must be at most {most} {term.unit}, not {value};"
                f" {term.setting} changes that",
                path=f"{at}/{name}", limit=most,
            )  # fmt: skip
        limits = replace(limits, **{term.field: int(value)})
    return limits


def output_of(outcome: Outcome, queue_ms: float) -> dict[str, Any]:
    """The data of the `output` message."""
    facts = outcome.facts
    return {
        # A client of the seed alone has no other field in which it would see what a good program wrote to stderr.
        "output": outcome.stdout + outcome.stderr if outcome.error is None else outcome.stdout,
        "error": outcome.error,
        "executionTime": round(facts.usage.wall_ms, 3),
        "memoryUsed": facts.usage.memory_bytes,
        "status": outcome.status.value,
        "stderr": outcome.stderr,
        "exitCode": facts.exit_code,
        "signal": facts.signal,
        "cpuTime": round(facts.usage.cpu_ms, 3),
        "truncated": list(facts.output_cut),
        "queueTime": round(queue_ms, 3),
    }
