"""Network namespaces are used again only if nobody has made a socket in them; with real fork servers."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable

import pytest

from sandbox.forkserver import ForkServerEngine
from sandbox.model import Channel, Job, Language, Limits
from sandbox.networks import Network, Networks
from tests.conftest import opened, until

AGAIN = 8
NETWORK: dict[Language, str] = {
    "python": "import os; print(os.readlink('/proc/self/ns/net'))",
    "javascript": "console.log(require('fs').readlinkSync('/proc/self/ns/net'))",
}
SOCKETS: dict[str, tuple[Language, str]] = {
    "a socket": ("python", "import socket; socket.socket().close()"),
    "a pair": ("python", "import socket; socket.socketpair()"),
    "in a process of its own": ("python", "import os, socket; os.fork() or socket.socket(); os.wait()"),
    "in a thread": ("python", "import socket, threading; threading.Thread(target=socket.socket).start()"),
    "in a process that is left": (
        "python",
        "import os, socket, time\nif os.fork() == 0:\n  os.setsid(); socket.socket(); time.sleep(60)\ntime.sleep(0.1)",
    ),
    "with a name": ("python", "import socket; socket.socket(socket.AF_UNIX).bind('\\0name')"),
    "of node": ("javascript", "require('net').createServer().listen(0)\nsetTimeout(() => process.exit(), 50)"),
    "of a child of node": ("javascript", "require('child_process').execFileSync('/usr/bin/node', ['--version'])"),
}


def on_engine(test: Callable[[ForkServerEngine], Awaitable[None]]) -> None:
    async def main() -> None:
        async with opened("forkserver") as engine:
            assert isinstance(engine, ForkServerEngine)
            await test(engine)

    asyncio.run(main())


def kept(engine: ForkServerEngine) -> set[str]:
    """Those that wait to be used again, or are in use by a slot."""
    servers = [server for servers in engine._servers.values() for server in servers._servers]
    return {f"net:[{network.number}]" for server in servers for network in server.networks._known.values()}


async def networks(engine: ForkServerEngine, language: Language, count: int = AGAIN) -> list[str]:
    return [(await engine.run(Job(language, NETWORK[language]), Channel())).stdout for _ in range(count)]


@pytest.mark.parametrize("language", NETWORK)
def test_one_without_sockets_is_used_again(language: Language) -> None:
    async def test(engine: ForkServerEngine) -> None:
        seen = await networks(engine, language, 4 * AGAIN)
        assert all(one.startswith("net:[") for one in seen)
        assert len(set(seen)) < len(seen)

    on_engine(test)


@pytest.mark.parametrize("name", SOCKETS)
def test_one_with_sockets_is_not_used_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given_back: dict[str, bool] = {}

    def note(networks: Networks, network: Network, give_back: Callable[..., None] = Networks.give_back) -> None:
        given_back[f"net:[{network.number}]"] = network.is_used  # a number may be a new one's when it is free
        give_back(networks, network)

    monkeypatch.setattr(Networks, "give_back", note)

    async def test(engine: ForkServerEngine) -> None:
        language, code = SOCKETS[name]
        printed = {"python": f"{NETWORK['python']}\n", "javascript": f"{NETWORK['javascript']}\n"}[language]
        await networks(engine, language)
        await until(lambda: not engine._leaving)
        given_back.clear()
        outcome = await engine.run(Job(language, printed + code), Channel())
        used = outcome.stdout.splitlines()[0]
        assert used.startswith("net:["), outcome
        await until(lambda: not engine._leaving)
        assert given_back == {used: True}

    on_engine(test)


def test_two_runs_at_once_are_never_in_the_same() -> None:
    async def test(engine: ForkServerEngine) -> None:
        code = f"{NETWORK['python']}; import time; time.sleep(0.2)"
        for _ in range(3):
            runs = [engine.run(Job("python", code), Channel()) for _ in range(AGAIN)]
            seen = [outcome.stdout for outcome in await asyncio.gather(*runs)]
            assert len(set(seen)) == AGAIN

    on_engine(test)


def test_sockets_are_as_they_were() -> None:
    async def test(engine: ForkServerEngine) -> None:
        code = """
import errno, socket
for family, expected in ((socket.AF_INET, errno.ENETUNREACH), (socket.AF_INET6, errno.ENETUNREACH)):
    with socket.socket(family) as one:
        address = ("127.0.0.1", 9) if family == socket.AF_INET else ("::1", 9)
        print(one.connect_ex(address) in (expected, errno.EADDRNOTAVAIL))
