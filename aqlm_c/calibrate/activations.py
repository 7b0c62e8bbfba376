"""Runs calibration sequences block by block: what goes into each block of a model."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ..config import TuningOptions
from ..distributed import group
from ..model.blocks import Blocks, find_blocks
from ..model.probe import Arguments, equal, hidden_of, input_device, join_hidden, replaced_forward, split_hidden
from .offload import OffloadedTensors, Room
from .spill import SpilledTensors

TOKENS_PER_BATCH = 8192  # of calibration, in one forward pass
TOKENS_ON_GPU = 16384  # whose kernels take no longer for each of more tokens, and little less


def tokens_per_batch(device: torch.device | None) -> int:
    """Tokens in one forward pass of calibration; device: None is the CPU."""
    return TOKENS_ON_GPU if device is not None and device.type == "cuda" else TOKENS_PER_BATCH


@dataclasses.dataclass
class Activations:
    """The activations as they pass through the model: what goes into the next block, batch by batch.

    hidden: one tensor [batch, length, hidden_size] in the model's dtype a batch, in memory (a list), on disk,
    or near a device.
    arguments: what the model passes to each block beside it (positions, masks), by batch and block. Of a block that
    runs more than once in a pass, each call is a batch.
    """

    hidden: list[torch.Tensor] | SpilledTensors | OffloadedTensors
    arguments: Sequence[Sequence[Arguments] | Mapping[int, Arguments]]

    def forward(
        self, index: int, block: Callable[..., Any], batch: int, hidden: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The output of `block`, the model's number `index`, for one batch; gradients flow.

        hidden: what goes in, if not the activations' own.
        """
        given = self.hidden[batch] if hidden is None else hidden
        args, kwargs = join_hidden(given, self.arguments[batch][index])
        return hidden_of(block(*args, **kwargs))

    def prefetch(self, batch: int) -> None:
        """A batch is needed soon: where activations are kept far away, it begins to come."""
        if prefetch := getattr(self.hidden, "prefetch", None):
            prefetch(batch)

    @torch.no_grad()
    def run(self, index: int, block: torch.nn.Module, batch: int) -> torch.Tensor:
        """`forward` without gradients."""
        return self.forward(index, block, batch)

    def advance(self, index: int, block: torch.nn.Module) -> None:
        """Replace the activations by the outputs of `block`."""
        self.expect(range(len(self.hidden)))
        for batch in range(len(self.hidden)):
            self.hidden[batch] = self.run(index, block, batch)

    def outputs(self, index: int, block: torch.nn.Module) -> Activations:
        """The outputs of `block`, kept where these are."""
        found = self.empty()
        self.expect(range(len(self.hidden)))
        for batch in range(len(self.hidden)):
            found.hidden.append(self.run(index, block, batch))
        return found

    def expect(self, batches: Iterable[int]) -> None:
        """The batches that will be asked for next, in this order: they can be fetched meanwhile."""
        if isinstance(self.hidden, OffloadedTensors):
            self.hidden.expect(batches)

    def empty(self) -> Activations:
        """A place for other activations of the same sequences, kept where these are; the arguments are shared."""
        return Activations([] if isinstance(self.hidden, list) else self.hidden.empty(), self.arguments)

    def has_room(self) -> bool:
        """Whether others of the same sizes would be in memory too; true where these are all in memory, or on disk."""
        return not isinstance(self.hidden, OffloadedTensors) or self.hidden.has_room()

    def batch_sizes(self) -> list[int]:
        """Sequences in each batch."""
        if isinstance(self.hidden, list):
            return [hidden.shape[0] for hidden in self.hidden]
        return [shape[0] for shape in self.hidden.shapes()]

    def __enter__(self) -> Activations:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the activations."""
        self.hidden.clear()


def batch_size_for(
    sequences: torch.Tensor, tuning: TuningOptions, asked: int | None = None, device: torch.device | None = None
) -> int:
    """Sequences in one forward pass: as many as asked for or as memory likes, of a step of fine-tuning at most.

    Of several ranks each is to have one, and on GPUs a part of each step too: more ranks then have other batches, whose
    last bits are others, unless a size is asked for.
    """
    n, length = sequences.shape
    ranks, gpu = group().size, device is not None and device.type == "cuda"
    size = asked or min(max(1, tokens_per_batch(device) // length), max(1, n // ranks))
    if tuning.finetune_epochs:
        step = tuning.finetune_batch_size if asked or not gpu else -(-tuning.finetune_batch_size // ranks)
        size = min(size, step, max(1, n // 2))  # some must be left to validate
    return min(size, n)


@torch.no_grad()
def capture(
    model: torch.nn.Module,
    blocks: Blocks | torch.nn.ModuleList,
    sequences: torch.Tensor,
    batch_size: int | None = None,
    place: str | os.PathLike[str] | Room | None = None,
) -> Activations:
    """What goes into the first block for token ids [n, length], and every block's other arguments.

    The model itself prepares them: its forward pass runs with the blocks, which are `chained`, replaced by recorders
    that hand their input on, so that per-block masks and positions are right for any architecture. The activations
    stay in memory or, where `place` is a directory, on disk there (`SpilledTensors`), or in that `Room`. blocks: as
    `find_blocks` gives them, which is asked where they are a plain list.
    """
    if not isinstance(blocks, Blocks):
        _, blocks = find_blocks(model)
    activations = _nothing_yet(place)
    arguments: list[list[Arguments]] = []

    def record(index: int, hidden: torch.Tensor, others: Arguments) -> None:
        if index == 0:
            activations.hidden.append(hidden)
            arguments.append([])
        arguments[-1].append(others)

    with blocks.recorded(record):
        for body, ids in _batches(model, sequences, batch_size):
            body(input_ids=ids, use_cache=False)
            for index, (kept, new) in enumerate(zip(arguments[0], arguments[-1], strict=True)):
                arguments[-1][index] = kept if equal(kept, new) else new  # masks are large
    activations.arguments = arguments
    return activations


@torch.no_grad()
def capture_block(
    model: torch.nn.Module,
    blocks: Blocks,
    index: int,
    sequences: torch.Tensor,
    batch_size: int | None = None,
    place: str | os.PathLike[str] | Room | None = None,
) -> Activations:
    """What goes into block number `index` of a model whose blocks are not `chained`, for token ids [n, length]: the
    model runs from its start up to the block, as often as that runs. Otherwise as `capture`.
    """
    activations = _nothing_yet(place)
    arguments: list[Mapping[int, Arguments]] = []
    calls = 0

    def recorder(_: int, module: torch.nn.Module) -> Callable[..., Any]:
        run = module.forward

        def record(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            hidden, others = split_hidden((args, kwargs))
            activations.hidden.append(hidden.clone())  # some models write into it
            first = arguments[calls][index] if len(arguments) > calls else others
            arguments.append({index: first if equal(first, others) else others})
            calls += 1
            if calls == blocks.runs[index]:
                raise _Reached
            return run(*args, **kwargs)

        return record

    with replaced_forward([blocks[index]], recorder):
        for body, ids in _batches(model, sequences, batch_size):
            calls = 0
            with contextlib.suppress(_Reached):
                body(input_ids=ids, use_cache=False)
    activations.arguments = arguments
    return activations


class _Reached(Exception):
    """Leaves a forward pass where all calls of a block are known."""


def _nothing_yet(place: str | os.PathLike[str] | Room | None) -> Activations:
    if place is None:
        return Activations([], [])
    return Activations(OffloadedTensors(place) if isinstance(place, Room) else SpilledTensors(place), [])


def _batches(
    model: torch.nn.Module, sequences: torch.Tensor, batch_size: int | None
) -> Iterator[tuple[Callable[..., Any], torch.Tensor]]:
    """(the model without its output embedding, token ids) of each batch."""
    body: Any = getattr(model, "base_model", model)
    batch_size = batch_size or max(1, tokens_per_batch(input_device(model)) // sequences.shape[1])
    return ((body, ids) for ids in sequences.to(input_device(model)).split(batch_size))
