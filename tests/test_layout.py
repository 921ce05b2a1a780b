"""The rooms of the house, and who may call whom."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = ("background", "config", "processes", "protocol", "sandbox", "services", "handlers", "server")
MAY_IMPORT = {
    "background": (),
    "config": (),
    "processes": (),
    "protocol": ("protocol",),
    "sandbox": ("background", "sandbox"),
    "services": ("background", "protocol", "services", "sandbox.model", "sandbox.engine"),
    "handlers": ("background", "protocol", "services", "handlers"),
    "server": OURS,
}
OUTSIDE = {
    "protocol/schema.py": {"jsonschema", "referencing"},
    "sandbox/cluster_leases.py": {"distributed"},
    "sandbox/cluster_link.py": {"dask", "distributed"},
    "sandbox/cluster_worker.py": {"dask", "distributed"},
    "sandbox/cluster_conversation.py": {"distributed"},
    "sandbox/sampled.py": {"psutil"},
    "sandbox/seccomp.py": {"pyseccomp"},
    "services/redis_calls.py": {"redis"},
    "services/store_redis.py": {"redis"},
    "services/board.py": {"sortedcontainers"},
    "handlers": {"tornado"},
    "server.py": {"tornado", "uvloop"},
}
STANDARD = __import__("sys").stdlib_module_names
FILES = sorted(
    path.relative_to(ROOT)
    for name in OURS
    for path in [ROOT / f"{name}.py", *(ROOT / name).rglob("*.py")]
    if path.is_file()
)


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.append(node.module or "")
    return found


@pytest.mark.parametrize("path", FILES, ids=str)
def test_each_module_imports_only_what_its_room_may(path: Path) -> None:
    room = path.parts[0].removesuffix(".py")
    outside = {name for place, names in OUTSIDE.items() if str(path).startswith(place) for name in names}

    for module in imports(path):
        top = module.split(".")[0]
        if top in OURS:
            assert any(module == may or module.startswith(f"{may}.") for may in MAY_IMPORT[room]), module
        elif "child" not in path.parts:
            assert top in STANDARD or top in outside, module


@pytest.mark.parametrize("path", [path for path in FILES if "child" in path.parts], ids=str)
def test_what_runs_in_the_jail_imports_nothing_of_ours(path: Path) -> None:
    assert all(module.split(".")[0] in {*STANDARD, "early_end"} for module in imports(path))


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_file_grows_beyond_the_ceiling(path: Path) -> None:
    assert len((ROOT / path).read_text().splitlines()) <= 400
