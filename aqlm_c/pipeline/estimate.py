"""What a run will cost, in time, memory and disk: said before the work starts, corrected after every block."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..calibrate.activations import TOKENS_ON_GPU, TOKENS_PER_BATCH
from ..core import arrays, verbs
from ..core.runtime import synchronize
from ..core.verbs import Array
from ..distributed import local_size
from ..files import available_memory, check_free_space, resident_memory, same_disk, temporary_directory
from ..format import Format
from ..methods import get_method
from ..recipe import AqlmConfig
from ..units import binary_size, duration, fastest

if TYPE_CHECKING:
    import torch

# How phases relate to the products that `Rates` counts: fitted to a run of SmolLM2 (64 x 1,024 tokens, 2x8g8, two
# AVX-512 cores), of which they give every phase within a tenth. What they miss elsewhere, `Estimator` learns.
_FORWARD = 1.65  # time of a forward pass over that of its products alone
_BACKWARD = 3.5  # forward and backward pass with decoding, in forward passes
_BACKWARD_AHEAD = 2.2  # of a block of the lookahead, to whose weights no gradient goes
_SQUARED = 1.4  # flop per token and element of H: half of it is computed
_CUBED = 10.0  # flop per in^3: the block factor of H; as much again: its eigenvalues
_DECAY = 0.8  # weight of a block in the corrections, each time another one is finished
_COPIES = 8  # of a layer's weight, in fp32, while it is quantized
_FREE = 0.95  # of what is free on a GPU may be used
_LIBRARIES = 1 << 29  # bytes of host memory that libraries of a GPU take once they are used
_SLACK = 1.25  # memory that allocators take over what is asked for (measured: 1.1 and 1.2 times)
# Of the inputs and outputs of a block's linears, per token: what a forward pass has at once, what the backward pass
# keeps of the block trained (1.13 in transformers' Llama, 1.32 in its Qwen3) and of each ahead (0.85, 0.98), and what
# else it has at once.
_FORWARD_KEEPS, _KEEPS, _KEEPS_AHEAD, _BACKWARD_KEEPS = 1.5, 1.4, 1.0, 0.7
_IN_FLIGHT = 3  # batches of each copy of the activations that are on a GPU while they come and go


@dataclasses.dataclass(frozen=True)
class Rates:
    """Speed of the machine, all threads together; the defaults are those of the run named above.

    product: flop/s of torch in the model's dtype. gemm: flop/s of the C core in fp32. group: seconds to search
    the codes of one group once. factor: flop/s of what is derived from H, which a GPU does in float64; not measured.
    """

    product: float = 420e9
    gemm: float = 150e9
    group: float = 1.1e-6
    factor: float = 150e9

    @classmethod
    def of_kind(cls, device: torch.device) -> Rates:
        """Those of one machine with such a device, the same everywhere; of a GPU: of an H100 at 2x8g8."""
        return cls(product=4e14, gemm=1.1e14, group=4.3e-9, factor=1e13) if device.type == "cuda" else cls()

    @classmethod
    def measure(cls, config: AqlmConfig, dtype: str = "bfloat16", device: torch.device | None = None) -> Rates:
        """The rates on this machine now, for this format and a model of `dtype`; takes about a tenth of a second.

        device: None is the CPU.
        """
        import torch

        place, on_gpu = device or torch.device("cpu"), device is not None and device.type == "cuda"
        rows, width = (8192, 4096) if on_gpu else (1024, 512)  # a GPU is not busy with less
        a, b = (torch.ones(n, width, dtype=getattr(torch, dtype), device=place) for n in (rows, width))
        shape = (rows, width) if on_gpu else (2048, 512)
        numbers = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
        x: Array = torch.from_numpy(numbers).to(place) if on_gpu else numbers
        sums = arrays.zeros(x, shape[1], shape[1])
        like = x if on_gpu else None

        def seconds(call: Callable[[], object]) -> float:
            def finished() -> None:
                call()
                synchronize(device)

            return fastest(finished)

        return cls(
            product=2 * a.numel() * b.shape[1] / seconds(lambda: a @ b),
            gemm=_SQUARED * arrays.size(x) * shape[1] / seconds(lambda: verbs.accumulate_hessian(sums, x)),
            group=get_method(config.solver).seconds_per_group(config.format, config.options, like),
        )


@dataclasses.dataclass(frozen=True)
class Work:
    """One block and the calibration that runs through it, in plain numbers.

    layers: [out, in] of each linear to quantize. inputs: in_features of each distinct input among them, that is of each
    H. weights: of all linears of the block. tokens: of the calibration, in sequences of sequence_length, of which
    batch_size are run at a time (None: a whole step's of fine-tuning). itemsize: bytes of a value of the model's dtype.
    heads: attention heads whose scores are kept for the backward pass, 0 where attention is fused. formats: of each of
    the layers; none: that of `config` is all theirs. block_bytes: of the dense block, where it is brought to memory for
    the step; else it is there anyway. ahead_bytes: then, of a block that is read meanwhile; start_bytes: of all in no
    block, which is there before the calibration starts. width: inputs and outputs of the linears that a token goes to,
    if not of all. comes_first: before the calibration starts.
    """

    layers: tuple[tuple[int, int], ...]
    inputs: tuple[int, ...]
    weights: int
    tokens: int
    sequence_length: int
    hidden_size: int
    config: AqlmConfig
    itemsize: int = 2
    heads: int = 0
    formats: tuple[Format, ...] = ()
    block_bytes: int = 0
    batch_size: int | None = None
    ahead_bytes: int = 0
    start_bytes: int = 0
    width: int | None = None
    comes_first: bool = False

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, int]], weights: int | None = None, **fields: Any) -> Work:
        """The work of linears given as name -> (out, in); `fields` are the other fields."""
        inputs = inputs_of(shapes)
        layers = tuple(shapes.values())
        weights = sum(out * n for out, n in layers) if weights is None else weights
        return cls(layers, tuple(inputs), weights, **fields)

    def seconds(self, rates: Rates, resumed: bool = False, again: bool = False) -> dict[str, float]:
        """Seconds by the name of the phase; a block that is `resumed` is only run through. again: what blocks ahead
        make of the targets is not kept.
        """
        config = self.config
        flop = 2 * self.tokens * (self.weights + 2 * self.sequence_length * self.hidden_size)
        forward = _FORWARD * flop / rates.product
        if resumed or not self.layers:
            return {"propagate": forward}
        costs = [get_method(config.solver).cost(layer, (out, n), config.options) for out, n, layer in self._each()]
        solve = sum(cost.flop / rates.gemm + cost.group_searches * rates.group for cost in costs)
        search = sum(cost.flop_again / rates.gemm + cost.group_searches_again * rates.group for cost in costs)
        cubes = _CUBED * sum(n**3 for n in self.inputs) / rates.gemm
        factors = cubes if any(cost.factors for cost in costs) else 0.0
        tuning = config.tuning
        held_out, ahead = tuning.finetune_held_out, tuning.finetune_lookahead
        epoch = ((_BACKWARD + _BACKWARD_AHEAD * ahead) * (1 - held_out) + (1 + ahead) * held_out) * forward
        searched = tuning.finetune_search
        epochs = (1 + searched) * tuning.finetune_epochs
        passes = epochs + 2 * held_out if again else 1  # and the errors at the start
        squares, remaining = sum(n * n for n in self.inputs), self._remaining()
        turns = len(self.inputs) if config.target.sequential or remaining else 1
        corrects = bool(config.target.error_correction)
        calibrate = turns + 2 * turns * corrects + self._follows()
        again_in_turn = (turns - 1) * (ahead * forward + remaining * epoch)
        phases = {
            "calibrate": (calibrate + _BACKWARD * bool(config.target.fisher_share)) * forward,
            "hessian": (_SQUARED + 2 * corrects) * self.tokens * squares / rates.gemm,
            "quantize": solve + factors,
            "reference": cubes if config.gaussian_reference else 0.0,
            "finetune": ahead * passes * forward + epochs * epoch + searched * search + again_in_turn
            if epochs
            else 0.0,
            "propagate": forward,
        }
        return {name: seconds for name, seconds in phases.items() if seconds}

    def memory(self, most_hessians: int | None = None) -> int:
        """Most bytes of host memory this block needs beside the model and the activations between blocks, at any one
        time, where the CPU computes.

        most_hessians: bytes that all H together may take, of which one at least is kept.
        """
        tuning_options, item, width = self.config.tuning, self.itemsize, self._width()
        hessians = bytes_of_hessians(self.inputs)
        if most_hessians is not None:
            hessians = min(hessians, max(most_hessians, bytes_of_hessians([max(self.inputs, default=0)])))
        solver = _COPIES * 4 * max(self._sizes(), default=0)  # the weight, its error, targets and gradients
        gather = min(TOKENS_PER_BATCH, self.tokens) * width * item
        batch = min((self.batch_size or tuning_options.finetune_batch_size) * self.sequence_length, self.tokens)
        kept = (1 + tuning_options.finetune_lookahead) * (3 * width * item + self.heads * self.sequence_length * 6)
        # Decoded weights and their gradients, in fp32 and in the model's dtype; what the backward pass keeps.
        tuning = self.weights * (8 + 2 * item) + batch * kept
        tuning = tuning + self._remaining_bytes() if tuning_options.finetune_epochs else 0
        crosses = self._cross_bytes(sum(n * n for n in self.inputs))
        return int(_SLACK * (hessians + crosses + self._searched_again() + max(solver, gather, tuning)))

    def device_memory(self, most_hessians: int | None = None) -> int:
        """Most bytes of a GPU's memory that this step takes at any one time, blocks that are brought for it among them,
        beside the activations that are kept there. most_hessians: as in `memory`.

        H: 8 bytes of a sum and 4 of H for each value; beside them the largest one's product while it is summed up
        (twice, fp32), its float64 mean, its factors (two in float64, and damped, feedback), or what a search has of it.
        """
        squares, one = sum(n * n for n in self.inputs), max(self.inputs, default=0) ** 2
        if most_hessians is not None:
            squares = min(squares, max(most_hessians // bytes_of_hessians([1]), one))
        solver = max((_solver_bytes(out, n, layer) for out, n, layer in self._each()), default=0)
        tokens = self.batch_tokens()
        batch = tokens * self.hidden_size * self.itemsize
        passing = _IN_FLIGHT * 2 * batch
        of_token = _FORWARD_KEEPS * self._width() * self.itemsize + self.heads * self.sequence_length * 6
        gather = tokens * of_token + passing
        largest, kept, again = 4 * max(self._sizes(), default=0), 4 * squares, self._searched_again()
        if again:  # all H are kept until then, with their factors
            kept = again + 12 * sum(n * n for n in self.inputs)
        quantize = max(12 * squares + 9 * one, kept + 24 * one + largest, kept + 12 * one + solver)
        tuning = self._tuning() + _IN_FLIGHT * 3 * batch if self.config.tuning.finetune_epochs else 0
        crosses = self._cross_bytes(squares)
        if crosses:  # twice the inputs of linears; what a correction is solved for, in fp64, and its factor
            gather *= 2
            quantize = max(quantize, kept + 24 * one + 6 * largest)
        tuning += self._remaining_bytes()
        most = max(8 * squares + 8 * one + gather, quantize, tuning + (kept if again else 0)) + crosses
        through = self.start_bytes + self.block_bytes + int(_SLACK * gather)  # as the output layer's inputs are found
        return max(self.blocks() + int(_SLACK * most), through) + self.ahead_bytes

    def batch_tokens(self) -> int:
        """Tokens in a pass on a GPU."""
        step = self.config.tuning.finetune_batch_size if self.config.tuning.finetune_epochs else 0
        size = (self.batch_size or step) * self.sequence_length
        return min(size or TOKENS_ON_GPU, self.tokens)

    def batch_bytes(self) -> int:
        """Of the activations of such a pass."""
        return self.batch_tokens() * self.hidden_size * self.itemsize

    def _tuning(self) -> int:
        """Bytes of a GPU's memory in fine-tuning: decoded weights, their gradients and the index of codes; what a batch
        keeps for the backward pass; losses, in fp32, at each output that is compared.
        """
        ahead = self.config.tuning.finetune_lookahead
        index = sum(out * n // layer.in_group_size * layer.num_codebooks * 6 for out, n, layer in self._each())
        kept = (_KEEPS + _KEEPS_AHEAD * ahead + _BACKWARD_KEEPS) * self._width() * self.itemsize
        kept += (1 + ahead) * self.heads * self.sequence_length * 6
        losses = (2 if ahead else 1) * 12 * self.hidden_size
        return int(self.weights * 2 * self.itemsize + index + self.batch_tokens() * (kept + losses))

    def _remaining(self) -> int:
        """Epochs of tuning after each turn of linears."""
        return self.config.target.tune_remaining if self.config.tuning.finetune_epochs else 0

    def _remaining_bytes(self) -> int:
        """Bytes of weights that are tuned before they are quantized: their values, changes, gradients and moments, in
        fp32; and of the block as it was.
        """
        return self.weights * (7 * 4 + self.itemsize) if self._remaining() else 0

    def _follows(self) -> bool:
        """Whether the original's activations are kept too."""
        target = self.config.target
        original = target.finetune_target == "original" and self.config.tuning.finetune_epochs > 0
        return target.error_correction > 0 or original

    def _cross_bytes(self, squares: int) -> int:
        """Bytes of the sums by which weights are corrected, of so many values, and of their means."""
        return 12 * squares if self.config.target.error_correction else 0

    def _searched_again(self) -> int:
        """Bytes of the weights, in fp32, that are kept to search their codes again after fine-tuning."""
        tuning = self.config.tuning
        return 4 * sum(self._sizes()) if tuning.finetune_epochs and tuning.finetune_search else 0

    def _width(self) -> int:
        """Inputs and outputs of the linears that a token goes to."""
        return self.width or sum(out + n for out, n in self.layers) or 2 * self.hidden_size

    def blocks(self) -> int:
        """Bytes of dense blocks that are brought to memory for this one: itself and those of the lookahead."""
        tuned = self.config.tuning.finetune_epochs > 0 and self.layers
        return self.block_bytes * (1 + (self.config.tuning.finetune_lookahead if tuned else 0))

    def activations(self, again: bool = False) -> int:
        """Bytes of the activations between blocks: one copy, one of the original's where these are followed, and for
        fine-tuning what its outputs should be; and what blocks ahead make of that, unless it is made `again` whenever
        it is needed.
        """
        copies = 1
        if self.config.tuning.finetune_epochs:
            copies += 2 if self.config.tuning.finetune_lookahead and not again else 1
        copies += self._follows()
        return copies * self.tokens * self.hidden_size * self.itemsize

    def stored(self) -> int:
        """Bytes on disk of the quantized layers: codes, codebooks and scales."""
        return sum(layer.stored_bytes(out, n) for out, n, layer in self._each())

    def _each(self) -> Iterator[tuple[int, int, Format]]:
        """out, in and format of each layer."""
        formats = self.formats or (self.config.format,) * len(self.layers)
        return ((out, n, layer) for (out, n), layer in zip(self.layers, formats, strict=True))

    def _sizes(self) -> list[int]:
        return [out * n for out, n in self.layers]


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """What a run holds at most, in bytes, and where its activations are.

    directory: of the activations on disk. device_bytes: of a GPU's memory, of which activations may take
    `device_activations`; host_activations: of host memory then, None for any number. most_hessians: what all H of a
    step may take together; None: any number. again: memory has no room for what blocks ahead make of the targets.
    """

    memory_bytes: int
    disk_bytes: int
    on_disk: bool
    directory: Path | None
    device_bytes: int = 0
    device_activations: int = 0
    host_activations: int | None = None
    most_hessians: int | None = None
    again: bool = False


def plan_memory(
    limit: int | None,
    works: Sequence[Work],
    *,
    resident: int | None = None,
    work_dir: str | os.PathLike[str] | None = None,
    other_bytes: int = 0,
    resumed: int = 0,
) -> MemoryPlan:
    """Activations in memory, or on disk where `limit` bytes of memory do not hold them too.

    resident: bytes held already, with the model; what this process holds now if None. work_dir: directory of the
    finished blocks and of activations on disk, which go to the temporary directory without it. other_bytes: of the
    output beside the quantized layers. resumed: so many blocks are in work_dir already.

    Raises ValueError naming memory_limit if it is too small even with activations on disk, and OSError (ENOSPC)
    if the disk has too little space for blocks and activations.
    """
    held = (resident_memory() if resident is None else resident) + _kept(works)
    activations = max(work.activations() for work in works)
    a_batch = int(min(1.0, TOKENS_PER_BATCH / max(1, works[0].tokens)) * activations)
    of_work, most_hessians = _work_bytes(
        works, None if limit is None else limit - held - a_batch, lambda work, most: work.memory(most) + work.blocks()
    )
    blocks = held + of_work
    on_disk = limit is not None and blocks + activations > limit
    memory = blocks + (a_batch if on_disk else activations)
    _check_limit(
        "memory_limit", limit, memory, f"of which the model and its libraries hold {binary_size(held)} already"
    )
    directory, disk = _plan_disk(works, activations if on_disk else 0, work_dir, other_bytes, resumed)
    return MemoryPlan(memory, disk, on_disk, directory if on_disk else None, most_hessians=most_hessians)


def plan_on_device(
    limits: tuple[int | None, int | None],
    works: Sequence[Work],
    free: int,
    *,
    resident: int | None = None,
    work_dir: str | os.PathLike[str] | None = None,
    other_bytes: int = 0,
    resumed: int = 0,
) -> MemoryPlan:
    """`plan_memory` for a GPU of which `free` bytes are free: activations stay there as far as they fit beside the
    work, else in host memory, else on disk. limits: of host memory (None: what is free) and of the GPU's.

    What blocks ahead make of the targets of fine-tuning is kept where memory has room for it, never on disk: to make it
    again takes a forward pass of these blocks.

    Raises ValueError naming device_memory_limit, or device where none was given, and memory_limit; OSError as there.
    """
    host_limit, limit = limits[0], _device_limit(limits[1], free)
    needed, most_hessians = _work_bytes(works, limit, Work.device_memory)
    _check_device(limits[1], limit, needed, works)
    held = (resident_memory() if resident is None else resident) + _kept(works)
    # Pages of the files of a block and of the next one are in memory while they are copied. Measured at 8B, where these
    # were not counted: 1.26 GiB over the limit.
    held += _LIBRARIES + 2 * max((work.block_bytes for work in works), default=0)
    _check_limit("memory_limit", host_limit, held, "which the model and its libraries hold")
    if host_limit is not None:
        room: int | None = host_limit - held
    else:
        there = available_memory()
        room = None if there is None else int(_FREE * (there // local_size()))
    beside = max((work.device_memory(most_hessians) for work in works if not work.comes_first), default=0)
    left = int(_FREE * (limit - beside))  # what is freed leaves gaps
    activations = max(work.activations() for work in works)
    empty = 2 * max(work.batch_bytes() for work in works)  # at most, at the ends of both: no batch is in two places
    in_memory = None if room is None else max(0, left + room - empty)
    again = in_memory is not None and activations > in_memory
    if again:
        activations = max(work.activations(again) for work in works)
    on_device = min(activations, left)
    on_disk = 0 if in_memory is None else max(0, activations - in_memory)
    on_host = activations - on_device - on_disk
    directory, disk = _plan_disk(works, on_disk, work_dir, other_bytes, resumed)
    return MemoryPlan(
        memory_bytes=held + on_host,
        disk_bytes=disk,
        on_disk=on_disk > 0,
        directory=directory if on_disk else None,
        device_bytes=max(needed, beside + on_device),
        device_activations=on_device,
        host_activations=room,
        most_hessians=most_hessians,
        again=again,
    )


def fitting_batch_size(limit: int | None, works: Sequence[Work], free: int, size: int) -> int:
    """Sequences in a pass on a GPU of which `free` bytes are free: `size`, or as few that the work of a step fits what
    it may take, at best with all H at once, for which a block runs once only; 1 where none do. limit: of the GPU's
    memory, if any was given.
    """
    most, sizes = _device_limit(limit, free), [size >> halved for halved in range(size.bit_length())]
    found = {n: [dataclasses.replace(work, batch_size=n) for work in works] for n in sizes}
    for at_once in (None, most):
        for n, works_then in found.items():
            if _work_bytes(works_then, at_once, Work.device_memory)[0] <= most:
                return n
    return 1


def _device_limit(asked: int | None, free: int) -> int:
    """Bytes of a GPU's memory that may be taken."""
    return min(int(_FREE * free), free if asked is None else asked)


def _check_device(asked: int | None, limit: int, needed: int, works: Sequence[Work]) -> None:
    """Refuse what a GPU does not hold, by the name of what is too small."""
    batch = max(work.batch_tokens() for work in works)
    what = f"for a step of the work on batches of {batch} tokens"
    if asked is not None and asked <= limit:
        _check_limit("device_memory_limit", limit, needed, what)
    else:
        _check_limit("device", limit, needed, f"{what}, of the GPU's memory that is free")


def _work_bytes(
    works: Sequence[Work], limit: int | None, memory: Callable[[Work, int | None], int]
) -> tuple[int, int | None]:
    """What steps need at most, and what all H of a step may take together so that they fit `limit`, if they can at all;
    None: any number. memory: what a step needs under such a number.
    """
    whole = max(memory(work, None) for work in works)
    if limit is None or whole <= limit:
        return whole, None
    least = max(memory(work, 0) for work in works)
    most = max(0, int((limit - least) / _SLACK))
    return max(memory(work, most) for work in works), most


def _kept(works: Sequence[Work]) -> int:
    """Bytes of quantized layers that come to the model's: where blocks are brought, no dense ones go for them."""
    return sum(work.stored() for work in works) if any(work.block_bytes for work in works) else 0


def _check_limit(name: str, limit: int | None, needed: int, what: str) -> None:
    if limit is not None and needed > limit:
        raise ValueError(
            f"{name}: got {limit} ({binary_size(limit)}), expected at least {needed} ({binary_size(needed)}), {what}; "
            "shorter sequences or a smaller batch_size need less"
        )


def _plan_disk(
    works: Sequence[Work], activations: int, work_dir: str | os.PathLike[str] | None, other_bytes: int, resumed: int
) -> tuple[Path, int]:
    """Where activations and finished blocks are written, and the bytes of these and of the result; OSError (ENOSPC).

    Other ranks on this machine keep their activations too, on the same disk but for a work directory's, which the first
    rank alone has.
    """
    stored = sum(work.stored() for work in works)
    unfinished = sum(work.stored() for work in works[resumed:]) if work_dir else 0
    written, directory = unfinished + activations, Path(work_dir or temporary_directory())
    if written:
        others = activations * (local_size() - 1) if same_disk(directory, temporary_directory()) else 0
        check_free_space(directory, written + others, "finished blocks and activations" if work_dir else "activations")
    return directory, written + stored + other_bytes


def _solver_bytes(out: int, n: int, layer: Format) -> int:
    """Of a GPU's memory, for a layer that is quantized: the weight in fp32, two products or an error of its size with
    parts of one; codes, best, found and worked on; the groups of each code, as they are sorted (csrc/cuda/quantizer).
    """
    groups, K = out * n // layer.in_group_size, layer.num_codebooks
    return 12 * out * n + groups * (4 * K + 14) + 3 * 2 * groups * K + 4 * out * 512


def bytes_of_hessians(inputs: Iterable[int]) -> int:
    """Of H of inputs of these sizes, with what is derived from them."""
    return sum(n * n for n in inputs) * (8 + 4 + 4 + 4)  # the sum; H, damped and factored


def groups_of(shapes: Mapping[str, tuple[int, int]], most_hessians: int | None) -> list[list[str]]:
    """Names of layers, given with (out, in), in groups whose H take no more than `most_hessians` bytes together; those
    of one module, which may share an input, are in one.
    """
    if most_hessians is None or bytes_of_hessians(inputs_of(shapes)) <= most_hessians:
        return [list(shapes)]
    parents: dict[str, dict[str, tuple[int, int]]] = {}
    for name, shape in shapes.items():
        parents.setdefault(name.rpartition(".")[0], {})[name] = shape
    groups: list[list[str]] = []
    left = -1
    for layers in parents.values():
        needed = bytes_of_hessians(inputs_of(layers))
        if needed > left:
            groups.append([])
            left = most_hessians
        groups[-1] += layers
        left -= needed
    return groups


def inputs_of(shapes: Mapping[str, tuple[int, int]]) -> list[int]:
    """in_features of each distinct input of layers given as name -> (out, in).

    Which share an input shows only when the block runs: until then the last linear of a module (o_proj, down_proj) is
    taken to have its own, the others to share by in_features.
    """
    parents: dict[str, list[int]] = {}
    for name, (_, in_features) in shapes.items():
        parents.setdefault(name.rpartition(".")[0], []).append(in_features)
    return [n for sizes in parents.values() for n in (*sorted(set(sizes[:-1])), sizes[-1])]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """seconds_total counts from the start to the end, seconds_left from now; memory and disk are peaks in bytes."""

    seconds_total: float
    seconds_left: float
    memory_bytes: int
    disk_bytes: int
    n_blocks: int
    done: int
    device_bytes: int = 0

    def describe(self) -> str:
        """One line, such as "about 32 min, 1.4 GiB of memory, 0.1 GiB on disk"."""
        span = duration(self.seconds_total)
        if self.done:
            span = f"{duration(self.seconds_left)} left of {span}"
        device = f", {binary_size(self.device_bytes)} on the GPU" if self.device_bytes else ""
        return (
            f"about {span}, {binary_size(self.memory_bytes)} of memory{device}, {binary_size(self.disk_bytes)} on disk"
        )


class Estimator:
    """Estimates of one run over blocks, from the work in each, the rates of the machine and the blocks finished.

    What each phase took, over what it was predicted to take, corrects the prediction of the blocks left; later
    blocks weigh more. resumed: so many blocks at the start are finished already and only run through.
    """

    def __init__(
        self,
        works: Sequence[Work],
        plan: MemoryPlan | None = None,
        rates: Rates | None = None,
        *,
        resumed: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        again = plan is not None and plan.again
        self._costs = [work.seconds(rates or Rates(), index < resumed, again) for index, work in enumerate(works)]
        self._plan = plan
        self._clock = clock
        self._observed: dict[str, float] = {}
        self._predicted: dict[str, float] = {}
        self._phases: dict[str, float] = {}
        self._done = 0
        self._started = self._block_started = clock()

    def start(self, phases: Mapping[str, float] | None = None) -> None:
        """Count from now; `phases`: see `finish_block`."""
        self._started = self._block_started = self._clock()
        self._phases = dict(phases or {})

    def finish_block(self, index: int, phases: Mapping[str, float] | None = None, *, alike: bool = True) -> None:
        """Block `index` is finished, and all before it. alike: false for one that says nothing about the others.

        phases: seconds by phase since the start of the run, as in `QuantizationReport.phases`, phases by the names
        of `Work.seconds`; without it, each phase is taken to be off by as much as the whole block.
        """
        now = self._clock()
        elapsed, cost = now - self._block_started, self._costs[index]
        whole = sum(cost.values())
        if phases is None or len(cost) == 1:
            spent = {name: elapsed * seconds / (whole or 1.0) for name, seconds in cost.items()}
        else:
            spent = {name: phases.get(name, 0.0) - self._phases.get(name, 0.0) for name in cost}
            spent["other"] = elapsed - sum(spent.values())  # such as saving: goes by the whole of the work
        self._phases = dict(phases or {})
        for name, seconds in spent.items() if alike else ():
            self._observed[name] = _DECAY * self._observed.get(name, 0.0) + seconds
            self._predicted[name] = _DECAY * self._predicted.get(name, 0.0) + cost.get(name, whole)
        self._done, self._block_started = index + 1, now

    def estimate(self) -> Estimate:
        """What is known by now."""
        now = self._clock()
        left = [self._corrected(cost) for cost in self._costs[self._done :]]
        if left:
            left[0] = max(0.0, left[0] - (now - self._block_started))
        plan = self._plan
        return Estimate(
            seconds_total=now - self._started + sum(left),
            seconds_left=sum(left),
            memory_bytes=plan.memory_bytes if plan else 0,
            disk_bytes=plan.disk_bytes if plan else 0,
            n_blocks=len(self._costs),
            done=self._done,
            device_bytes=plan.device_bytes if plan else 0,
        )

    def _corrected(self, cost: Mapping[str, float]) -> float:
        known = sum(seconds * self._ratio(name, 1.0) for name, seconds in cost.items())
        return max(0.0, known + self._ratio("other", 0.0) * sum(cost.values()))

    def _ratio(self, phase: str, unknown: float) -> float:
        predicted = self._predicted.get(phase, 0.0)
        return self._observed[phase] / predicted if predicted > 0 else unknown
