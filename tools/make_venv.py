"""Makes a virtual environment, also on a Debian whose python came without the ensurepip package."""

from __future__ import annotations

import subprocess
import sys
import venv


def main(folder: str) -> int:
    """Gives the exit code."""
    if sys.version_info < (3, 11):  # noqa: UP036 -- whoever has an older one should read why
        print(
            f"Runboard needs Python 3.11 or newer; this is {sys.version.split()[0]} (make PYTHON=...)", file=sys.stderr
        )
        return 2
    try:
        venv.create(folder, with_pip=True, clear=True)
    except (subprocess.CalledProcessError, ModuleNotFoundError):
        print("This python lacks ensurepip: install it with `apt-get install python3-venv`", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
