"""ForkServerEngine: runs start in milliseconds, forked from warm interpreters inside jails."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import marshal
import os
import platform
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from background import spawn
from sandbox.cgroup import TooLittleMemory
from sandbox.engine import EngineUnavailable, did_not_fit
from sandbox.first_process import executable
from sandbox.forkjail import ForkServer, ForkServerLost, ForkServers
from sandbox.host import FIRST_UID, UIDS, Host, Uids
from sandbox.interpreters import Wanted, find_koffi, runtime_folder
from sandbox.languages import LANGUAGES
from sandbox.model import Channel, Job, Language, Limits, Outcome, Status
from sandbox.placing import placed
from sandbox.policy import (
    INSIDE_UID,
    bind,
    command_of,
    content,
    environment_inside,
    environment_of,
    folder,
    identity,
    quoted,
    tree,
)  # fmt: skip
from sandbox.ready import LEFT_FOR_FIRST, Ready
from sandbox.seccomp import asking, bpf, kafel_of_fork_server
from sandbox.slot import Slot
from sandbox.syscalls import CODE_AT, JOB_AT, JOB_BYTES, PART, REQUEST_AT, SHARED_AT, code
from sandbox.world import JOB, REPORT, Parent, request, shared

log = logging.getLogger(__name__)

CHILD = Path(__file__).parent / "child"
SERVER_UIDS = 100
"""So many of an engine's user ids are for the fork servers themselves."""
NAMED_UIDS = 256
"""So many of the slots' users have a name in their /etc/passwd; more are rarely needed at once."""
SEEDS = 4
"""Python's hashes are seeded when it starts, not when it is forked. So runs take turns on a few fork servers…"""
MOST_FORKS = 1000
"""…each of which is replaced, at a cost of about a dozen runs, after so many."""
ATTEMPTS = 2 * SEEDS
"""To find a fork server that lives."""
EVER = 1 << 62
MARSHAL_VERSION = 4
PRELOAD = (
    "collections", "contextlib", "copy", "dataclasses", "datetime", "functools", "heapq", "io", "itertools", "json",
    "math", "operator", "random", "re", "string", "threading", "traceback", "typing",
)  # fmt: skip
"""Python's modules that programs import most, apart from those that python has imported anyway."""
TRIALS: dict[Language, tuple[str, str]] = {
    "python": (
        "import os, random, sys; print(os.getpid(), sys.argv); print(random.random(), file=sys.stderr)",
        "2 ['main.py']\n",
    ),
    "javascript": ("console.log(process.pid > 0, process.argv.length); console.error(Math.random())", "true 2\n"),
}
"""What a program prints; on its standard error, it is to be something else each time."""


