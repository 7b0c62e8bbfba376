"""Linears of one input, such as q, k and v, in one launch: a small product on a GPU is a launch above all."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .config import FORMAT
from .linear import QuantizedLinear

__all__ = ["Joined", "join_linears"]

# Children of a module that its forward calls one after the other with the same tensor.
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"), ("w1", "w3"))
MOST_MISSES = 8  # in a row, before a group gives up


class Joined:
    """Linears that are called with the same tensor: the first product with one row on a GPU makes those of all.

    The others take theirs if they get that very tensor, unchanged; where they do not, for `MOST_MISSES` times in a
    row, each is by itself again. So it is while a member is replaced, elsewhere or trained, and with tensors made in
    inference mode, of which nobody knows whether they were changed (in a compiled function nobody may: none that we
    know of changes its input between these calls).
    """

    device_type = "cuda"

    def __init__(self, parent: nn.Module, names: tuple[str, ...]) -> None:
        self.parent, self.names = weakref.ref(parent), names  # weak: memory of a model is free when it is deleted
        self.misses = 0
        self._left: tuple[Tensor, int, dict[int, Tensor]] | None = None  # x, its version, products by place

    def take(self, place: int, x: Tensor) -> Tensor | None:
        """The product of member `place` with x, or None if it is to make it by itself."""
        if self.misses == MOST_MISSES or not self._fits(x):
            return None
        left, self._left = self._left, None
        if left is not None:
            if left[0] is x and left[1] == _version(x) and place in left[2]:
                y = left[2].pop(place)
                if left[2]:
                    self._left = left
                elif self.misses:
                    self.misses = 0
                return y
            self.misses += 1
            if self.misses == MOST_MISSES:
                return None
        parent = self.parent()
        if parent is None:
            return None
        members = [parent._modules.get(name) for name in self.names]
        if not all(isinstance(m, QuantizedLinear) and m.joined and m.joined[0] is self for m in members):
            return None
        weights = [(m.codes, m.codebooks, m.scales, m.bias) for m in members]
        if any(codes.device != x.device for codes, *_ in weights):
            return None
        products = dict(enumerate(ops.matmul_joined(x, weights)))
        y = products.pop(place)
        self._left = x, _version(x), products
        return y

    def _fits(self, x: Tensor) -> bool:
        return (
            isinstance(x, Tensor)
            and x.device.type == self.device_type
            and x.numel() == x.shape[-1]
            and (torch.compiler.is_compiling() or not x.is_inference())
        )


def _version(x: Tensor) -> int:
    """How often x was changed in place."""
    return 0 if torch.compiler.is_compiling() else x._version


def join_linears(model: nn.Module) -> int:
    """Let quantized linears of `model` that get the same input share launches (`Joined`); returns how many groups do.

    They are found by the names of `TOGETHER` and must have one format, in_features, dtype, and all or none a bias;
    results are the same but for the order of sums. transformers models that this package loads or quantizes are
    joined already; copies of a model are not.
    """
    groups = 0
    for module in list(model.modules()):
        for names in TOGETHER:
            members = [module._modules.get(name) for name in names]
            if not all(type(m) is QuantizedLinear for m in members) or len({_format(m) for m in members}) > 1:
                continue
            group = Joined(module, names)
            for place, member in enumerate(members):
                member.joined = group, place
            groups += 1
    return groups


def _format(linear: QuantizedLinear) -> tuple[Any, ...]:
    sizes = tuple(getattr(linear, name) for name in FORMAT)
    return *sizes, linear.in_features, linear.codebooks.dtype, linear.bias is not None
