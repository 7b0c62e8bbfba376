"""One phrasing of what is wrong with an argument: ``NAME: got X, expected Y``, on one line."""

from __future__ import annotations

import importlib
from typing import Any

INSTALL = "pip install 'aqlm-c[hf]'"
# Packages that no extra of ours brings, or not that one.
_CURES = {"matplotlib": "pip install 'aqlm-c[plot]'", "pandas": "pip install pandas", "peft": "pip install peft"}


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


def missing(error: ImportError) -> ImportError:
    """The error of a package that is not installed, saying the cure; any other as it is."""
    package = (error.name or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or package in ("", "aqlm_c"):
        return error
    return ModuleNotFoundError(
        f"{package}: got none that is installed here, expected one: {_CURES.get(package, INSTALL)}", name=error.name
    )


def require(name: str) -> Any:
    """The module called `name`; an ImportError that says the cure if its package is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise missing(error) from error