class ForkServerEngine:
    """Runs each Job in a child that was forked ahead of need and waits in namespaces of its own.

    Needs what NsjailEngine needs, and libseccomp. Where koffi is not installed, node processes are started ahead
    instead of forked.
    """

    name = "forkserver"

    def __init__(
        self, wanted: Wanted | None = None, warm: int = 1, number: int = 0,
        preload: tuple[str, ...] = PRELOAD, usual: Limits | None = None, seeds: int = SEEDS,
    ) -> None:  # fmt: skip
        """`warm` slots of each language wait for the next runs.

        `number` tells engines on one machine apart, `preload` are the modules that python's fork servers import, and
        `usual` are the limits that runs mostly have: others of `tmp_bytes` and `open_files` take a moment longer. Of
        python there are `seeds` fork servers, each with a hash seed of its own.
        """
        self._wanted = wanted or Wanted()
        self._warm = warm
        self._preload = preload
        self._usual = usual or Limits()
        self._seeds = seeds
        self._first_uid = FIRST_UID + number * UIDS
        self._server_uids, self._uids = Uids(self._first_uid), Uids(self._first_uid + SERVER_UIDS)
        self._host: Host | None = None
        self._koffi: Path | None = None
        self._servers: dict[Language, ForkServers] = {}
        self._slots: dict[Language, Ready[Slot]] = {}
        self._leaving: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Starts the fork servers and tries them. Raises EngineUnavailable."""
        self._host = host = await asyncio.to_thread(Host, self._wanted)
        try:
            self._filter = bpf()
            self._koffi = find_koffi(not host.is_root, runtime_folder())
            if self._koffi is None:
                log.warning("koffi is not installed (`make serve` does it): node is started ahead, not forked")
            self._servers["python"] = ForkServers(lambda: self._start_python(host), self._seeds, MOST_FORKS)
            await asyncio.to_thread(self._servers["python"].start)
            self._servers["javascript"] = await asyncio.to_thread(self._started_for_node, host)
            for language in LANGUAGES:
                make = functools.partial(self._make_slot, host, language, self._usual)
                self._slots[language] = Ready(make, self._warm)
                await self._slots[language].fill()
            for trial in TRIALS:
                await self._try(trial)
        except OSError as failure:
            await self.close()
            raise EngineUnavailable(str(failure)) from failure
        except EngineUnavailable:
            await self.close()
            raise

    def warnings(self) -> list[str]:
        """What this machine does not let the engine enforce."""
        if self._host is None:
            return []
        unlimited = ["the number of a run's processes is not limited"] if self._host.no_cgroups else []
        return [*self._host.warnings(), *unlimited]

    async def run(self, job: Job, channel: Channel) -> Outcome:
        """Runs `job` in a slot."""
        slot = await self._take(job, channel)
        try:
            slot.leaf.limit(job.limits)
            slot.begin(job, self._task_of(job, slot.parent))
            outcome = await slot.watch(job, channel)
            await slot.gone()
            return await slot.files(job, outcome)
        except TooLittleMemory:
            return did_not_fit(job)
        finally:
            lives = slot.is_good()
            leaving = self._leave(slot.discard())
            if lives:  # whoever cancels may rely on the processes being gone, and cancel once more
                await asyncio.shield(leaving)

    async def close(self) -> None:
        """Ends the fork servers and gives the control groups back."""
        for slots in self._slots.values():
            await slots.close()
        while self._leaving:
            await asyncio.wait(self._leaving)
        for servers in self._servers.values():
            await asyncio.to_thread(servers.close)
        if self._host is not None:
            self._host.close()
        self._slots, self._servers, self._host = {}, {}, None

    async def _take(self, job: Job, channel: Channel) -> Slot:
        if self._host is None:
            raise EngineUnavailable("the forkserver engine is not open")
        if (job.limits.tmp_bytes, job.limits.open_files) == (self._usual.tmp_bytes, self._usual.open_files):
            return await self._slots[job.language].take(leave=0 if channel.first else LEFT_FOR_FIRST)
        one = Ready(functools.partial(self._make_slot, self._host, job.language, job.limits), 0)
        try:
            return await one.take()
        except BaseException:  # if nobody waits for it any more, it is made nevertheless
            await asyncio.shield(self._leave(one.close()))
            raise

    def _leave(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Gives back a slot, whatever becomes of the caller."""
        leaving = spawn(work, name="give back a slot")
        self._leaving.add(leaving)
        leaving.add_done_callback(self._leaving.discard)
        return leaving

    async def _try(self, language: Language) -> None:
        code, expected = TRIALS[language]
        outcomes = [await self.run(Job(language, code), Channel()) for _ in range(2)]
        for outcome in outcomes:
            if (outcome.status, outcome.stdout) != (Status.OK, expected):
                raise EngineUnavailable(f"{language} does not run well when forked: {outcome.error or outcome.stdout}")
        if len({outcome.stderr for outcome in outcomes}) < len(outcomes):
            raise EngineUnavailable(f"{language} has the same random numbers in each run when it is forked")

    async def _make_slot(self, host: Host, language: Language, limits: Limits) -> Slot:
        """A slot that waits, of the first fork server that answers."""
        servers = self._servers[language]
        extra = self._started_ahead(host, language) if self._starts_ahead(language) else b""
        straight = language == "python"
        for _ in range(ATTEMPTS):
            server, uid = await servers.take(), self._uids.take()
            inside = INSIDE_UID + 1 + uid - self._first_uid - SERVER_UIDS if host.is_root else INSIDE_UID

            def give_back(server: ForkServer = server, uid: int = uid) -> None:
                servers.give_back(server)
                self._uids.give_back(uid)

            leaf = None
            try:
                leaf = host.groups.leaf()
                groups = len(leaf.entrances())
                slot = Slot(server, leaf, uid, give_back)
                image = request(
                    server.parent, inside, limits, groups,
                    has_network=slot.network is not None, straight=straight, extra=extra,
                )  # fmt: skip
                await slot.fill(image)
                return slot
            except (ForkServerLost, TimeoutError) as loss:
                server.lost()
                failure: OSError = loss
            except OSError as problem:
                failure = problem
            if leaf is not None:
                await leaf.remove()
            give_back()
            if server.is_alive():
                break
        raise failure

    def _task_of(self, job: Job, parent: Parent) -> bytes:
        """The job's file, for a child of `parent` or, where node is started ahead, for preload.cjs."""
        files = {**job.files, LANGUAGES[job.language].file_name: job.code}
        if self._starts_ahead(job.language):
            return json.dumps({"args": job.args, "files": files}).encode()
        extra = b""
        if job.language == "python" and (job.args or job.files):  # which come before modules that are warm
            names = [name.partition("/")[0].removesuffix(".py") for name in job.files]
            extra = marshal.dumps((list(job.args), names), MARSHAL_VERSION)
        elif job.args:
            extra = json.dumps(job.args).encode()
        contents = {name: text.encode("utf-8", "surrogatepass") for name, text in files.items()}
        return placed(contents, parent.base + REPORT, parent.base + JOB, extra)

    def _starts_ahead(self, language: Language) -> bool:
        return language == "javascript" and self._koffi is None

    def _start_python(self, host: Host) -> ForkServer:
        python = str(host.interpreters["python"].inside)
        surroundings = environment_inside(host, "python")
        packages = [surroundings["PYTHONPATH"]] if "PYTHONPATH" in surroundings else []
        lines = [
            content("/forkserver/sitecustomize.py", (CHILD / "fork_python.py").read_text()),
            content("/forkserver/early_end.py", (CHILD / "early_end.py").read_text()),
            *environment_of({**surroundings, "PYTHONPATH": ":".join(["/forkserver", *packages])}),
            command_of([python, LANGUAGES["python"].file_name]),
        ]  # fmt: skip
        setup = {**self._setup(), "preload": self._preload}
        return self._start(host, lines, marshal.dumps(setup, MARSHAL_VERSION))

    def _setup(self) -> dict[str, Any]:
        return {
            "first_process": executable(platform.machine()),
            "code": code(platform.machine()),
            "code_at": CODE_AT,
            "shared_at": SHARED_AT,
            "request_at": REQUEST_AT,
            "size": PART,
            "job_at": JOB_AT,
            "job_bytes": JOB_BYTES,
        }

    def _started_ahead(self, host: Host, language: Language) -> bytes:
        """A command and an environment."""
        argv = [str(host.interpreters[language].inside), "--require", "/preload/preload.cjs"]
        command = [*argv, LANGUAGES[language].file_name], environment_inside(host, language)
        return marshal.dumps(command, MARSHAL_VERSION)

    def _started_for_node(self, host: Host) -> ForkServers:
        """Blocks."""
        if self._koffi is not None:
            forking = ForkServers(lambda: self._start_node(host), 1, EVER)
            try:
                forking.start()
                return forking
            except EngineUnavailable as failure:
                log.warning("node is started ahead, not forked: %s", failure)
                self._koffi = None
        starting = ForkServers(lambda: self._start_python(host), 1, EVER)
        starting.start()
        return starting

    def _start_node(self, host: Host) -> ForkServer:
        assert self._koffi is not None
        node = str(host.interpreters["javascript"].inside)
        options = ["--single-threaded", "--v8-pool-size=0", "--require", "/preload/preload.cjs"]
        lines = [
            *(
                content(f"/forkserver/{name}", (CHILD / name).read_text())
                for name in ("fork_node.cjs", "node_random.cjs")
            ),
            bind(self._koffi, "/forkserver/node_modules"),
            *environment_of({**environment_inside(host, "javascript"), "FORK_SERVER": "1"}),
            command_of([node, *options, LANGUAGES["javascript"].file_name]),
        ]
        setup = {name: part.hex() if isinstance(part, bytes) else part for name, part in self._setup().items()}
        return self._start(host, lines, json.dumps(setup).encode())

    def _start(self, host: Host, lines: list[str], setup: bytes) -> ForkServer:
        """A fork server in a jail of its own, with the rights to make the world of a run."""
        uid = self._server_uids.take()
        users = identity(INSIDE_UID, uid, uid if host.is_root else os.getegid())
        if host.is_root:
            slots = self._first_uid + SERVER_UIDS
            users += identity(INSIDE_UID + 1, slots, slots, UIDS - SERVER_UIDS)
        config = [
            *tree(host, NAMED_UIDS if host.is_root else 1),
            f"seccomp_string: {quoted(kafel_of_fork_server())}",
            *users,
            *(f'cap: "CAP_{right}"' for right in ("SYS_ADMIN", "SETUID", "SETGID", "SETPCAP", "KILL")),
            "time_limit: 0",
            "rlimit_nofile_type: HARD",
            "rlimit_nproc_type: HARD",
            *(folder(place) for place in ("/tmp", "/work", "/dev/shm", "/forkserver", "/preload")),  # noqa: S108
            content("/preload/preload.cjs", (CHILD / "preload.cjs").read_text()),
            *lines,
        ]
        leaf = host.groups.leaf()
        give_back = functools.partial(self._server_uids.give_back, uid)
        warded = host.warden is not None
        return ForkServer(host.nsjail, "\n".join(config), setup, self._shared, leaf, give_back, warded=warded)

    def _shared(self, parent: Parent) -> bytes:
        return shared(parent, self._filter, asking())
