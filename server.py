"""Runboard's composition root: settings → engine → services → handlers → listening. `python server.py --help`."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import ipaddress
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import uvloop
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.web import Application

from config import BadSetting, Settings, flag, read_settings
from handlers.app import AppServices, AppSocket
from handlers.base import Transport
from handlers.dev import DevSocket
from handlers.http import HealthHandler, SchemaHandler, StartHandler
from processes import CANNOT_SERVE, reserved, run_all
from protocol.errors import CloseCode
from protocol.schema import Schemas
from sandbox.cluster import ClusterEngine, Place
from sandbox.engine import Engine, EngineUnavailable
from sandbox.forkserver import PRELOAD
from sandbox.interpreters import Wanted
from sandbox.local import JAILING, Local
from sandbox.model import Limits
from services.actions.grade_code import grade_code_action
from services.actions.run_code import run_code_action
from services.actions.sleep import sleep_action
from services.hub import Hub
from services.jobs import Terms
from services.leaderboard import Leaderboard
from services.modes import CLUSTER, STANDALONE, Modes
from services.runs import Bounds, Runs
from services.store import Store, StoreUnavailable
from services.store_redis import RedisStore
from services.store_sqlite import SqliteStore
from services.task_action import BadTaskModule, TaskAction, load_actions
from services.tasks import Tasks

log = logging.getLogger("runboard")
SWITCH_SECONDS = 0.0005
"""For so long a thread that encodes a large answer may keep the loop waiting, each time that this has to go on."""
FAREWELL_SECONDS = 2.0
"""How long clients have to answer the close of their connection before it is cut."""


class CannotServe(Exception):
    """The server cannot start; the text is one sentence that says why."""


@dataclass(frozen=True, slots=True)
class Running:
    """A server that takes connections."""

    address: str
    port: int
    engine: str


@asynccontextmanager
async def running(settings: Settings, number: int = 0) -> AsyncIterator[Running]:
    """The whole server, for as long as the block lasts. `number` counts the processes of one server.

    Raises:
        CannotServe: the engine or the address cannot be had.
    """
    async with AsyncExitStack() as parts:
        schemas = Schemas()
        engine = await _open_engine(settings, number)
        parts.push_async_callback(engine.close)
        runs = Runs(engine, _bounds(settings))
        cluster = await _open_cluster(settings, engine.name)
        parts.push_async_callback(cluster.close)
        cluster_runs = Runs(cluster, _cluster_bounds(settings, cluster.capacity), cluster.away)
        cluster.follow(
            lambda capacity: cluster_runs.resize(_cluster_bounds(settings, capacity)), cluster_runs.refuse_waiting
        )
        modes = Modes({STANDALONE: runs, CLUSTER: cluster_runs})
        terms = _terms(settings)
        transport = Transport(
            schemas, settings.outbox_bytes, settings.max_requests, settings.ping_s, settings.allowed_origins
        )

        def health() -> Mapping[str, object]:
            status = "stopping" if runs.closed else "ok"
            return {
                "status": status,
                "engine": engine.name,
                "connections": len(transport.open_sockets),
                **runs.counts,
                "cluster": {"problem": cluster.away(), "capacity": cluster.capacity, **cluster_runs.counts},
            }

        store = _store(settings)
        leaderboard = Leaderboard(store, hub := Hub(), settings.max_players)
        try:
            await store.open(leaderboard.changed)
        except StoreUnavailable as failure:
            raise CannotServe(str(failure)) from failure
        parts.push_async_callback(store.close)
        parts.push_async_callback(leaderboard.close)
        tasks = Tasks(_task_actions(settings, schemas, modes, terms), store, settings.tasks_at_once)
        parts.push_async_callback(_say_farewell, transport)
        parts.push_async_callback(_close_all, [runs, cluster_runs], settings.drain_s)
        services = AppServices(modes, terms, tasks, leaderboard, hub)

        is_local = is_loopback(settings.address) and not settings.dev
        for_developers = {"is_open": is_local or settings.dev, "is_local": is_local}
        application = Application(
            [
                (r"/appws", AppSocket, {"transport": transport, "services": services}),
                (r"/devws", DevSocket, {"transport": transport, "services": services, **for_developers}),
                (r"/healthz", HealthHandler, {"health": health}),
                (r"/schemas/(.*)", SchemaHandler, {"documents": schemas.documents()}),
                (r"/", StartHandler),
            ],
            websocket_max_message_size=settings.max_message_bytes,
        )
        listener, port = _listen(application, settings)
        parts.callback(listener.stop)
        for warning in (*engine.warnings(), *cluster.warnings()):
            log.warning("not enforced here: %s", warning)
        yield Running(settings.address, port, engine.name)


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches `address`."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


async def _open_engine(settings: Settings, number: int) -> Engine:
    names = [*JAILING, "subprocess"] if settings.engine == "auto" else [settings.engine]
    unsafe = ""
    if "subprocess" in names and not (is_loopback(settings.address) or settings.allow_unsafe):
        names.remove("subprocess")
        unsafe = (
            f"the subprocess engine does not contain programs, so it may serve {settings.address}, which other"
            " machines reach, only with --allow-unsafe"
        )
    try:
        return await _local(settings).open_first(names, number)
    except EngineUnavailable as missing:
        raise CannotServe("; ".join(reason for reason in (str(missing), unsafe) if reason)) from missing


def _store(settings: Settings) -> Store:
    if settings.store == "sqlite":
        return SqliteStore(settings.data_dir, settings.max_players)
    if settings.store.startswith(("redis://", "rediss://", "unix://")):
        return RedisStore(settings.store, settings.max_players)
    raise CannotServe(f"there is no store {settings.store!r}; --store is sqlite or an address redis://…")


def _task_actions(settings: Settings, schemas: Schemas, modes: Modes, terms: Terms) -> dict[str, TaskAction]:
    try:
        added = load_actions(settings.task_modules)
    except BadTaskModule as failure:
        raise CannotServe(str(failure)) from failure
    actions = [
        run_code_action(schemas, modes, terms),
        grade_code_action(schemas, modes, terms, settings.tasks_at_once),
        sleep_action(schemas),
        *added,
    ]
    return {action.name: action for action in actions}


def _bounds(settings: Settings) -> Bounds:
    """What one process may do; the processes of one server share the machine."""
    return Bounds(
        running=-(-settings.max_runs // settings.processes),
        queued=settings.queue_size,
        queued_bytes=settings.queue_bytes,
        running_of_one=settings.max_runs_per_connection,
        queued_of_one=settings.max_queued_per_connection,
    )


def _cluster_bounds(settings: Settings, capacity: int) -> Bounds:
    """One connection may have the whole cluster, if nobody else wants it: then the others' turns come in between."""
    return dataclasses.replace(_bounds(settings), running=capacity, running_of_one=capacity)


