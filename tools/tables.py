"""Writes the tables of docs/ from the code: `python -m tools.tables`. A test fails when one is out of date."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from config import FIELDS, PREFIX, flag, shown
from protocol.errors import close_table, refusal_table
from sandbox.promises import PROMISES

DOCS = Path(__file__).parent.parent / "docs"


def tables() -> dict[tuple[str, str], str]:
    """(document, name of the table) → Markdown."""
    settings = [
        (f"`{flag(field.name)}`", f"`{PREFIX}{field.name.upper()}`", _default(field), field.metadata["help"])
        for field in FIELDS
    ]
    promises = [(promise.name, promise.sentence, promise.feature) for promise in PROMISES]
    return {
        ("protocol.md", "errors"): _table(("code", "try again?", "meaning"), refusal_table()),
        ("protocol.md", "close codes"): _table(("code", "meaning", "reconnect?"), close_table()),
        ("operations.md", "settings"): _table(("option", "environment", "default", "what it is"), settings),
        ("sandbox.md", "promises"): _table(("probe", "promise", "what keeps it"), promises),
    }


def updated(text: str, name: str, table: str) -> str:
    """`text` with the table between its two markers replaced."""
    begin, end = f"<!-- {name}: made by tools/tables.py -->", f"<!-- end of {name} -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    assert pattern.search(text), f"no markers for {name}"
    return pattern.sub(lambda _: f"{begin}\n{table}\n{end}", text)


def _default(field: dataclasses.Field[object]) -> str:
    # A document must not depend on the machine that made it.
    if field.name == "cluster_runs_per_worker":
        return "half the processors"
    if field.name == "max_runs":
        return "processors and one"
    return "processors" if field.name in ("max_runs_per_connection", "warm") else shown(field.default)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    lines += [" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


if __name__ == "__main__":
    for (document, name), table in tables().items():
        path = DOCS / document
        path.write_text(updated(path.read_text(), name, table))
