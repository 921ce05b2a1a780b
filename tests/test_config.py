"""Settings: where they come from, who wins, and what is said of a bad one."""

from __future__ import annotations

from pathlib import Path

import pytest

from config import FIELDS, BadSetting, Settings, flag, read_settings


def test_nothing_set_gives_the_defaults() -> None:
    assert read_settings([], {}) == Settings()


def test_the_command_line_wins_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "runboard.toml"
    file.write_text('port = 1\nmax_runs = 7\naddress = "::1"\nallowed_origins = ["https://a", "https://b"]\ndev = true')
    settings = read_settings(["--config", str(file), "--port", "3"], {"RUNBOARD_PORT": "2", "RUNBOARD_MAX_RUNS": "8"})

    assert (settings.port, settings.max_runs, settings.address, settings.dev) == (3, 8, "::1", True)
    assert settings.allowed_origins == ("https://a", "https://b")


@pytest.mark.parametrize(
    ("argv", "environment", "said"),
    [
        (["--port", "x"], {}, "--port must be a whole number, not 'x'"),
        (["--port", "70000"], {}, "--port must be 0 to 65535, not 70000"),
        (["--max-runs", "0"], {}, "--max-runs must be at least 1, not 0"),
        (["--ping-s", "nan"], {}, "--ping-s must be at least 0.05, not nan"),
        (["--engine", "docker"], {}, "--engine must be one of auto, forkserver, nsjail, subprocess, not 'docker'"),
        (["--prot", "1"], {}, "unrecognized arguments: --prot 1"),
        ([], {"RUNBOARD_PROT": "1"}, "the environment variable RUNBOARD_PROT is no setting; see --help"),
        ([], {"RUNBOARD_DEV": "maybe"}, "RUNBOARD_DEV must be on or off, not 'maybe'"),
        (["--wall-ms", "90000"], {}, "--wall-ms is 90000, above --max-wall-ms, which is 60000"),
        (["--config", "/nowhere"], {}, "the settings file /nowhere cannot be read"),
    ],
)
def test_a_bad_setting_is_named_with_its_value_and_origin(
    argv: list[str], environment: dict[str, str], said: str
) -> None:
    with pytest.raises(BadSetting) as caught:
        read_settings(argv, environment)

    assert said in str(caught.value)


@pytest.mark.parametrize("line", ["prot = 1", "port = 'x'", "port = [1"])
def test_a_bad_line_of_the_file_is_told_with_the_file(line: str, tmp_path: Path) -> None:
    file = tmp_path / "runboard.toml"
    file.write_text(line)
    with pytest.raises(BadSetting, match=r"runboard\.toml"):
        read_settings(["--config", str(file)], {})


def test_help_tells_every_setting_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        read_settings(["--help"], {})
    shown = capsys.readouterr().out

    assert left.value.code == 0
    assert all(f"{flag(field.name)} " in shown for field in FIELDS)
    assert shown.count("(default:") == len(FIELDS)
