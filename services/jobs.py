"""Turns the data of `runCode` into a Job, and an Outcome into the data of `output`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from protocol.errors import InvalidMessage, PayloadTooLarge
from protocol.message import clip, has_surrogate, pointer
from sandbox.model import Job, Limits, Outcome

MAX_CODE_BYTES = 256 << 10
MAX_NAME_BYTES = 255
MAX_PARTS = 16
MAX_FILES = 100
LANGUAGE_FILES = {"python": "main.py", "javascript": "main.js"}
"""What the program's own file is called; a test compares it with the sandbox's."""


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
LIVE = ("stream", "interactive")
"""What only a connection can have, and so no task."""


def job_of(data: Mapping[str, Any], terms: Terms, at: str = "/data") -> Job:
    """The Job that a checked `runCode` asks for. `at` is where `data` stands in the message, a JSON Pointer.

    Raises:
        PayloadTooLarge: more code than 256 KiB.
        InvalidMessage: a limit above the server's maximum, or a file that would not be in the program's folder.
    """
    where = at[1:].replace("/", ".")
    size = len(data["code"].encode("utf-8", "surrogatepass"))
    if size > MAX_CODE_BYTES:
        raise PayloadTooLarge(
            f"{where}.code has {size} bytes, and the limit is {MAX_CODE_BYTES} bytes (fixed by the protocol)",
            path=f"{at}/code", limit=MAX_CODE_BYTES,
        )  # fmt: skip
    files = data.get("files", {})
    _check_files(files, LANGUAGE_FILES[data["language"]], f"{at}/files")
    return Job(
        language=data["language"],
        code=data["code"],
        stdin=data.get("stdin", ""),
        args=tuple(data.get("args", ())),
        files=files,
        return_files=data.get("returnFiles", False),
        limits=_limits(data.get("limits", {}), terms, f"{at}/limits"),
    )


def _check_files(files: Mapping[str, str], program: str, at: str) -> None:
    for name in files:
        parts = name.split("/")
        folders = {"/".join(parts[:depth]) for depth in range(1, len(parts))}
        if any(part in ("", ".", "..") for part in parts) or "\0" in name or has_surrogate(name):
            reason = "it must lead to a file below the program's folder, without . or .."
        elif max(len(part.encode()) for part in parts) > MAX_NAME_BYTES or len(parts) > MAX_PARTS:
            reason = f"the limit is {MAX_NAME_BYTES} bytes for each part of it, and {MAX_PARTS} parts"
        elif program in {name, *folders}:
            reason = "that is the program itself"
        elif folders & files.keys():
            reason = "another file stands where it needs a folder"
        else:
            continue
        raise InvalidMessage(f"the file name {clip(name)} cannot be used: {reason}", path=at + pointer([name]))


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


def output_of(outcome: Outcome, queue_ms: float, job: Job, *, streamed: bool = False) -> dict[str, Any]:
    """The data of the `output` message. `streamed`: the client was shown standard error already."""
    shows_stderr = outcome.error is None and not streamed
    facts = outcome.facts
    files, files_cut = _files_of(outcome, job)
    return {
        # A client of the seed alone has no other field in which it would see what a good program wrote to stderr.
        "output": outcome.stdout + outcome.stderr if shows_stderr else outcome.stdout,
        "error": outcome.error,
        "executionTime": round(facts.usage.wall_ms, 3),
        "memoryUsed": facts.usage.memory_bytes,
        "status": outcome.status.value,
        "stderr": outcome.stderr,
        "exitCode": facts.exit_code,
        "signal": facts.signal,
        "cpuTime": round(facts.usage.cpu_ms, 3),
        "truncated": [*facts.output_cut, *(["files"] if files_cut else [])],
        "queueTime": round(queue_ms, 3),
        **({} if outcome.worker is None else {"worker": outcome.worker}),
        **({"files": files} if job.return_files else {}),
    }


def _files_of(outcome: Outcome, job: Job) -> tuple[dict[str, str], bool]:
    """What the program has left, without what it was given and has not changed; and whether that is not all."""
    given = {**job.files, LANGUAGE_FILES[job.language]: job.code}
    left = {name: content.decode("utf-8", "replace") for name, content in outcome.facts.files.items()}
    new = {name: text for name, text in left.items() if given.get(name) != text}
    shown: dict[str, str] = {}
    room = job.limits.output_bytes
    for name, text in new.items():
        room -= len(outcome.facts.files[name])
        if len(shown) < MAX_FILES and room >= 0:
            shown[name] = text
    return shown, outcome.facts.files_cut or len(shown) < len(new)
