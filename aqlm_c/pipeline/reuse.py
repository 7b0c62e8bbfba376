"""Results of single layers that runs with the same statistics share: a layer that no option changes is found once."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..calibrate.sources import Calibration
from ..calibrate.statistics import StoredHessians, TunedStoredHessians
from ..core import arrays
from ..core.runtime import kind_of_device
from ..errors import one_line
from ..format import Format
from ..methods.base import DenseWeight, QuantizedWeight, Result
from ..recipe import AqlmConfig
from ..report.layers import LayerReport
from ..versions import versions

log = logging.getLogger("aqlm_c")


class LayerStore:
    """A directory with a safetensors file for each result, by the SHA-256 of what it depends on: statistics (and so
    the model), layer, format, method with its options, seed, dtype, kind of device, versions. Several processes may
    use it at once.
    """

    def __init__(self, directory: str | os.PathLike[str], statistics: str, device: torch.device) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.found = 0  # layers that were taken from it
        self._common = {"statistics": statistics, "device": kind_of_device(device), "versions": versions()}

    @classmethod
    def of(cls, calibration: Calibration, config: AqlmConfig, device: torch.device) -> LayerStore | None:
        """That of a calibration's statistics; None where there is none, and where codes are searched again after
        tuning, which asks for more than results.
        """
        if not isinstance(calibration, (StoredHessians, TunedStoredHessians)) or config.tuning.finetune_search:
            return None
        statistics = calibration.statistics
        return None if statistics.store is None else cls(statistics.store, statistics.digest, device)

    def path(self, name: str, dtype: str, format: Format, config: AqlmConfig) -> Path:
        """Of a layer's file, whether it is there or not."""
        fields: dict[str, Any] = {
            **self._common,
            "layer": name,
            "dtype": dtype,
            "format": format.to_dict(),
            "solver": config.solver,
            "options": dataclasses.asdict(config.options),
            "seed": config.seed,
            "gaussian_reference": config.gaussian_reference,
        }
        digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
        return self.directory / f"{digest}.safetensors"

    def load(self, path: Path, device: torch.device) -> tuple[Result, LayerReport] | None:
        """A layer's weight and report; None where there is no file, and, with a warning, where it is damaged."""
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as stored:
                tensors = {part: stored.get_tensor(part).clone().to(device) for part in stored.keys()}  # noqa: SIM118
                facts = json.loads(stored.metadata()["aqlm_c"])
            report = LayerReport.from_dict(facts["report"])
            weight = _weight(tensors, report, **{name: facts[name] for name in ("dtype", "relative_error")})
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            log.warning("%s: damaged (%s), the layer is quantized again", path, one_line(error))
            return None
        self.found += 1
        return weight, report

    def save(self, path: Path, weight: Result, report: Mapping[str, Any]) -> None:
        """Keep a layer; nothing happens where that cannot be written, but for a warning."""
        temporary = path.with_name(f".{path.stem}.{os.getpid()}.new")
        facts = {"report": dict(report), "dtype": weight.dtype, "relative_error": weight.relative_error}
        tensors = {
            part: torch.as_tensor(array).detach().cpu().contiguous().clone() for part, array in weight.tensors().items()
        }
        try:
            save_file(tensors, temporary, {"aqlm_c": json.dumps(facts)})
            os.replace(temporary, path)
        except (SafetensorError, OSError) as error:
            log.warning("%s: not kept: %s", path, one_line(error))
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _weight(tensors: Mapping[str, torch.Tensor], report: LayerReport, dtype: str, relative_error: float) -> Result:
    parts = {part: arrays.of_tensor(tensor) for part, tensor in tensors.items()}
    if "weight" in parts:
        return DenseWeight(parts["weight"], dtype, report.bits_per_weight, relative_error, {}, [])
    return QuantizedWeight(parts["codes"], parts["codebooks"], parts["scales"], dtype, relative_error, {}, [])
