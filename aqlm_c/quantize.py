"""Quantizes weights, linears and whole models: the verbs of the package."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import re
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from . import _core, calibration
from .checkpoint import quantized_linears
from .config import AqlmConfig, int_between
from .data import check_token_ids
from .diagnose import diagnose
from .estimate import Estimate, Estimator, Rates, Work, plan_memory
from .finetune.block import finetune_block
from .linear import QuantizedEmbedding, QuantizedLayer, QuantizedLinear
from .report import BlockReport, LayerReport, QuantizationReport, peak_memory
from .resume import WorkDir, block_state, fingerprint, restore_block
from .run import parse_size
from .solver import Hessian, QuantizedWeight, quantize_weight

if TYPE_CHECKING:
    from .hf.ends import Ends

__all__ = ["Hessian", "Progress", "QuantizedWeight", "quantize_linear", "quantize_model", "quantize_weight"]

log = logging.getLogger("aqlm_c")


class Progress:
    """What `quantize_model` tells while it works; this one says nothing."""

    def on_start(self, n_blocks: int, n_layers: int) -> None: ...
    def on_resume(self, n_finished_blocks: int) -> None: ...
    def on_estimate(self, estimate: Estimate) -> None: ...
    def on_block(self, index: int, name: str) -> None: ...
    def on_phase(self, name: str) -> None: ...
    def on_layer(self, report: LayerReport) -> None: ...
    def on_block_report(self, report: BlockReport) -> None: ...
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
    return _quantize(linear, hessian, config, dtype)


def _quantize(
    module: torch.nn.Linear | torch.nn.Embedding, hessian: Any, config: AqlmConfig, dtype: torch.dtype | None = None
) -> tuple[QuantizedLayer, QuantizedWeight]:
    dtype = dtype or disk_dtype(module.weight.dtype)
    solved = quantize_weight(module.weight, hessian, config, dtype=str(dtype).removeprefix("torch."))
    kind = QuantizedEmbedding if isinstance(module, torch.nn.Embedding) else QuantizedLinear
    return kind.from_quantized_weight(solved, module, dtype), solved


def quantize_model(
    model: Any,
    sequences: torch.Tensor,
    config: AqlmConfig,
    *,
    layers: str | None = None,
    progress: Any = None,
    batch_size: int | None = None,
    work_dir: str | os.PathLike[str] | None = None,
    memory_limit: int | str | None = None,
) -> QuantizationReport:
    """Quantize the linears in the decoder blocks of a transformers model, in place, block by block.

    Each block's linears are quantized under H of their inputs in the model as it is by then, quantized up
    to that block; then the block is fine-tuned (`finetune.block`), unless `finetune_epochs` is 0. The embeddings
    and the output layer stay. `sequences` holds token ids [n, length], int64. `layers` is a regular expression:
    only linears whose name it finds. `progress`: see `Progress`. `batch_size`: sequences in one forward pass at
    most; fine-tuning takes no more than `finetune_batch_size` and half of them all.
    `work_dir`: a directory that keeps each finished block; the same call with the same directory goes on after
    the last of them (`resume`). `memory_limit`: bytes, or text such as "8GiB"; where the activations would not fit
    too, they are kept on disk. The model is left in evaluation mode and can be saved with `save_quantized`.

    Raises ValueError, before any work, for token ids that are too few or outside the vocabulary, for a
    format that does not fit a layer or cannot be searched yet, for NaN or Inf in any parameter, for a `work_dir`
    of another run and a `memory_limit` that is too small; and later, naming the layer, for NaN or Inf in
    activations. Raises OSError if `work_dir` cannot be written; what is finished in it stays usable.
    """
    from .hf import experts
    from .hf.ends import find_ends, tie
    from .hf.quantizer import attach

    progress = progress or Progress()
    phases = _Phases(progress)
    if batch_size is not None:
        int_between("batch_size", batch_size, 1)
    if memory_limit is not None:
        memory_limit = parse_size("memory_limit", memory_limit)
    device = next(model.parameters()).device
    if device.type != "cpu":
        raise ValueError(f"model: on {device}, expected cpu, where its weights are quantized")
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise ValueError("model: is quantized already, expected an unquantized model")
    sequences = _check_sequences(model, sequences, config)
    experts.unfuse(model)
    prefix, blocks = calibration.find_blocks(model)
    targets = [_select(f"{prefix}.{index}", block, layers, config) for index, block in enumerate(blocks)]
    ends = find_ends(model)
    end_targets = {name: model.get_submodule(name) for name in ends.quantized(config)}
    _check_targets(model, [*targets, end_targets], config, layers, ends)
    n_blocks = 1 + max((index for index, linears in enumerate(targets) if linears), default=-1)  # none later
    dtype = model.dtype  # before its first parameters are codebooks
    first = 1 if end_targets else 0  # the ends are done before the blocks, as their number 0
    batch_size = calibration.batch_size(sequences, config, batch_size)

    report = QuantizationReport(
        tokens=sequences.numel(),
        sequences=len(sequences),
        config=config.to_dict(),
        model=getattr(model.config, "_name_or_path", ""),
        threads=_core.get_num_threads(),
        isa=_core.get_isa(),
        phases=phases.seconds,
    )
    model.eval()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_without_gradients(model))
        saved = None
        if work_dir is not None:
            run = fingerprint(model, sequences, config, layers, batch_size=batch_size)
            saved = stack.enter_context(WorkDir.open(work_dir, run))
        finished = saved.finished if saved else 0
        works = [
            _work(
                *(model, [blocks[index]], {name: config.for_layer(name) for name in targets[index]}, sequences, config),
                lookahead=len(blocks) - 1 - index,
            )
            for index in range(n_blocks)
        ]
        if end_targets:
            untuned = dataclasses.replace(config, finetune_epochs=0)
            formats = {name: ends.config(name, config) for name in end_targets}
            works.insert(0, _work(model, blocks, formats, sequences, untuned))
        dense = sum(linear.weight.nbytes for linears in (*targets, end_targets) for linear in linears.values())
        kept = sum(parameter.nbytes for parameter in model.parameters()) - dense
        plan = plan_memory(memory_limit, works, work_dir=work_dir, other_bytes=kept, resumed=finished)
        rates = Rates.measure(config, str(dtype).removeprefix("torch."))
        estimator = Estimator(works, plan, rates, resumed=finished)
        progress.on_start(len(works), sum(map(len, targets)) + len(end_targets))
        if finished:
            progress.on_resume(finished)
        progress.on_estimate(estimator.estimate())
        estimator.start(phases.seconds)

        def finish(number: int, reports: dict[str, list[dict[str, Any]]]) -> None:
            report.layers += map(LayerReport.from_dict, reports["layers"])
            report.blocks += map(BlockReport.from_dict, reports["blocks"])
            estimator.finish_block(number, phases.seconds, alike=number >= first)
            progress.on_estimate(estimator.estimate())

        if end_targets:
            progress.on_block(0, ", ".join(end_targets))
            if finished:
                tensors, reports = saved.load_block(0)
                restore_block(model, tensors, lambda name: ends.config(name, config))
            else:
                reports = _quantize_ends(model, ends, end_targets, sequences, batch_size, config, phases)
                if saved:
                    saved.save_block(0, block_state(model, quantized_only=True), reports)
            if ends.tied:
                tie(model, ends)
            finish(0, reports)
        with phases("calibrate"):
            stream = calibration.start_stream(model, blocks, _mixed(sequences, config), batch_size, plan.directory)
        stack.enter_context(stream)
        if not end_targets:
            estimator.start(phases.seconds)
        for index, block in enumerate(blocks[:n_blocks]):
            name, number = f"{prefix}.{index}", first + index
            progress.on_block(number, name)
            linears, targets[index] = targets[index], {}  # so that the dense weights go with the block
            if number < finished:
                tensors, reports = saved.load_block(number)
                restore_block(block, tensors, lambda part, name=name: config.for_layer(f"{name}.{part}"))
            else:
                reports = _quantize_block(name, index, blocks, linears, stream, config, phases, dtype)
                if saved:
                    saved.save_block(number, block_state(block) if linears else {}, reports)
            del linears
            if index + 1 < n_blocks:
                with phases("propagate"), _dense(block, dtype):
                    stream.advance(index, block)
            finish(number, reports)

    experts.fuse(model)  # if none was quantized
    attach(model, config)
    report.peak_memory_bytes = peak_memory()
    report.diagnoses = diagnose(report)
    progress.on_finish(report)
    return report


def _quantize_block(
    block_name: str,
    index: int,
    blocks: Sequence[torch.nn.Module],
    linears: dict[str, torch.nn.Linear],
    stream: calibration.Stream,
    config: AqlmConfig,
    phases: _Phases,
    dtype: torch.dtype,
) -> dict[str, list[dict[str, Any]]]:
    """Quantize `linears`, by their names in the model, of `blocks[index]` for the inputs that `stream` gives them.

    dtype: the model's. Returns the reports of its layers and, after fine-tuning, of the block, as JSON can hold them.
    """
    reports: dict[str, list[dict[str, Any]]] = {"layers": [], "blocks": []}
    if not linears:
        return reports
    block, progress = blocks[index], phases.progress
    tunes = config.finetune_epochs > 0

    def search(name: str, *state: torch.Tensor) -> torch.Tensor:
        name = f"{block_name}.{name}"
        return _search_codes(linears[name], hessians[name], config.for_layer(name), *state)

    with stream.empty() as targets:
        with phases("calibrate"):
            sums = calibration.HessianSums(linears)
            sums.gather(stream, index, block, targets if tunes else None)
            hessians = sums.hessians()
        phases.move("calibrate", "hessian", sums.seconds)
        for name, linear in linears.items():
            part = config.for_layer(name)
            layer, layer_report = _quantize_layer(name, linear, hessians[name], part, phases)
            block.set_submodule(name.removeprefix(f"{block_name}."), layer)
            layer_report.tokens = sums.tokens_of(name)
            reports["layers"].append(layer_report.to_dict())
            progress.on_layer(layer_report)
        if tunes:
            with phases("finetune"), _dense(block, dtype) as quantized:
                tuned = finetune_block(block_name, index, blocks, quantized, stream, targets, config, search)
            reports["blocks"].append(tuned.to_dict())
            progress.on_block_report(tuned)
    return reports


def _quantize_layer(
    name: str, module: torch.nn.Linear | torch.nn.Embedding, hessian: Hessian, config: AqlmConfig, phases: _Phases
) -> tuple[QuantizedLayer, LayerReport]:
    """The quantized layer of a linear or an embedding, and its report."""
    with phases("quantize"):
        started = time.perf_counter()
        try:
            layer, solved = _quantize(module, hessian, config)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        seconds = time.perf_counter() - started
    with phases("reference"):
        return layer, _layer_report(name, module, hessian, config, solved, seconds)


def _quantize_ends(
    model: Any,
    ends: Ends,
    targets: dict[str, torch.nn.Linear | torch.nn.Embedding],
    sequences: torch.Tensor,
    batch_size: int,
    config: AqlmConfig,
    phases: _Phases,
) -> dict[str, list[dict[str, Any]]]:
    """Quantize input embedding and output layer, in place; their reports.

    H of the output layer is that of its inputs in the model as it is. An embedding's rows are looked up, not
    multiplied: its H is the identity, and half of it where it is the output layer too.
    """
    reports: dict[str, list[dict[str, Any]]] = {"layers": [], "blocks": []}
    hessian = None
    if ends.head in targets or ends.tied:
        with phases("calibrate"):
            sums = calibration.HessianSums({ends.head: model.get_submodule(ends.head)})
            sums.gather_whole(model, sequences, batch_size)
            hessian = sums.hessians()[ends.head]
        phases.move("calibrate", "hessian", sums.seconds)
    for name, module in targets.items():
        H = hessian
        if name == ends.embedding:
            identity = np.eye(module.embedding_dim, dtype=np.float32)
            H = Hessian(identity if not ends.tied else (identity + hessian.H / hessian.H.diagonal().mean()) / 2)
        layer, report = _quantize_layer(name, module, H, ends.config(name, config), phases)
        report.tokens = sequences.numel()
        model.set_submodule(name, layer)
        reports["layers"].append(report.to_dict())
        phases.progress.on_layer(report)
    return reports


def _search_codes(
    linear: torch.nn.Linear,
    hessian: Hessian,
    config: AqlmConfig,
    codes: torch.Tensor,
    codebooks: torch.Tensor,
    scales: torch.Tensor,
) -> torch.Tensor:
    """Codes of `linear` after one more sweep under other codebooks and scales, all as in QuantizedLinear."""
    weight = np.ascontiguousarray(linear.weight.detach().to("cpu", torch.float32).numpy())
    nbits = config.nbits_per_codebook
    found = _core.search_sweep(
        _core.unpack_codes(codes.cpu().numpy(), nbits),
        weight,
        hessian.damped(config.relative_damp),
        codebooks.squeeze(2).cpu().numpy(),
        scales.flatten().cpu().numpy(),
        config.search_beam_size,
        config.seed,
        config.search_pairs,
    )
    return torch.from_numpy(_core.pack_codes(found, nbits)).to(codes.device)


@contextlib.contextmanager
def _dense(block: torch.nn.Module, dtype: torch.dtype) -> Iterator[dict[str, QuantizedLinear]]:
    """The block with dense linears of `dtype` in place of the quantized, which are given by their names in it.

    For runs over the calibration sequences: a dense product is the fastest there.
    """
    quantized = dict(quantized_linears(block))
    try:
        for name, layer in quantized.items():
            block.set_submodule(name, layer.dequantize(dtype))
        block.requires_grad_(False)
        yield quantized
    finally:
        for name, layer in quantized.items():
            block.set_submodule(name, layer)


@contextlib.contextmanager
def _without_gradients(model: torch.nn.Module) -> Iterator[None]:
    """No parameter of `model` asks for a gradient."""
    asked = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.requires_grad_(False)
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():  # some are others by now
            if name in asked:
                parameter.requires_grad_()


def disk_dtype(dtype: torch.dtype) -> torch.dtype:
    """The 16-bit float in which codebooks and scales of a layer of `dtype` are stored."""
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float16


class _Phases:
    """Seconds by phase."""

    def __init__(self, progress: Any) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(
            ("calibrate", "hessian", "quantize", "reference", "finetune", "propagate"), 0.0
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


def _check_sequences(model: Any, sequences: torch.Tensor, config: AqlmConfig) -> torch.Tensor:
    sequences = torch.as_tensor(sequences)
    if sequences.ndim != 2 or sequences.is_floating_point() or not sequences.numel():
        raise ValueError(
            f"sequences: {sequences.dtype} {list(sequences.shape)}, expected token ids [n, length], at least one"
        )
    if config.finetune_epochs and len(sequences) < 2:
        raise ValueError("sequences: 1, expected at least 2: fine-tuning trains on some and validates on others")
    check_token_ids("sequences", sequences, model)
    return sequences.long()


def _mixed(sequences: torch.Tensor, config: AqlmConfig) -> torch.Tensor:
    """The sequences in an order that puts every source into every batch, for fine-tuning."""
    if not config.finetune_epochs:
        return sequences
    return sequences[torch.randperm(len(sequences), generator=torch.Generator().manual_seed(config.seed))]


def _select(prefix: str, block: torch.nn.Module, layers: str | None, config: AqlmConfig) -> dict[str, torch.nn.Linear]:
    """The linears of a block to quantize, by their name in the model: all but routers and what is to stay dense."""
    try:
        pattern = re.compile(layers or "")
    except re.error as error:
        raise ValueError(f"layers={layers!r}: expected a regular expression: {error}") from None
    routers = calibration.routers(block)
    named = ((f"{prefix}.{name}", module) for name, module in block.named_modules() if name not in routers)
    return {
        name: module
        for name, module in named
        if isinstance(module, torch.nn.Linear) and pattern.search(name) and config.for_layer(name)
    }


def _check_targets(
    model: torch.nn.Module,
    targets: list[dict[str, torch.nn.Module]],
    config: AqlmConfig,
    layers: str | None,
    ends: Ends,
) -> None:
    config.check_searchable()
    _check_rules(model, config, ends)
    if not any(targets):
        given = f"layers={layers!r}" + (f" and rules={config.rules!r}" if config.rules else "")
        raise ValueError(f"{given}: matches no linear layer to quantize, expected names such as 'mlp.up_proj'")
    for name, module in (item for block in targets for item in block.items()):
        ends.config(name, config).check_layer(name, *module.weight.shape)
        if isinstance(module, torch.nn.Embedding):
            QuantizedEmbedding.check(name, module)
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(f"{name}: NaN or Inf, expected finite values")


def _check_rules(model: torch.nn.Module, config: AqlmConfig, ends: Ends) -> None:
    """Raise ValueError for a rule that decides nothing: no layer that can be quantized has it as its first."""
    if not config.rules:
        return
    prefix, blocks = calibration.find_blocks(model)
    free = dataclasses.replace(config, rules=None)
    names = [name for index, block in enumerate(blocks) for name in _select(f"{prefix}.{index}", block, None, free)]
    names += filter(None, ends[:2])
    for rule in config.rules:
        found = [name for name in names if re.search(rule, name)]
        first = {next(other for other in config.rules if re.search(other, name)) for name in found}
        if not found:
            raise ValueError(f"rules: {rule!r}: matches no layer, expected a part of names such as {names[0]!r}")
        if rule not in first:
            raise ValueError(f"rules: {rule!r}: expected before {min(first)!r}, which matches all its layers first")


def _work(
    model: Any,
    modules: Sequence[torch.nn.Module],
    targets: dict[str, AqlmConfig],
    sequences: torch.Tensor,
    config: AqlmConfig,
    lookahead: int = 0,
) -> Work:
    """The work of quantizing `targets`, layers of `model` by name, while the calibration runs through `modules`."""
    text = model.config.get_text_config()
    fused = getattr(model.config, "_attn_implementation", None) != "eager"
    linears = (part for module in modules for part in module.modules() if isinstance(part, torch.nn.Linear))
    return Work.from_shapes(
        {name: tuple(model.get_submodule(name).weight.shape) for name in targets},
        sum(linear.weight.numel() for linear in linears),
        tokens=sequences.numel(),
        sequence_length=sequences.shape[1],
        hidden_size=text.hidden_size,
        config=dataclasses.replace(config, finetune_lookahead=min(config.finetune_lookahead, lookahead)),
        itemsize=model.dtype.itemsize,
        heads=0 if fused else getattr(text, "num_attention_heads", 0),
        formats=tuple(targets.values()),
    )


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
