"""Runs calibration sequences block by block: what goes into each block of a model."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import torch

from ..config import TuningOptions
from .spill import SpilledTensors

TOKENS_PER_BATCH = 8192  # of calibration, in one forward pass

_Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # of a block, after its hidden states


@dataclasses.dataclass
class Activations:
    """The activations as they pass through the model: what goes into the next block, batch by batch.

    hidden: one tensor [batch, length, hidden_size] in the model's dtype a batch, in memory (a list) or on disk.
    arguments: what the model passes to each block beside it (positions, masks), by batch and block.
    """

    hidden: list[torch.Tensor] | SpilledTensors
    arguments: list[list[_Arguments]]

    def forward(
        self, index: int, block: Callable[..., Any], batch: int, hidden: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The output of `block`, the model's number `index`, for one batch; gradients flow.

        hidden: what goes in, if not the activations' own.
        """
        args, kwargs = self.arguments[batch][index]
        return _hidden_states(block(self.hidden[batch] if hidden is None else hidden, *args, **kwargs))

    @torch.no_grad()
    def run(self, index: int, block: torch.nn.Module, batch: int) -> torch.Tensor:
        """`forward` without gradients."""
        return self.forward(index, block, batch)

    def advance(self, index: int, block: torch.nn.Module) -> None:
        """Replace the activations by the outputs of `block`."""
        for batch in range(len(self.hidden)):
            self.hidden[batch] = self.run(index, block, batch)

    def empty(self) -> Activations:
        """A place for other activations of the same sequences, kept where these are; the arguments are shared."""
        kept = self.hidden
        return Activations(SpilledTensors(kept.directory) if isinstance(kept, SpilledTensors) else [], self.arguments)

    def batch_sizes(self) -> list[int]:
        """Sequences in each batch."""
        if isinstance(self.hidden, SpilledTensors):
            return [shape[0] for shape in self.hidden.shapes()]
        return [hidden.shape[0] for hidden in self.hidden]

    def __enter__(self) -> Activations:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the activations."""
        self.hidden.clear()


def batch_size_for(sequences: torch.Tensor, tuning: TuningOptions, asked: int | None = None) -> int:
    """Sequences in one forward pass: as many as asked for or as memory likes, of a step of fine-tuning at most."""
    n, length = sequences.shape
    size = asked or max(1, TOKENS_PER_BATCH // length)
    if tuning.finetune_epochs:
        size = min(size, tuning.finetune_batch_size, max(1, n // 2))  # some must be left to validate
    return min(size, n)


@torch.no_grad()
def capture(
    model: torch.nn.Module,
    blocks: torch.nn.ModuleList,
    sequences: torch.Tensor,
    batch_size: int | None = None,
    directory: str | os.PathLike[str] | None = None,
) -> Activations:
    """What goes into the first block for token ids [n, length], and every block's other arguments.

    The model itself prepares them: its forward pass runs with the blocks replaced by recorders that hand
    their input on, so that per-block masks and positions are right for any architecture. The activations stay
    in memory or, if `directory` is given, on disk there (`SpilledTensors`).
    """
    batch_size = batch_size or max(1, TOKENS_PER_BATCH // sequences.shape[1])
    activations = Activations([] if directory is None else SpilledTensors(directory), [])
    returns_tuple: bool | None = None

    def recorder(block: torch.nn.Module) -> Callable[..., Any]:
        forward = block.forward

        def record(*args: Any, **kwargs: Any) -> Any:
            nonlocal returns_tuple
            hidden, args, kwargs = _split_hidden(args, kwargs)
            if block is blocks[0]:
                activations.hidden.append(hidden)
                activations.arguments.append([])
                if returns_tuple is None:
                    returns_tuple = isinstance(forward(hidden, *args, **kwargs), tuple)
            activations.arguments[-1].append((args, kwargs))
            return (hidden,) if returns_tuple else hidden

        return record

    body = getattr(model, "base_model", model)  # without the output embedding
    for block in blocks:
        block.forward = recorder(block)
    try:
        for ids in sequences.to(next(model.parameters()).device).split(batch_size):
            body(input_ids=ids, use_cache=False)
            _share(activations.arguments)
    finally:
        for block in blocks:
            del block.forward
    return activations


def _split_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]:
    if args:
        return args[0], args[1:], kwargs
    return (
        kwargs["hidden_states"],
        (),
        {name: value for name, value in kwargs.items() if name != "hidden_states"},
    )


def _hidden_states(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def _share(arguments: list[list[_Arguments]]) -> None:
    """Let the last batch use the first one's arguments where they are equal: masks are large."""
    first, last = arguments[0], arguments[-1]
    for index, (kept, new) in enumerate(zip(first, last, strict=True)):
        if kept is not new and _equal(kept, new):
            last[index] = kept


def _equal(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    return a is b or a == b
