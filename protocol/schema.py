"""Checks messages against the JSON Schema files, and says in one sentence what is wrong with one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError
from referencing import Registry, Resource

from protocol.errors import InvalidMessage, UnknownAction
from protocol.message import Message, clip, envelope_of, nearest, pointer

Side = Literal["client", "server"]
SCHEMAS = Path(__file__).parent.parent / "schemas"
MOST_VIOLATIONS = 50
SIZES = ("maxLength", "maxItems", "maxProperties")
"""Each stands before what is then checked of every item; a test sees to it."""
UNITS = {
    "maxLength": "characters",
    "minLength": "characters",
    "maxItems": "items",
    "minItems": "items",
    "maxProperties": "properties",
}


class Schemas:
    """All message schemas, compiled once: `client/ACTION.json` and `server/ACTION.json` below one folder."""

    def __init__(self, folder: Path = SCHEMAS) -> None:
        self._files = {
            path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.json"))
        }
        documents = {name: json.loads(content) for name, content in self._files.items()}
        registry: Registry[Any] = Registry().with_resources(
            (document["$id"], Resource.from_contents(document)) for document in documents.values()
        )
        self._registry = registry
        self._documents = documents
        self._schemas: dict[Side, dict[str, Any]] = {"client": {}, "server": {}}
        self._validators: dict[Side, dict[str, Draft202012Validator]] = {"client": {}, "server": {}}
        for side in self._schemas:
            for name, document in documents.items():
                if name.startswith(f"{side}/"):
                    action = Path(name).stem
                    self._schemas[side][action] = document
                    self._validators[side][action] = Draft202012Validator(_inlined(document, registry))

    def documents(self) -> dict[str, bytes]:
        """The files themselves, by name (`client/runCode.json`)."""
        return dict(self._files)

    def shape(self, name: str) -> Shape:
        """What the file `name` (`tasks/sleep.json`) allows."""
        return Shape(_inlined(self._documents[name], self._registry))

    def actions(self, *, dev: bool) -> list[str]:
        """The actions that a client may send; with `dev` also those of /devws alone."""
        return [action for action, schema in self._schemas["client"].items() if dev or not schema.get("x-dev")]

    def schema(self, action: str) -> dict[str, Any]:
        """The schema of a client's action."""
        found: dict[str, Any] = self._schemas["client"][action]
        return found

    def example(self, action: str) -> Any:
        """A good message of a client's action."""
        return self._schemas["client"][action]["examples"][0]

    def check(self, message: Message, *, side: Side = "client", dev: bool = False) -> None:
        """Returns when the message is good.

        Raises:
            UnknownAction: there is no such action.
            InvalidMessage: the schema does not allow it; tells the one violation that is worth most.
        """
        known = self.actions(dev=dev) if side == "client" else list(self._schemas[side])
        if message.action not in known:
            raise UnknownAction(
                f"there is no action {clip(message.action)}{nearest(message.action, known)}",
                path="/action",
                id=message.id,
            )
        errors = _first(self._validators[side][message.action].iter_errors(envelope_of(message)))
        if errors:
            sentence, details = _tell(min(_leaves(errors), key=_rank))
            raise InvalidMessage(sentence, id=message.id, **details)

    def violations(self, message: Message) -> list[dict[str, Any]]:
        """Everything that the schema has against a client's message: {error, path, expected?, limit?} each."""
        validator = self._validators["client"][message.action]
        errors = _first(validator.iter_errors(envelope_of(message)))
        told = (_tell(error) for error in sorted(_leaves(errors), key=_rank))
        return [{"error": sentence, **details} for sentence, details in told]


class Shape:
    """What a part of a message must look like, compiled once."""

    def __init__(self, schema: Mapping[str, Any]) -> None:
        Draft202012Validator.check_schema(schema)
        self._validator = Draft202012Validator(schema)

    def check(self, value: Any, at: str) -> None:
        """Returns when `value` is good. `at` is its place in the message, a JSON Pointer.

        Raises:
            InvalidMessage: the schema does not allow it.
        """
        errors = _first(self._validator.iter_errors(value))
        if errors:
            sentence, details = _tell(min(_leaves(errors), key=_rank), at)
            raise InvalidMessage(sentence, **details)


def _inlined(schema: Any, registry: Registry[Any]) -> Any:
    """The schema with what it refers to in place: looking references up is half the time of a check."""
    if isinstance(schema, dict):
        if schema.keys() == {"$ref"}:
            return _inlined(registry.resolver().lookup(schema["$ref"]).contents, registry)
        return {name: _inlined(part, registry) for name, part in schema.items()}
    return [_inlined(part, registry) for part in schema] if isinstance(schema, list) else schema


def _first(errors: Iterable[ValidationError]) -> list[ValidationError]:
    """As many violations as are worth a look. What is too large is looked at no further: each error costs 0.1 ms."""
    found = []
    for error in errors:
        found.append(error)
        if error.validator in SIZES or len(found) == MOST_VIOLATIONS:
            break
    return found


def _leaves(errors: Iterable[ValidationError]) -> Iterator[ValidationError]:
    """The violations that say what is wrong, out of those that only say that a branch failed."""
    for error in errors:
        if error.context:
            yield from _leaves(error.context)
        else:
            yield error


def _rank(error: ValidationError) -> tuple[int, int]:
    """What to tell first: a misspelt property explains the missing one; else the violation nearest to the top."""
    order = {"additionalProperties": 0, "type": 1, "required": 2}
    return len(error.absolute_path), order.get(str(error.validator), 3)


def _tell(error: ValidationError, at: str = "") -> tuple[str, dict[str, Any]]:
    """A sentence about one violation, and its details. `at` is where the checked value stands in the message."""
    parts = [*at.split("/")[1:], *error.absolute_path]
    where = ".".join(str(part) for part in parts) or "the message"
    path = pointer(parts)
    rule: str = str(error.validator)
    wanted: Any = error.validator_value
    value: Any = error.instance
    schema: Any = error.schema
    match rule:
        case "additionalProperties":
            known = list(schema.get("properties", {}))
            name = next(name for name in value if name not in known)
            return f"{where} has no property {clip(name)}{nearest(name, known)}", {"path": pointer([*parts, name])}
        case "required":
            name = next(name for name in wanted if error.message.startswith(repr(name)))  # one error for each name
            return f"{where} lacks {name}", {"path": path, "expected": name}
        case "enum" | "const":
            allowed = ", ".join(json.dumps(option) for option in (wanted if rule == "enum" else [wanted]))
            return f"{where} must be {allowed}, not {clip(value)}", {"path": path, "expected": allowed}
        case "type":
            kinds = " or ".join([wanted] if isinstance(wanted, str) else wanted)
            return f"{where} must be of type {kinds}, not {clip(value)}", {"path": path, "expected": kinds}
        case "maxLength" | "maxItems" | "maxProperties":
            said = f"{where} has {len(value)} {UNITS[rule]}, and the limit is {wanted}"
            return said, {"path": path, "limit": wanted}
        case "minLength" | "minItems":
            return f"{where} must have at least {wanted} {UNITS[rule]}, not {len(value)}", {
                "path": path,
                "limit": wanted,
            }
        case "minimum" | "maximum":
            side = "at least" if rule == "minimum" else "at most"
            return f"{where} must be {side} {wanted}, not {clip(value)}", {"path": path, "limit": wanted}
        case "pattern":
            return f"{where} must match {wanted}, not {clip(value)}", {"path": path, "expected": wanted}
        case _:
            return f"{where} is not valid: {rule}", {"path": path}
