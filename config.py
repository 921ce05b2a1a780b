"""Settings: one frozen dataclass. A field holds its default and its help; the command line, the environment and a
file can each set it, the first of them wins."""

from __future__ import annotations

import argparse
import dataclasses
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, get_args, get_type_hints

PREFIX = "RUNBOARD_"
MIB = 1 << 20


class BadSetting(Exception):
    """The text names the setting, what is wrong with its value and where the value came from."""


def _setting(default: Any, group: str, help: str, **bounds: Any) -> Any:
    return field(default=default, metadata={"group": group, "help": help, **bounds})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that can be set."""

    address: str = _setting("127.0.0.1", "Server", "address to listen on")
    port: int = _setting(8080, "Server", "port to listen on; 0 takes a free one", least=0, most=65535)
    dev: bool = _setting(False, "Server", "open /devws although the server listens beyond this machine")
    allowed_origins: tuple[str, ...] = _setting(
        (),
        "Server",
        "origins whose pages may connect to /appws beside the server's own, separated by commas; * for all",
    )
    data_dir: Path = _setting(Path("data"), "Server", "folder for what the server keeps")
    store: str = _setting(
        "sqlite", "Server", "where scores are kept: sqlite (in --data-dir), or the redis://… that several servers share"
    )
    processes: int = _setting(1, "Server", "server processes on the one port; more than one need Redis", least=1)
    log_level: str = _setting("info", "Server", "how much to log", choices=("debug", "info", "warning", "error"))
    max_message_bytes: int = _setting(MIB, "Connections", "largest message of a client, in bytes", least=1024)
    outbox_bytes: int = _setting(MIB, "Connections", "most that may wait for a slow client, in bytes", least=1024)
    max_requests: int = _setting(2000, "Connections", "requests of one connection that may be under way", least=1)
    ping_s: float = _setting(20.0, "Connections", "seconds between two pings to a client", least=0.05)
    tasks_at_once: int = _setting(8, "Tasks", "tasks of one connection that may be at work at once", least=1)
    task_modules: tuple[str, ...] = _setting(
        (), "Tasks", "Python modules with task actions of your own, separated by commas"
    )
    max_players: int = _setting(100_000, "Games", "players in one room", least=1)
    engine: str = _setting(
        "auto", "Runs", "how programs are run", choices=("auto", "forkserver", "nsjail", "subprocess")
    )
    allow_unsafe: bool = _setting(False, "Runs", "let the subprocess engine serve other machines, unprotected")
    python: Path | None = _setting(None, "Runs", "the python that programs run on; found by itself if not given")
    node: Path | None = _setting(None, "Runs", "the node that programs run on; found by itself if not given")
    python_packages: Path | None = _setting(
        None, "Runs", "a list for pip (requirements.txt) of what python programs may import; installed once, at start"
    )
    node_packages: Path | None = _setting(
        None, "Runs", "a package.json of what javascript programs may import; installed once, at start"
    )
    fork_servers: int = _setting(4, "Runs", "fork servers for python; each has a hash seed of its own", least=1)
    # One more than processors: while a program is handed over or reported, its processor would wait.
    max_runs: int = _setting(max(2, os.cpu_count() or 2) + 1, "Runs", "programs that run at once", least=1)
    warm: int = _setting(os.cpu_count() or 1, "Runs", "children or jails that wait ready for the next runs", least=0)
    preload: tuple[str, ...] = _setting(
        (), "Runs", "modules that the fork servers for python import ahead; not given: those that programs use most"
    )
    drain_s: float = _setting(5.0, "Runs", "seconds that runs may still take when the server is stopped", least=0)
    queue_size: int = _setting(2000, "Runs", "programs that may wait for their turn", least=0)
    queue_bytes: int = _setting(256 * MIB, "Runs", "code, input and files of those that wait, in bytes", least=MIB)
    max_runs_per_connection: int = _setting(
        max(2, os.cpu_count() or 2), "Runs", "programs of one connection that run at once", least=1
    )
    max_queued_per_connection: int = _setting(1000, "Runs", "programs of one connection that may wait", least=0)
    scheduler: str | None = _setting(
        None,
        "Cluster",
        "the Dask scheduler for mode cluster, tls://host:8786 or tcp://…; without, workers are embedded",
    )
    cluster_workers: int = _setting(2, "Cluster", "embedded workers, started by the first run that asks for", least=1)
    cluster_runs_per_worker: int = _setting(
        max(1, (os.cpu_count() or 2) // 2), "Cluster", "programs that run at once on each embedded worker", least=1
    )
    cluster_tls_ca: Path | None = _setting(
        None, "Cluster", "certificate of the authority that scheduler and workers trust"
    )
    cluster_tls_cert: Path | None = _setting(None, "Cluster", "this server's certificate for the cluster")
    cluster_tls_key: Path | None = _setting(None, "Cluster", "the key of that certificate")
    wall_ms: int = _setting(10_000, "Limits", "wall time of a program, in milliseconds", least=1)
    cpu_ms: int = _setting(10_000, "Limits", "CPU time of a program, in milliseconds", least=1)
    memory_bytes: int = _setting(256 * MIB, "Limits", "memory of a program, in bytes", least=16 * MIB)
    output_bytes: int = _setting(MIB, "Limits", "what a program may write to each stream, in bytes", least=1)
    run_processes: int = _setting(64, "Limits", "processes and threads of a program", least=1)
    tmp_bytes: int = _setting(64 * MIB, "Limits", "what each scratch folder of a program holds, in bytes", least=MIB)
    open_files: int = _setting(256, "Limits", "files that a process of a program may have open", least=16)
    max_wall_ms: int = _setting(60_000, "Maxima", "most wall time that a client may ask for, in milliseconds", least=1)
    max_cpu_ms: int = _setting(60_000, "Maxima", "most CPU time that a client may ask for, in milliseconds", least=1)
    max_memory_bytes: int = _setting(1024 * MIB, "Maxima", "most memory that a client may ask for, in bytes", least=1)
    max_output_bytes: int = _setting(8 * MIB, "Maxima", "most output that a client may ask for, in bytes", least=1)
    max_run_processes: int = _setting(256, "Maxima", "most processes that a client may ask for", least=1)


FIELDS: Final = dataclasses.fields(Settings)
TYPES: Final = get_type_hints(Settings)


def read_settings(argv: Sequence[str], environment: Mapping[str, str]) -> Settings:
    """The settings of a command line, an environment (`RUNBOARD_PORT` …) and the file that `--config` names.

    Raises:
        BadSetting: an option that does not exist, or a value that cannot be.
        SystemExit: `--help` was asked for and printed.
    """
    options = vars(_parser().parse_args(argv))
    file = options.pop("config", None) or environment.get(f"{PREFIX}CONFIG")
    values = _from_file(Path(file)) if file else {}
    values |= _from_environment(environment)
    values |= {name: _parsed(name, text, flag(name)) for name, text in options.items()}
    for limit in ("wall_ms", "cpu_ms", "memory_bytes", "output_bytes", "run_processes"):
        settings = Settings(**values)
        if getattr(settings, limit) > getattr(settings, f"max_{limit}"):
            raise BadSetting(
                f"{flag(limit)} is {getattr(settings, limit)}, above {flag(f'max_{limit}')},"
                f" which is {getattr(settings, f'max_{limit}')}"
            )
    return Settings(**values)


def flag(name: str) -> str:
    """The option of a setting: `--max-runs` for max_runs."""
    return f"--{name.replace('_', '-')}"


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the usage."""

    def error(self, message: str) -> Any:
        raise BadSetting(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="server.py",
        description="Runboard: runs code in a sandbox, tasks and leaderboards over WebSockets.",
        epilog=f"Each option can be set in the environment too ({PREFIX}MAX_RUNS=4), or in the file of --config"
        " (max_runs = 4). The command line wins over the environment, and that over the file.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", default=argparse.SUPPRESS, help="a TOML file with settings")
    groups: dict[str, Any] = {}
    for setting in FIELDS:
        title = setting.metadata["group"]
        group = groups.get(title) or groups.setdefault(title, parser.add_argument_group(title))
        help = f"{setting.metadata['help']} (default: {shown(setting.default)})".replace("%", "%%")
        if TYPES[setting.name] is bool:
            group.add_argument(
                flag(setting.name), action="store_const", const="true", default=argparse.SUPPRESS, help=help
            )
        else:
            choices = setting.metadata.get("choices")
            metavar = "|".join(choices) if choices else _metavar(TYPES[setting.name])
            group.add_argument(flag(setting.name), metavar=metavar, default=argparse.SUPPRESS, help=help)
    return parser


