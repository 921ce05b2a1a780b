"""A server whose Redis goes away and comes back, as its clients meet it."""

from __future__ import annotations

from tests.conftest import GEN_TEST
from tests.handlers.client import connected, serving
from tests.services.redis_server import running_redis

pytestmark = GEN_TEST


async def test_clients_get_a_clear_error_meanwhile_and_the_board_afterwards() -> None:
    async with running_redis() as redis, serving(store=redis.url) as server, connected(server) as client:
        await client.send("startGame")
        await client.hear()
        await client.send("updateScore", {"playerId": 1, "change": 2}, id="a")
        while (await client.hear()).get("id") != "a":
            pass
        await redis.stop()
        answer = await client.ask("updateScore", {"playerId": 1, "change": 3}, id="b")
        while answer["action"] == "leaderboardUpdate":
            answer = await client.hear()
        assert (answer["details"]["code"], answer["details"]["retryable"]) == ("OVERLOADED", True)
        assert "same id" in answer["error"]
        assert (await client.run("print(1)"))["output"] == "1\n"

        await redis.start()
        assert (await client.hear(60))["data"][0]["score"] in (2, 5)  # without anyone having asked
        await client.send("updateScore", {"playerId": 1, "change": 3}, id="b")
        while (await client.hear()).get("id") != "b":
            pass
        await client.send("getLeaderboard", id="g")
        while (answer := await client.hear()).get("id") != "g":
            pass
        assert answer["data"][0]["score"] == 5
