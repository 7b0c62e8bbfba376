"""H of a model's linears, gathered once for many runs: `collect_hessians`, and MODEL -> OUT."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import missing

try:
    import torch
except ModuleNotFoundError as error:
    raise missing(error) from error

from .calibrate.sources import SequenceCalibration
from .calibrate.statistics import Statistics, StatisticsWriter
from .config import CalibrationOptions, TuningOptions
from .core.runtime import check_kernels, set_threads
from .distributed import device_of_rank, group
from .errors import int_between, wrong
from .io import data as texts
from .pipeline.collect import Collector, facts_of_model
from .pipeline.placement import Placement
from .recipe import AqlmConfig

__all__ = ["Statistics", "StatisticsRun", "collect_hessians", "statistics_of"]


def collect_hessians(
    model: Any,
    sequences: torch.Tensor,
    out: str | os.PathLike[str],
    *,
    layers: str | None = None,
    device: str | torch.device | None = None,
    batch_size: int | None = None,
    progress: Any = None,
    data: Mapping[str, Any] | None = None,
) -> Statistics:
    """Gather H = X^T X / n_tokens of the linears in the decoder blocks of a transformers model and of its output layer,
    as the model is, and write them to the safetensors file `out`; each H once, float32 [in, in], however many linears
    share it. `quantize_model(..., statistics=out)` takes them from there.

    sequences: token ids [n, length], int64. layers: regular expression, only linears of blocks whose name it finds.
    device, batch_size, progress: as in `quantize_model`. data: what the file is to say of the data beside the tokens'
    SHA-256, as `io.data.provenance` gives it.

    Raises ValueError for a model that cannot be calibrated, for token ids outside of its vocabulary, for NaN or Inf in
    activations, naming the layer, and where several ranks run; OSError where `out` cannot be written, which is then as
    it was.
    """
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"model: got {type(model).__name__}, expected a transformers model, as load_model gives it")
    if group().size > 1:
        raise ValueError(f"ranks: got {group().size}, expected 1: statistics are gathered by one process")
    if batch_size is not None:
        int_between("batch_size", batch_size, 1)
    if not Path(out).absolute().parent.is_dir() or Path(out).is_dir():
        raise wrong("out", str(out), "a file in a directory that exists")
    untuned = TuningOptions(finetune_epochs=0)
    ids = texts.check_sequences(model, sequences, untuned)
    place = Placement(device).find(model)
    shape = {"sequences": len(ids), "sequence_length": ids.shape[1]}
    facts = {
        "model": facts_of_model(model),
        "data": {**(data or {}), "input_ids": texts.tokens_digest(ids), **shape},
        "options": {"layers": layers},
    }
    calibration = SequenceCalibration(ids, AqlmConfig(tuning=untuned), batch_size, place)
    collector = Collector(model, calibration, place, layers, progress)
    collector.run(lambda count: StatisticsWriter(out, count), facts)
    return Statistics(out)


def statistics_of(
    path: str | os.PathLike[str] | Statistics, model: Any, sequences: torch.Tensor | None, config: AqlmConfig
) -> Statistics:
    """The file of a model, and of these sequences if there are some; ValueError, before any work, for one of another
    model, dtype or tokens, and for options that need inputs of layers as they are while the model is quantized.
    """
    found = path if isinstance(path, Statistics) else Statistics(path)
    found.check_model(facts_of_model(model))
    if sequences is not None:
        found.check_tokens(texts.tokens_digest(sequences))
    config.target.check_without_inputs()
    return found


@dataclasses.dataclass
class StatisticsRun:
    """What `aqlm-c hessians` does: MODEL and data -> the file OUT. Fields as in `RunConfig`.

    Raises ValueError naming the field, its value and what was expected.
    """

    model: str
    out: str
    data: list[str]
    drawn: CalibrationOptions
    seed: int = 0
    layers: str | None = None
    threads: int | None = None
    device: str = "auto"
    batch_size: int | None = None
    overwrite: bool = False

    def run(self, progress: Any = None) -> Statistics:
        """Load the model and the data, gather, write."""
        from .hf.models import load_model
        from .pipeline.progress import Progress

        if Path(self.out).exists() and not self.overwrite:
            raise wrong("OUT", self.out, "a file that is not there yet, or --overwrite")
        sources = self.data or [texts.BUNDLED]
        for source in sources:
            texts.check_source(source)
        set_threads(self.threads)
        check_kernels(device_of_rank(self.device))
        progress = progress or Progress()
        progress.on_phase("load")
        model, tokenizer, _ = load_model(self.model, "auto", "cpu", True)
        drawn = self.drawn
        options = (drawn.samples, drawn.sequence_length, drawn.shuffle, self.seed, drawn.bos)
        ids = texts.load_sequences(sources, tokenizer, *options)
        data = texts.provenance(sources, ids, texts.common_start(ids, tokenizer))
        return collect_hessians(
            model,
            ids,
            self.out,
            layers=self.layers,
            device=self.device,
            batch_size=self.batch_size,
            progress=progress,
            data=data,
        )