async def _open_cluster(settings: Settings, engine: str) -> ClusterEngine:
    place = Place(
        scheduler=settings.scheduler,
        tls=(settings.cluster_tls_ca, settings.cluster_tls_cert, settings.cluster_tls_key),
        workers=settings.cluster_workers,
        slots=settings.cluster_runs_per_worker,
        engine=engine,
        local=dataclasses.replace(_local(settings), warm=min(settings.warm, settings.cluster_runs_per_worker)),
    )
    cluster = ClusterEngine(place)
    try:
        await cluster.open()
    except EngineUnavailable as failure:
        raise CannotServe(str(failure)) from failure
    return cluster


async def _close_all(queues: list[Runs], drain_s: float) -> None:
    await asyncio.gather(*(queue.close(drain_s) for queue in queues))


def _local(settings: Settings) -> Local:
    wanted = Wanted(settings.python, settings.node, settings.python_packages, settings.node_packages)
    return Local(wanted, settings.warm, settings.preload or PRELOAD, _defaults(settings), settings.fork_servers)


def _defaults(settings: Settings) -> Limits:
    return Limits(
        settings.wall_ms, settings.cpu_ms, settings.memory_bytes, settings.output_bytes, settings.run_processes,
        settings.tmp_bytes, settings.open_files,
    )  # fmt: skip


def _terms(settings: Settings) -> Terms:
    maxima = Limits(
        settings.max_wall_ms, settings.max_cpu_ms, settings.max_memory_bytes, settings.max_output_bytes,
        settings.max_run_processes,
    )  # fmt: skip
    return Terms(_defaults(settings), maxima)


def _listen(application: Application, settings: Settings) -> tuple[HTTPServer, int]:
    server = HTTPServer(application)
    try:
        sockets = bind_sockets(settings.port, settings.address, reuse_port=settings.processes > 1)
    except OSError as failure:
        place = f"{settings.address}:{settings.port}"
        raise CannotServe(
            f"cannot listen on {place}: {failure.strerror} ({flag('address')}, {flag('port')})"
        ) from failure
    server.add_sockets(sockets)
    return server, int(sockets[0].getsockname()[1])


async def _say_farewell(transport: Transport) -> None:
    """Closes every connection, once it has its answers, as a restart does; Tornado itself would leave them open."""
    with contextlib.suppress(TimeoutError):
        answered = (socket.all_answered() for socket in transport.open_sockets)
        await asyncio.wait_for(asyncio.gather(*answered), FAREWELL_SECONDS)
    for socket in list(transport.open_sockets):
        socket.close_with(CloseCode.RESTART)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(transport.deserted(), FAREWELL_SECONDS)


async def _serve(settings: Settings, number: int) -> None:
    stop = asyncio.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(name, stop.set)
    async with running(settings, number) as server:
        log.info("listening on http://%s:%d, engine %s", server.address, server.port, server.engine)
        await stop.wait()
        log.info("stopping")


def main(argv: list[str]) -> int:
    """Runs the server until SIGTERM or SIGINT; gives the exit code, 2 when it cannot start."""
    try:
        settings = read_settings(argv, os.environ)
        logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        if settings.processes == 1:
            return _serve_alone(settings, 0)
        if settings.store == "sqlite":
            raise CannotServe("several --processes need a store that they can share: --store redis://…")
        with reserved(settings.address, settings.port) as port:
            shared = dataclasses.replace(settings, port=port)
            return run_all(settings.processes, lambda number: _serve_alone(shared, number))
    except (BadSetting, CannotServe, OSError) as failure:
        print(f"server.py: {failure}", file=sys.stderr)
        return CANNOT_SERVE


def _serve_alone(settings: Settings, number: int) -> int:
    """One process; gives its exit code."""
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(settings, number))
    except CannotServe as failure:
        print(f"server.py: {failure}", file=sys.stderr)
        return CANNOT_SERVE
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
