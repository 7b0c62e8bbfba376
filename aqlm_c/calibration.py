"""Runs calibration sequences block by block and gathers H = X^T X / n_tokens for the linears of each."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from . import _core
from .config import AqlmConfig
from .report import kind_of
from .solver import Hessian

log = logging.getLogger("aqlm_c")

_TOKENS_PER_BATCH = 8192

_Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # of a block, after its hidden states


def batch_size(sequences: torch.Tensor, config: AqlmConfig, asked: int | None = None) -> int:
    """Sequences in one forward pass: as many as asked for or as memory likes, of a step of fine-tuning at most."""
    n, length = sequences.shape
    size = asked or max(1, _TOKENS_PER_BATCH // length)
    if config.finetune_epochs:
        size = min(size, config.finetune_batch_size, max(1, n // 2))  # some must be left to validate
    return min(size, n)


class _Stop(Exception):
    """Leaves a forward pass once everything needed of it is known."""


def find_blocks(model: torch.nn.Module) -> tuple[str, torch.nn.ModuleList]:
    """(name, list) of the decoder blocks: the list of like modules with the most linear weights.

    Raises ValueError if there is none.
    """
    best: tuple[str, torch.nn.ModuleList] | None = None
    most = 0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len({type(block) for block in module}) == 1:
            weights = sum(linear.weight.numel() for linear in module.modules() if isinstance(linear, torch.nn.Linear))
            if weights > most:  # a list inside a block holds less than the blocks
                best, most = (name, module), weights
    if best is None:
        raise ValueError(f"model: {type(model).__name__} has no list of blocks with linear layers to quantize")
    return best


def routers(block: torch.nn.Module) -> set[str]:
    """Names in `block` of the linears that choose experts: beside a list of n experts, with n outputs or one.

    They are small, and what they choose must not change.
    """
    found = set()
    for name, parent in block.named_modules():
        lists = (child for child in parent.children() if isinstance(child, torch.nn.ModuleList))
        outputs = {len(experts) for experts in lists if any(isinstance(m, torch.nn.Linear) for m in experts.modules())}
        if outputs:
            children = ((f"{name}.{child}".lstrip("."), linear) for child, linear in parent.named_children())
            found |= {
                child
                for child, linear in children
                if isinstance(linear, torch.nn.Linear) and linear.out_features in outputs | {1}
            }
    return found


class DiskTensors:
    """A list of tensors kept in a file of `directory`: reading one gives a new tensor with the bits that were written.

    The file has no name (it is removed as soon as it is open), so that its space is free again however the
    process ends. Raises OSError naming the directory if it cannot be written or is full.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = directory
        self._slots: list[tuple[int, torch.Size, torch.dtype, torch.device]] = []  # where in the file, what
        self._end = 0
        try:
            self._file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115
        except OSError as error:
            raise self._failed(error) from None

    def __len__(self) -> int:
        return len(self._slots)

    def __getitem__(self, index: int) -> torch.Tensor:
        offset, shape, dtype, device = self._slots[index]
        tensor = torch.empty(shape, dtype=dtype)  # aligned as every tensor, so that products give the same bits
        self._transfer(self._file.readinto, offset, tensor)
        return tensor.to(device)

    def __setitem__(self, index: int, tensor: torch.Tensor) -> None:
        offset, shape, dtype, _ = self._slots[index]
        if tensor.nbytes > math.prod(shape) * dtype.itemsize:
            offset = self._end
        self._slots[index] = self._write(offset, tensor)

    def shapes(self) -> list[torch.Size]:
        """Of the tensors, without reading them."""
        return [shape for _, shape, _, _ in self._slots]

    def append(self, tensor: torch.Tensor) -> None:
        self._slots.append(self._write(self._end, tensor))

    def clear(self) -> None:
        """Give the space back; nothing can be stored any more."""
        self._slots.clear()
        self._file.close()

    def _write(self, offset: int, tensor: torch.Tensor) -> tuple[int, torch.Size, torch.dtype, torch.device]:
        try:
            self._transfer(self._file.write, offset, tensor.detach().to("cpu").contiguous())
        except OSError as error:
            raise self._failed(error) from None
        self._end = max(self._end, offset + tensor.nbytes)
        return offset, tensor.shape, tensor.dtype, tensor.device

    def _transfer(self, call: Callable[[memoryview], int], offset: int, tensor: torch.Tensor) -> None:
        view = memoryview(tensor.view(-1).view(torch.uint8).numpy())
        self._file.seek(offset)
        while view:  # one call moves 2 GiB at most
            moved = call(view)
            if not moved:
                raise OSError(f"{self.directory}: the activations ended early")
            view = view[moved:]

    def _failed(self, error: OSError) -> OSError:
        return OSError(error.errno, f"{self.directory}: cannot keep activations here: {error.strerror}")


