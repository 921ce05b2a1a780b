"""Several server processes on one port: forked before anything runs, started again if one dies, stopped together."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

log = logging.getLogger("runboard")
PR_SET_PDEATHSIG = 1
RESTART_SECONDS = 1.0
CANNOT_SERVE = 2


@contextmanager
def reserved(address: str, port: int) -> Iterator[int]:
    """The port, which processes may bind with SO_REUSEPORT meanwhile; if `port` is 0, a free one. Raises OSError."""
    family, kind, protocol, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as holder:  # it never listens, so no client is ever given to it
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(place)
        yield int(holder.getsockname()[1])


def run_all(count: int, serve: Callable[[int], int]) -> int:
    """Runs `serve(0)` … `serve(count - 1)`, each in a process, until SIGTERM or SIGINT; gives the exit code."""
    children = {_fork(number, serve): number for number in range(count)}
    stopping = False

    def stop(*_: object) -> None:
        nonlocal stopping
        stopping = True
        for pid in children:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    code = 0
    while children:
        pid, status = os.wait()
        number = children.pop(pid, None)
        if number is None:
            continue
        ended = os.waitstatus_to_exitcode(status)
        if ended == CANNOT_SERVE:
            code = CANNOT_SERVE
            stop()
        elif not stopping:
            log.error("server process %d ended with %d; it is started again", number, ended)
            time.sleep(RESTART_SECONDS)
            if not stopping:
                children[_fork(number, serve)] = number
    return code


def _fork(number: int, serve: Callable[[int], int]) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal's Ctrl-C, the parent tells the children
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() == parent:
            code = serve(number)
    finally:
        os._exit(code)
