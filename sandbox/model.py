"""The words of the sandbox: a Job goes in, an Outcome comes out, Facts lie between."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

Language = Literal["python", "javascript"]
Stream = Literal["stdout", "stderr"]


class Status(StrEnum):
    """How a run ended. Only `verdict.judge` chooses one."""

    OK = "ok"
    ERROR = "error"
    TIMEOUT = "timeout"
    CPU_LIMIT = "cpuLimit"
    MEMORY_LIMIT = "memoryLimit"
    OUTPUT_LIMIT = "outputLimit"
    PROCESS_LIMIT = "processLimit"
    KILLED = "killed"
    CANCELLED = "cancelled"
    INTERNAL_ERROR = "internalError"


@dataclass(frozen=True, slots=True)
class Limits:
    """What one run may use. `tmp_bytes` and `open_files` are the server's to set, the others a client's too."""

    wall_ms: int = 10_000
    cpu_ms: int = 10_000
    memory_bytes: int = 256 << 20
    output_bytes: int = 1 << 20
    processes: int = 64
    tmp_bytes: int = 64 << 20
    open_files: int = 256


@dataclass(frozen=True, slots=True)
class Job:
    """One program to run, with everything that it is given. `files`: path below its folder → text.

    `batch` says that it is one of many that nobody waits for: where engines have a choice, others go first.
    """

    language: Language
    code: str
    stdin: str = ""
    args: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    return_files: bool = False
    limits: Limits = field(default_factory=Limits)
    batch: bool = False

    @property
    def given_bytes(self) -> int:
        """The size of all that it is given."""
        return _bytes_in(self.code, self.stdin, *self.args, *self.files.values())

    @property
    def return_bytes(self) -> int:
        """How many bytes of files are given back at most, what it was given included."""
        return self.limits.output_bytes + _bytes_in(self.code, *self.files.values()) if self.return_files else 0


def _bytes_in(*texts: str) -> int:
    return sum(len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass")) for text in texts)


@dataclass(frozen=True, slots=True)
class Usage:
    """What a run used: wall time from the program's first instruction, the rest of its whole process tree."""

    wall_ms: float = 0.0
    cpu_ms: float = 0.0
    memory_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Facts:
    """What an engine saw of a run; no judgement in it.

    `exit_code` and `signal` (a name such as "SIGKILL") are of the program's first process; at most one is set.
    `wall_cut`, `cpu_cut`, `output_cut` and `cancelled` say that the engine ended the run, and why.
    `files` are those that it left in its folder, if they were asked for; `files_cut`: some did not fit.
    `oom_kills` and `refused_forks` are the kernel's counts for the run. `engine_failure` is a sentence about a
    fault of ours: then the program's own end is not known.
    """

    exit_code: int | None = None
    signal: str | None = None
    wall_cut: bool = False
    cpu_cut: bool = False
    output_cut: tuple[Stream, ...] = ()
    cancelled: bool = False
    oom_kills: int = 0
    refused_forks: int = 0
    engine_failure: str | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)
    files_cut: bool = False
    usage: Usage = field(default_factory=Usage)


@dataclass(frozen=True, slots=True)
class Outcome:
    """A run that is over. `error` is None exactly when `status` is OK. `worker`: the cluster's one that ran it."""

    status: Status
    stdout: str
    stderr: str
    error: str | None
    facts: Facts
    worker: str | None = None


class Feed:
    """Standard input that comes while a run lasts. The client's side pushes, the run's side takes."""

    def __init__(self) -> None:
        self.ended = False
        self._waiting = bytearray()
        self._wake: Callable[[], None] = lambda: None

    def __len__(self) -> int:
        """Bytes that the run has not taken yet."""
        return len(self._waiting)

    def push(self, text: bytes) -> None:
        """More to read."""
        self._waiting += text
        self._wake()

    def end(self) -> None:
        """Nothing more will come: the run finds the end of the file."""
        self.ended = True
        self._wake()

    def attach(self, wake: Callable[[], None]) -> None:
        """`wake` is called whenever there is something to take."""
        self._wake = wake

    def take(self, count: int) -> bytes:
        """The first `count` bytes, which stay until `taken` says how many of them were used."""
        return bytes(self._waiting[:count])

    def taken(self, count: int) -> None:
        """So many bytes are read."""
        del self._waiting[:count]


def silent(stream: Stream, chunk: bytes) -> None:
    """The `emit` of a run that nobody listens to."""


class Cancel(asyncio.Event):
    """Set to end a run. Its listeners hear of it at once."""

    def __init__(self) -> None:
        super().__init__()
        self.listeners: list[Callable[[], None]] = []

    def set(self) -> None:
        """Ends the run."""
        super().set()
        for listener in list(self.listeners):
            listener()


@dataclass(frozen=True, slots=True)
class Channel:
    """What flows between a run and its client while it lasts.

    `emit` takes the bytes of a stream as they come and may neither wait nor raise. Setting `cancel` ends the run,
    which then still gives its Outcome. `feed` is standard input after the Job's own; without one it ends with that.
    `first`: its client has no other run under way, so it may have what an engine keeps ready for such clients.
    `ended` is called when the program has ended, if the engine knows before all of its Outcome is there.
    """

    emit: Callable[[Stream, bytes], None] = silent
    cancel: Cancel = field(default_factory=Cancel)
    feed: Feed | None = None
    first: bool = True
    ended: Callable[[], None] = lambda: None


@dataclass(frozen=True, slots=True)
class Check:
    """One promise of the sandbox, tried on this machine."""

    promise: str
    kept: bool
    detail: str
