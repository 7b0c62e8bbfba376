"""The buffers of PV-Tuning (arXiv 2405.14852): what gradients to decoded weights have led to, and whose they are.

Each layer has a buffer B that starts at the decoded weight Wq and is trained by the gradient to Wq. What is kept is
B - Wq, float32, with the moments of its Adam, in 32 or in 8 bits. Of several ranks each has the buffers of a share of
the layers: gradients are added up there, and nowhere else is there memory for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..config import FinetuneOptions
from ..core import verbs
from ..distributed import group
from .student import TunedWeight

_BLOCK = 256  # moments of 8 bits that share a scale


def bytes_of(options: FinetuneOptions) -> float:
    """Of a buffer, for each weight: the difference, and the moments."""
    moments = 2 if options.pv_beta1 else 1
    return 4 + moments * (4 if options.pv_states == "float32" else 1 + 4 / _BLOCK)


def owners(sizes: Sequence[int], ranks: int) -> list[int]:
    """Which rank has which of some buffers: the largest first, each goes to the first rank that has least."""
    loads, found = [0] * ranks, [0] * len(sizes)
    for place in sorted(range(len(sizes)), key=lambda place: (-sizes[place], place)):
        found[place] = loads.index(min(loads))
        loads[found[place]] += sizes[place]
    return found


def _tensors_of(shape: tuple[int, int], options: FinetuneOptions) -> list[tuple[str, torch.dtype, tuple[int, int]]]:
    """(name, dtype, shape) of what a buffer has."""
    small = options.pv_states == "8bit"
    found = [("offset", torch.float32, shape), ("second", torch.uint8 if small else torch.float32, shape)]
    if options.pv_beta1:
        found.append(("first", torch.int8 if small else torch.float32, shape))
    if small:
        found.append(("scales", torch.float32, (2, -(-shape[0] * shape[1] // _BLOCK))))
    return found


class Buffer:
    """Of one layer. weight: as it is decoded, [out, in]; offset: B - Wq, float32. Steps are relative to its rms."""

    def __init__(self, weight: Tensor, options: FinetuneOptions) -> None:
        self.rate = options.pv_learning_rate * float(weight.float().square().mean().sqrt())
        self.betas = options.pv_beta1, options.pv_beta2
        out, width = weight.shape
        self.tensors = {
            name: torch.zeros(shape, dtype=dtype, device=weight.device)
            for name, dtype, shape in _tensors_of((out, width), options)
        }
        self.offset = self.tensors["offset"]
        self._moments = self.tensors.get("first"), self.tensors["second"], self.tensors.get("scales")

    def move(self, offset: Tensor) -> None:
        """The difference is there from now on."""
        self.offset = self.tensors["offset"] = offset.copy_(self.offset)

    def step(self, number: int, gradient: Tensor, divisor: float, rate: float) -> None:
        """Step `number` of Adam, from 1 on, by gradient / divisor, [out, in], at `rate` times its own rate."""
        verbs.buffer_step(self.offset, gradient, self._moments, divisor, rate * self.rate, self.betas, number)


class Buffers:
    """Those of `weights`, of which `own` has this rank's, by their places. dtype: of gradients on their way.

    A step is `begin`, gradients in any order by `give`, and `finish`; all ranks handle them in the same order. The rank
    that has a buffer also finds what a gradient comes to for codebooks and scales: sums over ranks are then those that
    one process makes of as many passes, to the same bits.
    """

    def __init__(self, weights: Sequence[TunedWeight], options: FinetuneOptions, dtype: torch.dtype) -> None:
        self._weights = list(weights)
        self._dtype, self._options = dtype, options
        self.owner = owners([weight.codes.numel() for weight in weights], group().size)
        self.own = {
            place: Buffer(weight.decoded(torch.float32), options)
            for place, weight in enumerate(weights)
            if self.owner[place] == group().rank
        }
        self._step, self._waiting, self._next = (1, 1.0, 1.0), dict[int, Tensor](), -1

    def begin(self, number: int, divisor: float, rate: float) -> None:
        """Before the first gradient of step `number`, from 1 on, whose gradients are sums over `divisor` positions."""
        self._step, self._next = (number, divisor, rate), len(self._weights) - 1

    def give(self, place: int, gradient: Tensor) -> None:
        """All of this rank's gradient to a weight; the last weights' come first, as backward makes them."""
        self._waiting[place] = gradient
        while self._next >= 0 and self._next in self._waiting:
            self._take(self._waiting.pop(self._next))

    def finish(self) -> None:
        """No other gradients come: those that are missing are zero, as of experts that no token went to."""
        while self._next >= 0:
            weight, gradient = self._weights[self._next], self._waiting.pop(self._next, None)
            if gradient is None:
                gradient = torch.zeros(weight.shape, dtype=self._dtype, device=weight.codes.device)
            self._take(gradient)

    def _take(self, gradient: Tensor) -> None:
        place, self._next = self._next, self._next - 1
        ranks = group()
        total = gradient if ranks.size == 1 else ranks.sum_on(gradient.to(self._dtype), self.owner[place])
        if total is not None:
            self._weights[place].spread(total)
            number, divisor, rate = self._step
            self.own[place].step(number, total, divisor, rate)

    def state(self, prefix: str) -> dict[str, Tensor]:
        """The tensors of all buffers by name, on the first rank, to which the others send theirs; {} on these."""
        ranks, found = group(), {}
        for place, weight in enumerate(self._weights):
            root, device = self.owner[place], weight.codes.device
            for name, kind, size in _tensors_of(weight.shape, self._options):
                own = self.own[place].tensors[name] if place in self.own else None
                if not ranks.first and own is None:
                    continue
                there = own if own is not None else torch.empty(size, dtype=kind, device=device)
                if root != 0:
                    ranks.move(there, root, 0)
                if ranks.first:
                    found[f"{prefix}.{place}.{name}"] = there if own is not None else there.cpu()
        return found

    @torch.no_grad()
    def load(self, prefix: str, state: Mapping[str, Tensor]) -> None:
        """Of a state of all buffers, take what this rank has."""
        for place, own in self.own.items():
            for name, tensor in own.tensors.items():
                tensor.copy_(state[f"{prefix}.{place}.{name}"])
