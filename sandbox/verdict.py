"""Names what became of a run. Nothing else in the project does."""

from __future__ import annotations

import codecs

from sandbox.model import Facts, Job, Limits, Outcome, Status, Stream


def judge(facts: Facts, limits: Limits) -> Status:
    """The first rule that fits: our own fault, then what we ended the run for, then what the kernel says."""
    if facts.engine_failure is not None:
        return Status.INTERNAL_ERROR
    if facts.cancelled:
        return Status.CANCELLED
    if facts.wall_cut:
        return Status.TIMEOUT
    if facts.oom_kills:
        return Status.MEMORY_LIMIT
    if facts.output_cut:
        return Status.OUTPUT_LIMIT
    if facts.cpu_cut or facts.usage.cpu_ms > limits.cpu_ms:
        return Status.CPU_LIMIT
    if facts.exit_code == 0:
        return Status.OK
    if facts.refused_forks:
        return Status.PROCESS_LIMIT
    return Status.ERROR if facts.signal is None else Status.KILLED


def conclude(job: Job, facts: Facts, stdout: bytes, stderr: bytes) -> Outcome:
    """The Outcome of a run that is over, with `error` as a person reads it."""
    status = judge(facts, job.limits)
    out, err = (_text(written, name in facts.output_cut) for name, written in _streams(stdout, stderr))
    return Outcome(status, out, err, _error(status, facts, job.limits, err), facts)


def _streams(stdout: bytes, stderr: bytes) -> tuple[tuple[Stream, bytes], tuple[Stream, bytes]]:
    return ("stdout", stdout), ("stderr", stderr)


def _text(written: bytes, cut: bool) -> str:
    """UTF-8 with U+FFFD for what is none; a character that our own cut halved is left out."""
    return codecs.getincrementaldecoder("utf-8")("replace").decode(written, final=not cut)


def _error(status: Status, facts: Facts, limits: Limits, stderr: str) -> str | None:
    if status is Status.OK:
        return None
    if status is Status.ERROR and stderr.strip():
        return stderr
    sentence = _sentence(status, facts, limits)
    return f"{sentence}\n{stderr}" if stderr else sentence


def _sentence(status: Status, facts: Facts, limits: Limits) -> str:
    match status:
        case Status.INTERNAL_ERROR:
            return f"The sandbox failed: {facts.engine_failure}"
        case Status.CANCELLED:
            return "Cancelled"
        case Status.TIMEOUT:
            return f"Time limit exceeded: {limits.wall_ms / 1000:g} s of wall time"
        case Status.CPU_LIMIT:
            return f"CPU limit exceeded: {limits.cpu_ms / 1000:g} s of CPU time"
        case Status.MEMORY_LIMIT:
            return f"Memory limit exceeded: {_size(limits.memory_bytes, 20, 'MiB')}"
        case Status.OUTPUT_LIMIT:
            names = {"stdout": "standard output", "stderr": "standard error"}
            where = " and ".join(names[stream] for stream in facts.output_cut)
            return f"Output limit exceeded: {_size(limits.output_bytes, 10, 'KiB')} on {where}"
        case Status.PROCESS_LIMIT:
            return f"Process limit exceeded: {limits.processes} processes and threads"
        case Status.KILLED:
            return f"Ended by signal {facts.signal}"
        case _:
            return f"Ended with exit code {facts.exit_code}"


def _size(size: int, shift: int, unit: str) -> str:
    return f"{size / (1 << shift):g} {unit}" if size >= 1 << shift else f"{size} bytes"
