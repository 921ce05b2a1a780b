"""What all tests share: one unit of time, engines, a real server, and the check that nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest
import uvloop
from tornado.ioloop import IOLoop

from sandbox.cgroup_root import PREFIX
from sandbox.cluster import ClusterEngine, Place
from sandbox.engine import Engine
from sandbox.forkserver import ForkServerEngine
from sandbox.nsjail import NsjailEngine
from sandbox.subproc import SubprocessEngine
from tests.dask_processes import Cluster
from tests.units import SECOND as SECOND

ENGINES: dict[str, Callable[[], Engine]] = {
    "forkserver": lambda: ForkServerEngine(seeds=1),
    "nsjail": NsjailEngine,
    "subprocess": SubprocessEngine,
    "cluster": lambda: ClusterEngine(Place(scheduler=shared_cluster().address)),
}
JAILING = pytest.mark.parametrize("engine_name", ["forkserver", "nsjail"])
"""The engines that contain what they run."""


async def until(happened: Callable[[], object], seconds: float = 10.0) -> None:
    """Waits for something that must happen within `seconds` scaled seconds."""
    end = time.monotonic() + seconds * SECOND
    while not happened():
        assert time.monotonic() < end, f"did not happen within {seconds} s"
        await asyncio.sleep(0.005)


def within(work: Awaitable[object], seconds: float = 20.0) -> Awaitable[object]:
    """`work`, which must be over within so many scaled seconds."""
    return asyncio.wait_for(work, seconds * SECOND)


@asynccontextmanager
async def opened(name: str) -> AsyncIterator[Engine]:
    """An engine that is ready."""
    engine = ENGINES[name]()
    await engine.open()
    try:
        yield engine
    finally:
        await engine.close()


CGROUPS = Path("/sys/fs/cgroup")
GEN_TEST = pytest.mark.gen_test(timeout=120 * SECOND)
"""For tests on a Tornado loop: `pytestmark = GEN_TEST`."""


def leaves() -> set[Path]:
    """The control groups of this process' runs, and those that they are in."""
    places = (place.glob(f"{PREFIX}{os.getpid()}*") for place in [CGROUPS, *CGROUPS.glob("*/")])
    return {path for groups in places for group in groups for path in (group, *group.glob("*/"))}


def descriptors() -> int:
    """How many this process has open."""
    return len(os.listdir("/proc/self/fd"))


def opened_files() -> dict[str, str]:
    """Descriptor → what it is."""
    return {path.name: os.readlink(path) for path in Path("/proc/self/fd").iterdir() if os.path.lexists(path)}


KEPT: set[int] = set()
"""Processes that outlive a test on purpose, with all below them."""


@functools.cache
def shared_cluster() -> Cluster:
    """A scheduler and two workers, started for the first test that wants them; they live as long as the session."""
    cluster = Cluster(workers=2)
    KEPT.update(cluster.pids())
    return cluster


@pytest.fixture(scope="session", autouse=True)
def end_of_session() -> Iterator[None]:
    """Stops what tests have shared. With the first loop, libuv opens a pipe that the process keeps."""
    uvloop.new_event_loop().close()
    yield
    if shared_cluster.cache_info().currsize:
        shared_cluster().stop()


def children() -> list[psutil.Process]:
    """All processes below this one, but for those that are kept."""
    found: list[psutil.Process] = []
    for child in psutil.Process().children():
        if child.pid not in KEPT:
            found += [child]
            with contextlib.suppress(psutil.NoSuchProcess):
                found += child.children(recursive=True)
    return found


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """After each test there is no process, descriptor or control group that was not there before."""
    gc.collect()
    before, files, groups = descriptors(), opened_files(), leaves()
    known = {child.pid for child in children()}
    yield
    gc.collect()
    left = [child for child in children() if child.pid not in known]
    assert not left, f"processes left: {left}"
    assert leaves() <= groups
    left_open = {fd: what for fd, what in opened_files().items() if fd not in files}
    assert descriptors() <= before, left_open


@pytest.fixture
def io_loop(nothing_left_behind: None) -> Iterator[IOLoop]:
    """pytest-tornado's fixture, made without what Tornado has deprecated, with the loop that the server has."""
    loop = uvloop.new_event_loop()
    asyncio.set_event_loop(loop)
    yield IOLoop.current()
    loop.run_until_complete(loop.shutdown_default_executor())
    asyncio.set_event_loop(None)
    loop.close()
