"""The engines of this machine, by name: the server opens one for itself, and each worker of a cluster its own."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterable
from dataclasses import dataclass

from sandbox.engine import Engine, EngineUnavailable
from sandbox.forkserver import PRELOAD, SEEDS, ForkServerEngine
from sandbox.interpreters import Wanted
from sandbox.model import Limits
from sandbox.nsjail import NsjailEngine
from sandbox.subproc import SubprocessEngine

log = logging.getLogger(__name__)

JAILING = ("forkserver", "nsjail")
"""The engines that contain what they run, best first."""
FIRST_WORKER, LAST_WORKER = 1_000, 20_000
"""The numbers of workers' engines. Below are those of the server's own processes, above it is out of user ids."""


@dataclass(frozen=True, slots=True)
class Local:
    """How an engine on this machine is made. `usual` are the limits that runs mostly have."""

    wanted: Wanted = Wanted()
    warm: int = 1
    preload: tuple[str, ...] = PRELOAD
    usual: Limits | None = None
    seeds: int = SEEDS

    def make(self, name: str, number: int) -> Engine:
        """The engine of that name, not yet open. `number` tells engines on one machine apart."""
        match name:
            case "forkserver":
                return ForkServerEngine(self.wanted, self.warm, number, self.preload, self.usual, self.seeds)
            case "nsjail":
                return NsjailEngine(self.wanted, self.warm, number)
            case "subprocess":
                return SubprocessEngine(self.wanted)
        raise EngineUnavailable(f"there is no engine {name}")

    async def open_first(self, names: Iterable[str], number: int) -> Engine:
        """The first of these engines that this machine can run, open; it warns of those that it cannot.

        Raises:
            EngineUnavailable: it can run none; the text has all reasons.
        """
        reasons = []
        for name in names:
            engine = self.make(name, number)
            try:
                await engine.open()
            except EngineUnavailable as missing:
                reasons.append(f"the {name} engine cannot run here: {missing}")
            else:
                for reason in reasons:
                    log.warning("%s", reason)
                return engine
        raise EngineUnavailable("; ".join(reasons))


def claim_number() -> tuple[int, socket.socket]:
    """A number that no other worker of this machine has while the socket is open, which the kernel sees to.

    Raises:
        EngineUnavailable: all are taken.
    """
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    for number in range(FIRST_WORKER, LAST_WORKER):
        try:
            claim.bind(f"\0runboard-worker-{number}")
        except OSError:
            continue
        return number, claim
    claim.close()
    raise EngineUnavailable("there are too many workers on this machine")
