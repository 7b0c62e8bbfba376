"""Regular expressions from the files of others, searched in bounded time: Python's `re` may take exponential time.

A pattern that leaves few ways to match is searched by `re` itself. Any other is compiled to a program whose state is a
place in it and one in the text, and no state is entered twice: the time is at most their product (for each place where
something is looked for ahead). Who still takes long is stopped.
"""

from __future__ import annotations

import functools
import importlib
import math
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any

from .errors import wrong

_parser: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")
_MOST_CHARACTERS, _MOST_STEPS = 1000, 500  # of a pattern, of its program
_MOST_STATES = 20_000  # of a program in one text
_WAYS, _LENGTH = 1024, 256  # that `re` may have to try from each start, in a text of this length

_CATEGORIES: dict[str, Callable[[str], bool]] = {
    "CATEGORY_DIGIT": str.isdecimal,
    "CATEGORY_SPACE": str.isspace,
    "CATEGORY_WORD": lambda c: c.isalnum() or c == "_",
}
_CATEGORIES |= {
    name.replace("_", "_NOT_"): (lambda c, holds=holds: not holds(c))  # type: ignore[misc]
    for name, holds in list(_CATEGORIES.items())
}


class Pattern:
    """A regular expression of `re`. Raises ValueError, naming `name`, for what is none and for one that neither `re`
    nor the program here can search in bounded time.
    """

    def __init__(self, name: str, text: Any) -> None:
        if not isinstance(text, str):
            raise wrong(name, text, "a regular expression, as text")
        if len(text) > _MOST_CHARACTERS:
            raise wrong(name, text, f"a regular expression of at most {_MOST_CHARACTERS} characters")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._re = re.compile(text)
                tree = _parser.parse(text)
            simple = _ways(tree) <= _WAYS
            self._program: list[tuple[Any, ...]] = [] if simple else _program(tree)
        except (re.error, OverflowError, RecursionError) as error:
            raise wrong(name, text, f"a regular expression: {error}") from None
        except _TooComplexError as error:
            raise wrong(name, text, f"a simpler regular expression: {error}") from None
        self._name, self._text = name, text
        self._known: dict[str, bool] = {}  # what programs found

    @property
    def simple(self) -> bool:
        """Whether `re` searches it."""
        return not self._program

    def found_in(self, text: str) -> bool:
        """As `re.search`."""
        if not self._program:
            return self._re.search(text) is not None
        if text not in self._known:
            try:
                self._known[text] = _search(self._program, text)
            except _TooComplexError as error:
                raise wrong(self._name, self._text, f"a simpler regular expression: {error}") from None
        return self._known[text]


@functools.lru_cache(maxsize=4096)
def pattern_of(name: str, text: str) -> Pattern:
    """`Pattern`, kept."""
    return Pattern(name, text)


class _TooComplexError(Exception):
    pass


def _ways(tree: Any) -> float:
    """How many ways there are to match at one place of a text, at most: what a backtracking search may try."""
    ways = 1.0
    for op, argument in tree:
        kind = str(op)
        if kind in ("MAX_REPEAT", "MIN_REPEAT"):
            low, high, body = argument
            inside, count = _ways(body), min(int(high), _LENGTH)
            if inside == 1:
                ways *= max(1, count - low + 1)
            elif high == 1:
                ways *= inside + (low == 0)
            else:
                ways *= math.inf
        elif kind == "BRANCH":
            ways *= sum(map(_ways, argument[1]))
        elif kind == "SUBPATTERN":
            ways *= _ways(argument[3])
        elif kind in ("ASSERT", "ASSERT_NOT"):
            ways *= _ways(argument[1])
        elif kind not in ("LITERAL", "NOT_LITERAL", "ANY", "IN", "AT", "GROUPREF"):
            return math.inf
    return ways


# ---- a program: ("one", predicate), ("split", step, step), ("jump", step), ("at", kind), ("look", program, positive),
# ("match",)


def _program(tree: Any) -> list[tuple[Any, ...]]:
    if tree.state.flags != re.UNICODE:
        raise _TooComplexError("flags only where it has few ways to match")
    steps: list[tuple[Any, ...]] = []
    _emit(tree, steps)
    return [*steps, ("match",)]


