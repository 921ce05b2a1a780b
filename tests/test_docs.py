"""What the documents say is true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import GEN_TEST
from tests.handlers.client import connected, serving
from tests.handlers.test_tasks import ends, task
from tools.tables import DOCS, tables, updated

ROOT = DOCS.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "bench" / "README.md", *sorted(DOCS.glob("*.md"))]


@pytest.mark.parametrize("place", tables(), ids=" ".join)
def test_a_table_is_what_the_code_says(place: tuple[str, str]) -> None:
    text = (DOCS / place[0]).read_text()

    assert updated(text, place[1], tables()[place]) == text, "run `python -m tools.tables`"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        assert target.startswith("http") or (path.parent / target).exists(), target


@GEN_TEST
async def test_the_task_action_of_the_documentation_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.search(r"```python\n(.*?)```", (DOCS / "tasks.md").read_text(), re.DOTALL)
    assert code is not None
    (tmp_path / "documented_actions.py").write_text(code[1])
    monkeypatch.syspath_prepend(tmp_path)
    async with serving(task_modules=("documented_actions",)) as server, connected(server) as client:
        await client.send("startTasks", {"tasks": [task("a", "count", to=5), task("b", "count", to=13)]})
        updates = await ends(client, {"a", "b"})

    assert updates["a"][-1]["result"] == {"counted": 5}
    assert updates["b"][-1]["result"] == {"error": "thirteen is too far", "code": "UNLUCKY"}
