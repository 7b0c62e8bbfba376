"""One phrasing of what is wrong with an argument: ``NAME: got X, expected Y``, on one line."""

from __future__ import annotations

from typing import Any


def wrong(name: str, got: Any, expected: str) -> ValueError:
    """The error of an argument: its name, its value as Python writes it, what was expected."""
    return ValueError(f"{name}: got {got!r}, expected {expected}")


def int_between(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Raise ValueError unless `value` is an int (not a bool) in [low, high]."""
    if type(value) is int and low <= value and (high is None or value <= high):
        return
    raise wrong(name, value, f"an integer in {low}..{high}" if high is not None else f"an integer >= {low}")


def share(name: str, value: Any, *, zero: bool = False) -> None:
    """Raise ValueError unless `value` is a number in (0, 1), or in [0, 1) where `zero` is allowed."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not (0 <= value < 1) or (value == 0 and not zero):
        raise wrong(name, value, f"a number in {'[' if zero else '('}0, 1)")


def one_line(error: BaseException) -> str:
    """What an error of any type says, on one line; its type if it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
