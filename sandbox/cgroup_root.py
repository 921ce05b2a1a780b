"""Finds the server's own place in the control group tree and makes a group there for its runs."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

from sandbox.cgroup import V1, V2, Cgroups, CgroupUnavailable, Layout

V1_CONTROLLERS = ("memory", "pids", "cpuacct", "cpu")
V2_CONTROLLERS = ("memory", "pids", "cpu")
PREFIX = "runboard-"


def open_cgroups(proc: Path = Path("/proc/self"), owner: int | None = None) -> Cgroups:
    """A group named after this server (`owner`, its process id) below the one it is in.

    `proc` is where the kernel tells of mounts and memberships. Groups of servers that died are emptied and removed.

    Raises:
        CgroupUnavailable: there is no controller for memory and processes, or no right to make groups.
    """
    mounts = _mounts(proc / "mountinfo")
    memberships = _memberships(proc / "cgroup")
    owner = os.getpid() if owner is None else owner
    try:
        if all(controller in mounts for controller in ("memory", "pids", "cpuacct")):
            parents = {
                controller: mounts[controller] / memberships.get(controller, "/").lstrip("/")
                for controller in V1_CONTROLLERS
                if controller in mounts
            }
            return _make(V1, parents, owner)
        if "" in mounts:
            parent = mounts[""] / memberships.get("", "/").lstrip("/")
            _delegate(parent)
            return _make(V2, {"": parent}, owner)
    except OSError as failure:
        raise CgroupUnavailable(
            f"no control group can be made for runs: {failure.strerror} at {failure.filename}"
        ) from failure
    raise CgroupUnavailable("no control groups for memory and processes are mounted")


def _make(layout: Layout, parents: dict[str, Path], owner: int) -> Cgroups:
    for parent in parents.values():
        _sweep(parent, owner)
    folders = {controller: parent / f"{PREFIX}{owner}" for controller, parent in parents.items()}
    for folder in folders.values():
        folder.mkdir(exist_ok=True)
    if layout is V2:
        (folders[""] / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in V2_CONTROLLERS))
    controller, name, share = layout.weight
    if controller in folders:  # runs yield to the server when both want the processor
        (folders[controller] / name).write_text(share)
    return Cgroups(layout, folders)


def _delegate(parent: Path) -> None:
    """Version 2 gives controllers only to groups below one without processes: the server moves into a leaf."""
    available = (parent / "cgroup.controllers").read_text().split()
    if missing := [name for name in V2_CONTROLLERS if name not in available]:
        raise CgroupUnavailable(f"the control group {parent} lacks the controllers {', '.join(missing)}")
    if parent.parent != parent and (parent / "cgroup.type").exists():  # only the root group has no type
        leaf = parent / "server"
        leaf.mkdir(exist_ok=True)
        for pid in (parent / "cgroup.procs").read_text().split():
            (leaf / "cgroup.procs").write_text(pid)
    (parent / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in V2_CONTROLLERS))


def _sweep(parent: Path, living: int) -> None:
    """Ends and removes what a server that was killed has left; a group of a living server is left alone."""
    for group in parent.glob(f"{PREFIX}*"):
        owner = group.name.removeprefix(PREFIX)
        if owner.isdigit() and int(owner) != living and Path(f"/proc/{owner}").exists():
            continue
        for leaf in [*group.glob("*/"), group]:
            with contextlib.suppress(OSError):
                for pid in (leaf / "cgroup.procs").read_text().split():
                    os.kill(int(pid), signal.SIGKILL)
            with contextlib.suppress(OSError):
                leaf.rmdir()


def _mounts(mountinfo: Path) -> dict[str, Path]:
    """Controller → mount point; version 2 under ""."""
    found: dict[str, Path] = {}
    for line in mountinfo.read_text().splitlines():
        place, _, kind = line.partition(" - ")
        fields, (filesystem, _, options) = place.split(), kind.split(maxsplit=2)
        if filesystem == "cgroup2":
            found.setdefault("", Path(fields[4]))
        elif filesystem == "cgroup":
            for option in options.split(","):
                found.setdefault(option, Path(fields[4]))
    return found


def _memberships(cgroup: Path) -> dict[str, str]:
    """Controller → path of this process' group; version 2 under ""."""
    found: dict[str, str] = {}
    for line in cgroup.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            found[controller] = path
    return found
