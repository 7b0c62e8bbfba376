"""One phrasing of what is wrong with an argument: ``NAME: got X, expected Y``, on one line."""

from __future__ import annotations

import importlib
import re
from typing import Any

INSTALL = "pip install 'aqlm-c[hf]'"
# Packages that no extra of ours brings, or not that one.
_CURES = {"matplotlib": "pip install 'aqlm-c[plot]'", "pandas": "pip install pandas", "peft": "pip install peft"}
_CURES["lm_eval"] = "pip install 'aqlm-c[eval]'"
_CURES |= dict.fromkeys(("optuna", "psycopg", "psycopg2", "sqlalchemy"), "pip install 'aqlm-c[sweep]'")
_CURES |= dict.fromkeys(("fastapi", "openai", "starlette", "uvicorn"), "pip install 'aqlm-c[serve]'")
_CURES["pyarrow"] = "pip install pyarrow"
_SHOWN = 300  # characters of a value in a message
_LINE = 2000  # of a message
_MOST_INT = 2**31 - 1
# Not to be printed as they are: they command a terminal, turn the order of letters or are halves of characters.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_HALF = re.compile("[\ud800-\udfff]")


def wrong(name: str, got: Any, expected: str) -> ValueError:
    """The error of an argument: its name, its value as Python writes it, what was expected."""
    return ValueError(f"{name}: got {shown(got)}, expected {expected}")


def shown(value: Any) -> str:
    """A value as Python writes it, cut where it is long."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested deeply, an integer of thousands of digits
        return f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def is_text(text: str) -> bool:
    """Whether all characters are whole, so that UTF-8 can write them: names of files and arguments need not be."""
    return not _HALF.search(text)


def printable(text: str) -> str:
    """Text of others, with escapes in place of what would command a terminal; tabs and ends of lines stay."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def int_between(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Raise ValueError unless `value` is an int (not a bool) in [low, high]; high None: no more than 32 bits hold."""
    most = _MOST_INT if high is None else high
    if type(value) is int and low <= value <= most:
        return
    open_end = high is None and not (type(value) is int and value > most)
    raise wrong(name, value, f"an integer >= {low}" if open_end else f"an integer in {low}..{most}")


def share(name: str, value: Any, *, zero: bool = False) -> None:
    """Raise ValueError unless `value` is a number in (0, 1), or in [0, 1) where `zero` is allowed."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not (0 <= value < 1) or (value == 0 and not zero):
        raise wrong(name, value, f"a number in {'[' if zero else '('}0, 1)")


def number_between(name: str, value: Any, low: float, high: float) -> None:
    """Raise ValueError unless `value` is a number (not a bool) in [low, high]."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
        raise wrong(name, value, f"a number in [{low:g}, {high:g}]")


def device_name(name: str, value: Any) -> str:
    """The value if it names a device, which need not be there; ValueError otherwise."""
    if not isinstance(value, str) or not re.fullmatch(r"cpu|auto|cuda(:\d{1,3})?", value):
        raise wrong(name, value, "cpu, cuda, cuda:N or auto")
    return value


def one_line(error: BaseException | str) -> str:
    """What an error of any type says, printable, on one line that is not endless; its type if it says nothing."""
    text = printable(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= _LINE else f"{text[:_LINE]}..."


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
