"""Which rank quantizes which layers of a step: by what they cost, the longest first."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

from ..format import Format
from ..methods import get_method
from ..recipe import AqlmConfig
from .estimate import Rates

_FACTOR = 1.7  # flop per in^3 of what is derived from H once for all layers that share it


def spread_layers(
    layers: Mapping[str, tuple[Format, tuple[int, int], AqlmConfig]],
    shared: Mapping[str, Hashable],
    size: int,
    rates: Rates,
) -> dict[str, int]:
    """The rank, of `size`, of each layer, given as format, (out, in) and config by name.

    Layers of the same `shared` have their H in common: on one rank it is summed up and factored once. What comes of it
    depends on nothing but the arguments. rates: the same on all ranks, so not those measured there.
    """
    costs, of_inputs = {}, {}
    for name, (format, (out, n), config) in layers.items():
        cost = get_method(config.solver).cost(format, (out, n), config.options)
        costs[name] = cost.flop / rates.gemm + cost.group_searches * rates.group
        of_inputs[name] = _FACTOR * n**3 / rates.factor
    loads, known, found = [0.0] * size, [set[Hashable]() for _ in range(size)], {}
    for name in sorted(layers, key=lambda name: -costs[name]):  # a stable sort: ties as they come
        ends = [loads[r] + costs[name] + of_inputs[name] * (shared[name] not in known[r]) for r in range(size)]
        rank = ends.index(min(ends))
        loads[rank], found[name] = ends[rank], rank
        known[rank].add(shared[name])
    return {name: found[name] for name in layers}
