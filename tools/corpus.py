"""Plays the public corpus of black-box cases against a server of its own. Further arguments go to its runner."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parent.parent
RUNNER = ROOT.parent / "shared" / "corpus" / "run_corpus.py"
START_SECONDS = 30.0
WALL_SECONDS = 3
WARM_PROCESSES = {"forkserver": 60, "nsjail": 4, "subprocess": 0}
"""What an engine keeps ready, and at times twice: processes in namespaces of their own, as what is left would be."""


def main(argv: list[str]) -> int:
    """Gives the runner's exit code; 0 where there is no corpus."""
    parser = argparse.ArgumentParser(prog="tools/corpus.py", description=__doc__)
    parser.add_argument("--engine", default="nsjail", choices=WARM_PROCESSES, help="the server's (default: nsjail)")
    options, more = parser.parse_known_args(argv)
    if not RUNNER.is_file():
        print("corpus: skipped, because ../shared/corpus is not beside this repository")
        return 0
    canary = secrets.token_hex()
    with tempfile.TemporaryDirectory(prefix="runboard-corpus-") as folder:
        port = _free_port()
        server = subprocess.Popen(
            [sys.executable, ROOT / "server.py", f"--port={port}", f"--engine={options.engine}",
             f"--data-dir={folder}", f"--wall-ms={WALL_SECONDS * 1000}", "--log-level=warning"],
            env={**os.environ, "SECRET_CANARY": canary},
        )  # fmt: skip
        try:
            _wait_until_ready(server, port)
            runner: list[str | Path] = [sys.executable, RUNNER, "--url", f"ws://127.0.0.1:{port}/appws"]
            runner += ["--wall", str(WALL_SECONDS), "--memory-mib", "256", "--concurrency", "2"]
            runner += ["--canary", canary, "--allow-children", str(WARM_PROCESSES[options.engine]), *more]
            return subprocess.run(runner, cwd=folder, check=False).returncode
        finally:
            server.terminate()
            server.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_ready(server: subprocess.Popen[bytes], port: int) -> None:
    end = time.monotonic() + START_SECONDS
    while server.poll() is None and time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=1) as answer:
                if json.load(answer)["status"] == "ok":
                    return
        except OSError:
            time.sleep(0.05)
    raise SystemExit("corpus: the server did not start")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
