"""The schema files: valid, readable by draft-07 tools too, with examples; and what is told of a violation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator, Draft202012Validator

from protocol.errors import REFUSALS, InvalidMessage, UnknownAction
from protocol.message import Message, decode
from protocol.schema import SCHEMAS as FOLDER
from protocol.schema import Schemas, Shape

SCHEMAS = Schemas()
FILES = sorted(FOLDER.rglob("*.json"))
SEED_CLIENT = {"runCode", "startTasks", "startGame", "updateScore"}
SEED_SERVER = {"output", "taskUpdate", "leaderboardUpdate", "error"}
TOO_NEW = {"prefixItems", "unevaluatedProperties", "unevaluatedItems", "$dynamicRef", "$dynamicAnchor",
           "dependentSchemas", "dependentRequired"}  # fmt: skip


def objects(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from objects(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from objects(inner)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_is_valid_for_new_and_old_tools(path: Path) -> None:
    document = json.loads(path.read_text())
    Draft202012Validator.check_schema(document)
    Draft7Validator.check_schema({**document, "$schema": "http://json-schema.org/draft-07/schema#"})

    assert document["$id"] == f"https://runboard.dev/schemas/{path.relative_to(FOLDER).as_posix()}"
    for schema in objects({key: value for key, value in document.items() if key != "examples"}):
        assert not TOO_NEW & schema.keys()
        assert "$ref" not in schema or len(schema) == 1


@pytest.mark.parametrize("path", [path for path in FILES if path.parent != FOLDER], ids=lambda path: path.stem)
def test_every_example_is_good(path: Path) -> None:
    document = json.loads(path.read_text())
    assert document["examples"]
    for example in document["examples"]:
        if path.parent.name == "tasks":
            SCHEMAS.shape(f"tasks/{path.name}").check(example, "")
        else:
            assert example["action"] == path.stem
            SCHEMAS.check(decode(json.dumps(example)), side=path.parent.name, dev=True)


def test_all_of_the_seed_is_there() -> None:
    assert set(SCHEMAS.actions(dev=False)) >= SEED_CLIENT
    assert {path.stem for path in (FOLDER / "server").iterdir()} >= SEED_SERVER
    assert set(SCHEMAS.actions(dev=True)) - set(SCHEMAS.actions(dev=False)) == {"describe", "validate", "echo"}


def test_the_codes_of_errors_are_a_closed_list() -> None:
    details = json.loads((FOLDER / "server" / "error.json").read_text())["properties"]["details"]

    assert sorted(details["properties"]["code"]["enum"]) == sorted(kind.code for kind in REFUSALS)


@pytest.mark.parametrize(
    ("text", "said", "path"),
    [
        ('{"action":"runCode","data":{"language":"ruby","code":"","mode":"standalone"}}',
         'data.language must be "python", "javascript", not "ruby"', "/data/language"),
        ('{"action":"runCode","data":{"language":"python","cdoe":"","mode":"standalone"}}',
         'data has no property "cdoe" (did you mean code?)', "/data/cdoe"),
        ('{"action":"runCode","data":{"language":"python","mode":"standalone"}}', "data lacks code", "/data"),
        ('{"action":"runCode"}', "the message lacks data", ""),
        ('{"action":"updateScore","data":{"playerId":"7","change":1}}',
         'data.playerId must be of type integer, not "7"', "/data/playerId"),
        ('{"action":"startTasks","data":{"tasks":[]}}', "data.tasks must have at least 1 items, not 0", "/data/tasks"),
    ],
)  # fmt: skip
def test_one_violation_is_told_in_a_sentence(text: str, said: str, path: str) -> None:
    with pytest.raises(InvalidMessage) as caught:
        SCHEMAS.check(decode(text))

    assert (caught.value.sentence, caught.value.details["path"]) == (said, path)


def test_all_violations_can_be_had() -> None:
    message = Message("runCode", {"language": "ruby", "code": 7, "mode": "standalone", "extra": 1})

    assert {told["path"] for told in SCHEMAS.violations(message)} == {"/data/language", "/data/code", "/data/extra"}


@pytest.mark.parametrize("action", ["runcode", "", "echo", "output", "__class__", "x" * 10_000])
def test_an_action_that_a_client_may_not_send_is_unknown(action: str) -> None:
    with pytest.raises(UnknownAction) as caught:
        SCHEMAS.check(Message(action))

    assert len(caught.value.sentence) < 200


def test_a_shape_tells_where_in_the_message_it_was_broken() -> None:
    shape = Shape({"type": "object", "properties": {"n": {"type": "integer"}}})
    with pytest.raises(InvalidMessage) as caught:
        shape.check({"n": "x"}, "/data/tasks/3/params")

    assert caught.value.sentence.startswith("data.tasks.3.params.n must be of type integer")
    assert caught.value.details["path"] == "/data/tasks/3/params/n"


def test_sizes_are_checked_before_what_is_inside() -> None:
    """So that a message that is far too large is not looked at item by item."""
    for path in FILES:
        for schema in objects(json.loads(path.read_text())):
            for size, inside in (("maxItems", "items"), ("maxProperties", "additionalProperties")):
                if size in schema and inside in schema:
                    assert list(schema).index(size) < list(schema).index(inside), path


def test_of_many_violations_a_few_are_told() -> None:
    assert len(SCHEMAS.violations(Message("cancelTasks", {"ids": [0] * 900}))) == 50


def test_each_missing_name_is_told() -> None:
    told = [violation["expected"] for violation in SCHEMAS.violations(Message("runCode", {"language": "python"}))]

    assert sorted(told) == ["code", "mode"]
