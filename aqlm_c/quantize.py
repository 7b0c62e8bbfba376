"""Quantizes linears and whole models: the verbs of the package."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from .errors import int_between, missing

try:
    import torch
except ModuleNotFoundError as error:
    raise missing(error) from error

from .calibrate.sources import DataFree, SequenceCalibration
from .calibrate.statistics import StoredHessians, TunedStoredHessians
from .core.hessian import Hessian
from .core.verbs import Array
from .distributed import group
from .io.data import check_sequences
from .methods.base import Result
from .nn.linear import QuantizedLinear
from .pipeline.block import quantize_module
from .pipeline.pipeline import Pipeline
from .pipeline.placement import Placement, Placing
from .pipeline.progress import Progress
from .pipeline.resume import begun_batch_size
from .recipe import AqlmConfig
from .report.report import QuantizationReport
from .statistics import Statistics, statistics_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Progress", "quantize_linear", "quantize_model"]


def quantize_linear(
    linear: torch.nn.Linear,
    hessian: Hessian | Array,
    config: AqlmConfig | str,
    dtype: torch.dtype | None = None,
) -> tuple[QuantizedLinear | torch.nn.Linear, Result]:
    """Quantize one linear layer under H (arXiv 2401.06118, section 3).

    `hessian` is H = X^T X / n_tokens [in, in] over its calibration inputs; pass one `Hessian` for all
    linears with the same input. `config`: also the text of a scheme, such as "2x8g8". Codebooks and scales are rounded
    to `dtype`, a 16-bit float: the layer's own if not given, and float16 for a float32 layer. Returns the layer, which
    takes over the bias, and the weight with its error; a method that makes no AQLM checkpoint gives a torch.nn.Linear
    with the weight that its codes decode to. Raises ValueError for a format that does not fit the layer and for NaN or
    Inf.
    """
    if not isinstance(linear, torch.nn.Linear):
        raise ValueError(f"linear: got {type(linear).__name__}, expected a torch.nn.Linear")
    config = AqlmConfig.of(config)
    layer, solved, _ = quantize_module("weight", linear, hessian, config.format, config, dtype)
    assert isinstance(layer, (QuantizedLinear, torch.nn.Linear))
    return layer, solved


def quantize_model(
    model: Any,
    sequences: torch.Tensor | None,
    config: AqlmConfig | str,
    *,
    layers: str | None = None,
    progress: Any = None,
    batch_size: int | None = None,
    work_dir: str | os.PathLike[str] | None = None,
    statistics: str | os.PathLike[str] | Statistics | None = None,
    **placement: Unpack[Placing],
) -> QuantizationReport:
    """Quantize the linears in the decoder blocks of a transformers model, in place, block by block.

    Each block's linears are quantized under H of their inputs in the model as it is by then, quantized up to that
    block; then the block is fine-tuned (`train.block`), unless `finetune_epochs` is 0. The embeddings and the output
    layer are quantized as `config.embeddings` says, to 4 bits where they would be more than a tenth of the quantized
    model. `sequences` holds token ids [n, length], int64; None: without data, each layer is quantized as if all its
    inputs were white, and nothing is fine-tuned. `config`: also the text of a scheme, such as "2x8g8", or an
    `aqlm_c.hf.AqlmConfig` without a dataset. `layers` is a regular expression: only linears whose name it finds.
    `progress`: see `Progress`. `batch_size`: sequences in one forward pass at most; fine-tuning takes no more than
    `finetune_batch_size` and half of them all. `work_dir`: a directory that keeps each finished block; the same call
    with the same directory goes on after the last of them (`pipeline.resume`). `statistics`: a file of
    `collect_hessians`, whose H take the place of those of `sequences`: no layer is then calibrated on what was
    quantized before it; with sequences, which must be those of the file, blocks are fine-tuned on them, without them
    nothing is. `device`: "cpu", "cuda", "cuda:N" or
    "auto"; without it a model is quantized where it is. Blocks of a model that is elsewhere are brought there one after
    another, and come back quantized, so that the device need not hold it; nor need the memory of the host, where the
    model was loaded from safetensors files. `memory_limit`, `device_memory_limit`: bytes, or text such as "8GiB";
    activations are kept on the device, what it does not hold beside its work in host memory, and what that does not
    hold on disk. The layers of a method that makes no AQLM checkpoint (docs/methods.md) stay dense, with the weights
    that its codes decode to, and nothing is fine-tuned; such a model is saved by its own `save_pretrained`. The model
    is left in evaluation mode, where it was, and can be saved with `save_quantized`.

    Raises ValueError, before any work, for a model with adapters or whose quantized checkpoint would not load again
    (`hf.quantizer.check_loads`), for token ids that are too few or outside the vocabulary, for a format that does not
    fit a layer or cannot be searched yet, for NaN or Inf in any parameter, for a `work_dir` of another run or device,
    for a `device` that is not there, for `statistics` of another model, dtype or tokens, and a limit of memory that is
    too small; and later, naming the layer, for NaN or Inf in activations. Raises OSError if `work_dir` cannot be
    written; what is finished in it stays usable.
    """
    from .hf.peft import check_no_adapters
    from .hf.quantizer import attach, check_loads

    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"model: got {type(model).__name__}, expected a transformers model, as load_model gives it")
    config = AqlmConfig.of(config)
    if batch_size is not None:
        int_between("batch_size", batch_size, 1)
    check_no_adapters(model)
    placed = Placement(**placement)
    device = placed.find(model)
    if sequences is not None:
        sequences = check_sequences(model, sequences, config.tuning)
        if batch_size is None and work_dir is not None:  # which another number of ranks may have begun
            batch_size = group().broadcast(begun_batch_size(work_dir) if group().first else None)
    elif work_dir is not None:
        raise ValueError(
            f"work_dir: got {str(work_dir)!r} without sequences, expected None: nothing is kept without data"
        )
    calibration: DataFree | SequenceCalibration
    found = None if statistics is None else statistics_of(statistics, model, sequences, config)
    if sequences is None:
        config = config if found is None else config.replace(finetune_epochs=0)
        calibration = DataFree(device) if found is None else StoredHessians(found, device)
    elif found is None:
        calibration = SequenceCalibration(sequences, config, batch_size, device)
    else:
        calibration = TunedStoredHessians(found, sequences, config, batch_size, device)
    options = {"layers": layers, "progress": progress, "work_dir": work_dir, "placement": placed}
    pipeline = Pipeline(model, config, calibration, **options)
    if config.is_dense:  # any transformers loads it
        return pipeline.run()
    check_loads(model, pipeline.plan.targets(), pipeline.config)
    report = pipeline.run()
    if found is not None:
        report.tokens, report.sequences = found.tokens, found.sequences
    attach(model, pipeline.config)
    return report
