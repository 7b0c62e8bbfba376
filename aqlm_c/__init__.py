"""aqlm_c: AQLM quantization (arXiv 2401.06118) of language models to about 2 bits per weight, in C.

The names below are loaded on first use, so that importing the package costs neither torch nor transformers.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import missing
from .versions import __version__

_HOMES = {
    "AqlmConfig": "recipe",
    "Format": "format",
    "Hessian": "weights",
    "QuantizedWeight": "weights",
    "quantize_weight": "weights",
    "QuantizedLinear": "nn.linear",
    "quantize_linear": "quantize",
    "quantize_model": "quantize",
    "collect_hessians": "statistics",
    "sweep": "sweeps.study",
    "choose_schemes": "allocation.choose",
    "Allocation": "report.allocation",
    "finetune_model": "finetune",
    "FinetuneOptions": "config",
    "FinetuneReport": "report.finetune",
    "join_linears": "nn.grouped",
    "save_quantized": "io.checkpoint",
    "push_to_hub": "hf.card",
    "load_model": "hf.models",
    "load_sequences": "io.data",
    "token_stream": "io.data",
    "perplexity": "evaluate",
    "divergence": "evaluate",
    "evaluate_models": "evaluate",
    "Evaluation": "report.evaluation",
    "LayerReport": "report.layers",
    "QuantizationReport": "report.report",
    "PRESETS": "recipe",
    "RunConfig": "recipe",
}

__all__ = [*_HOMES, "__version__"]

if TYPE_CHECKING:  # what type checkers and editors read
    from .allocation.choose import choose_schemes as choose_schemes
    from .config import FinetuneOptions as FinetuneOptions
    from .evaluate import divergence as divergence
    from .evaluate import evaluate_models as evaluate_models
    from .evaluate import perplexity as perplexity
    from .finetune import finetune_model as finetune_model
    from .format import Format as Format
    from .hf.card import push_to_hub as push_to_hub
    from .hf.models import load_model as load_model
    from .io.checkpoint import save_quantized as save_quantized
    from .io.data import load_sequences as load_sequences
    from .io.data import token_stream as token_stream
    from .nn.grouped import join_linears as join_linears
    from .nn.linear import QuantizedLinear as QuantizedLinear
    from .quantize import quantize_linear as quantize_linear
    from .quantize import quantize_model as quantize_model
    from .recipe import PRESETS as PRESETS
    from .recipe import AqlmConfig as AqlmConfig
    from .recipe import RunConfig as RunConfig
    from .report.allocation import Allocation as Allocation
    from .report.evaluation import Evaluation as Evaluation
    from .report.finetune import FinetuneReport as FinetuneReport
    from .report.layers import LayerReport as LayerReport
    from .report.report import QuantizationReport as QuantizationReport
    from .statistics import collect_hessians as collect_hessians
    from .sweeps.study import sweep as sweep
    from .weights import Hessian as Hessian
    from .weights import QuantizedWeight as QuantizedWeight
    from .weights import quantize_weight as quantize_weight

logging.getLogger(__name__).addHandler(logging.NullHandler())  # the program decides what is shown


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    except ModuleNotFoundError as error:
        raise missing(error) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
