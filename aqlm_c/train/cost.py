"""What tuning a whole model takes, in memory and time, before it starts."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from ..config import FinetuneOptions
from ..core.runtime import free_device_memory, synchronize
from ..distributed import group
from ..errors import wrong
from ..files import available_memory
from ..io.checkpoint import quantized_linears
from ..model.logits import slice_bytes
from ..nn.embedding import QuantizedEmbedding
from ..nn.linear import QuantizedLayer
from ..units import binary_size, duration, fastest
from .buffers import bytes_of

_KEPT_CODES = 3  # copies: of the last look, of the best, and of those that are tried against them
_LOGITS = 7  # of the size of a slice's logits in float32, for both models
_PER_FEATURE = 2.5  # values that are kept for gradients, over features of the inputs and outputs of linears
_WORDS = 1.3  # time of a pass over that of its products
# What a GPU moves in a pass, beside products: bytes for each value of a linear's input or output, over its own size,
# and for each logit; for each weight whose codes are trained, in a step. And seconds of a step for each layer whose
# codes are. Measured on an H200, SmolLM2 and 8B.
_MOVED, _MOVED_LOGIT, _MOVED_WEIGHT, _LAYER_SECONDS = 7, 55, 800, 6e-4


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes on the device, seconds, and how they come about. states: of PV-Tuning, `FinetuneOptions.pv_states` but
    never "auto". replays: passes are replayed, as CUDA graphs, which keep their memory.
    """

    bytes: int
    seconds: float
    micro: int
    checkpointing: bool
    limit: int | None
    states: str = "float32"
    replays: bool = False

    def describe(self) -> str:
        """For people."""
        how = "with gradient checkpointing" if self.checkpointing else "without gradient checkpointing"
        free = "" if self.limit is None else f" of {binary_size(self.limit)} free"
        how += ", moments of 8 bits" if self.states == "8bit" else ""
        return (
            f"about {duration(self.seconds)} at most, {binary_size(self.bytes)}{free}: "
            f"{self.micro} sequences in a pass, {how}"
        )


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a model: its quantized linears, weights of these and of all matrices that multiply, features in and out of
    the linears, vocabulary and width of hidden states, blocks, bytes of a value and of all codes, how many codes.
    """

    linears: int
    quantized: int
    code_bytes: int
    codes: int
    multiplied: int
    features: int
    width: int
    layers: int
    vocabulary: int
    itemsize: int

    @classmethod
    def of(cls, model: Any) -> Sizes:
        layers = [layer for _, layer in quantized_linears(model) if not isinstance(layer, QuantizedEmbedding)]
        shapes = [_shape(layer) for layer in layers]
        head = model.get_output_embeddings() or model.get_input_embeddings()
        vocabulary, width = _shape(head) if isinstance(head, QuantizedLayer) else head.weight.shape[:2]
        dense = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
        config = model.config.get_text_config()
        return cls(
            linears=len(shapes),
            quantized=sum(out * n for out, n in shapes),
            code_bytes=sum(layer.codes.nbytes for layer in layers),
            codes=sum(layer.codes.numel() for layer in layers),
            multiplied=sum(out * n for out, n in shapes) + sum(weight.numel() for weight in dense),
            features=sum(out + n for out, n in shapes),
            width=width,
            layers=max(1, getattr(config, "num_hidden_layers", 1)),
            vocabulary=vocabulary,
            itemsize=model.dtype.itemsize,
        )


def _shape(layer: QuantizedLayer) -> tuple[int, int]:
    rows, groups, _ = layer.codes.shape
    return rows * layer.out_group_size, groups * layer.in_group_size


def estimate(
    model: Any, sequences: torch.Tensor, options: FinetuneOptions, device: torch.device, teacher_bytes: int = 0
) -> Estimate:
    """Of a run on `device`, where both models are but for `teacher_bytes` of the original, which come or, if negative,
    go. Raises ValueError, naming batch_size, for fewer sequences in a step than ranks.
    """
    ranks, length = group().size, sequences.shape[1]
    if options.batch_size < ranks:
        raise wrong("batch_size", options.batch_size, f"at least {ranks}, as many as there are ranks")
    sizes = Sizes.of(model)
    most = 16384 if device.type == "cuda" else 2048
    micro = min(options.micro_batch_size or max(1, most // length), -(-options.batch_size // ranks))
    free = free_device_memory(device) if device.type == "cuda" else available_memory()
    free = min(frees) if (frees := [one for one in group().gather(free) if one is not None]) else None
    logits, fixed = _LOGITS * slice_bytes(device), teacher_bytes
    if device.type == "cpu" and options.cache_teacher == "memory":
        fixed += sequences.numel() * sizes.width * sizes.itemsize

    def needed(checkpointing: bool, states: str, replays: bool = False) -> int:
        share = 1 / sizes.layers if checkpointing else 1.0
        kept = sizes.features * _PER_FEATURE * share + sizes.width * sizes.layers
        tuned = dataclasses.replace(options, pv_states=states)
        gradient = (sizes.itemsize if replays else 0) if micro * ranks >= options.batch_size else 4
        codes = _code_bytes(sizes, tuned, gradient, device)
        slices = (2 if replays else 1) * logits  # passes that are not replayed have memory of their own
        return int(fixed + slices + codes + sizes.itemsize * (sizes.quantized * share + micro * length * kept))

    states = "float32" if options.pv_states == "auto" else options.pv_states
    if options.pv and options.pv_states == "auto" and free is not None:
        small = needed(options.gradient_checkpointing != "never", "float32") > 0.8 * free
        states = "8bit" if small else "float32"
    checkpointing = options.gradient_checkpointing == "always"
    if options.gradient_checkpointing == "auto":
        checkpointing = free is not None and needed(False, states) > 0.8 * free
    replays = device.type == "cuda" and not (checkpointing or states == "8bit" or options.shard_original)
    replays = replays and (free is None or needed(False, states, True) < 0.6 * free)
    passes = (5 if checkpointing else 4) * options.steps * options.batch_size / ranks
    looks = options.steps / options.evaluation_interval + 1
    passes += 2 * looks * min(options.most_held_out, options.held_out * len(sequences)) / ranks
    flop = 2.0 * passes * length * (sizes.multiplied + sizes.vocabulary * sizes.width)
    seconds = _WORDS * flop / _speed(model.dtype, device)
    if device.type == "cuda":
        seconds += _moving_seconds(sizes, options, passes * length, device)
    found = needed(checkpointing, states, replays)
    return Estimate(found, seconds, micro, checkpointing, free, states, replays)


def _code_bytes(sizes: Sizes, options: FinetuneOptions, gradient: int, device: torch.device) -> int:
    """Of the index of codes and, where these are trained, of their copies, and of buffers and gradients; gradient: its
    bytes for each weight.
    """
    lean = options.pv and options.pv_states == "8bit"
    index = 4 * sizes.codes if device.type == "cuda" and not lean else 0
    if not options.pv:
        return index
    buffers = sizes.quantized * (bytes_of(options) / group().size + gradient)
    return int(index + buffers) + sizes.code_bytes * (1 if lean else 1 + _KEPT_CODES)


def _moving_seconds(sizes: Sizes, options: FinetuneOptions, positions: float, device: torch.device) -> float:
    """What is not products: of all passes over `positions` and, where codes are trained, of all steps."""
    moved = positions * (_MOVED * sizes.features * sizes.itemsize + _MOVED_LOGIT * sizes.vocabulary)
    if not options.pv:
        return moved / _bandwidth(device)
    moved += options.steps * _MOVED_WEIGHT * sizes.quantized / group().size
    return moved / _bandwidth(device) + options.steps * sizes.linears * _LAYER_SECONDS / group().size


def _bandwidth(device: torch.device) -> float:
    """Bytes/s of a copy, read and written."""
    source = torch.zeros(2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        for _ in range(4):
            target.copy_(source)
        synchronize(device)

    return 8 * source.numel() / fastest(copy)


def _speed(dtype: torch.dtype, device: torch.device) -> float:
    """flop/s of a product of a pass's size."""
    rows, width = (8192, 2048) if device.type == "cuda" else (1024, 512)
    a, b = (torch.ones(n, width, dtype=dtype, device=device) for n in (rows, width))

    def product() -> None:
        torch.matmul(a, b)
        synchronize(device)

    return 2.0 * rows * width * width / fastest(product)
