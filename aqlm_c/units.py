"""Sizes and durations: read from text, written for people, measured."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from .errors import wrong

# As people write them: 500MB is decimal, 8GiB and the 8G of other commands are binary.
_UNITS = {"": 1, "b": 1} | {f"{p}b": 1000 ** (i + 1) for i, p in enumerate("kmgt")}
_UNITS |= {f"{p}{end}": 1024 ** (i + 1) for i, p in enumerate("kmgt") for end in ("", "ib")}
_MOST = 2**63 - 1
_SIZE = re.compile(r"(\d+(?:\.\d+)?) *([A-Za-z]*)")


def parse_size(name: str, size: int | str) -> int:
    """Bytes of an int or of a text such as "8G", "8GiB" (the same) or "500 MB", in any case; ValueError naming `name`
    for anything else.
    """
    n_bytes, match = 0, None if isinstance(size, int) else _SIZE.fullmatch(str(size).strip())
    if type(size) is int:
        n_bytes = size
    elif match is not None and match[2].lower() in _UNITS:
        n_bytes = int(min(float(match[1]) * _UNITS[match[2].lower()], 2.0 * _MOST))
    if not 0 < n_bytes <= _MOST:
        raise wrong(name, size, "a number of bytes, or a size such as 8G, 8GiB or 500MB")
    return n_bytes


def duration(seconds: float) -> str:
    """A span for people: "45 s", "32 min", "3.2 h", "2.5 days"."""
    units = ((90, 1, "{:.0f} s"), (90 * 60, 60, "{:.0f} min"), (48 * 3600, 3600, "{:.1f} h"))
    for limit, unit, text in units:
        if seconds < limit:
            return text.format(seconds / unit)
    return f"{seconds / 86400:.1f} days"


def binary_size(n_bytes: float) -> str:
    """Bytes of memory for people: "1.4 GiB", "27 MiB"."""
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**30 / 10 else f"{n_bytes / 2**20:.0f} MiB"


def megabytes(n_bytes: int) -> str:
    """Bytes on disk for people: decimal megabytes."""
    return f"{n_bytes / 1e6:,.1f} MB"


def fastest(call: Callable[[], object]) -> float:
    """Seconds of the fastest of three calls."""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
