"""What is served over plain HTTP."""

from __future__ import annotations

import json

from tornado.httpclient import AsyncHTTPClient, HTTPResponse

from protocol.schema import SCHEMAS
from server import Running
from tests.conftest import GEN_TEST
from tests.handlers.client import serving

pytestmark = GEN_TEST


async def get(server: Running, path: str, **headers: str) -> HTTPResponse:
    client = AsyncHTTPClient(force_instance=True)
    try:
        url = f"http://127.0.0.1:{server.port}{path}"
        return await client.fetch(
            url, headers={name.replace("_", "-"): v for name, v in headers.items()}, raise_error=False
        )
    finally:
        client.close()


async def test_health_says_what_is_going_on() -> None:
    async with serving() as server:
        answer = await get(server, "/healthz")

        assert answer.code == 200
        health = json.loads(answer.body)
        assert health["cluster"].pop("capacity") >= 1
        assert health == {
            "status": "ok", "engine": server.engine, "connections": 0, "running": 0, "queued": 0,
            "cluster": {"problem": None, "running": 0, "queued": 0},
        }  # fmt: skip


async def test_schemas_are_served_as_they_are_with_an_etag_for_every_page() -> None:
    async with serving() as server:
        names = json.loads((await get(server, "/schemas/")).body)["schemas"]
        for path in names:
            answer = await get(server, path)

            assert answer.body == (SCHEMAS.parent / path.removeprefix("/")).read_bytes()
            assert answer.headers["Access-Control-Allow-Origin"] == "*"
            assert (await get(server, path, If_None_Match=answer.headers["Etag"])).code == 304


async def test_there_is_no_way_out_of_the_schemas() -> None:
    async with serving() as server:
        for path in ("/schemas/../server.py", "/schemas/%2e%2e/server.py", "/schemas/client/nope.json"):
            assert (await get(server, path)).code == 404


async def test_the_start_page_says_what_is_here() -> None:
    async with serving() as server:
        assert b"/appws" in (await get(server, "/")).body
