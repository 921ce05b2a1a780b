"""NsjailEngine: every run starts cold in a jail of its own, made by nsjail."""

from __future__ import annotations

import asyncio
import functools
import marshal
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sandbox.cgroup import TooLittleMemory
from sandbox.engine import EngineUnavailable, did_not_fit
from sandbox.host import FIRST_UID, UIDS, Host, Uids
from sandbox.interpreters import SCRATCH_PLACES, Wanted
from sandbox.jail import Jail
from sandbox.languages import LANGUAGES, command
from sandbox.model import Channel, Job, Limits, Outcome
from sandbox.policy import (
    INSIDE_UID,
    command_of,
    content,
    environment_inside,
    identity,
    quoted,
    scratch,
    tmpfs,
    tree,
)  # fmt: skip
from sandbox.ready import LEFT_FOR_FIRST, Ready
from sandbox.seccomp import kafel

CHILD = Path(__file__).parent / "child"
MARSHAL_VERSION = 4  # which every python from 3.4 on reads
OWN_PROCESSES = 2
"""nsjail itself and child/init.py are in a run's control group beside the program."""


class NsjailEngine:
    """Runs each Job in a fresh jail; needs Linux and nsjail, and root or user namespaces for everyone."""

    name = "nsjail"

    def __init__(self, wanted: Wanted | None = None, warm: int = 1, number: int = 0) -> None:
        """`warm` jails wait for the next runs. `number` tells engines on one machine apart, which share no user ids."""
        self._wanted = wanted or Wanted()
        self._warm = warm
        self._uids = Uids(FIRST_UID + number * UIDS)
        self._host: Host | None = None
        self._jails: Ready[Jail] | None = None

    async def open(self) -> None:
        """Finds nsjail, the interpreters and the control groups. Raises EngineUnavailable."""
        self._host = host = await asyncio.to_thread(Host, self._wanted)
        self._tree = [*tree(host), f"seccomp_string: {quoted(kafel())}"]
        self._init, self._collect = ((CHILD / name).read_text() for name in ("init.py", "collect.py"))
        # Threads that live as long as this: the kernel may end a child with the thread that started it.
        self._threads = ThreadPoolExecutor(max(1, self._warm), thread_name_prefix="jails")
        make = functools.partial(asyncio.get_running_loop().run_in_executor, self._threads, self._make_jail, host)
        self._jails = Ready(make, self._warm)
        await self._jails.fill()

    def warnings(self) -> list[str]:
        """What this machine does not let the engine enforce."""
        return self._opened().warnings()

    async def run(self, job: Job, channel: Channel) -> Outcome:
        """Runs `job` in a fresh jail."""
        if self._jails is None:
            raise EngineUnavailable("the nsjail engine is not open")
        jail = await self._jails.take(leave=0 if channel.first else LEFT_FOR_FIRST)
        try:
            jail.leaf.limit(job.limits, OWN_PROCESSES)
            jail.begin(self.config_of(job, jail.uid), self.task_of(job))
            return await jail.watch(job, channel)
        except TooLittleMemory:
            return did_not_fit(job)
        finally:
            await jail.discard()
            self._uids.give_back(jail.uid)

    async def close(self) -> None:
        """Gives the control groups back."""
        if self._jails is not None:
            await self._jails.close()
            self._threads.shutdown()
        if self._host is not None:
            self._host.close()
        self._jails = self._host = None

    def task_of(self, job: Job) -> bytes:
        """What init.py is to do."""
        interpreter = str(self._opened().interpreters[job.language].inside)
        return marshal.dumps(
            {
                "argv": command(job.language, interpreter, job.args),
                "environment": environment_inside(self._opened(), job.language),
                "files": {**job.files, LANGUAGES[job.language].file_name: job.code},
                "return_bytes": job.return_bytes,
            },
            MARSHAL_VERSION,
        )

    def config_of(self, job: Job, uid: int) -> Callable[[int, int, int], str]:
        """The configuration of one run; the numbers of the descriptors come when they are known."""
        host, limits = self._opened(), job.limits
        lines = [
            *self._tree,
            *(tmpfs(place, scratch(limits)) for place in SCRATCH_PLACES),
            *identity(INSIDE_UID, uid, uid if host.is_root else os.getegid()),
            f"time_limit: {limits.wall_ms // 1000 + 30}  # a backstop, should the server not be there any more",
            f"rlimit_nofile: {limits.open_files}",
            _process_limit(host, limits),
            content("/init.py", self._init),
            *([content("/collect.py", self._collect)] if job.return_files else []),
        ]

        def complete(job_fd: int, report_fd: int, log_fd: int) -> str:
            python = str(host.interpreters["python"].inside)
            own = [
                f"log_fd: {log_fd}",
                f"pass_fd: {job_fd}",
                f"pass_fd: {report_fd}",
                command_of([python, "-I", "-S", "/init.py", str(job_fd), str(report_fd)]),
            ]
            return "\n".join([*lines, *own])

        return complete

    def _make_jail(self, host: Host) -> Jail:
        """A jail that waits. Called in threads."""
        return Jail(host.nsjail, host.groups.leaf(), self._uids.take(), warded=host.warden is not None)

    def _opened(self) -> Host:
        if self._host is None:
            raise EngineUnavailable("the nsjail engine is not open")
        return self._host


def _process_limit(host: Host, limits: Limits) -> str:
    """The control group counts processes; where there is none, the jail's own user id does."""
    if host.no_cgroups:
        return f"rlimit_nproc_type: VALUE rlimit_nproc: {limits.processes + 1}"  # and init
    return "rlimit_nproc_type: HARD"
