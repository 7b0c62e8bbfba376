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
from ..files import available_memory, check_free_space, resident_memory, temporary_directory
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
_COPIES, _COPIES_ON_GPU = 8, 4  # of a layer's weight, in fp32, while it is quantized
_FREE = 0.95  # of what is free on a GPU may be used
_SLACK = 1.25  # memory that allocators take over what is asked for (measured: 1.1 and 1.2 times)


@dataclasses.dataclass(frozen=True)
class Rates:
    """Speed of the machine, all threads together; the defaults are those of the run named above.

    product: flop/s of torch in the model's dtype. gemm: flop/s of the C core in fp32. group: seconds to search
    the codes of one group once.
    """

    product: float = 420e9
    gemm: float = 150e9
    group: float = 1.1e-6

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
    fine-tuning takes batch_size at a time (None: a whole step's). itemsize: bytes of a value of the model's dtype.
    heads: attention heads whose scores are kept for the backward pass, 0 where attention is fused. formats: of each of
    the layers; none: that of `config` is all theirs. block_bytes: of the dense block, where it is brought to memory for
    the step; else it is there anyway.
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

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, int]], weights: int | None = None, **fields: Any) -> Work:
        """The work of linears given as name -> (out, in); `fields` are the other fields."""
        inputs = inputs_of(shapes)
        layers = tuple(shapes.values())
        weights = sum(out * n for out, n in layers) if weights is None else weights
        return cls(layers, tuple(inputs), weights, **fields)

    def seconds(self, rates: Rates, resumed: bool = False) -> dict[str, float]:
        """Seconds by the name of the phase; a block that is `resumed` is only run through."""
        config = self.config
        flop = 2 * self.tokens * (self.weights + 2 * self.sequence_length * self.hidden_size)
        forward = _FORWARD * flop / rates.product
        if resumed or not self.layers:
            return {"propagate": forward}
        costs = [get_method(config.solver).cost(layer, (out, n), config.options) for out, n, layer in self._each()]
        solve = sum(cost.flop / rates.gemm + cost.group_searches * rates.group for cost in costs)
        again = sum(cost.flop_again / rates.gemm + cost.group_searches_again * rates.group for cost in costs)
        cubes = _CUBED * sum(n**3 for n in self.inputs) / rates.gemm
        factors = cubes if any(cost.factors for cost in costs) else 0.0
        tuning = config.tuning
        held_out, ahead = tuning.finetune_held_out, tuning.finetune_lookahead
        epoch = ((_BACKWARD + _BACKWARD_AHEAD * ahead) * (1 - held_out) + (1 + ahead) * held_out) * forward
        searched = tuning.finetune_search
        epochs = (1 + searched) * tuning.finetune_epochs
        phases = {
            "calibrate": forward,
            "hessian": _SQUARED * self.tokens * sum(n * n for n in self.inputs) / rates.gemm,
            "quantize": solve + factors,
            "reference": cubes if config.gaussian_reference else 0.0,
            "finetune": ahead * forward + epochs * epoch + searched * again if epochs else 0.0,
            "propagate": forward,
        }
        return {name: seconds for name, seconds in phases.items() if seconds}

    def memory(self, most_hessians: int | None = None, on_gpu: bool = False) -> int:
        """Most bytes this block needs beside the model and the activations between blocks, at any one time.

        most_hessians: bytes that all H together may take, of which one at least is kept.
        """
        tuning_options, item = self.config.tuning, self.itemsize
        width = sum(out + n for out, n in self.layers) or 2 * self.hidden_size
        hessians = bytes_of_hessians(self.inputs)
        if most_hessians is not None:
            hessians = min(hessians, max(most_hessians, bytes_of_hessians([max(self.inputs, default=0)])))
        copies = _COPIES_ON_GPU if on_gpu else _COPIES  # the weight, its error, targets and gradients
        solver = copies * 4 * max(self._sizes(), default=0)
        gather = min(TOKENS_ON_GPU if on_gpu else TOKENS_PER_BATCH, self.tokens) * width * item
        batch = min((self.batch_size or tuning_options.finetune_batch_size) * self.sequence_length, self.tokens)
        kept = (1 + tuning_options.finetune_lookahead) * (3 * width * item + self.heads * self.sequence_length * 6)
        # Decoded weights and their gradients, in fp32 and in the model's dtype; what the backward pass keeps.
        tuning = self.weights * (8 + 2 * item) + batch * kept
        tuning = tuning if tuning_options.finetune_epochs else 0
        if on_gpu and not tuning_options.finetune_search:  # which is when H is kept until then
            return int(_SLACK * max(hessians + max(solver, gather), tuning))
        return int(_SLACK * (hessians + max(solver, gather, tuning)))

    def blocks(self) -> int:
        """Bytes of dense blocks that are brought to memory for this one: itself and those of the lookahead."""
        tuned = self.config.tuning.finetune_epochs > 0 and self.layers
        return self.block_bytes * (1 + (self.config.tuning.finetune_lookahead if tuned else 0))

    def activations(self) -> int:
        """Bytes of the activations between blocks: one copy, and for fine-tuning what its outputs should be."""
        copies = 1
        if self.config.tuning.finetune_epochs:
            copies += 2 if self.config.tuning.finetune_lookahead else 1
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
    step may take together; None: any number.
    """

    memory_bytes: int
    disk_bytes: int
    on_disk: bool
    directory: Path | None
    device_bytes: int = 0
    device_activations: int = 0
    host_activations: int | None = None
    most_hessians: int | None = None


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
    of_work, most_hessians = _work_bytes(works, None if limit is None else limit - held - a_batch, False)
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
    """
    host_limit, asked = limits
    limit = min(int(_FREE * free), free if asked is None else asked)
    ahead = max(work.block_bytes for work in works)  # the next one is read meanwhile
    of_work, most_hessians = _work_bytes(works, limit - ahead, True)
    needed = of_work + ahead
    what = "for a step of the work" if asked is not None and asked == limit else "which is what the GPU has free"
    _check_limit("device_memory_limit", limit, needed, what)
    activations = max(work.activations() for work in works)
    on_device = min(activations, int(_FREE * (limit - needed)))  # what is freed leaves gaps
    held = (resident_memory() if resident is None else resident) + _kept(works)
    _check_limit("memory_limit", host_limit, held, "which the model and its libraries hold")
    if host_limit is not None:
        room: int | None = host_limit - held
    else:
        there = available_memory()
        room = None if there is None else int(_FREE * (there // local_size()))
    on_host = activations - on_device if room is None else min(activations - on_device, room)
    on_disk = activations - on_device - on_host
    directory, disk = _plan_disk(works, on_disk, work_dir, other_bytes, resumed)
    return MemoryPlan(held + on_host, disk, on_disk > 0, directory, needed + on_device, on_device, room, most_hessians)


def _work_bytes(works: Sequence[Work], limit: int | None, on_gpu: bool) -> tuple[int, int | None]:
    """What steps need at most, and what all H of a step may take together so that they fit `limit`, if they can at all;
    None: any number.
    """
    whole = max(work.memory(on_gpu=on_gpu) + work.blocks() for work in works)
    if limit is None or whole <= limit:
        return whole, None
    least = max(work.memory(0, on_gpu) + work.blocks() for work in works)
    most = max(0, int((limit - least) / _SLACK))
    return max(work.memory(most, on_gpu) + work.blocks() for work in works), most


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
    """Where activations and finished blocks are written, and the bytes of these and of the result; OSError (ENOSPC)."""
    stored = sum(work.stored() for work in works)
    unfinished = sum(work.stored() for work in works[resumed:]) if work_dir else 0
    written, directory = unfinished + activations, Path(work_dir or temporary_directory())
    if written:
        check_free_space(directory, written, "finished blocks and activations" if work_dir else "activations")
    return directory, written + stored + other_bytes


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
        self._costs = [work.seconds(rates or Rates(), index < resumed) for index, work in enumerate(works)]
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
