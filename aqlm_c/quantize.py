"""Quantizes weights, linears and whole models: the verbs of the package."""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from . import _core, calibration
from .config import AqlmConfig
from .data import check_token_ids
from .linear import QuantizedLinear
from .report import LayerReport, QuantizationReport, peak_memory
from .solver import Hessian, QuantizedWeight, quantize_weight

__all__ = ["Hessian", "Progress", "QuantizedWeight", "quantize_linear", "quantize_model", "quantize_weight"]

log = logging.getLogger("aqlm_c")


class Progress:
    """What `quantize_model` tells while it works; this one says nothing."""

    def on_start(self, n_blocks: int, n_layers: int) -> None: ...
    def on_block(self, index: int, name: str) -> None: ...
    def on_phase(self, name: str) -> None: ...
    def on_layer(self, report: LayerReport) -> None: ...
    def on_finish(self, report: QuantizationReport) -> None: ...


def quantize_linear(
    linear: torch.nn.Linear,
    hessian: Hessian | np.ndarray | torch.Tensor,
    config: AqlmConfig,
    dtype: torch.dtype | None = None,
) -> tuple[QuantizedLinear, QuantizedWeight]:
    """Quantize one linear layer under H (arXiv 2401.06118, section 3).

    `hessian` is H = X^T X / n_tokens [in, in] over its calibration inputs; pass one `Hessian` for all
    linears with the same input. Codebooks and scales are rounded to `dtype`, a 16-bit float: the layer's
    own if not given, and float16 for a float32 layer. Returns the layer, which takes over the bias, and the
    weight with its error. Raises ValueError for a format that does not fit the layer and for NaN or Inf.
    """
    dtype = dtype or disk_dtype(linear.weight.dtype)
    quantized = quantize_weight(linear.weight, hessian, config, dtype=str(dtype).removeprefix("torch."))
    return QuantizedLinear.from_quantized_weight(quantized, linear.bias, dtype), quantized


def quantize_model(
    model: Any,
    sequences: torch.Tensor,
    config: AqlmConfig,
    *,
    layers: str | None = None,
    progress: Any = None,
    batch_size: int | None = None,
) -> QuantizationReport:
    """Quantize the linears in the decoder blocks of a transformers model, in place, block by block.

    Each block's linears are quantized under H of their inputs in the model as it is by then, quantized up
    to that block; the embeddings and the output layer stay. `sequences` holds token ids [n, length], int64.
    `layers` is a regular expression: only linears whose name it finds. `progress`: see `Progress`.
    `batch_size`: sequences in one forward pass. The model is left in evaluation mode and can be saved with
    `save_quantized`.

    Raises ValueError, before any work, for token ids that are too few or outside the vocabulary, for a
    format that does not fit a layer or cannot be searched yet and for NaN or Inf in any parameter; and
    later, naming the layer, for NaN or Inf in activations.
    """
    progress = progress or Progress()
    phases = _Phases(progress)
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise ValueError("model: is quantized already, expected an unquantized model")
    sequences = _check_sequences(model, sequences)
    prefix, blocks = calibration.find_blocks(model)
    targets = [_select(f"{prefix}.{index}", block, layers) for index, block in enumerate(blocks)]
    _check_targets(model, targets, config, layers)

    n_blocks = 1 + max(index for index, linears in enumerate(targets) if linears)  # nothing to do in later ones

    reports: list[LayerReport] = []
    model.eval()
    progress.on_start(n_blocks, sum(map(len, targets)))
    with phases("calibrate"):
        stream = calibration.start_stream(model, blocks, sequences, batch_size)
    for index, block in enumerate(blocks[:n_blocks]):
        progress.on_block(index, f"{prefix}.{index}")
        linears, targets[index] = targets[index], {}  # so that the dense weights go with the block
        quantized = _quantize_block(index, block, linears, stream, config, phases, reports)
        with phases("propagate"):
            if index + 1 < n_blocks:
                _decode_into(linears, quantized)  # a dense product in the model's dtype is the fastest here
                stream.advance(index, block)
            for name, layer in quantized.items():
                model.set_submodule(name, layer)

    from .hf.quantizer import attach

    attach(model, config)
    report = QuantizationReport(
        layers=reports,
        phases=phases.seconds,
        tokens=sequences.numel(),
        sequences=len(sequences),
        peak_memory_bytes=peak_memory(),
        config=config.to_dict(),
        model=getattr(model.config, "_name_or_path", ""),
        threads=_core.get_num_threads(),
        isa=_core.get_isa(),
    )
    progress.on_finish(report)
    return report


