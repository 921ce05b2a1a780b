"""/devws tells developers more."""

from __future__ import annotations

import pytest
from tornado.httpclient import HTTPClientError, HTTPRequest
from tornado.websocket import websocket_connect

from services.runs import Runs
from tests.conftest import GEN_TEST
from tests.handlers.client import connected, serving

pytestmark = GEN_TEST


async def test_pages_of_this_machine_are_welcome_on_any_port() -> None:
    async with serving() as server:
        for origin in ("http://localhost:5173", "http://127.0.0.1:3000", "http://[::1]:9"):
            async with connected(server, "/devws", origin=origin) as client:
                assert (await client.run("print(1)"))["output"] == "1\n"


async def test_other_pages_are_not() -> None:
    async with serving() as server:
        with pytest.raises(HTTPClientError, match="403"):
            async with connected(server, "/devws", origin="http://localhost.example:5173"):
                pass


async def test_it_is_closed_on_a_server_for_others() -> None:
    async with serving(address="0.0.0.0") as server:
        with pytest.raises(HTTPClientError, match="403"):
            async with connected(server, "/devws"):
                pass
    async with serving(address="0.0.0.0", dev=True) as server, connected(server, "/devws") as client:
        assert (await client.ask("echo", 1))["data"] == 1


async def test_an_error_lists_every_violation_and_an_example() -> None:
    async with serving() as server, connected(server, "/devws") as client:
        details = (await client.ask("runCode", {"language": "cobol", "code": 1}))["details"]

        assert {violation["path"] for violation in details["violations"]} == {"/data", "/data/language", "/data/code"}
        assert details["example"]["action"] == "runCode"


async def test_describe_gives_the_schema_of_every_action() -> None:
    async with serving() as server, connected(server, "/devws") as client:
        actions = (await client.ask("describe"))["data"]["actions"]

        assert {"runCode", "startTasks", "updateScore", "echo"} <= set(actions)
        assert actions["runCode"]["required"] == ["action", "data"]


@pytest.mark.parametrize(
    ("message", "valid"), [({"action": "startGame"}, True), ({"action": "x"}, False), (3, False), ({}, False)]
)
async def test_validate_is_a_dry_run(message: object, valid: bool) -> None:
    async with serving() as server, connected(server, "/devws") as client:
        data = (await client.ask("validate", {"message": message}))["data"]

        assert data["valid"] is valid
        assert bool(data["violations"]) is not valid


async def test_echo_sends_the_same_back() -> None:
    async with serving() as server, connected(server, "/devws") as client:
        assert await client.ask("echo", {"ü": [1, None]}, id="e") == {
            "action": "echo",
            "data": {"ü": [1, None]},
            "id": "e",
        }


@pytest.mark.parametrize(("path", "told"), [("/devws", True), ("/appws", False)])
async def test_a_fault_of_ours_is_confessed_to_developers_only(
    path: str, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("ours")

    monkeypatch.setattr(Runs, "run", fail)
    async with serving() as server, connected(server, path) as client:
        answer = await client.ask("runCode", {"language": "python", "code": "", "mode": "standalone"}, id=1)

        assert (answer["details"]["code"], answer["id"]) == ("INTERNAL", 1)
        assert ("RuntimeError: ours" in str(answer)) is told


async def test_a_page_that_only_pretends_to_be_of_this_machine_is_refused() -> None:
    """DNS rebinding: its own host name leads to 127.0.0.1, so that its origin and its host agree."""
    async with serving() as server:
        host = f"evil.example:{server.port}"
        for path, refused in (("/devws", True), ("/appws", False)):
            request = HTTPRequest(
                f"ws://127.0.0.1:{server.port}{path}", headers={"Host": host, "Origin": f"http://{host}"}
            )
            if refused:
                with pytest.raises(HTTPClientError, match="403"):
                    await websocket_connect(request)
            else:
                (await websocket_connect(request)).close()


async def test_an_origin_that_is_no_address_is_refused() -> None:
    async with serving() as server:
        request = HTTPRequest(f"ws://127.0.0.1:{server.port}/devws", headers={"Origin": "http://[::1"})
        with pytest.raises(HTTPClientError, match="403"):
            await websocket_connect(request)
