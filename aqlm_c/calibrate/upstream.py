"""What the quantized layers before a linear do to its inputs: sums to correct its weight by, and which linears come
before which.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core import arrays, verbs
from ..core.verbs import Array
from ..distributed import group
from ..model.kinds import kind_of
from .activations import Activations
from .hessians import Weigh, rows_of, same_tensor

log = logging.getLogger("aqlm_c")

See = Callable[[str, Tensor], None]


@contextlib.contextmanager
def watched(linears: Mapping[str, nn.Module], see: See) -> Iterator[None]:
    """`see` is told the name and the input of each of the linears before it runs; of none without a token."""

    def hook(name: str, _: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        x = args[0] if args else kwargs["input"]
        if x.numel():
            see(name, x)

    handles = [
        linear.register_forward_pre_hook(functools.partial(hook, name), with_kwargs=True)
        for name, linear in linears.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def original_of(block: nn.Module, shared: bool) -> nn.Module:
    """The block as it is, whatever becomes of its layers; shared: with the very tensors, to which nobody writes."""
    memo = {id(t): t for t in (*block.parameters(), *block.buffers())} if shared else {}
    return copy.deepcopy(block, memo)


@torch.no_grad()
def in_turn(inputs: Activations, index: int, block: nn.Module, linears: Mapping[str, nn.Module]) -> list[list[str]]:
    """The names of `linears`, of the model's block number `index`, in the order in which they run, those with the same
    input together; and together with experts the others of their kind. One batch shows it, the first rank's.
    """
    seen: dict[str, Tensor] = {}
    turns: dict[str, list[str]] = {}

    def see(name: str, x: Tensor) -> None:
        if name in seen:
            return
        leader = next((other for other, y in seen.items() if same_tensor(y, x)), name)
        seen[name] = x
        turn = turns.setdefault(kind_of(leader), [])
        turn += [name] if all(name not in names for names in turns.values()) else []

    with watched(linears, see):
        inputs.run(index, block, 0)
    left = [name for name in linears if name not in seen]  # experts to which no token of the batch goes
    for name in left:
        alike = (names for names in turns.values() if any(kind_of(other) == kind_of(name) for other in names))
        next(alike, turns.setdefault("", [])).append(name)
    found: list[list[str]] = group().broadcast([names for names in turns.values() if names])
    return found


class CrossSums:
    """Sums of (X - X^)^T X^ of some linears of one block, one for each distinct input: X^ is what a linear is given in
    the model quantized so far, X what it is given in the original, for the same tokens.

    A linear that is not given all tokens of a batch, as an expert, has none: the two models may send it others. weigh:
    as in `HessianSums`.
    """

    def __init__(self, linears: Mapping[str, nn.Linear], weigh: Weigh | None = None) -> None:
        self.linears, self.weigh = linears, weigh
        self.leader: dict[str, str] = {}  # linear -> the first linear with the same input
        self.sums: dict[str, Array] = {}  # leader -> float64 [in, in], where its inputs are
        self.tokens: dict[str, int] = {}
        self.without: set[str] = set()
        self._batch, self._in_batch = 0, 0  # its number, its tokens
        self._truth: dict[str, list[Tensor]] = {}  # of each call in this batch, in the original
        self._seen: dict[str, Tensor] = {}  # in this batch, of the last call
        self._calls: dict[str, int] = {}

    @torch.no_grad()
    def gather(
        self, originals: Activations, original: nn.Module, inputs: Activations, index: int, block: nn.Module
    ) -> None:
        """Run `block`, the model's number `index`, on all of `inputs`, and the original one on `originals`; the linears
        have the same names in both.
        """
        twins = _twins(self.linears, block, original)
        batches = range(len(inputs.hidden))
        originals.expect(batches)
        inputs.expect(batches)
        for batch in batches:
            self._batch, hidden = batch, originals.hidden[batch]
            self._in_batch = hidden.numel() // hidden.shape[-1]
            kept: list[tuple[Tensor, Tensor]] = []  # input, and its copy: some models write into it
            with watched(twins, functools.partial(self._keep, kept)):
                originals.forward(index, original, batch, hidden)
            kept.clear()
            with watched(self.linears, self._compare):
                inputs.run(index, block, batch)
            self._truth.clear()
            self._seen.clear()
            self._calls.clear()

    def collect(self, ranks: Mapping[str, int]) -> None:
        """Bring the sums of all ranks to those that `ranks` names for the linears, added in the order of the ranks."""
        told = group().gather({"leader": self.leader, "tokens": self.tokens, "without": sorted(self.without)})
        self.without = {name for there in told for name in there["without"]}
        others = [there["leader"] for there in told]
        self.without |= {name for name in self.linears if len({str(there.get(name)) for there in others}) > 1}
        own, self.sums = self.sums, {}
        for leader in dict.fromkeys(others[0].values()):
            followers = [name for name in self.linears if self.has(name) and self.leader[name] == leader]
            part = own.pop(leader, None)
            for root in sorted({ranks[name] for name in followers}):
                linear = self.linears[leader]
                place = functools.partial(arrays.zeros_at, linear.weight.device, linear.in_features, linear.in_features)
                total = group().sum_in_order(part, range(len(told)), root, place)
                if total is not None:
                    self.sums[leader] = total
            self.tokens[leader] = sum(there["tokens"].get(leader, 0) for there in told)

    def has(self, name: str) -> bool:
        """Whether a linear has a sum, here or on another rank."""
        return name in self.leader and not {name, self.leader[name]} & self.without

    def means(self) -> dict[str, Array]:
        """C = (X - X^)^T X^ / n_tokens of the linears whose sums are here, float32 [in, in], by name; the same object
        for those that share an input. A warning names the linears without one.
        """
        if without := [name for name in self.linears if not self.has(name)]:
            log.warning("not corrected for the layers before them, since they see a part of the tokens: %s", without)
        found = {leader: arrays.to_float(total / self.tokens[leader]) for leader, total in self.sums.items()}
        leaders = {name: self.leader[name] for name in self.linears if self.has(name)}
        return {name: found[leader] for name, leader in leaders.items() if leader in found}

    def _keep(self, kept: list[tuple[Tensor, Tensor]], name: str, x: Tensor) -> None:
        copied = next((copied for seen, copied in kept if same_tensor(seen, x)), None)
        if copied is None:
            copied = x.clone()
            kept.append((x, copied))
        self._truth.setdefault(name, []).append(copied)

    def _compare(self, name: str, x: Tensor) -> None:
        call = self._calls[name] = self._calls.get(name, -1) + 1
        truth = self._truth.get(name, [])
        if call >= len(truth) or truth[call].shape != x.shape or x.numel() // x.shape[-1] != self._in_batch:
            self.without.add(name)
            return
        if name not in self.leader:
            same = (other for other, seen in self._seen.items() if same_tensor(seen, x))
            self.leader[name] = next(same, name)
        leader = self.leader[name]
        if leader == name:
            self._seen[name] = x  # kept alive, so that no other tensor of this batch can have its address
            self._add(name, truth[call], x)
        elif not same_tensor(self._seen.get(leader), x):
            self.without.add(name)

    def _add(self, name: str, truth: Tensor, x: Tensor) -> None:
        change = truth - x
        if self.weigh is not None:
            change, x = (self.weigh(name, self._batch, part) for part in (change, x))
        rows = rows_of(x)
        if name not in self.sums:
            self.sums[name] = arrays.zeros(rows, rows.shape[1], rows.shape[1])
            self.tokens[name] = 0
        verbs.accumulate_product(self.sums[name], rows_of(change), rows)
        self.tokens[name] += rows.shape[0]


def _twins(linears: Mapping[str, nn.Module], block: nn.Module, original: nn.Module) -> dict[str, nn.Module]:
    """The linears of `original` in the places that `linears` have in `block`."""
    places = {id(module): place for place, module in block.named_modules()}
    return {name: original.get_submodule(places[id(linear)]) for name, linear in linears.items()}
