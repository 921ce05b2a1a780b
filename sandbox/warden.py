"""Ends all runs when the server is killed and can no longer do so itself."""

from __future__ import annotations

import subprocess

from sandbox.cgroup import Cgroups


class Warden:
    """Ends all runs when the server is killed: a shell that waits for the server's end of a pipe to close."""

    SCRIPT = """
        read -r _
        while procs=$(cat "$1"/*/cgroup.procs 2>/dev/null) && [ -n "$procs" ]; do
            for leaf in "$1"/*/; do echo 0 > "$leaf/pids.max"; done
            for pid in $procs; do kill -KILL "$pid"; done
        done 2>/dev/null
        for folder in "$@"; do rmdir "$folder"/*/ "$folder"; done 2>/dev/null
    """

    def __init__(self, cgroups: Cgroups) -> None:
        folders = [str(folder) for folder in dict.fromkeys(cgroups.folders.values())]
        pids = str(cgroups.folders.get("pids", cgroups.folders.get("")))
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", self.SCRIPT, "warden", pids, *folders],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True, env={"PATH": "/usr/bin:/bin"}, cwd="/",
        )  # fmt: skip

    def close(self) -> None:
        """Sends the shell home; what it would end is gone already."""
        self._process.kill()
        self._process.communicate()
