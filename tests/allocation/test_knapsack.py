"""The choice of schemes against all choices there are."""

import itertools

import numpy as np
import pytest

from aqlm_c.allocation import knapsack


def best(options, capacity):
    """The least loss of all choices that fit."""
    losses = [
        sum(loss for _, loss in choice)
        for choice in itertools.product(*options)
        if sum(size for size, _ in choice) <= capacity
    ]
    return min(losses)


def random_items(rng, items, largest):
    found = []
    for _ in range(items):
        sizes = rng.integers(1, largest, rng.integers(1, 5))
        found.append([(int(size), float(rng.exponential() / size)) for size in sizes])
    return found


@pytest.mark.parametrize("seed", range(20))
def test_exact_against_all_choices(seed):
    rng = np.random.default_rng(seed)
    options = random_items(rng, 6, 40)
    least = sum(min(size for size, _ in item) for item in options)
    most = sum(max(size for size, _ in item) for item in options)
    for capacity in {least, (least + most) // 2, most, most + 7}:
        chosen = knapsack.choose(options, capacity)
        picked = [item[index] for item, index in zip(options, chosen, strict=True)]
        assert sum(size for size, _ in picked) <= capacity
        assert sum(loss for _, loss in picked) == pytest.approx(best(options, capacity), rel=1e-12)


def test_large_sizes_are_rounded_and_what_is_left_is_used():
    rng = np.random.default_rng(0)
    options = [[(int(size), float(1.0 / size)) for size in sorted(rng.integers(10**6, 10**9, 5))] for _ in range(40)]
    least = sum(min(size for size, _ in item) for item in options)
    most = sum(max(size for size, _ in item) for item in options)
    capacity = (least + most) // 2
    chosen = knapsack.choose(options, capacity)
    size = sum(item[index][0] for item, index in zip(options, chosen, strict=True))
    assert 0.999 * capacity <= size <= capacity
    left = capacity - size  # no single change that fits would lose less
    for item, index in zip(options, chosen, strict=True):
        assert not any(each[0] - item[index][0] <= left and each[1] < item[index][1] for each in item)


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="capacity: got 4, expected at least 5"):
        knapsack.choose([[(2, 1.0), (9, 0.0)], [(3, 1.0)]], 4)
    with pytest.raises(ValueError, match="options: got an item with none"):
        knapsack.choose([[]], 4)
