"""Packages for programs: installed once, by pip and npm, into folders that every jail has, read-only."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from sandbox.engine import EngineUnavailable
from sandbox.interpreters import Interpreter, put_in_place
from sandbox.model import Language

INSTALL_SECONDS = 900
PYTHON_INSIDE = "/packages"
NODE_INSIDE = "/node_modules"
"""Where node looks for what /work/main.js requires or imports, last of all."""


def prepare(
    requirements: Path | None, manifest: Path | None, interpreters: dict[Language, Interpreter], runtime: Path
) -> dict[Language, Path]:
    """The folders with packages for the languages that have any, made below `runtime` if they are not there yet.

    `requirements` is what pip takes with -r, `manifest` a package.json. Blocks.

    Raises:
        EngineUnavailable: they cannot be installed; the text has the installer's last words.
    """
    found: dict[Language, Path] = {}
    if requirements is not None:
        python = interpreters["python"].executable
        option = "--python-packages"

        def install(folder: Path) -> None:
            command = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", "install"]
            _call([*command, "--quiet", "--target", str(folder), "-r", str(requirements)], option)

        found["python"] = _prepared("python", requirements, str(python.resolve()), runtime, option, install)
    if manifest is not None:
        node = interpreters["javascript"].executable
        option = "--node-packages"

        def install_modules(folder: Path) -> None:
            for file in (manifest, manifest.with_name("package-lock.json")):
                if file.is_file():
                    shutil.copy(file, folder)
            _call([_npm(), "install", "--prefix", str(folder), "--omit=dev", "--no-audit", "--no-fund",
                   "--ignore-scripts", "--silent"], option, node.parent)  # fmt: skip

        folder = _prepared("node", manifest, str(node.resolve()), runtime, option, install_modules)
        found["javascript"] = folder / "node_modules"
    return found


def _prepared(
    name: str, wanted: Path, interpreter: str, runtime: Path, option: str, install: Callable[[Path], None]
) -> Path:
    """The folder for just this list and this interpreter; another list gets another folder."""
    try:
        digest = hashlib.sha256(wanted.read_bytes() + interpreter.encode()).hexdigest()[:16]
    except OSError as failure:
        raise EngineUnavailable(f"{wanted} cannot be read: {failure.strerror} ({option})") from failure
    target = runtime / f"{name}-packages-{digest}"
    if not target.exists():
        staging = target.with_name(f"{target.name}.{os.getpid()}")
        staging.mkdir(parents=True, mode=0o755)
        try:
            install(staging)
            (staging / "node_modules").mkdir(exist_ok=True)  # npm makes none for an empty list
        except BaseException:
            shutil.rmtree(staging)
            raise
        put_in_place(staging, target)
    return target


def _call(command: list[str], option: str, path: Path | None = None) -> None:
    environment = {**os.environ, "PATH": f"{path}:{os.environ.get('PATH', '')}"} if path else None
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=INSTALL_SECONDS, env=environment
        )
    except (OSError, subprocess.TimeoutExpired) as failure:
        raise EngineUnavailable(f"packages cannot be installed: {failure} ({option})") from failure
    if done.returncode:
        words = (done.stderr or done.stdout).strip().splitlines()[-2:] or [f"exit code {done.returncode}"]
        raise EngineUnavailable(f"packages cannot be installed: {' / '.join(words)} ({option})")


def _npm() -> str:
    beside = Path(sys.executable).with_name("npm")
    if beside.is_file():
        return str(beside)
    if on_path := shutil.which("npm"):
        return on_path
    raise EngineUnavailable("npm was not found, and --node-packages needs it")
