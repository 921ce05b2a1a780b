"""stream, interactive and sendInput: runs that a client follows and talks to."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handlers import base
from sandbox.model import Facts, Job, Outcome
from sandbox.verdict import conclude
from services.live import LiveOutput
from tests.conftest import GEN_TEST, SECOND, until
from tests.handlers.client import Client, connected, serving
from tests.handlers.test_app import jailed

pytestmark = GEN_TEST
ENGINES = pytest.mark.parametrize("engine", ["nsjail", "subprocess"])


def live(code: str, language: str = "python", **more: Any) -> dict[str, Any]:
    return {"language": language, "code": code, "mode": "standalone", "stream": True, **more}


async def all_of(client: Client, id: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The messages of a run: those before its output, and its output's data."""
    before = []
    while (message := await client.hear(60))["action"] != "output":
        assert message["id"] == id
        before.append(message)
    return before, message["data"]


async def heard(client: Client, text: str) -> None:
    """Waits until the run has printed `text`, and no more."""
    printed = ""
    while printed != text:
        message = await client.hear(60)
        assert message["action"] in ("outputChunk", "runStatus"), message
        printed += message["data"].get("text", "")
        assert text.startswith(printed)


@ENGINES
async def test_chunks_come_while_the_program_runs_and_together_are_its_output(engine: str) -> None:
    code = (
        "import sys, time\n"
        "for n in range(5):\n"
        "    print('out', n)\n    print('err', n, file=sys.stderr)\n    time.sleep(0.05)\n"
        "sys.exit(int(sys.argv[1]))"
    )
    async with serving(engine=engine) as server, connected(server) as client:
        for exit_code in (0, 3):
            await client.send("runCode", {**live(code), "args": [str(exit_code)]}, id="r")
            before, data = await all_of(client, "r")
            chunks = [message["data"] for message in before if message["action"] == "outputChunk"]

            assert before[0] == {"action": "runStatus", "data": {"status": "running"}, "id": "r"}
            assert data["exitCode"] == exit_code
            assert len(chunks) >= 4
            for stream, whole in (("stdout", data["output"]), ("stderr", data["stderr"])):
                assert "".join(chunk["text"] for chunk in chunks if chunk["stream"] == stream) == whole


async def test_a_character_is_never_halved() -> None:
    code = "import os, time\nfor byte in 'ä€𝄞'.encode():\n    os.write(1, bytes([byte]))\n    time.sleep(0.03)"
    async with serving() as server, connected(server) as client:
        await client.send("runCode", live(code), id="r")
        before, data = await all_of(client, "r")

        assert [message["data"]["text"] for message in before[1:]] == ["ä", "€", "𝄞"]
        assert data["output"] == "ä€𝄞"


async def test_who_does_not_stream_gets_the_output_alone() -> None:
    async with serving() as server, connected(server) as client:
        await client.send("runCode", {**live("print(1)"), "stream": False}, id="r")
        before, data = await all_of(client, "r")

        assert (before, data["output"]) == ([], "1\n")


async def test_who_has_to_wait_is_told_its_place() -> None:
    async with serving(max_runs=1) as server, connected(server) as client, connected(server) as other:
        await other.send("runCode", live("input()", interactive=True), id="first")
        await other.hear()
        await client.send("runCode", live("print(1)"), id="r")
        assert (await client.hear())["data"] == {"status": "queued", "position": 1}
        await other.send("cancelRun", {"run": "first"})
        before, _ = await all_of(client, "r")
        assert before[0]["data"] == {"status": "running"}


@ENGINES
@pytest.mark.parametrize(
    ("language", "code"),
    [
        ("python", "name = input('Name? ')\nage = input(f'Hello {name}! Age? ')\nprint(int(age) + 1)"),
        (
            "javascript",
            "const rl = require('readline').createInterface({input: process.stdin, output: process.stdout});\n"
            "rl.question('Name? ', name => rl.question(`Hello ${name}! Age? `, age => {"
            " console.log(Number(age) + 1); rl.close(); }));",
        ),
    ],
)
async def test_a_program_holds_a_conversation(engine: str, language: str, code: str) -> None:
    async with serving(engine=engine) as server, connected(server) as client:
        await client.send("runCode", live(code, language, interactive=True), id="r")
        await heard(client, "Name? ")
        await client.send("sendInput", {"run": "r", "text": "Ada\n"})
        await heard(client, "Hello Ada! Age? ")
        await client.send("sendInput", {"run": "r", "text": "36\n", "end": True})  # node waits for the end of a pipe
        _, data = await all_of(client, "r")

        assert (data["status"], data["output"]) == ("ok", "Name? Hello Ada! Age? 37\n")


async def test_input_ends_when_the_client_says_so_and_comes_after_stdin() -> None:
    async with serving() as server, connected(server) as client:
        await client.send("runCode", live("print(open(0).read())", interactive=True, stdin="a"), id="r")
        await client.send("sendInput", {"run": "r", "text": "b"}, id="i1")
        await client.send("sendInput", {"run": "r", "text": "c", "end": True}, id="i2")
        acknowledged = []
        while (message := await client.hear())["action"] != "output":
            acknowledged += [message["id"]] if message["action"] == "ack" else []

        assert acknowledged == ["i1", "i2"]
        assert message["data"]["output"] == "abc\n"


