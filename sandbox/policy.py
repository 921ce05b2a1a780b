"""Writes nsjail configurations: jail.cfg, which all jails share, and what differs from one kind of jail to the next."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from sandbox.host import Host
from sandbox.languages import environment
from sandbox.model import Language, Limits
from sandbox.packages import NODE_INSIDE, PYTHON_INSIDE

INSIDE_UID = 1000
PACKAGES_INSIDE: dict[Language, str] = {"python": PYTHON_INSIDE, "javascript": NODE_INSIDE}
_SHARED = (Path(__file__).parent / "jail.cfg").read_text()


def tree(host: Host, users: int = 1) -> list[str]:
    """What every jail has: the shared policy, the interpreters, and names for so many users."""
    mounts = {found.executable: found.inside for found in host.interpreters.values()}
    mounts |= {folder: Path(PACKAGES_INSIDE[language]) for language, folder in host.packages.items()}
    mounts |= {path: path for found in host.interpreters.values() for path in found.needs}
    python = str(host.interpreters["python"].inside)
    links = [name for name in ("/usr/bin/python3", "/usr/bin/python") if name != python]
    people = "".join(f"sandbox:x:{INSIDE_UID + n}:{INSIDE_UID + n}::/work:/bin/sh\n" for n in range(users))
    groups = "".join(f"sandbox:x:{INSIDE_UID + n}:\n" for n in range(users))
    return [
        _SHARED,
        content("/etc/passwd", f"{people}nobody:x:65534:65534::/:/bin/false\n"),
        content("/etc/group", f"{groups}nogroup:x:65534:\n"),
        *(bind(source, str(target)) for source, target in sorted(mounts.items())),
        *(f"mount {{ src: {quoted(python)} dst: {quoted(link)} is_symlink: true }}" for link in links),
    ]  # fmt: skip


def scratch(limits: Limits) -> str:
    """The options of a scratch folder."""
    return f"size={limits.tmp_bytes},nr_inodes={max(1024, limits.tmp_bytes >> 13)}"


def identity(inside: int, outside_uid: int, outside_gid: int, count: int = 1) -> list[str]:
    """So many user ids inside, from `inside` on, and what they are outside."""
    return [
        f'{kind}map {{ inside_id: "{inside}" outside_id: "{outside}" count: {count} }}'
        for kind, outside in (("uid", outside_uid), ("gid", outside_gid))
    ]


def bind(source: Path, target: str) -> str:
    """A file or folder of the host, read-only."""
    return f"mount {{ src: {quoted(str(source))} dst: {quoted(target)} is_bind: true nosuid: true nodev: true }}"


def content(target: str, text: str) -> str:
    """A read-only file with this content."""
    return f"mount {{ src_content: {quoted(text)} dst: {quoted(target)} }}"


def folder(target: str) -> str:
    """An empty folder, read-only but for what is mounted in it."""
    return f'mount {{ dst: "{target}" fstype: "tmpfs" options: "size=1m,nr_inodes=64" nosuid: true nodev: true }}'


def tmpfs(target: str, options: str) -> str:
    """A folder in memory that may be written to."""
    return f'mount {{ dst: "{target}" fstype: "tmpfs" rw: true nosuid: true nodev: true options: "{options}" }}'


def environment_inside(host: Host, language: Language) -> dict[str, str]:
    """A program's environment in a jail."""
    packages = PYTHON_INSIDE if "python" in host.packages else ""
    return environment(language, home="/work", scratch="/tmp", packages=packages)  # noqa: S108 -- the jail's own


def environment_of(variables: Mapping[str, str]) -> list[str]:
    """The whole environment of the jail's first process."""
    return [f"envar: {quoted(f'{name}={value}')}" for name, value in variables.items()]


def command_of(words: Iterable[str]) -> str:
    """The jail's first process."""
    path, *arguments = words
    return f"exec_bin {{ path: {quoted(path)} {' '.join(f'arg: {quoted(word)}' for word in arguments)} }}"


def quoted(text: str) -> str:
    """A string in protocol buffers' text format."""
    plain = {ord("\\"): "\\\\", ord('"'): '\\"', ord("\n"): "\\n"}
    return '"' + text.translate(plain) + '"'
