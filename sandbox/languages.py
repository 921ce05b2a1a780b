"""The languages: what a program's file is called and how its interpreter is started on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sandbox.model import Language

COMMON_ENVIRONMENT = {
    "LANG": "C.UTF-8",
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "USER": "sandbox",
    "TZ": "UTC",
}


@dataclass(frozen=True, slots=True)
class LanguageSpec:
    """How one language is run; `{interpreter}` stays the engine's to fill in."""

    file_name: str
    options: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


LANGUAGES: dict[Language, LanguageSpec] = {
    "python": LanguageSpec(
        file_name="main.py",
        # Unbuffered: what a program printed before a limit ended it must not be lost in its buffer.
        environment={"PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONIOENCODING": "utf-8"},
    ),
    "javascript": LanguageSpec(
        file_name="main.js",
    ),
}


def command(language: Language, interpreter: str, args: tuple[str, ...]) -> list[str]:
    """The argv that runs the program in the current directory."""
    spec = LANGUAGES[language]
    return [interpreter, *spec.options, spec.file_name, *args]


def environment(language: Language, *, home: str, scratch: str, packages: str = "") -> dict[str, str]:
    """A program's whole environment: nothing of the server's is in it. `packages` is a folder for python."""
    path = {"PYTHONPATH": packages} if packages and language == "python" else {}
    return {**COMMON_ENVIRONMENT, "HOME": home, "TMPDIR": scratch, **LANGUAGES[language].environment, **path}
