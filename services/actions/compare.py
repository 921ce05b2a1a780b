"""Whether an output is the expected one, in four grades of strictness; and where it first is not."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import zip_longest
from math import isfinite
from typing import Final

from protocol.message import clip

TOLERANCE = 1e-6
"""Numbers may differ by so much, absolutely or relative to the expected one."""
INTEGER = re.compile(r"[+-]?\d{1,4000}", re.ASCII)
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def exact(expected: str, actual: str) -> bool:
    """Every character counts."""
    return expected == actual


def trim(expected: str, actual: str) -> bool:
    """White space at the ends of lines and of the whole does not count, nor how lines end."""
    return _trimmed(expected) == _trimmed(actual)


def tokens(expected: str, actual: str) -> bool:
    """Only what stands between white space counts."""
    return expected.split() == actual.split()


def numbers(expected: str, actual: str) -> bool:
    """As tokens, but numbers may differ a little unless both are whole."""
    pairs = zip_longest(expected.split(), actual.split())
    return all(a is not None and b is not None and _same_number(a, b) for a, b in pairs)


COMPARISONS: Final[dict[str, Callable[[str, str], bool]]] = {
    "exact": exact, "trim": trim, "tokens": tokens, "numbers": numbers,
}  # fmt: skip


def difference(expected: str, actual: str) -> str:
    """The first line that is not as expected, in one short sentence."""
    lines = zip_longest(_trimmed(expected), _trimmed(actual))
    for number, (wanted, found) in enumerate(lines, 1):
        if wanted != found:
            return f"line {number}: expected {_told(wanted)}, got {_told(found)}"
    return "only white space differs"


def _trimmed(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def _same_number(expected: str, actual: str) -> bool:
    if expected == actual:
        return True
    if INTEGER.fullmatch(expected) and INTEGER.fullmatch(actual):
        return int(expected) == int(actual)
    if NUMBER.fullmatch(expected) and NUMBER.fullmatch(actual):
        wanted, found = float(expected), float(actual)
        return isfinite(wanted) and isfinite(found) and abs(wanted - found) <= TOLERANCE * max(1.0, abs(wanted))
    return False


def _told(line: str | None) -> str:
    return "nothing" if line is None else clip(line)
