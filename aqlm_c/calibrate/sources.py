"""Where the H of a layer comes from: calibration sequences that run through the model, or nothing at all."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Protocol

import torch

from ..core import arrays
from ..core.hessian import Hessian
from ..core.verbs import Array
from ..distributed import group
from ..model.blocks import Blocks, is_close
from ..model.residence import Residence
from ..recipe import AqlmConfig
from .activations import Activations, batch_size_for, capture, capture_block
from .fisher import TokenWeights, token_weights
from .hessians import NO_POOLS, HessianSums, Pools, Spread, alone, pool_kinds, run_after
from .offload import Room
from .upstream import CrossSums, in_turn


@dataclasses.dataclass
class LayerInputs:
    """What is known of the inputs of some layers.

    hessians: by the layer's name in the model, of the layers of this rank. ranks: which rank has which layer. tokens:
    that each was summed over; empty without data. seconds: spent on the sums alone. outputs: of the original block for
    the same inputs, if they were asked for. crosses: (X - X^)^T X^ / n_tokens, float32 [in, in], of those that are
    corrected for what was quantized before them, X being their inputs in the original model.
    """

    hessians: dict[str, Hessian]
    ranks: Mapping[str, int]
    tokens: dict[str, int] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    outputs: Activations | None = None
    crosses: dict[str, Array] = dataclasses.field(default_factory=dict)

    def rank_of(self, name: str) -> int:
        """The rank that has the H of this layer."""
        return self.ranks.get(name, group().rank)


class _Seen(Exception):
    """Leaves a forward pass once the output layer's input is known."""


@dataclasses.dataclass
class Chain:
    """The `chained` blocks of a model, which `residence` brings one after another. place: of activations."""

    residence: Residence
    blocks: Blocks
    place: str | os.PathLike[str] | Room | None

    def gather(self, sums: HessianSums, model: Any, ids: torch.Tensor, batch_size: int) -> None:
        """Sum up the inputs of the output layer, on which all token ids [n, length] come together: the blocks are
        brought once, not once for each batch. Where the model makes more of them than what the last one returns, which
        the first batch shows, they come for each.
        """
        residence, (layer,) = self.residence, sums.linears.values()
        with contextlib.ExitStack() as stack:
            with residence.using(model):
                outputs = stack.enter_context(capture(model, self.blocks, ids, batch_size, self.place))
            for index, block in enumerate(self.blocks):
                for following in self.blocks[index + 1 : index + 2]:
                    residence.read_ahead(following)
                with residence.using(block):
                    outputs.advance(index, block)
            first = ids[:batch_size].to(residence.device)
            with residence.running():
                whole = _input_of(layer, lambda: model(input_ids=first, use_cache=False))
            with residence.using(model):
                found = _input_of(layer, lambda: run_after(model, self.blocks, outputs.hidden[0], first))
                if is_close(whole, found):
                    sums.gather_after(model, self.blocks, outputs, ids, batch_size)
                    return
        with residence.running():
            sums.gather_whole(model, ids, batch_size)


