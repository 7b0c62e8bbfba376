"""Gathers H = X^T X / n_tokens for linears while their block runs."""

from __future__ import annotations

import functools
import logging
import operator
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from ..core import arrays, verbs
from ..core.hessian import Hessian
from ..core.verbs import Array
from ..distributed import group
from ..model.blocks import Blocks
from ..model.kinds import kind_of
from ..model.probe import input_device
from .activations import Activations

log = logging.getLogger("aqlm_c")

# Ranks of linears, given for each what it has in common with those of the same H.
Spread = Callable[[Mapping[str, tuple[str, ...]]], Mapping[str, int]]
Weigh = Callable[[str, int, torch.Tensor], torch.Tensor]


def alone(linears: Mapping[str, tuple[str, ...]]) -> Mapping[str, int]:
    """The spread over one rank."""
    return dict.fromkeys(linears, 0)


class _Stop(Exception):
    """Leaves a forward pass once everything needed of it is known."""


class Pools(NamedTuple):
    """Sums of X^T X over all experts of a kind, and their tokens, by kind: for experts that saw too few."""

    sums: dict[str, Array]
    tokens: dict[str, int]


NO_POOLS = Pools({}, {})


class HessianSums:
    """Sums of X^T X over the calibration inputs of some linears of one block, one for each distinct input.

    Linears that are given the same tensor (q, k and v; gate and up) share a sum; that is seen while the
    block runs, whatever the model's type. Linears whose names differ in a number alone are one kind, of several
    experts: one that saw fewer tokens than it has inputs is given the H of all its kind. pools: of kinds of which some
    are not among `linears`. weigh: gives the inputs of (linear, batch, inputs) times the roots of their tokens'
    weights, [tokens, in].
    """

    def __init__(
        self, linears: Mapping[str, torch.nn.Linear], pools: Pools = NO_POOLS, weigh: Weigh | None = None
    ) -> None:
        self.linears, self.pools, self.weigh = linears, pools, weigh
        self.leader: dict[str, str] = {}  # linear -> the first linear with the same input
        self.sums: dict[str, Array] = {}  # leader -> float64 [in, in], where its inputs are
        self.tokens: dict[str, int] = {}
        self.ranks: dict[str, int] = {}  # linear -> the rank that has its H, after `collect`
        self.seconds = 0.0  # spent on the sums alone
        self._seen: dict[str, torch.Tensor] = {}  # leader -> its input in this batch
        self._called: list[str] = []  # in this batch
        self._last: str | None = None  # that every batch calls, once
        self._batch = 0

    def gather(
        self, inputs: Activations, index: int, block: torch.nn.Module, outputs: Activations | None = None
    ) -> None:
        """Run `block`, the model's number `index`, on all of `inputs` and add up its linears' inputs.

        outputs: an empty place that takes the block's outputs, if they are wanted.
        """
        batches = range(len(inputs.hidden))
        inputs.expect(batches)
        self._gather((functools.partial(inputs.run, index, block, batch) for batch in batches), outputs)

    @torch.no_grad()
    def gather_whole(self, model: torch.nn.Module, sequences: torch.Tensor, batch_size: int) -> None:
        """Run the whole model, up to the last of the linears, on token ids [n, length] and add up their inputs."""
        if len(self.linears) == 1:
            self._last = next(iter(self.linears))
        batches = sequences.to(input_device(model)).split(batch_size)
        self._gather(functools.partial(model, input_ids=ids, use_cache=False) for ids in batches)

    @torch.no_grad()
    def gather_after(
        self, model: torch.nn.Module, blocks: Blocks, outputs: Activations, sequences: torch.Tensor, batch_size: int
    ) -> None:
        """`gather_whole` for an output layer, where `outputs` are those of the last of the `blocks`."""
        self._last = next(iter(self.linears))
        batches = sequences.to(input_device(model)).split(batch_size)
        outputs.expect(range(len(batches)))
        self._gather(
            functools.partial(run_after, model, blocks, outputs.hidden[batch], ids) for batch, ids in enumerate(batches)
        )

    def _gather(self, runs: Iterable[Callable[[], Any]], outputs: Activations | None = None) -> None:
        linears = self.linears.items()
        hooks = [linear.register_forward_pre_hook(self._hook(name), with_kwargs=True) for name, linear in linears]
        try:
            for self._batch, run in enumerate(runs):
                try:
                    output = run()
                    if outputs is not None:
                        outputs.hidden.append(output)
                except _Stop:
                    continue
                else:
                    if outputs is None and len(set(self._called)) == len(self._called) == len(self.linears):
                        self._last = self._called[-1]
                finally:
                    self._seen.clear()
                    self._called.clear()
        finally:
            for hook in hooks:
                hook.remove()

    def hessians(self) -> dict[str, Hessian]:
        """Each linear's H = X^T X / n_tokens; the same object for linears that share their input. After `collect`: of
        this rank's linears.

        Experts with too few tokens share the H of all their kind; a warning names them. The identity takes the place of
        an H of zeros, and of none where no input was seen, by the kind neither; a warning names those too. Raises
        ValueError naming a linear whose inputs were NaN, Inf or too large to square.
        """
        shared: dict[tuple[str, ...], Hessian] = {}
        few: list[str] = []
        silent: list[str] = []
        found = {}
        for name, linear in self.linears.items():
            if self.ranks.get(name, group().rank) != group().rank:
                continue
            leaders = self._leaders(name)
            if leaders and leaders not in shared:
                shared[leaders] = self._hessian(name, leaders)
            if leaders and shared[leaders].H.any():
                found[name] = shared[leaders]
                few += [name] if leaders != (self.leader.get(name),) else []
            else:
                key = ("", str(linear.in_features))
                found[name] = shared[key] = shared.get(key) or Hessian.identity(
                    linear.in_features, linear.weight.device
                )
                silent.append(name)
        for found_there, what in (
            (few, "fewer calibration tokens than in_features, H of all experts taken"),
            (silent, "no calibration token reaches these or all of them are zero there, the identity taken as H"),
        ):
            everywhere = {name for names in group().gather(found_there) for name in names}
            if names := [name for name in self.linears if name in everywhere]:
                log.warning("%s for %d layers: %s", what, len(names), ", ".join(names))
        return found

    def collect(self, spread: Spread) -> None:
        """Bring the sums of all ranks to those to which `spread` gives the linears; `ranks` says which these are.

        The parts are float64 and added in the order of the ranks, which have the sequences in order: they are those of
        one process but for the last bits of float64, of which H, float32, sees nothing, rare ties of rounding aside.
        """
        ranks, own = group(), self.sums
        told = ranks.gather({"leader": self.leader, "tokens": self.tokens})
        leaders, tokens = [one["leader"] for one in told], [one["tokens"] for one in told]
        alike: dict[tuple[str | None, ...], str] = {}  # leaders of a linear, by rank -> the first linear that has them
        self.leader = {}
        for name in dict.fromkeys(name for there in leaders for name in there):
            self.leader[name] = alike.setdefault(tuple(there.get(name) for there in leaders), name)
        self.tokens = {
            name: sum(counts[one] for counts, one in zip(tokens, there, strict=True) if one is not None)
            for there, name in alike.items()
        }
        self.ranks = dict(spread({name: self._leaders(name) for name in self.linears}))
        self.sums, left = {}, Counter(there[ranks.rank] for there in alike)
        for there, name in alike.items():
            width, part = self.linears[name].in_features, there[ranks.rank]
            having = [rank for rank, one in enumerate(there) if one is not None]
            for root in sorted({self.ranks[other] for other in self.linears if name in self._leaders(other)}):
                place = functools.partial(arrays.zeros_at, self.linears[name].weight.device, width, width)
                total = ranks.sum_in_order(None if part is None else own[part], having, root, place)
                if total is not None:
                    self.sums[name] = total
            left[part] -= 1
            if part is not None and not left[part]:
                del own[part]

    def tokens_of(self, name: str) -> int:
        """Tokens that the linear's H is of."""
        counts = {**self.pools.tokens, **self.tokens}
        return sum(counts[leader] for leader in self._leaders(name))

    def _leaders(self, name: str) -> tuple[str, ...]:
        """The linears whose sums make up H of `name`."""
        own = self.leader.get(name)
        if own is not None and self.tokens[own] >= self.linears[name].in_features:
            return (own,)
        if kind_of(name) in self.pools.sums:
            return (kind_of(name),)
        kind = [leader for other, leader in self.leader.items() if kind_of(other) == kind_of(name)]
        return tuple(dict.fromkeys(kind))

    def _hessian(self, name: str, leaders: tuple[str, ...]) -> Hessian:
        with np.errstate(over="ignore"):
            sums = {**self.pools.sums, **self.sums}
            total = functools.reduce(operator.add, (sums[leader] for leader in leaders))
            H = arrays.to_float(total / self.tokens_of(name))
        if not arrays.is_finite(H.diagonal()):
            raise ValueError(f"{name}: got NaN or Inf in H of the layer's input activations, expected finite values")
        return Hessian(H)

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(_module: torch.nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
            x = args[0] if args else kwargs["input"]
            if not x.numel():  # an expert that no token of this batch goes to
                return
            self._called.append(name)
            if name not in self.leader:
                same = (leader for leader, seen in self._seen.items() if same_tensor(seen, x))
                self.leader[name] = next(same, name)
            if self.leader[name] == name:
                self._seen[name] = x  # kept alive, so that no other tensor of this batch can have its address
                self._add(name, x)
            elif not same_tensor(self._seen.get(self.leader[name]), x):
                self._part(name)  # it had the leader's input until now
                self._seen[name] = x
                self._add(name, x)
            if name == self._last:
                raise _Stop  # the rest of the block is not needed

        return hook

    def _part(self, name: str) -> None:
        """Give a linear sums of its own: those of its leader so far, without this batch unless it took part in that."""
        leader = self.leader[name]
        sums = arrays.copied(self.sums[leader])
        self.leader[name], self.tokens[name] = name, self.tokens[leader]
        if self._called.count(name) == 1 and leader in self._seen:
            rows = self._rows(leader, self._seen[leader])
            own = arrays.zeros(rows, *sums.shape)
            verbs.accumulate_hessian(own, rows)
            sums -= own
            self.tokens[name] -= rows.shape[0]
        self.sums[name] = sums

    def _rows(self, name: str, x: torch.Tensor) -> Array:
        return rows_of(x if self.weigh is None else self.weigh(name, self._batch, x))

    def _add(self, name: str, x: torch.Tensor) -> None:
        started = time.perf_counter()
        rows = self._rows(name, x)
        if name not in self.sums:
            self.sums[name] = arrays.zeros(rows, rows.shape[1], rows.shape[1])
            self.tokens[name] = 0
        verbs.accumulate_hessian(self.sums[name], rows)
        self.tokens[name] += rows.shape[0]
        self.seconds += time.perf_counter() - started


def run_after(model: torch.nn.Module, blocks: Blocks, hidden: torch.Tensor, ids: torch.Tensor) -> Any:
    """Run `model` on token ids with `hidden` for what its `blocks` make of them, which do not run."""
    with blocks.recorded(lambda index, *_: hidden if index == 0 else None):
        return model(input_ids=ids, use_cache=False)


@torch.no_grad()
def pool_kinds(
    linears: Mapping[str, torch.nn.Linear], inputs: Activations, index: int, block: torch.nn.Module
) -> Pools:
    """The pools of experts of which some see too few tokens, over all ranks: `block` runs twice on all of `inputs`."""
    ranks, counts = group(), Counter[str]()

    def run(names: Iterable[str], see: Callable[[str, torch.Tensor], None]) -> None:
        def hook(name: str, _: Any, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
            see(name, args[0] if args else kwargs["input"])

        hooks = [
            linears[name].register_forward_pre_hook(functools.partial(hook, name), with_kwargs=True) for name in names
        ]
        try:
            inputs.expect(range(len(inputs.hidden)))
            for batch in range(len(inputs.hidden)):
                inputs.run(index, block, batch)
        finally:
            for handle in hooks:
                handle.remove()

    def add(name: str, x: torch.Tensor) -> None:
        if x.numel():
            rows = rows_of(x)
            kind, width = kind_of(name), rows.shape[1]
            if kind not in sums:
                sums[kind] = arrays.zeros(rows, width, width)
            verbs.accumulate_hessian(sums[kind], rows)

    run(linears, lambda name, x: counts.update({name: x.numel() // x.shape[-1]}))
    counts = sum((Counter(there) for there in ranks.gather(dict(counts))), Counter())
    several = Counter(map(kind_of, linears))
    starved = {kind_of(name) for name, linear in linears.items() if counts[name] < linear.in_features}
    starved = {kind for kind in starved if several[kind] > 1}
    if not starved:
        return NO_POOLS
    sums: dict[str, Array] = {}
    few = [name for name in linears if kind_of(name) in starved]
    run(few, add)
    device = next(iter(linears.values())).weight.device
    return _over_ranks(
        sums, device, {kind: sum(counts[name] for name in few if kind_of(name) == kind) for kind in starved}
    )


def _over_ranks(sums: dict[str, Array], device: torch.device, tokens: dict[str, int]) -> Pools:
    """The pools of all ranks, on each of them."""
    ranks, found = group(), {}
    for kind in sorted(tokens):
        told = ranks.gather([kind in sums, list(sums[kind].shape) if kind in sums else None])
        having = [rank for rank, (has, _) in enumerate(told) if has]
        if not having:
            continue
        shape = told[having[0]][1]
        total = ranks.sum_in_order(sums.get(kind), having, 0, functools.partial(arrays.zeros_at, device, *shape))
        found[kind] = ranks.broadcast_arrays(None if total is None else {"sum": total}, 0, device)["sum"]
    return Pools(found, {kind: tokens[kind] for kind in found})


def rows_of(x: torch.Tensor) -> Array:
    """Inputs of a linear as a matrix [tokens, in]: float32 on the CPU, on a GPU of their own dtype."""
    rows = x.reshape(-1, x.shape[-1])
    return arrays.of_tensor((rows.float() if x.device.type == "cpu" else rows).contiguous())


def same_tensor(a: torch.Tensor | None, b: torch.Tensor) -> bool:
    return a is b or (
        a is not None and a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()
    )