async def test_a_request_that_comes_again_is_applied_once_and_answered_again() -> None:
    async with serving() as server, connected(server) as client:
        await client.send("runCode", live("print(open(0).read())", interactive=True), id="r")
        for action, data in (
            ("sendInput", {"run": "r", "text": "a"}), ("sendInput", {"run": "r", "text": "a"}),
            ("sendInput", {"run": "r", "end": True}), ("sendInput", {"run": "r", "end": True}),
        ):  # fmt: skip
            await client.send(action, data, id="end" if "end" in data else "text")
        acknowledged = []
        while (message := await client.hear())["action"] != "output":
            acknowledged += [message["id"]] if message["action"] == "ack" else []

        assert (acknowledged, message["data"]["output"]) == (["text", "text", "end", "end"], "a\n")


async def test_input_that_no_run_can_take_is_a_clear_error() -> None:
    async with serving() as server, connected(server) as client, connected(server) as other:
        await client.send("runCode", live("print(input())", interactive=True), id="r")
        await client.send("runCode", {**live("import time; time.sleep(1e6)"), "stream": False}, id="deaf")
        await client.hear()

        async def refused(who: Client, run: str, text: str = "x") -> str:
            code: str = (await who.ask("sendInput", {"run": run, "text": text}))["details"]["code"]
            return code

        assert await refused(other, "r") == "NOT_FOUND"
        assert await refused(client, "unknown") == "NOT_FOUND"
        assert await refused(client, "deaf") == "CONFLICT"
        assert (await client.ask("runCode", live("", interactive=True)))["details"]["path"] == "/id"
        await client.send("sendInput", {"run": "r", "text": "done\n", "end": True}, id="e")
        _, data = await all_of_after_ack(client)
        assert data["output"] == "done\n"
        assert await refused(client, "r") == "NOT_FOUND"


async def all_of_after_ack(client: Client) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    assert (await client.hear())["action"] == "ack"
    return await all_of(client, "r")


async def test_input_that_is_not_read_is_bounded() -> None:
    async with serving() as server, connected(server) as client:
        await client.send("runCode", live("import time; time.sleep(1e6)", interactive=True), id="r")
        await client.hear()
        for _ in range(2):
            await client.send("sendInput", {"run": "r", "text": "x" * 700_000})
        answer = await client.hear()

        assert (answer["details"]["code"], answer["details"]["limit"]) == ("PAYLOAD_TOO_LARGE", 1 << 20)


async def test_a_cancelled_run_gives_what_it_had_printed() -> None:
    async with serving() as server, connected(server) as client:
        await client.send("runCode", live("import time; print('begun'); time.sleep(1e6)"), id="r")
        await heard(client, "begun\n")
        await client.send("cancelRun", {"run": "r"})
        _, data = await all_of(client, "r")

        assert (data["status"], data["output"]) == ("cancelled", "begun\n")


async def test_a_flood_is_cut_and_whole_for_a_client_that_reads() -> None:
    async with serving() as server, connected(server) as client:
        await client.send("runCode", live("while True: print('x' * 999)"), id="r")
        before, data = await all_of(client, "r")

        assert data["status"] == "outputLimit"
        assert "".join(m["data"]["text"] for m in before if m["action"] == "outputChunk") == data["output"]
        assert len(data["output"]) == 1 << 20


async def test_a_client_that_stops_reading_is_closed_and_its_program_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "PATIENCE_SECONDS", 0.5 * SECOND)
    async with serving(outbox_bytes=100_000) as server, connected(server) as other:
        idle = jailed()
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(
            b"GET /appws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        await reader.readuntil(b"\r\n\r\n")
        reader._transport.pause_reading()  # asyncio itself would go on reading
        code = "import os, time\nfor _ in range(120):\n    os.write(1, b'x' * 65536)\ntime.sleep(1e6)"
        text = json.dumps({"action": "runCode", "data": live(code, limits={"outputBytes": 8 << 20})}).encode()
        writer.write(b"\x81\xfe" + len(text).to_bytes(2, "big") + bytes(4) + text)
        await until(lambda: jailed() > idle)
        assert (await other.run("print(1)"))["output"] == "1\n"
        await until(lambda: jailed() == idle, 60)
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


chunks = st.lists(st.tuples(st.sampled_from(["stdout", "stderr"]), st.binary(max_size=6) | st.sampled_from(
    ["ä€𝄞".encode()[cut:][:2] for cut in range(9)])), max_size=12)  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(chunks, st.sampled_from([(), ("stdout",), ("stdout", "stderr")]))
def test_whatever_is_printed_the_chunks_together_are_the_streams(
    printed: list[tuple[Any, bytes]], cut: tuple[Any, ...]
) -> None:
    async def main() -> tuple[Outcome, dict[str, str]]:
        got = {"stdout": "", "stderr": ""}

        async def send(stream: str, text: str) -> None:
            assert text
            json.dumps(text)
            got[stream] += text

        output = LiveOutput(send)
        for stream, chunk in printed:
            output.emit(stream, chunk)
        whole = {name: b"".join(chunk for stream, chunk in printed if stream == name) for name in got}
        outcome = conclude(Job("python", ""), Facts(exit_code=0, output_cut=cut), whole["stdout"], whole["stderr"])
        await output.finish(outcome)
        return outcome, got

    outcome, got = asyncio.run(main())
    assert got == {"stdout": outcome.stdout, "stderr": outcome.stderr}