def _quantize_block(
    index: int,
    block: torch.nn.Module,
    linears: dict[str, torch.nn.Linear],
    stream: calibration.Stream,
    config: AqlmConfig,
    phases: _Phases,
    reports: list[LayerReport],
) -> dict[str, QuantizedLinear]:
    """Quantize `linears` of `block` for the inputs that `stream` gives them; adds to `reports`."""
    if not linears:
        return {}
    with phases("calibrate"):
        sums = calibration.HessianSums(linears)
        sums.gather(stream, index, block)
        hessians = sums.hessians()
    phases.move("calibrate", "hessian", sums.seconds)
    layers = {}
    for name, linear in linears.items():
        with phases("quantize"):
            started = time.perf_counter()
            try:
                layers[name], solved = quantize_linear(linear, hessians[name], config)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            seconds = time.perf_counter() - started
        with phases("reference"):
            reports.append(_layer_report(name, linear, hessians[name], config, solved, seconds))
        phases.progress.on_layer(reports[-1])
    return layers


def disk_dtype(dtype: torch.dtype) -> torch.dtype:
    """The 16-bit float in which codebooks and scales of a layer of `dtype` are stored."""
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float16


class _Phases:
    """Seconds by phase."""

    def __init__(self, progress: Any) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(
            ("calibrate", "hessian", "quantize", "reference", "propagate"), 0.0
        )
        self.progress = progress
        self._shown = ""

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if name not in (self._shown, "reference"):
            self._shown = name
            self.progress.on_phase(name)
        started = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - started

    def move(self, source: str, target: str, seconds: float) -> None:
        self.seconds[source] -= seconds
        self.seconds[target] += seconds


def _check_sequences(model: Any, sequences: torch.Tensor) -> torch.Tensor:
    sequences = torch.as_tensor(sequences)
    if sequences.ndim != 2 or sequences.is_floating_point() or not sequences.numel():
        raise ValueError(
            f"sequences: {sequences.dtype} {list(sequences.shape)}, expected token ids [n, length], at least one"
        )
    check_token_ids("sequences", sequences, model)
    return sequences.long()


def _select(prefix: str, block: torch.nn.Module, layers: str | None) -> dict[str, torch.nn.Linear]:
    """The linears of a block to quantize, by their name in the model."""
    try:
        pattern = re.compile(layers or "")
    except re.error as error:
        raise ValueError(f"layers={layers!r}: expected a regular expression: {error}") from None
    named = ((f"{prefix}.{name}", module) for name, module in block.named_modules())
    return {name: module for name, module in named if isinstance(module, torch.nn.Linear) and pattern.search(name)}


def _check_targets(
    model: torch.nn.Module, targets: list[dict[str, torch.nn.Linear]], config: AqlmConfig, layers: str | None
) -> None:
    config.check_searchable()
    if not any(targets):
        raise ValueError(f"layers={layers!r}: matches no linear layer, expected names such as 'mlp.up_proj'")
    for name, linear in (item for block in targets for item in block.items()):
        config.check_layer(name, linear.out_features, linear.in_features)
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(f"{name}: NaN or Inf, expected finite values")


def _layer_report(
    name: str,
    linear: torch.nn.Linear,
    hessian: Hessian,
    config: AqlmConfig,
    quantized: QuantizedWeight,
    seconds: float,
) -> LayerReport:
    """The layer's error beside that of Gaussian weights under the same H by reverse water-filling."""
    weight = np.ascontiguousarray(linear.weight.detach().to("cpu", torch.float32).numpy())
    bits = config.bits_per_weight(*weight.shape)
    # What Gaussian weights of this mean square have for tr(W H W^T), over what these weights have.
    gaussian_signal = float(np.square(weight, dtype=np.float64).mean()) * weight.shape[0] * float(np.trace(hessian.H))
    signal = _core.quantization_error(weight, hessian.H)
    code_rate, true_rate = (
        _core.gaussian_reference(hessian.eigenvalues, rate) * gaussian_signal / signal if signal > 0 else None
        for rate in (config.code_bits_per_weight(), bits)
    )
    return LayerReport(
        name=name,
        out_features=weight.shape[0],
        in_features=weight.shape[1],
        scheme=config.scheme,
        relative_error=quantized.relative_error,
        gaussian_code_rate=code_rate,
        gaussian_true_rate=true_rate,
        bits_per_weight=bits,
        seconds=seconds,
    )


@torch.no_grad()
def _decode_into(linears: dict[str, torch.nn.Linear], quantized: dict[str, QuantizedLinear]) -> None:
    for name, linear in linears.items():
        linear.weight.copy_(quantized[name].dequantize(linear.weight.dtype).weight)