def _metavar(kind: Any) -> str:
    if Path in (kind, *get_args(kind)):
        return "PATH"
    return {int: "N", float: "N", str: "TEXT", str | None: "TEXT"}.get(kind, "LIST")


def shown(default: Any) -> str:
    """A default as help and documents show it."""
    if default is None or default == ():
        return "none"
    if isinstance(default, bool):
        return "on" if default else "off"
    return str(default)


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    values = {}
    for variable, text in environment.items():
        if variable.startswith(PREFIX) and variable != f"{PREFIX}CONFIG":
            name = variable.removeprefix(PREFIX).lower()
            if name not in TYPES:
                raise BadSetting(f"the environment variable {variable} is no setting; see --help")
            values[name] = _parsed(name, text, variable)
    return values


def _from_file(path: Path) -> dict[str, Any]:
    try:
        found = tomllib.loads(path.read_text())
    except (OSError, ValueError) as failure:
        raise BadSetting(f"the settings file {path} cannot be read: {failure}") from failure
    values = {}
    for name, value in found.items():
        if name not in TYPES:
            raise BadSetting(f"the settings file {path} has {name}, which is no setting; see --help")
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        values[name] = _parsed(name, text, f"{name} in {path}")
    return values


def _parsed(name: str, text: str, origin: str) -> Any:
    """The value of a setting from its text, inside its bounds."""
    kind, bounds = TYPES[name], next(setting.metadata for setting in FIELDS if setting.name == name)
    if kind is bool:
        if text.lower() not in ("true", "false", "1", "0", "on", "off"):
            raise BadSetting(f"{origin} must be on or off, not {text!r}")
        return text.lower() in ("true", "1", "on")
    if "choices" in bounds and text not in bounds["choices"]:
        raise BadSetting(f"{origin} must be one of {', '.join(bounds['choices'])}, not {text!r}")
    if kind in (int, float):
        return _number(kind, text, origin, bounds)
    if Path in (kind, *get_args(kind)):
        return Path(text)
    if str in (kind, *get_args(kind)) and Ellipsis not in get_args(kind):
        return text
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _number(kind: type[int] | type[float], text: str, origin: str, bounds: Mapping[str, Any]) -> int | float:
    try:
        value = kind(text)
    except ValueError:
        raise BadSetting(f"{origin} must be a {'whole ' if kind is int else ''}number, not {text!r}") from None
    least, most = bounds.get("least"), bounds.get("most")
    if (least is not None and not value >= least) or (most is not None and value > most):
        raise BadSetting(
            f"{origin} must be {f'{least} to {most}' if most is not None else f'at least {least}'}, not {text}"
        )
    return value
