"""The transport: whatever a client sends, it is answered and the others do not notice."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from contextlib import AsyncExitStack

import pytest
from tornado.httpclient import HTTPClientError

from tests.conftest import GEN_TEST, SECOND
from tests.handlers.client import connected, serving

pytestmark = GEN_TEST


async def send_for_ever(writer: asyncio.StreamWriter, frame: bytes) -> None:
    while True:
        writer.write(frame)
        await asyncio.wait_for(writer.drain(), 60 * SECOND)


BAD_FRAMES = [
    ("", "PARSE_ERROR"),
    ("{", "PARSE_ERROR"),
    ("[]", "PARSE_ERROR"),
    ("null", "PARSE_ERROR"),
    ('{"action":"echo","data":NaN}', "PARSE_ERROR"),
    ('{"action":"echo","data":1e999}', "PARSE_ERROR"),
    ('{"action":"echo","action":"echo"}', "PARSE_ERROR"),
    ('{"action":"echo","data":' + "[" * 100 + "]" * 100 + "}", "PARSE_ERROR"),
    (b"\x00\xff", "PARSE_ERROR"),
    ("{}", "INVALID_MESSAGE"),
    ('{"action":1}', "INVALID_MESSAGE"),
    ('{"action":"runCode"}', "INVALID_MESSAGE"),
    ('{"action":"runCode","id":""}', "INVALID_MESSAGE"),
    ('{"action":"runCode","dta":{}}', "INVALID_MESSAGE"),
    ('{"action":"runCod","data":{}}', "UNKNOWN_ACTION"),
    ('{"action":"echo"}', "UNKNOWN_ACTION"),
    ('{"action":"__init__"}', "UNKNOWN_ACTION"),
]


async def test_every_bad_frame_is_answered_and_the_connection_lives() -> None:
    async with serving() as server:
        for frame, code in BAD_FRAMES:
            async with connected(server) as client:
                await client.say(frame)
                answer = await client.hear()

                assert (answer["action"], answer["details"]["code"]) == ("error", code), frame
                assert (await client.run("print(1)"))["output"] == "1\n"


async def test_an_error_carries_the_id_of_its_request() -> None:
    async with serving() as server, connected(server) as client:
        assert (await client.ask("runCode", {}, id="a"))["id"] == "a"
        assert (await client.ask("nonsense", {}, id=7))["id"] == 7


async def test_a_misspelt_property_is_named_with_the_right_one() -> None:
    async with serving() as server, connected(server) as client:
        answer = await client.ask("runCode", {"language": "python", "cod": "", "mode": "standalone"})

        assert answer["error"] == 'data has no property "cod" (did you mean code?)'
        assert answer["details"]["path"] == "/data/cod"


async def test_a_message_over_the_size_limit_closes_with_1009() -> None:
    async with serving(max_message_bytes=2000) as server, connected(server) as client:
        await client.say("x" * 3000)

        assert await client.close_code() == 1009


async def test_twenty_bad_messages_close_with_4400_after_an_answer_to_each() -> None:
    async with serving() as server, connected(server) as client:
        for _ in range(40):
            await client.say("{")
        answers = [await client.hear() for _ in range(40)]

        assert all(answer["action"] == "error" for answer in answers)
        assert await client.close_code() == 4400


async def test_nineteen_bad_messages_do_not_close() -> None:
    async with serving() as server, connected(server) as client:
        for _ in range(19):
            await client.say("{")
            await client.hear()

        assert (await client.run("print(1)"))["output"] == "1\n"


async def test_a_page_of_a_strange_origin_is_refused_and_the_log_names_the_setting(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with serving() as server:
        with pytest.raises(HTTPClientError, match="403"), caplog.at_level(logging.WARNING):
            async with connected(server, origin="http://localhost:5173"):
                pass

    assert "--allowed-origins 'http://localhost:5173'" in caplog.text


async def test_allowed_origins_and_the_servers_own_are_accepted() -> None:
    async with serving(allowed_origins=("https://app.example",)) as server:
        for origin in ("https://app.example", f"http://127.0.0.1:{server.port}", None):
            async with connected(server, origin=origin) as client:
                assert (await client.run("print(1)"))["output"] == "1\n"


async def test_a_client_of_whom_nothing_is_heard_is_closed() -> None:
    async with serving(ping_s=0.05 * SECOND) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(
            b"GET /appws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        await reader.readuntil(b"\r\n\r\n")
        heard = b""
        while not heard.endswith((4408).to_bytes(2, "big") + b"nothing was heard of the client"):
            chunk = await asyncio.wait_for(reader.read(1000), 30 * SECOND)
            assert chunk
            heard += chunk
        writer.close()
        await writer.wait_closed()


async def test_a_client_that_answers_pings_stays() -> None:
    async with serving(ping_s=0.05 * SECOND) as server, connected(server) as client:
        assert (await client.run(f"import time; time.sleep({0.5 * SECOND}); print(1)"))["output"] == "1\n"


async def test_a_client_that_never_reads_is_closed_and_others_do_not_notice() -> None:
    async with serving(outbox_bytes=20_000) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(
            b"GET /devws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        await reader.readuntil(b"\r\n\r\n")
        reader._transport.pause_reading()  # asyncio itself would go on reading
        text = json.dumps({"action": "nonsense" * 1000}).encode()
        frame = b"\x81\xfe" + len(text).to_bytes(2, "big") + bytes(4) + text
        async with connected(server) as other:
            with pytest.raises(OSError, match=r"reset|Broken|lost"):
                await send_for_ever(writer, frame)
            assert (await other.run("print(1)"))["output"] == "1\n"
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def test_requests_under_way_are_bounded_for_each_connection() -> None:
    async with serving(max_requests=2) as server, connected(server) as client, connected(server) as other:
        sleeper = {"language": "python", "code": "import time; time.sleep(1e6)", "mode": "standalone"}
        for _ in range(3):
            await client.send("runCode", sleeper)
        answer = await client.hear()

        assert (answer["details"]["code"], answer["details"]["limit"]) == ("RATE_LIMITED", 2)
        assert "--max-requests" in answer["error"]
        assert (await other.ask("nonsense"))["details"]["code"] == "UNKNOWN_ACTION"


async def test_a_stopping_server_closes_with_1012() -> None:
    stopping = AsyncExitStack()
    server = await stopping.enter_async_context(serving())
    async with connected(server) as client:
        await stopping.aclose()

        assert await client.close_code() == 1012


LARGE = {
    "a key twice among many": "{" + ",".join(f'"{n}":0' for n in range(60_000)) + ',"7":0}',
    "a long list of wrong ids": json.dumps({"action": "cancelTasks", "data": {"ids": [0] * 200_000}}),
    "a long list of right ids": json.dumps({"action": "cancelTasks", "data": {"ids": ["x"] * 150_000}}),
    "a long list of wrong players": json.dumps({"action": "startGame", "data": {"players": [{}] * 200_000}}),
    "a long list of wrong tasks": json.dumps({"action": "startTasks", "data": {"tasks": [{}] * 200_000}}),
}


@pytest.mark.parametrize("what", LARGE)
async def test_a_large_bad_message_does_not_keep_others_waiting(what: str) -> None:
    """Nor is it looked at for longer than it takes to say what is wrong."""
    async with serving() as server, connected(server) as client, connected(server, "/devws") as other:
        await client.say(LARGE[what])
        waits = []
        answer = asyncio.ensure_future(client.hear())
        while not answer.done():
            begin = asyncio.get_running_loop().time()
            await other.ask("echo", 1)
            waits.append(asyncio.get_running_loop().time() - begin)

        assert answer.result()["action"] == "error"
        assert max(waits) < 1 * SECOND


async def test_a_run_whose_client_left_while_its_message_was_read_is_not_begun() -> None:
    async with serving() as server, connected(server) as other:
        for _ in range(5):
            async with connected(server) as client:
                code = f"while True: pass\n{'#' * 200_000}"
                await client.send("runCode", {"language": "python", "code": code, "mode": "standalone"})
        assert (await other.run("print(1)"))["output"] == "1\n"  # two spinners would take both places


@pytest.mark.parametrize("query", ["room=%ff", "session=%ff", "room=a%20b", "room="])
async def test_a_bad_name_in_the_address_is_told(query: str) -> None:
    async with serving() as server, connected(server, f"/appws?{query}") as client:
        assert "must match" in (await client.hear())["error"]
        assert await client.close_code() == 4400
