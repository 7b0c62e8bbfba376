"""Quantizing a dense model while `from_pretrained` loads it: the half of `AqlmConfig` that no file keeps."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..calibration import find_blocks
from ..config import AqlmConfig
from ..data import check_source, load_sequences, provenance
from ..report import QuantizationReport
from ..run import FIELDS, RunConfig, check_names
from ..solver import Hessian

_DATA = ("tokenizer", "samples", "sequence_length", "shuffle", "work_dir", "memory_limit")  # what a data set is for
_OPTIONS = {"dataset", "tokenizer", *FIELDS} - {"model", "out", "data", "threads", "overwrite"}
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class OnTheFly:
    """What to quantize a model to, how and on what data.

    Attributes:
        config: the core `AqlmConfig`.
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
        check_names(options, dict.fromkeys(sorted(_OPTIONS)))
        self.config, self._run = RunConfig(model="-", out="-", scheme=scheme, **options).resolve()
        self.config.check_searchable()
        self.tokenizer = tokenizer
        self.dataset: list[str] | torch.Tensor | None = None
        if dataset is None:
            given = {"tokenizer": tokenizer, **options}
            if needless := [name for name in _DATA if given.get(name) is not None]:
                raise ValueError(f"{needless[0]}={given[needless[0]]!r}: expected a dataset beside it")
        elif isinstance(dataset, (torch.Tensor, np.ndarray)):
            self.dataset = torch.as_tensor(dataset)
        else:
            sources = [dataset] if _is_source(dataset) else dataset
            if not (isinstance(sources, (list, tuple)) and sources and all(map(_is_source, sources))):
                raise ValueError(
                    f"dataset={dataset!r}: expected a source or a list of them, token ids [n, length] or None"
                )
            self.dataset = list(map(os.fspath, sources))
            for source in self.dataset:
                check_source(source)

    def sequences(self, model: Any) -> torch.Tensor | None:
        """The calibration sequences, int64 [n, length], for a model that may have no weights yet.

        Raises ValueError for a model that cannot be quantized and for data that is too short or not the model's.
        """
        from ..quantize import _check_sequences

        if model.dtype not in _DTYPES:
            raise ValueError(f"dtype={model.dtype}: expected one of {', '.join(map(str, _DTYPES))}")
        with torch.device("cpu"):  # around us may be the meta device
            if self.dataset is None:
                return None
            sequences = self.dataset
            if not isinstance(sequences, torch.Tensor):
                names = ("samples", "sequence_length", "shuffle")
                sequences = load_sequences(
                    self.dataset, self._tokenizer(model), *map(self._run.get, names), self.config.seed
                )
            return _check_sequences(model, sequences, self.config)

    def quantize(self, model: Any, sequences: torch.Tensor | None) -> None:
        """Quantize the loaded model in place; it is then as one that was loaded quantized.

        Its `hf_quantizer.report` is the report.
        """
        from ..quantize import quantize_model

        check_device_map({name: parameter.device for name, parameter in model.named_parameters()})
        layers = self._run["layers"]
        if sequences is None:
            report = quantize_data_free(model, self.config, layers=layers)
        else:
            limits = {name: self._run[name] for name in ("work_dir", "memory_limit")}
            report = quantize_model(model, sequences, self.config, layers=layers, **limits)
            report.data = provenance(self.dataset if isinstance(self.dataset, list) else ["token ids"], sequences)
        model.hf_quantizer.report = report

    def _tokenizer(self, model: Any) -> Any:
        if self.tokenizer is not None:
            return self.tokenizer
        from transformers import AutoTokenizer

        name = model.config.name_or_path
        try:
            return AutoTokenizer.from_pretrained(name, trust_remote_code=False, local_files_only=os.path.isdir(name))
        except Exception as error:  # of many types
            raise ValueError(f"tokenizer=None: expected one, none could be loaded from {name!r}: {error}") from error


def quantize_data_free(model: Any, config: AqlmConfig, layers: str | None = None) -> QuantizationReport:
    """`quantize_model` without data: each layer's H is the identity, and nothing is fine-tuned.

    Errors in the report are those of the weights alone, ||W - Wq||^2 / ||W||^2.
    """
    from .. import quantize
    from . import experts
    from .ends import find_ends, tie
    from .quantizer import attach

    experts.unfuse(model)
    prefix, blocks = find_blocks(model)
    ends = find_ends(model)
    targets = {name: model.get_submodule(name) for name in ends.quantized(config)}
    for index, block in enumerate(blocks):
        targets |= quantize._select(f"{prefix}.{index}", block, layers, config)
    quantize._check_targets(model, [targets], config, layers, ends)
    phases = quantize._Phases(quantize.Progress())
    report = QuantizationReport(config=config.to_dict(), model=model.config.name_or_path, phases=phases.seconds)
    white: dict[int, Hessian] = {}  # by in_features
    for name in list(targets):
        module = targets.pop(name)  # so that the dense weight goes with it
        in_features = module.weight.shape[1]
        if in_features not in white:
            white[in_features] = Hessian(np.eye(in_features, dtype=np.float32))
        part = ends.config(name, config)
        layer, layer_report = quantize._quantize_layer(name, module, white[in_features], part, phases)
        model.set_submodule(name, layer)
        report.layers.append(layer_report)
        if ends.tied and name == ends.embedding:
            tie(model, ends)
    experts.fuse(model)  # if none was quantized
    attach(model, config)
    return report


def _is_source(source: Any) -> bool:
    return isinstance(source, (str, os.PathLike))


def check_device_map(device_map: Any) -> None:
    """Raise ValueError unless all places in a device map are the CPU; names such as "auto" may yet be."""
    places = device_map.values() if isinstance(device_map, dict) else ()
    if elsewhere := sorted({str(place) for place in places} - {"cpu"}):
        raise ValueError(f"device_map: {elsewhere[0]}, expected cpu for all, where a model is quantized on the fly")