@dataclasses.dataclass
class Stream:
    """The activations on their way through the model: what goes into the next block, batch by batch.

    hidden: one tensor [batch, length, hidden_size] in the model's dtype a batch, in memory (a list) or on disk.
    arguments: what the model passes to each block beside it (positions, masks), by batch and block.
    """

    hidden: list[torch.Tensor] | DiskTensors
    arguments: list[list[_Arguments]]

    def forward(
        self, index: int, block: Callable[..., Any], batch: int, hidden: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The output of `block`, the model's number `index`, for one batch; gradients flow.

        hidden: what goes in, if not the stream's own.
        """
        args, kwargs = self.arguments[batch][index]
        return _hidden_states(block(self.hidden[batch] if hidden is None else hidden, *args, **kwargs))

    @torch.no_grad()
    def run(self, index: int, block: torch.nn.Module, batch: int) -> torch.Tensor:
        """`forward` without gradients."""
        return self.forward(index, block, batch)

    def advance(self, index: int, block: torch.nn.Module) -> None:
        """Replace the stream by the outputs of `block`."""
        for batch in range(len(self.hidden)):
            self.hidden[batch] = self.run(index, block, batch)

    def empty(self) -> Stream:
        """A stream for other activations of the same sequences, kept where these are; the arguments are shared."""
        disk = isinstance(self.hidden, DiskTensors)
        return Stream(DiskTensors(self.hidden.directory) if disk else [], self.arguments)

    def batch_sizes(self) -> list[int]:
        """Sequences in each batch."""
        if isinstance(self.hidden, DiskTensors):
            return [shape[0] for shape in self.hidden.shapes()]
        return [hidden.shape[0] for hidden in self.hidden]

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the activations."""
        self.hidden.clear()


@torch.no_grad()
def start_stream(
    model: torch.nn.Module,
    blocks: Sequence[torch.nn.Module],
    sequences: torch.Tensor,
    batch_size: int | None = None,
    directory: str | os.PathLike[str] | None = None,
) -> Stream:
    """What goes into the first block for token ids [n, length], and every block's other arguments.

    The model itself prepares them: its forward pass runs with the blocks replaced by recorders that hand
    their input on, so that per-block masks and positions are right for any architecture. The activations stay
    in memory or, if `directory` is given, on disk there (`DiskTensors`).
    """
    batch_size = batch_size or max(1, _TOKENS_PER_BATCH // sequences.shape[1])
    stream = Stream([] if directory is None else DiskTensors(directory), [])
    returns_tuple: bool | None = None

    def recorder(block: torch.nn.Module) -> Callable[..., Any]:
        forward = block.forward

        def record(*args: Any, **kwargs: Any) -> Any:
            nonlocal returns_tuple
            hidden, args, kwargs = _split_hidden(args, kwargs)
            if block is blocks[0]:
                stream.hidden.append(hidden)
                stream.arguments.append([])
                if returns_tuple is None:
                    returns_tuple = isinstance(forward(hidden, *args, **kwargs), tuple)
            stream.arguments[-1].append((args, kwargs))
            return (hidden,) if returns_tuple else hidden

        return record

    body = getattr(model, "base_model", model)  # without the output embedding
    for block in blocks:
        block.forward = recorder(block)
    try:
        for ids in sequences.to(next(model.parameters()).device).split(batch_size):
            body(input_ids=ids, use_cache=False)
            _share(stream.arguments)
    finally:
        for block in blocks:
            del block.forward
    return stream


class HessianSums:
    """Sums of X^T X over the calibration inputs of some linears of one block, one for each distinct input.

    Linears that are given the same tensor (q, k and v; gate and up) share a sum; that is seen while the
    block runs. Linears whose names differ in a number alone are one kind, of several experts: one that saw fewer
    tokens than it has inputs is given the H of all its kind.
    """

    def __init__(self, linears: Mapping[str, torch.nn.Linear]) -> None:
        self.linears = linears
        self.leader: dict[str, str] = {}  # linear -> the first linear with the same input
        self.sums: dict[str, np.ndarray] = {}  # leader -> float64 [in, in]
        self.tokens: dict[str, int] = {}
        self.seconds = 0.0  # spent on the sums alone
        self._seen: dict[str, torch.Tensor] = {}  # leader -> its input in this batch
        self._called: list[str] = []  # in this batch
        self._last: str | None = None  # that every batch calls, once

    def gather(self, stream: Stream, index: int, block: torch.nn.Module, outputs: Stream | None = None) -> None:
        """Run `block`, the model's number `index`, on all of `stream` and add up its linears' inputs.

        outputs: an empty stream that takes the block's outputs, if they are wanted.
        """
        self._gather(
            (lambda batch=batch: stream.run(index, block, batch) for batch in range(len(stream.hidden))), outputs
        )

    @torch.no_grad()
    def gather_whole(self, model: torch.nn.Module, sequences: torch.Tensor, batch_size: int) -> None:
        """Run the whole model, up to the last of the linears, on token ids [n, length] and add up their inputs."""
        if len(self.linears) == 1:
            self._last = next(iter(self.linears))
        batches = sequences.to(next(model.parameters()).device).split(batch_size)
        self._gather(lambda ids=ids: model(input_ids=ids, use_cache=False) for ids in batches)

    def _gather(self, runs: Iterable[Callable[[], Any]], outputs: Stream | None = None) -> None:
        hooks = [linear.register_forward_pre_hook(self._hook(name)) for name, linear in self.linears.items()]
        try:
            for run in runs:
                try:
                    output = run()
                    if outputs is not None:
                        outputs.hidden.append(output)
                except _Stop:
                    continue
                else:
                    if outputs is None and len(self._called) == len(self.linears):
                        self._last = self._called[-1]
                finally:
                    self._seen.clear()
                    self._called.clear()
        finally:
            for hook in hooks:
                hook.remove()

    def hessians(self) -> dict[str, Hessian]:
        """Each linear's H = X^T X / n_tokens; the same object for linears that share their input.

        Experts with too few tokens share the H of all their kind; a warning names them. Raises ValueError naming a
        linear whose inputs were NaN, Inf or too large to square, or that saw no input at all, nor did its kind.
        """
        shared: dict[tuple[str, ...], Hessian] = {}
        few = []
        for name in self.linears:
            leaders = self._leaders(name)
            if leaders != (self.leader.get(name),):
                few.append(name)
            if leaders not in shared:
                shared[leaders] = self._hessian(name, leaders)
        if few:
            log.warning(
                "fewer calibration tokens than in_features, H of all experts taken for %d layers: %s",
                len(few),
                ", ".join(few),
            )
        return {name: shared[self._leaders(name)] for name in self.linears}

    def tokens_of(self, name: str) -> int:
        """Tokens that the linear's H is of."""
        return sum(self.tokens[leader] for leader in self._leaders(name))

    def _leaders(self, name: str) -> tuple[str, ...]:
        """The linears whose sums make up H of `name`."""
        own = self.leader.get(name)
        if own is not None and self.tokens[own] >= self.linears[name].in_features:
            return (own,)
        kind = [leader for other, leader in self.leader.items() if kind_of(other) == kind_of(name)]
        return tuple(dict.fromkeys(kind))

    def _hessian(self, name: str, leaders: tuple[str, ...]) -> Hessian:
        if not leaders:
            raise ValueError(f"{name}: the calibration sequences never reach this layer; leave it out or use more")
        with np.errstate(over="ignore"):
            total = functools.reduce(np.add, (self.sums[leader] for leader in leaders))
            H = (total / self.tokens_of(name)).astype(np.float32)
        if not np.isfinite(H.diagonal()).all():
            raise ValueError(f"{name}: NaN or Inf in H of the layer's input activations, expected finite values")
        return Hessian(H)

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(_module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0]
            if not x.numel():  # an expert that no token of this batch goes to
                return
            self._called.append(name)
            if name not in self.leader:
                same = (leader for leader, seen in self._seen.items() if _same_tensor(seen, x))
                self.leader[name] = next(same, name)
            if self.leader[name] == name:
                self._seen[name] = x  # kept alive, so that no other tensor of this batch can have its address
                self._add(name, x)
            elif not _same_tensor(self._seen.get(self.leader[name]), x):
                raise RuntimeError(f"{name} shared the input of {self.leader[name]} in one batch and not in another")
            if name == self._last:
                raise _Stop  # the rest of the block is not needed

        return hook

    def _add(self, name: str, x: torch.Tensor) -> None:
        started = time.perf_counter()
        rows = x.reshape(-1, x.shape[-1]).to("cpu", torch.float32).contiguous()
        if name not in self.sums:
            self.sums[name] = np.zeros((rows.shape[1],) * 2)
            self.tokens[name] = 0
        _core.accumulate_hessian(self.sums[name], rows.numpy())
        self.tokens[name] += rows.shape[0]
        self.seconds += time.perf_counter() - started


def _same_tensor(a: torch.Tensor | None, b: torch.Tensor) -> bool:
    return a is b or (
        a is not None and a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()
    )


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