def _emit(tree: Any, steps: list[tuple[Any, ...]]) -> None:
    for op, argument in tree:
        kind = str(op)
        if len(steps) > _MOST_STEPS:
            raise _TooComplexError(f"it has more than {_MOST_STEPS} steps")
        if kind in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            steps.append(("one", _one(kind, argument)))
        elif kind == "AT":
            steps.append(("at", str(argument)))
        elif kind == "SUBPATTERN" and not argument[1] and not argument[2]:
            _emit(argument[3], steps)
        elif kind in ("ASSERT", "ASSERT_NOT") and argument[0] == 1:  # ahead
            inner: list[tuple[Any, ...]] = []
            _emit(argument[1], inner)
            steps.append(("look", [*inner, ("match",)], kind == "ASSERT"))
        elif kind == "BRANCH":
            _emit_branch(argument[1], steps)
        elif kind in ("MAX_REPEAT", "MIN_REPEAT"):
            low, high, body = argument
            _emit_repeat(low, high, body, steps)
        else:
            raise _TooComplexError(f"{kind.lower().replace('_', ' ')} only where it has few ways to match")


def _emit_branch(branches: Any, steps: list[tuple[Any, ...]]) -> None:
    ends = []
    for branch in branches[:-1]:
        split = len(steps)
        steps.append(())
        _emit(branch, steps)
        ends.append(len(steps))
        steps.append(())
        steps[split] = ("split", split + 1, len(steps))
    _emit(branches[-1], steps)
    for end in ends:
        steps[end] = ("jump", len(steps))


def _emit_repeat(low: int, high: Any, body: Any, steps: list[tuple[Any, ...]]) -> None:
    for _ in range(low):
        _emit(body, steps)
        if len(steps) > _MOST_STEPS:
            raise _TooComplexError(f"it has more than {_MOST_STEPS} steps")
    if str(high) == "MAXREPEAT":
        split = len(steps)
        steps.append(())
        _emit(body, steps)
        steps.append(("jump", split))
        steps[split] = ("split", split + 1, len(steps))
        return
    splits = []
    for _ in range(high - low):
        splits.append(len(steps))
        steps.append(())
        _emit(body, steps)
        if len(steps) > _MOST_STEPS:
            raise _TooComplexError(f"it has more than {_MOST_STEPS} steps")
    for split in splits:
        steps[split] = ("split", split + 1, len(steps))


def _one(kind: str, argument: Any) -> Callable[[str], bool]:
    """Whether a character matches."""
    if kind == "ANY":
        return lambda c: c != "\n"
    if kind in ("LITERAL", "NOT_LITERAL"):
        return lambda c: (ord(c) == argument) == (kind == "LITERAL")
    negate = False
    tests: list[Callable[[str], bool]] = []
    for op, value in argument:
        name = str(op)
        if name == "NEGATE":
            negate = True
        elif name == "LITERAL":
            tests.append(lambda c, value=value: ord(c) == value)  # type: ignore[misc]
        elif name == "RANGE":
            tests.append(lambda c, value=value: value[0] <= ord(c) <= value[1])  # type: ignore[misc]
        else:
            tests.append(_CATEGORIES[str(value)])
    return lambda c: any(test(c) for test in tests) != negate


def _search(program: list[tuple[Any, ...]], text: str) -> bool:
    tried: set[tuple[int, int]] = set()  # by all starts: where one failed, the next fails too
    left = [_MOST_STATES]
    return any(_match(program, text, start, tried, left) for start in range(len(text) + 1))


def _match(program: list[tuple[Any, ...]], text: str, start: int, tried: set[tuple[int, int]], left: list[int]) -> bool:
    stack = [(0, start)]
    while stack:
        state = stack.pop()
        if state in tried:
            continue
        tried.add(state)
        left[0] -= 1
        if left[0] < 0:
            raise _TooComplexError(f"it takes long to look for it in {text[:100]!r}")
        step, at = state
        kind, *argument = program[step]
        if kind == "match":
            return True
        if kind == "split":
            stack += [(argument[1], at), (argument[0], at)]
        elif kind == "jump":
            stack.append((argument[0], at))
        elif kind == "one":
            if at < len(text) and argument[0](text[at]):
                stack.append((step + 1, at + 1))
        elif (
            _holds(argument[0], text, at) if kind == "at" else _match(argument[0], text, at, set(), left) == argument[1]
        ):
            stack.append((step + 1, at))
    return False


def _holds(kind: str, text: str, at: int) -> bool:
    if kind in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
        return at == 0
    if kind == "AT_END":
        return at == len(text) or (at == len(text) - 1 and text[at] == "\n")
    if kind == "AT_END_STRING":
        return at == len(text)
    word = _CATEGORIES["CATEGORY_WORD"]
    boundary = (at > 0 and word(text[at - 1])) != (at < len(text) and word(text[at]))
    return boundary == (kind == "AT_BOUNDARY")
