"""Quantizing a dense model while `from_pretrained` loads it: the half of `AqlmConfig` that no file keeps."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..calibrate.sources import DataFree, SequenceCalibration
from ..errors import wrong
from ..format import Format
from ..io.data import check_sequences, check_source, common_start, load_sequences, provenance, source_names
from ..pipeline.pipeline import Pipeline
from ..pipeline.placement import Placement
from ..recipe import FIELDS, SIZE_FIELDS, AqlmConfig, RunConfig, check_names, option_types
from ..report.report import QuantizationReport

_DATA = (
    "tokenizer",
    "samples",
    "sequence_length",
    "shuffle",
    "bos",
    "work_dir",
    "memory_limit",
    "device_memory_limit",
)  # what a data set is for
_NOT_HERE = {"model", "out", "data", "threads", "overwrite", "options", *SIZE_FIELDS}
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class OnTheFly:
    """What to quantize a model to, how and on what data.

    Attributes:
        config: the `aqlm_c.AqlmConfig`.
        dataset: sources as `load_sequences` takes them, token ids int64 [n, length], or None: without data, each
            layer is quantized as if all its inputs were white.
        tokenizer: for the sources; None: the model's own.

    Raises:
        ValueError: an unknown option (with the nearest one), a value that is out of range, a file that is not there.
    """

    def __init__(
        self,
        scheme: str,
        dataset: str | Sequence[str] | torch.Tensor | None = None,
        tokenizer: Any = None,
        **options: Any,
    ) -> None:
        known = {"dataset", "tokenizer", "method", *FIELDS, *option_types()} - _NOT_HERE
        check_names(options, dict.fromkeys(sorted(known)))
        run = RunConfig.from_fields({"model": "-", "out": "-", "scheme": scheme, **options}).resolve()
        self.config, self._calibration, self._run = run
        self.config.check_searchable()
        if self.config.is_dense:
            raise wrong("solver", self.config.solver, "one that makes AQLM codes; quantize_model runs this one")
        self._device: str | None = options.get("device")  # else where the model is
        self.tokenizer = tokenizer
        self._start: str | None = None  # of all sequences, once they are drawn
        self.dataset: list[str] | torch.Tensor | None = None
        if dataset is None:
            given = {"tokenizer": tokenizer, **options}
            if needless := [name for name in _DATA if given.get(name) is not None]:
                raise wrong(needless[0], given[needless[0]], "a dataset beside it")
        elif isinstance(dataset, (torch.Tensor, np.ndarray)):
            self.dataset = torch.as_tensor(dataset)
        else:
            self.dataset = source_names("dataset", dataset)
            if not self.dataset:
                raise wrong("dataset", dataset, "a source or a list of them, token ids [n, length] or None")
            for source in self.dataset:
                check_source(source)

    def sequences(self, model: Any) -> torch.Tensor | None:
        """The calibration sequences, int64 [n, length], for a model that may have no weights yet.

        Raises ValueError for a model that cannot be quantized and for data that is too short or not the model's.
        """
        if model.dtype not in _DTYPES:
            raise ValueError(f"dtype: got {model.dtype}, expected one of {', '.join(map(str, _DTYPES))}")
        with torch.device("cpu"):  # around us may be the meta device
            if self.dataset is None:
                return None
            sequences = self.dataset
            if not isinstance(sequences, torch.Tensor):
                drawn, tokenizer = self._calibration, self._tokenizer(model)
                options = (drawn.samples, drawn.sequence_length, drawn.shuffle, self.config.seed, drawn.bos)
                sequences = load_sequences(sequences, tokenizer, *options)
                self._start = common_start(sequences, tokenizer)
            return check_sequences(model, sequences, self.config.tuning)

    def quantize(
        self, model: Any, sequences: torch.Tensor | None, check: Callable[[Any, Mapping[str, Format], Any], None]
    ) -> tuple[QuantizationReport, AqlmConfig]:
        """Quantize the loaded model in place; the report, and the config with all its formats settled. check: of model,
        formats of its layers and config, before the work.
        """
        check_device_map({name: parameter.device for name, parameter in model.named_parameters()})
        options = {name: self._run[name] for name in ("layers", "work_dir")}
        limits = {name: self._run[name] for name in ("memory_limit", "device_memory_limit")}
        placed = Placement(self._device, **limits)
        calibration: DataFree | SequenceCalibration = DataFree(placed.find(model))
        if sequences is not None:
            calibration = SequenceCalibration(sequences, self.config, device=placed.find(model))
        pipeline = Pipeline(model, self.config, calibration, **options, placement=placed)
        check(model, pipeline.plan.targets(), pipeline.config)
        report = pipeline.run()
        if sequences is not None:
            sources = self.dataset if isinstance(self.dataset, list) else ["token ids"]
            report.data = provenance(sources, sequences, self._start)
        return report, pipeline.config

    def _tokenizer(self, model: Any) -> Any:
        if self.tokenizer is not None:
            return self.tokenizer
        from transformers import AutoTokenizer

        name = model.config.name_or_path
        try:
            return AutoTokenizer.from_pretrained(name, trust_remote_code=False, local_files_only=os.path.isdir(name))
        except Exception as error:  # of many types
            raise ValueError(
                f"tokenizer: got None, expected one, since none could be loaded from {name!r}: {error}"
            ) from error


def check_device_map(device_map: Any) -> None:
    """Raise ValueError unless all places in a device map are the CPU; names such as "auto" may yet be."""
    places = device_map.values() if isinstance(device_map, dict) else ()
    if elsewhere := sorted({str(place) for place in places} - {"cpu"}):
        raise ValueError(f"device_map: got {elsewhere[0]}, expected cpu for all, where a model is quantized on the fly")
