"""Draws what `python -m bench.run --json FILE` has measured.

python -m bench.plot FILE docs/runs.svg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "runboard"  # the same figures give the same file

from matplotlib import pyplot  # noqa: E402 -- it looks at the settings above when it is imported

COLOURS = {"server": "tab:blue", "cold nsjail": "tab:orange", "cold subprocess": "tab:gray"}


def draw(measured: Path, picture: Path) -> None:
    """Two panels for each language: the latency of one run, and runs per second by clients."""
    found = json.loads(measured.read_text())
    figure, rows = pyplot.subplots(len(found["languages"]), 2, figsize=(9, 6), layout="constrained")
    for (latency, rate), (language, ways) in zip(rows, found["languages"].items(), strict=True):
        for how, row in ways.items():
            latency.barh(how, row["p50_ms"], color=COLOURS[how])
            clients = [int(number) for number in row["runs_per_s"]]
            rate.plot(clients, list(row["runs_per_s"].values()), marker="o", label=how, color=COLOURS[how])
        latency.set_title(f"{language}: a short run, p50 in ms")
        latency.invert_yaxis()
        rate.set_title(f"{language}: runs per second, by clients")
        rate.set_xscale("log", base=2)
        rate.set_xticks(clients, labels=[str(number) for number in clients])
        rate.set_ylim(bottom=0)
    rows[0][1].legend()
    figure.suptitle(found["machine"], fontsize="small")
    figure.savefig(picture, metadata={"Date": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__.split("\n")[0])
    parser.add_argument("measured", type=Path)
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    draw(options.measured, options.picture)