for family in (16, 17, 38, 40):
    try:
        socket.socket(family, socket.SOCK_RAW)
    except OSError as failure:
        print(failure.errno == errno.EAFNOSUPPORT)
a, b = socket.socketpair()
a.send(b"text")
print(b.recv(4))
"""
        outcome = await engine.run(Job("python", code), Channel())
        assert outcome.stdout == "True\n" * 6 + "b'text'\n", outcome

    on_engine(test)


def test_programs_that_only_make_sockets_leave_the_server_its_time() -> None:
    """Each time, the server is asked: but not more often than it says."""

    async def test(engine: ForkServerEngine) -> None:
        code = """
import socket, threading
def make():
    while True:
        socket.socket().close()
for _ in range(30):
    threading.Thread(target=make, daemon=True).start()
threading.Event().wait()
"""
        hostile = [engine.run(Job("python", code, limits=Limits(wall_ms=3000)), Channel()) for _ in range(2)]
        attacks = asyncio.gather(*hostile)
        beside = 0
        while not attacks.done():
            assert (
                await engine.run(Job("python", "import socket; socket.socket(); print(1)"), Channel())
            ).stdout == "1\n"
            beside += 1
        assert beside >= 3
        await attacks

    on_engine(test)


def test_a_flood_of_sockets_does_not_hold_up_those_of_others() -> None:
    """Each network has a queue of its own."""

    async def test(engine: ForkServerEngine) -> None:
        flood = "import os, socket\nfor _ in range(20):\n  if not os.fork(): break\nwhile True: socket.socket().close()"
        few = "import socket\nfor _ in range(50): socket.socket().close()\nprint('made')"
        channel = Channel()
        floods = [asyncio.ensure_future(engine.run(Job("python", flood), channel)) for _ in range(2)]
        for _ in range(5):
            assert (await engine.run(Job("python", few), Channel())).stdout == "made\n"
        assert not any(one.done() for one in floods)
        channel.cancel.set()
        await asyncio.gather(*floods)

    on_engine(test)


def test_a_signal_does_not_interrupt_one_that_waits_for_its_socket() -> None:
    async def test(engine: ForkServerEngine) -> None:
        code = """
import signal, socket, time
def make():
    try:
        socket.socket().close()
    except InterruptedError:
        return 1
    return 0
for _ in range(300):
    make()
signal.signal(signal.SIGALRM, lambda *_: None)
signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
begin, interrupted = time.monotonic(), 0
while time.monotonic() < begin + 1:
    interrupted += make()
print(interrupted)
"""
        outcome = await engine.run(Job("python", code), Channel())
        assert int(outcome.stdout) <= 2, outcome  # in the moment before the server has read the question

    on_engine(test)


def test_a_run_that_is_ended_while_it_asks_ends() -> None:
    async def test(engine: ForkServerEngine) -> None:
        code = "import socket\nprint(1, flush=True)\nwhile True: socket.socket().close()"
        for _ in range(5):
            printed = asyncio.Event()
            channel = Channel(emit=lambda stream, chunk, printed=printed: printed.set())
            running = asyncio.ensure_future(engine.run(Job("python", code), channel))
            await printed.wait()
            channel.cancel.set()
            assert (await running).facts.cancelled
        assert (await engine.run(Job("python", "print(2)"), Channel())).stdout == "2\n"

    on_engine(test)


def test_without_a_listener_none_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a kernel that does not ask."""
    monkeypatch.setattr("sandbox.world.NEW_LISTENER", 1 << 30)

    async def test(engine: ForkServerEngine) -> None:
        await networks(engine, "python")
        assert not kept(engine)
        outcome = await engine.run(Job("python", "import socket; socket.socket(); print(1)"), Channel())
        assert outcome.stdout == "1\n"

    on_engine(test)


def test_one_that_nobody_knows_makes_all_suspect() -> None:
    listener, other = os.pipe()
    known = Networks(listener)
    network = known.of(os.getpid())
    assert network is not None
    assert known._used(os.getpid()) is network
    assert network.is_used
    again = Networks(os.dup(other))
    other_network = again.of(os.getpid())
    assert other_network is not None
    assert again._used(-1) is None
    assert other_network.is_used
    for networks_, one in ((known, network), (again, other_network)):
        networks_.give_back(one)
        assert networks_.take() is None
        networks_.close()
    os.close(other)
