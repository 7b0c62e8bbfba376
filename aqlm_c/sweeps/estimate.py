"""What a sweep will take, before any of it: `aqlm-c sweep --dry-run`."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from ..calibrate.sources import DataFree, SequenceCalibration
from ..core.runtime import set_threads
from ..model.blocks import find_blocks
from ..pipeline.pipeline import Pipeline
from ..pipeline.placement import Placement
from ..units import duration, megabytes
from .rows import read_rows
from .space import Space
from .worker import Bench, sharing_copy

_ASKED = 8  # points whose time is estimated
_GATHERED = ("calibrate", "hessian", "propagate")


@dataclasses.dataclass
class SweepEstimate:
    """trials: in all, of which done have a row by now. seconds: of one trial on average, and of its evaluation;
    statistics: sets of tokens, and seconds for each. bytes: of what will be kept on disk, of `free` ones.
    """

    trials: int
    done: int
    trial_seconds: float
    evaluation_seconds: float
    statistics: int
    statistics_seconds: float
    bytes: int
    free: int
    workers: int = 1

    @property
    def seconds(self) -> float:
        """Of all that is left, on as many workers."""
        left = max(0, self.trials - self.done)
        once = self.statistics * self.statistics_seconds if left else 0.0
        return once + left * (self.trial_seconds + self.evaluation_seconds) / self.workers

    def lines(self) -> list[str]:
        """For people."""
        workers = f" by {self.workers} workers" if self.workers > 1 else ""
        found = [
            f"trials: {self.trials}, {self.done} of them done",
            f"time: about {duration(self.seconds)}{workers}: {duration(self.trial_seconds)} to quantize and "
            f"{duration(self.evaluation_seconds)} to evaluate each",
            f"disk: about {megabytes(self.bytes)} of {megabytes(self.free)} free",
        ]
        if self.statistics:
            sets = "1 set" if self.statistics == 1 else f"{self.statistics} sets"
            once = f"{sets} of tokens, {duration(self.statistics_seconds)} each, shared by all trials"
            found.insert(2, f"statistics: {once}")
        return found

    def to_dict(self) -> dict[str, Any]:
        """All fields and `seconds`, ready for JSON."""
        return {**dataclasses.asdict(self), "seconds": self.seconds}


def estimate(
    space: Space, out: Path, workers: int = 1, device: str = "auto", threads: int | None = None
) -> SweepEstimate:
    """What `sweep` would take: a few points are planned, two windows are run, and nothing is written.

    Raises ValueError as `sweep` does.
    """
    set_threads(threads)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(dataclasses.replace(space, texts={}), Path(scratch), device, threads)
        points = space.samples(_ASKED)
        seconds, layer_bytes, model_bytes = 0.0, 0, 0
        tokens: dict[tuple[Any, ...], tuple[float, int]] = {}
        for point in points:
            found = _of_point(bench, point, tokens)
            seconds, layer_bytes, model_bytes = seconds + found[0], layer_bytes + found[1], model_bytes + found[2]
        evaluation = _evaluation_seconds(bench, space)
    rows = out / "rows"
    done = sum(row.get("foreign") is None for row in read_rows(rows)) if rows.is_dir() else 0
    kept = {"none": 0, "best": 1, "all": space.count}[space.keep] * model_bytes // len(points)
    layers = space.count * layer_bytes // len(points) if space.statistics and "seconds" not in space.objectives else 0
    files = list(tokens.values()) if space.statistics else []
    at = out.absolute()
    while not at.exists():
        at = at.parent
    return SweepEstimate(
        trials=space.count,
        done=done,
        trial_seconds=seconds / len(points),
        evaluation_seconds=evaluation,
        statistics=len(files),
        statistics_seconds=sum(one[0] for one in files) / max(1, len(files)),
        bytes=kept + layers + sum(one[1] for one in files),
        free=shutil.disk_usage(at).free,
        workers=workers,
    )


def _of_point(
    bench: Bench, point: dict[str, Any], tokens: dict[tuple[Any, ...], tuple[float, int]]
) -> tuple[float, int, int]:
    """Seconds of a trial, bytes of its quantized layers and of its model; tokens: told of the statistics it needs."""
    config = bench.config(point, "out")
    shares = bench.space.statistics
    if shares:
        config = dataclasses.replace(config, statistics="file")
    resolved = config.resolve()
    drawn = resolved.calibration
    placement = Placement(bench.device)
    place = placement.find(bench.original)
    ids = torch.zeros(drawn.samples, drawn.sequence_length, dtype=torch.long)
    key = (tuple(config.data), *dataclasses.astuple(drawn), resolved.config.seed if drawn.shuffle else 0)
    tuned = resolved.config.tuning.finetune_epochs > 0
    calibration: Any = SequenceCalibration(ids, resolved.config, config.batch_size, place)
    if shares and key not in tokens:
        plain = resolved.config.replace(finetune_epochs=0)
        of_tokens = SequenceCalibration(ids, plain, config.batch_size, place)
        pipeline = Pipeline(sharing_copy(bench.original), plain, of_tokens, layers=bench.layers, placement=placement)
        seconds = sum(value for phase, value in pipeline.expected().items() if phase in _GATHERED)
        tokens[key] = seconds, _statistics_bytes(bench, pipeline)
    if shares and not tuned:
        calibration = DataFree(place)
    model = sharing_copy(bench.original)
    pipeline = Pipeline(model, resolved.config, calibration, layers=config.layers, placement=placement)
    expected = pipeline.expected()
    seconds = sum(value for phase, value in expected.items() if not (shares and phase == "hessian"))
    quantized = dense = 0
    for name, format in pipeline.plan.targets().items():
        weight = model.get_submodule(name).weight
        quantized += round(format.bits_per_weight(*weight.shape) * weight.numel() / 8)
        dense += weight.nbytes
    whole = sum(parameter.nbytes for parameter in model.parameters())
    return seconds, quantized, whole - dense + quantized


def _statistics_bytes(bench: Bench, pipeline: Pipeline) -> int:
    """Of a file of H: what the first block has of different inputs, for all blocks, and the output layer's."""
    _, blocks = find_blocks(bench.original)
    steps = [step for step in pipeline.plan.steps if step.index is not None and step.targets]
    linears = {name: bench.original.get_submodule(name) for name in steps[0].targets}
    seen: dict[int, int] = {}

    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        seen[x.data_ptr()] = x.shape[-1]
        kept.append(x)  # so that no other has its address

    kept: list[Any] = []
    handles = [linear.register_forward_pre_hook(hook, with_kwargs=True) for linear in linears.values()]
    try:
        with torch.no_grad():
            bench.original(input_ids=torch.zeros(1, 2, dtype=torch.long, device=bench.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    head = blocks.width**2 if bench.layers is None else 0
    return 4 * (len(steps) * sum(width**2 for width in seen.values()) + head)


@torch.no_grad()
def _evaluation_seconds(bench: Bench, space: Space) -> float:
    """Of all texts of one model: a window is run, and its time taken as often as there are windows."""
    from ..io import data as texts

    chosen, windows = space.evaluation, 0
    for source in space.texts.values():
        texts.check_source(source)
        limit = chosen.windows and chosen.windows * chosen.sequence_length
        n = len(texts.token_stream(source, bench.tokenizer, limit)) // chosen.sequence_length
        windows += min(n, chosen.windows or n)
    if not windows:
        return 0.0
    ids = torch.zeros(1, chosen.sequence_length, dtype=torch.long, device=bench.device)
    started = time.perf_counter()
    float(bench.original(input_ids=ids, use_cache=False).logits.float().log_softmax(-1).sum())
    return windows * (time.perf_counter() - started)
