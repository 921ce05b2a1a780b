"""startGame, updateScore and getLeaderboard, as a client meets them."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.conftest import GEN_TEST
from tests.handlers.client import Client, connected, serving

pytestmark = GEN_TEST


def row(id: int, score: float, rank: int, name: str | None = None) -> dict[str, Any]:
    return {"id": id, "name": name or f"Player {id}", "score": score, "rank": rank}


async def board_with(client: Client, wanted: list[dict[str, Any]]) -> None:
    """Hears boards until one is as wanted: those before it are older states."""
    while True:
        message = await client.hear()
        assert message["action"] == "leaderboardUpdate", message
        assert "id" not in message
        if message["data"] == wanted:
            return


async def test_everyone_in_the_room_hears_of_a_change() -> None:
    async with serving() as server, connected(server) as one, connected(server) as two:
        await one.send("startGame")
        await board_with(two, [])
        await one.send("updateScore", {"playerId": 7, "change": 10})
        await one.send("updateScore", {"playerId": 8, "change": 10})
        await one.send("updateScore", {"playerId": 9, "change": 4.5})
        board = [row(7, 10, 1), row(8, 10, 1), row(9, 4.5, 3)]
        await board_with(one, board)
        await board_with(two, board)


async def test_rooms_and_paths_are_apart() -> None:
    async with (
        serving() as server,
        connected(server, "/appws?room=a") as a,
        connected(server, "/appws?room=b") as b,
        connected(server, "/devws?room=a") as dev,
    ):
        await a.send("startGame")
        await a.send("updateScore", {"playerId": 1, "change": 1})
        await board_with(a, [row(1, 1, 1)])
        for other in (b, dev):
            assert (await other.ask("getLeaderboard"))["data"] == []
            assert (await other.ask("updateScore", {"playerId": 1, "change": 1}))["details"]["code"] == "NOT_FOUND"


async def test_a_score_before_the_game_is_told_what_to_do() -> None:
    async with serving() as server, connected(server) as client:
        answer = await client.ask("updateScore", {"playerId": 1, "change": 1}, id=3)

        assert (answer["action"], answer["id"], answer["details"]["code"]) == ("error", 3, "NOT_FOUND")
        assert "startGame" in answer["error"]


async def test_requests_with_an_id_are_acknowledged_and_applied_once() -> None:
    async with serving() as server, connected(server) as client, connected(server) as other:
        await client.send("startGame", id="s")
        await client.send("updateScore", {"playerId": 1, "change": 2}, id="u")
        await client.send("updateScore", {"playerId": 1, "change": 2}, id="u")
        acknowledged = []
        while len(acknowledged) < 3:
            message = await client.hear()
            if message["action"] == "ack":
                acknowledged.append(message["id"])
        assert sorted(acknowledged) == ["s", "u", "u"]
        await other.send("updateScore", {"playerId": 1, "change": 2}, id="u")
        while (await other.hear())["action"] != "ack":
            pass
        await client.send("getLeaderboard", id="g")
        while (message := await client.hear()).get("id") != "g":
            pass
        assert message["data"] == [row(1, 2, 1)]


async def test_decimals_keep_six_places() -> None:
    async with serving() as server, connected(server) as client:
        await client.send("startGame")
        for change in (0.1, 0.2, 0.0000004):
            await client.send("updateScore", {"playerId": 1, "change": change})
        await client.send("updateScore", {"playerId": 2, "change": -1.0000006})
        await board_with(client, [row(1, 0.3, 1), row(2, -1.000001, 2)])


async def test_a_total_that_no_browser_could_show_is_refused() -> None:
    async with serving() as server, connected(server) as client:
        await client.send("startGame")
        await board_with(client, [])
        for change in (1e308, -1e308, 2**53, -(2**70)):
            answer = await client.ask("updateScore", {"playerId": 1, "change": change})
            assert (answer["details"]["code"], answer["details"]["limit"]) == ("INVALID_MESSAGE", 2**53 - 1)
        await client.send("updateScore", {"playerId": 1.0, "change": 2**53 - 1})
        await board_with(client, [row(1, 2**53 - 1, 1)])


async def test_a_roster_names_the_players_and_refuses_others() -> None:
    async with serving() as server, connected(server) as client:
        await client.send("startGame", {"players": [{"id": 2, "name": "Bö"}, {"id": 1, "name": "Ada"}]})
        await board_with(client, [row(2, 0, 1, "Bö"), row(1, 0, 1, "Ada")])
        answer = await client.ask("updateScore", {"playerId": 3, "change": 1})
        assert (answer["details"]["code"], answer["details"]["path"]) == ("NOT_FOUND", "/data/playerId")
        twice = [{"id": 2, "name": "x"}, {"id": 2.0, "name": "y"}]
        answer = await client.ask("startGame", {"players": twice})
        assert (answer["details"]["code"], answer["details"]["path"]) == ("INVALID_MESSAGE", "/data/players/1/id")
        answer = await client.ask("startGame", {"players": [{"id": 2, "name": "\ud800"}]})
        assert (answer["details"]["code"], answer["details"]["path"]) == ("INVALID_MESSAGE", "/data/players/0/name")


async def test_a_new_game_sets_scores_to_zero_and_keeps_the_players() -> None:
    async with serving() as server, connected(server) as client:
        await client.send("startGame")
        await client.send("updateScore", {"playerId": 1, "change": 1})
        await client.send("updateScore", {"playerId": 2, "change": 3})
        await board_with(client, [row(2, 3, 1), row(1, 1, 2)])
        await client.send("startGame")
        await board_with(client, [row(1, 0, 1), row(2, 0, 1)])


async def test_the_board_around_a_player_is_for_the_asker_alone() -> None:
    async with serving() as server, connected(server) as client:
        players = [{"id": n, "name": f"Player {n}"} for n in range(250)]
        await client.send("startGame", {"players": players})
        board = (await client.hear())["data"]
        assert [entry["id"] for entry in board] == list(range(100))
        answer = await client.ask("getLeaderboard", {"limit": 3, "around": 200}, id="g")
        assert ([entry["id"] for entry in answer["data"]], answer["id"]) == ([199, 200, 201], "g")
        assert len((await client.ask("getLeaderboard", {"limit": 240}))["data"]) == 240
        assert (await client.ask("getLeaderboard", {"around": 999}))["details"]["code"] == "NOT_FOUND"


async def test_many_changes_are_few_boards_and_the_last_one_arrives() -> None:
    async with serving() as server, connected(server) as client, connected(server) as watcher:
        await client.send("startGame")
        begin = asyncio.get_running_loop().time()
        for _ in range(500):
            await client.send("updateScore", {"playerId": 1, "change": 1})
        boards = 0
        while (await watcher.hear())["data"] != [row(1, 500, 1)]:
            boards += 1
        took = asyncio.get_running_loop().time() - begin

        assert boards <= 2 + took / 0.1


async def test_scores_survive_a_restart(tmp_path: Any) -> None:
    async with serving(data_dir=tmp_path) as server, connected(server) as client:
        await client.send("startGame")
        await client.send("updateScore", {"playerId": 1, "change": 5}, id=1)
        while (await client.hear())["action"] != "ack":
            pass
    async with serving(data_dir=tmp_path) as server, connected(server) as client:
        assert (await client.ask("getLeaderboard"))["data"] == [row(1, 5, 1)]
