"""A Dask cluster as it is in production: `dask scheduler` and `dask worker`, processes of their own, on loopback."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from tests.units import SECOND

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {"DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "0", "PYTHONUNBUFFERED": "1"}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        return int(holder.getsockname()[1])


class DaskProcess:
    """One process of it. `place` is the address that it has told."""

    def __init__(self, *words: str) -> None:
        self._below: list[psutil.Process] = []
        self._folder = tempfile.TemporaryDirectory(prefix="runboard-test-")
        self._log = Path(self._folder.name) / "log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dask", *words], stdout=log, stderr=log, cwd=ROOT,
                env={**os.environ, **ENVIRONMENT, "DASK_TEMPORARY_DIRECTORY": self._folder.name},
            )  # fmt: skip

    @property
    def log(self) -> str:
        return self._log.read_text()

    def told(self, pattern: str, seconds: float = 60) -> str:
        """Waits until it has told what matches; gives the match's first group."""
        end = time.monotonic() + seconds * SECOND
        while (found := re.search(pattern, self.log)) is None:
            assert self.process.poll() is None, self.log
            assert time.monotonic() < end, self.log
            time.sleep(0.02)
        return found[1]

    def kill(self) -> None:
        """At once, with all below it that its own kernel-side end does not take along."""
        self.process.kill()
        self.process.wait()

    def tell_to_stop(self) -> None:
        """As an operator does."""
        with contextlib.suppress(psutil.Error):
            self._below = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGTERM)

    def stop(self) -> None:
        """Waits until it and all below it are gone."""
        if not self._below:
            self.tell_to_stop()
        try:
            self.process.wait(30 * SECOND)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        _, left = psutil.wait_procs(self._below, 10 * SECOND)
        self._folder.cleanup()
        assert not left, left


class Cluster:
    """A scheduler and workers, each with so many slots."""

    def __init__(
        self, workers: int = 0, slots: int = 2, *options: str, port: int = 0, protocol: str = "tcp", nanny: bool = False
    ) -> None:
        """Without a nanny, a signal ends a worker at once; with one, it lets its runs end."""
        self._slots = slots
        self._nanny = "--nanny" if nanny else "--no-nanny"
        self._options = options
        port = port or free_port()
        self.address = f"{protocol}://127.0.0.1:{port}"  # known at once, so that all start beside each other
        self.scheduler = DaskProcess(
            "scheduler", "--host", "127.0.0.1", "--protocol", protocol, "--port", str(port), "--no-dashboard", *options
        )  # fmt: skip
        self.workers: list[DaskProcess] = []
        for _ in range(workers):
            self.add_worker(ready=False)
        for worker in self.workers:
            worker.told(r"(Registered to)")

    def add_worker(self, *, ready: bool = True, name: str | None = None) -> DaskProcess:
        worker = DaskProcess(
            "worker", self.address, "--host", "127.0.0.1", self._nanny, "--no-dashboard", "--nthreads",
            str(self._slots), "--resources", f"sandbox={self._slots}", "--memory-limit", "0",
            "--name", name or f"worker-{len(self.workers)}", "--preload", "sandbox.cluster_worker", *self._options,
        )  # fmt: skip
        self.workers.append(worker)
        if ready:
            worker.told(r"(Registered to)")
        return worker

    def pids(self) -> set[int]:
        """The roots of all that it consists of."""
        return {one.process.pid for one in (self.scheduler, *self.workers)}

    def stop(self) -> None:
        for one in self.workers:
            one.tell_to_stop()
        for one in (*self.workers, self.scheduler):
            one.stop()
