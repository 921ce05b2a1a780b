"""files and returnFiles: what a program is given, and what it leaves."""

from __future__ import annotations

import pytest

from tests.conftest import GEN_TEST
from tests.handlers.client import connected, serving

pytestmark = GEN_TEST
ENGINES = pytest.mark.parametrize("engine", ["forkserver", "nsjail", "subprocess"])


@ENGINES
async def test_a_program_finds_its_files_and_can_import_them(engine: str) -> None:
    files = {"data/in.txt": "hällo", "helper.py": "def shout(text): return text.upper()"}
    code = "from helper import shout; print(shout(open('data/in.txt').read()))"
    async with serving(engine=engine) as server, connected(server) as client:
        data = await client.run(code, files=files)
        assert (data["output"], "files" in data) == ("HÄLLO\n", False)
        data = await client.run("console.log(require('./x.js').y)", "javascript", files={"x.js": "exports.y = 7"})
        assert data["output"] == "7\n"


@ENGINES
async def test_what_it_leaves_comes_back_without_what_it_did_not_change(engine: str) -> None:
    code = (
        "import os\nos.makedirs('out/deep')\nopen('out/deep/a.txt', 'w').write('ä')\nopen('changed', 'a').write('+')\n"
        "open('bytes', 'wb').write(b'x\\xff')\nopen('empty', 'w')\nraise SystemExit(3)"
    )
    async with serving(engine=engine) as server, connected(server) as client:
        data = await client.run(code, files={"kept": "k", "changed": "c"}, returnFiles=True)

        assert data["status"] == "error"
        assert data["files"] == {"out/deep/a.txt": "ä", "changed": "c+", "bytes": "x\ufffd", "empty": ""}
        assert data["truncated"] == []


@ENGINES
async def test_only_regular_files_come_back_and_no_link_is_followed(engine: str) -> None:
    code = (
        "import os\nos.symlink('/etc/passwd', 'link')\nos.symlink('/etc', 'folder')\nos.mkfifo('pipe')\n"
        "open('secret', 'w').write('x')\nos.chmod('secret', 0)\nos.symlink('..', 'up')\nopen('plain', 'w').write('p')"
    )
    async with serving(engine=engine) as server, connected(server) as client:
        data = await client.run(code, returnFiles=True)

        assert data["status"] == "ok", data
        assert set(data["files"]) <= {"plain", "secret"}
        assert data["files"]["plain"] == "p"


@ENGINES
async def test_closed_doors_and_names_that_are_no_text_hold_nothing_back(engine: str) -> None:
    code = (
        "import os\nos.mkdir('d')\nopen('d/a', 'w').write('1')\nopen('b', 'w').write('2')\n"
        "open(b'\\xff', 'w').write('3')\nos.chmod('d', 0)\nos.chmod('b', 0)\nos.chmod('.', 0)"
    )
    async with serving(engine=engine) as server, connected(server) as client:
        data = await client.run(code, returnFiles=True)

        assert (data["status"], data["truncated"]) == ("ok", []), data
        assert data["files"] == {"d/a": "1", "b": "2", "\ufffd": "3"}


async def test_files_that_it_was_given_do_not_count() -> None:
    async with serving() as server, connected(server) as client:
        files = {f"{n:03}": "x" for n in range(100)}
        data = await client.run("open('zzz', 'w').write('new')", files=files, returnFiles=True)

        assert (data["files"], data["truncated"]) == ({"zzz": "new"}, [])


@ENGINES
async def test_too_many_or_too_large_files_are_cut_and_told(engine: str) -> None:
    async with serving(engine=engine) as server, connected(server) as client:
        many = await client.run("for n in range(300): open(f'{n:03}', 'w').write('x')", returnFiles=True)
        assert (sorted(many["files"]), many["truncated"]) == ([f"{n:03}" for n in range(100)], ["files"])
        large = "open('a', 'w').write('x' * 700_000); open('b', 'w').write('x' * 700_000); open('c', 'w').write('c')"
        data = await client.run(large, returnFiles=True)
        assert ({name: len(text) for name, text in data["files"].items()}, data["truncated"]) == (
            {"a": 700_000, "c": 1}, ["files"],
        )  # fmt: skip


async def test_a_child_that_lives_on_cannot_hold_the_files_back() -> None:
    code = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(1e6)\nopen('a', 'w').write('1')"
    async with serving() as server, connected(server) as client:
        data = await client.run(code, returnFiles=True)

        assert (data["status"], data["files"]) == ("ok", {"a": "1"})


async def test_a_run_that_was_ended_gives_no_files() -> None:
    async with serving() as server, connected(server) as client:
        code = "open('a', 'w').write('1')\nwhile True: pass"
        data = await client.run(code, returnFiles=True, limits={"timeMs": 300})

        assert (data["status"], data["files"]) == ("timeout", {})


async def test_a_program_cannot_put_its_own_code_into_what_collects_its_files() -> None:
    attack = "raise SystemExit(open('/proc/self/status').read())"
    code = (
        "import sys; sys.path.pop(0)\nimport os, py_compile\nos.makedirs('__pycache__', exist_ok=True)\n"
        "py_compile.compile('collect.py', '__pycache__/collect.cpython-311.pyc')\nopen('a', 'w').write('1')"
    )
    files = dict.fromkeys(("collect.py", "os.py", "stat.py", "encodings/__init__.py"), attack)
    async with serving() as server, connected(server) as client:
        data = await client.run(code, files=files, returnFiles=True)

        assert (data["status"], data["files"]["a"]) == ("ok", "1")