@torch.no_grad()
def _input_of(layer: torch.nn.Module, run: Callable[[], Any]) -> torch.Tensor:
    """What `layer` is given first while `run` is called, which ends there."""
    seen: list[torch.Tensor] = []

    def hook(_: Any, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
        seen.append(args[0] if args else kwargs["input"])
        raise _Seen

    handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with contextlib.suppress(_Seen):
            run()
    finally:
        handle.remove()
    return seen[0]


class Calibration(Protocol):
    """What a pipeline asks for H. A context manager: leaving it frees what it holds.

    tokens, sequences, sequence_length: of the calibration; 0 without data. batch_size: sequences in one forward pass,
    None without data; batch_size_asked: it was given and is to stay.
    inputs: what goes into the next block; None without data. originals: the same in the original model, if it is
    followed. Of several ranks each has a share of the sequences, and
    inputs are those of its own; `spread` says which rank is to have the H of which layer.
    """

    tokens: int
    sequences: int
    sequence_length: int
    inputs: Activations | None
    originals: Activations | None

    batch_size_asked: bool

    @property
    def batch_size(self) -> int | None: ...

    def set_batch_size(self, batch_size: int) -> None:
        """Take so many sequences in one forward pass from here on; before `start`."""

    def start(self, model: Any, blocks: Blocks, place: str | os.PathLike[str] | Room | None) -> None:
        """Make `inputs` those of the first block, kept in `place`: a directory, a `Room`, or None for memory."""

    def start_originals(self, model: Any, blocks: Blocks, place: str | os.PathLike[str] | Room | None) -> None:
        """The same for `originals`, while nothing is quantized; none where blocks are not `chained`."""

    def weigh(self, model: Any, linears: Mapping[str, torch.nn.Linear]) -> None:
        """Find what each token weighs for each of the model's linears, while nothing is quantized and where blocks are
        `chained`: H are of weighted tokens from here on.
        """

    def of_block(
        self,
        index: int,
        block: torch.nn.Module,
        linears: Mapping[str, torch.nn.Linear],
        outputs: bool,
        spread: Spread = alone,
        pools: Pools = NO_POOLS,
        original: torch.nn.Module | None = None,
    ) -> LayerInputs:
        """The inputs of `linears` in the model's block number `index`. pools: where these are not all that are
        quantized in it. original: the block before that; the linears are compared with its own.
        """

    def pools(self, index: int, block: torch.nn.Module, linears: Mapping[str, torch.nn.Linear]) -> Pools:
        """What experts among `linears` have in common, of which `of_block` will be asked a part at a time."""

    def of_output(self, model: Any, name: str, spread: Spread = alone, chain: Chain | None = None) -> LayerInputs:
        """The inputs of the output layer called `name`; chain: None where the whole model is there."""

    def advance(self, index: int, block: torch.nn.Module) -> None:
        """Replace `inputs` by the outputs of `block`."""

    def turns(self, index: int, block: torch.nn.Module, linears: Mapping[str, torch.nn.Linear]) -> list[list[str]]:
        """The names of `linears` in the order in which they run in `block`, those with the same input together."""

    def follow(self, index: int, original: torch.nn.Module, outputs: Activations | None = None) -> None:
        """Replace `originals`, if there are any, by the outputs of the original block: these, if they are known."""

    def __enter__(self) -> Calibration: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class SequenceCalibration:
    """Token ids [n, length] that run through the model as it is by then, quantized up to the block in question: from
    block to block where these are `chained`, else from the model's start for each.
    """

    def __init__(
        self,
        sequences: torch.Tensor,
        config: AqlmConfig,
        batch_size: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.ids = sequences
        self.sequences, self.sequence_length = sequences.shape
        self.tokens = sequences.numel()
        self.batch_size_asked = batch_size is not None
        self.inputs: Activations | None = None
        self.originals: Activations | None = None
        self._target, self._seed = config.target, config.seed
        self._weights: TokenWeights | None = None
        self._of_index: Callable[[int], Activations] | None = None  # where blocks are not chained
        self.set_batch_size(batch_size_for(sequences, config.tuning, batch_size, device))
        self._order: torch.Tensor | None = None
        if config.tuning.finetune_epochs:  # that puts every source into every batch
            self._order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(config.seed))

    def set_batch_size(self, batch_size: int) -> None:
        self.batch_size: int = batch_size
        self._share = _share(self.sequences, batch_size)

    def start(self, model: Any, blocks: Blocks, place: str | os.PathLike[str] | Room | None) -> None:
        ids = self._ids()
        if blocks.chained:
            self.inputs = capture(model, blocks, ids, self.batch_size, place)
        else:
            self.inputs = Activations([], [])
            self._of_index = lambda index: capture_block(model, blocks, index, ids, self.batch_size, place)

    def start_originals(self, model: Any, blocks: Blocks, place: str | os.PathLike[str] | Room | None) -> None:
        if blocks.chained:
            self.originals = capture(model, blocks, self._ids(), self.batch_size, place)

    def weigh(self, model: Any, linears: Mapping[str, torch.nn.Linear]) -> None:
        share = self._target.fisher_share
        found = token_weights(model, linears, self._ids(), self._share.start, share, self._seed)
        self._weights = TokenWeights(found, self.batch_size)

    def _ids(self) -> torch.Tensor:
        """Of this rank's sequences, in their order."""
        return (self.ids if self._order is None else self.ids[self._order])[self._share]

    def of_block(
        self,
        index: int,
        block: torch.nn.Module,
        linears: Mapping[str, torch.nn.Linear],
        outputs: bool,
        spread: Spread = alone,
        pools: Pools = NO_POOLS,
        original: torch.nn.Module | None = None,
    ) -> LayerInputs:
        inputs = self.inputs_of(index)
        kept = inputs.empty() if outputs else None
        try:
            weigh = None if self._weights is None else self._weights.applied
            sums = HessianSums(linears, pools, weigh)
            sums.gather(inputs, index, block, kept)
            found = self._inputs(sums, spread, kept)
            corrected = {name: linear for name, linear in linears.items() if self._target.corrects(name)}
            if original is not None and self.originals is not None and corrected:
                cross = CrossSums(corrected, weigh)
                cross.gather(self.originals, original, inputs, index, block)
                if group().size > 1:
                    cross.collect(found.ranks)
                found.crosses = cross.means()
            return found
        except BaseException:
            if kept is not None:
                kept.close()
            raise

    def pools(self, index: int, block: torch.nn.Module, linears: Mapping[str, torch.nn.Linear]) -> Pools:
        return pool_kinds(linears, self.inputs_of(index), index, block)

    def inputs_of(self, index: int) -> Activations:
        """Those of block number `index`."""
        assert self.inputs is not None, "start comes first"
        if self._of_index is not None:
            self.inputs.close()
            self.inputs = self._of_index(index)
        return self.inputs

    def of_output(self, model: Any, name: str, spread: Spread = alone, chain: Chain | None = None) -> LayerInputs:
        sums, ids = HessianSums({name: model.get_submodule(name)}), self.ids[self._share]
        if chain is None:
            sums.gather_whole(model, ids, self.batch_size)
        else:
            chain.gather(sums, model, ids, self.batch_size)
        return self._inputs(sums, spread)

    def advance(self, index: int, block: torch.nn.Module) -> None:
        assert self.inputs is not None, "start comes first"
        if self._of_index is None:
            self.inputs.advance(index, block)

    def turns(self, index: int, block: torch.nn.Module, linears: Mapping[str, torch.nn.Linear]) -> list[list[str]]:
        return in_turn(self.inputs_of(index), index, block, linears)

    def follow(self, index: int, original: torch.nn.Module, outputs: Activations | None = None) -> None:
        if self.originals is not None and outputs is not None:
            self.originals.close()
            self.originals = outputs
        elif self.originals is not None:
            self.originals.advance(index, original)

    def __enter__(self) -> SequenceCalibration:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for activations in (self.inputs, self.originals):
            if activations is not None:
                activations.close()
        self.inputs = self.originals = self._of_index = None

    @staticmethod
    def _inputs(sums: HessianSums, spread: Spread, outputs: Activations | None = None) -> LayerInputs:
        if group().size > 1:
            sums.collect(spread)
        tokens = {name: sums.tokens_of(name) for name in sums.linears}
        return LayerInputs(sums.hessians(), sums.ranks, tokens, sums.seconds, outputs)


def _share(n: int, batch_size: int) -> slice:
    """The sequences of this rank: whole batches, since a batch gives the same bits wherever it is run."""
    rank, size, batches = group().rank, group().size, -(-n // batch_size)
    if batches < size:
        raise ValueError(
            f"ranks: got {size} for {n} sequences in batches of {batch_size}, expected at most {batches}: a batch each"
        )
    return slice(rank * batches // size * batch_size, (rank + 1) * batches // size * batch_size)


class DataFree:
    """No data: each layer is quantized as if all its inputs were white, H = I, and nothing can be fine-tuned."""

    tokens = sequences = sequence_length = 0
    batch_size: int | None = None
    batch_size_asked = False
    inputs: Activations | None = None
    originals: Activations | None = None

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device
        self._hessians: dict[int, Hessian] = {}  # by in_features

    def set_batch_size(self, batch_size: int) -> None:
        pass

    def start(self, model: Any, blocks: Blocks, place: str | os.PathLike[str] | Room | None) -> None:
        pass

    start_originals = start

    def weigh(self, model: Any, linears: Mapping[str, torch.nn.Linear]) -> None:
        pass

    def of_block(
        self,
        index: int,
        block: torch.nn.Module,
        linears: Mapping[str, torch.nn.Linear],
        outputs: bool,
        spread: Spread = alone,
        pools: Pools = NO_POOLS,
        original: torch.nn.Module | None = None,
    ) -> LayerInputs:
        ranks = spread({name: (str(linear.in_features),) for name, linear in linears.items()})
        return LayerInputs({name: self._identity(linear.in_features) for name, linear in linears.items()}, ranks)

    def pools(self, index: int, block: torch.nn.Module, linears: Mapping[str, torch.nn.Linear]) -> Pools:
        return NO_POOLS

    def of_output(self, model: Any, name: str, spread: Spread = alone, chain: Chain | None = None) -> LayerInputs:
        return LayerInputs({name: self._identity(model.get_submodule(name).weight.shape[1])}, spread({name: ()}))

    def advance(self, index: int, block: torch.nn.Module) -> None:
        pass

    def turns(self, index: int, block: torch.nn.Module, linears: Mapping[str, torch.nn.Linear]) -> list[list[str]]:
        return [list(linears)]

    def follow(self, index: int, original: torch.nn.Module, outputs: Activations | None = None) -> None:
        pass

    def __enter__(self) -> DataFree:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hessians.clear()

    def _identity(self, in_features: int) -> Hessian:
        if in_features not in self._hessians:
            self._hessians[in_features] = Hessian.identity(in_features, self._device)
        return self._hessians[in_features]


def embedding_hessian(in_features: int, of_output: Hessian | None, device: torch.device | None = None) -> Hessian:
    """H of an input embedding, whose rows are looked up and not multiplied: the identity, and half of it where it is
    the output layer too, whose H is `of_output`.
    """
    if of_output is None:
        return Hessian.identity(in_features, device)
    identity = arrays.to_kind(arrays.identity(in_features), of_output.H)
    return Hessian((identity + of_output.H / of_output.H.diagonal().mean()) / 2)
