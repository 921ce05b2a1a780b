"""When an output is the expected one, and what is told when it is not."""

from __future__ import annotations

import pytest

from services.actions.compare import COMPARISONS, difference

CASES = [  # expected, actual, the comparisons that accept it
    ("1\n", "1\n", "exact trim tokens numbers"),
    ("1\n", "1", "trim tokens numbers"),
    ("1\n2\n", "1 \r\n2\r\n\n", "trim tokens numbers"),
    ("1 2", "1\n2", "tokens numbers"),
    ("0.3", "0.30000000000000004", "numbers"),
    ("1000000", "1000001", ""),
    ("1000000.0", "1000000.5", "numbers"),
    ("1e3", "1000", "numbers"),
    ("007", "7", "numbers"),
    ("1", "1 1", ""),
    ("", "", "exact trim tokens numbers"),
    ("a", "", ""),
    ("nan", "nan", "exact trim tokens numbers"),
    ("nan", "0", ""),
    ("1_000", "1000", ""),
    ("9" * 5000, "9" * 5000, "exact trim tokens numbers"),
    ("9" * 5000, "8" * 5000, ""),
    ("A", "a", ""),
]


@pytest.mark.parametrize(("expected", "actual", "accepting"), CASES)
def test_each_comparison_accepts_what_it_says(expected: str, actual: str, accepting: str) -> None:
    assert [name for name, same in COMPARISONS.items() if same(expected, actual)] == accepting.split()


@pytest.mark.parametrize(
    ("expected", "actual", "said"),
    [
        ("a\nb", "a\nc", 'line 2: expected "b", got "c"'),
        ("a\nb", "a", 'line 2: expected "b", got nothing'),
        ("a", "a\nb", 'line 2: expected nothing, got "b"'),
        ("a\n", "a", "only white space differs"),
    ],
)
def test_the_first_different_line_is_told(expected: str, actual: str, said: str) -> None:
    assert difference(expected, actual) == said


def test_a_difference_is_short() -> None:
    assert len(difference("x" * 10**6, "y" * 10**6)) < 200
