"""The choice of one option for each item that loses least within a capacity: the multiple-choice knapsack problem."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_MOST_UNITS = 2**17  # of capacity
_MOST_CELLS = 2**28  # of the table of choices, a byte each


def choose(options: Sequence[Sequence[tuple[int, float]]], capacity: int) -> list[int]:
    """The index of the option chosen for each item: (size, loss) with the least sum of losses and a sum of sizes of at
    most `capacity`.

    By dynamic programming over sizes beyond each item's smallest, exact where 2^17 units of 1 hold the capacity beyond
    these (fewer for more than 2,048 items); else sizes are rounded up to larger units, and what is left by that is
    given to the options that gain most. Raises ValueError where even the smallest do not fit, or an item has none or
    more than 255.
    """
    if not all(0 < len(item) < 256 for item in options):
        raise ValueError("options: got an item with none or more than 255, expected 1 to 255")
    smallest = [min(size for size, _ in item) for item in options]
    room = capacity - sum(smallest)
    if room < 0:
        raise ValueError(f"capacity: got {capacity}, expected at least {sum(smallest)}")
    units = max(1, min(_MOST_UNITS, _MOST_CELLS // max(1, len(options))))
    unit = max(1, -(-room // units))
    chosen = _exact(
        [
            [(-(-(size - least) // unit), loss) for size, loss in item]
            for item, least in zip(options, smallest, strict=True)
        ],
        room // unit,
    )
    return _filled(options, chosen, capacity)


def _exact(options: Sequence[Sequence[tuple[int, float]]], capacity: int) -> list[int]:
    """`choose` for sizes in units, each item having an option of size 0."""
    best = np.zeros(capacity + 1)  # least loss of the items so far, by the size they may take
    choices = np.zeros((len(options), capacity + 1), np.uint8)
    for item, row in zip(options, choices, strict=True):
        after = np.full(capacity + 1, np.inf)
        for index, (size, loss) in enumerate(item):
            if size > capacity:
                continue
            found = best[: capacity + 1 - size] + loss
            better = found < after[size:]
            after[size:][better] = found[better]
            row[size:][better] = index
        best = after
    chosen, left = [0] * len(options), capacity
    for number in range(len(options) - 1, -1, -1):
        chosen[number] = int(choices[number, left])
        left -= options[number][chosen[number]][0]
    return chosen


def _filled(options: Sequence[Sequence[tuple[int, float]]], chosen: list[int], capacity: int) -> list[int]:
    """`chosen` with the options that gain most in what they leave of the capacity."""
    left = capacity - sum(options[item][option][0] for item, option in enumerate(chosen))
    while True:
        gain, item, option = max(
            (
                (options[item][now][1] - loss, item, option)
                for item, now in enumerate(chosen)
                for option, (size, loss) in enumerate(options[item])
                if size - options[item][now][0] <= left
            ),
            default=(0.0, 0, 0),
        )
        if gain <= 0:
            return chosen
        left -= options[item][option][0] - options[item][chosen[item]][0]
        chosen[item] = option
