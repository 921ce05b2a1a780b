"""An authority and certificates, made with the commands of docs/operations.md."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

OPERATIONS = Path(__file__).parent.parent / "docs" / "operations.md"


def make_certificates(folder: Path) -> dict[str, Path]:
    """Runs the documented commands in `folder`; gives what they make by name: ca, cluster, cluster_key."""
    commands = re.search(r"```sh\n(openssl req .*?)```", OPERATIONS.read_text(), re.DOTALL)
    assert commands is not None
    subprocess.run(["/bin/sh", "-e", "-c", commands[1]], cwd=folder, check=True, capture_output=True)
    return {"ca": folder / "ca.pem", "cluster": folder / "cluster.pem", "cluster_key": folder / "cluster-key.pem"}
