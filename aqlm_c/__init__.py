"""aqlm_c: AQLM quantization (arXiv 2401.06118) of language models to about 2 bits per weight, in C.

The names below are loaded on first use, so that importing the package costs neither torch nor transformers.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "AqlmConfig": "config",
    "Hessian": "solver",
    "QuantizedWeight": "solver",
    "quantize_weight": "solver",
    "QuantizedLinear": "linear",
    "quantize_linear": "quantize",
    "quantize_model": "quantize",
    "join_linears": "joined",
    "save_quantized": "checkpoint",
    "push_to_hub": "hf.card",
    "load_model": "models",
    "load_sequences": "data",
    "token_stream": "data",
    "perplexity": "evaluate",
    "LayerReport": "report",
    "QuantizationReport": "report",
    "PRESETS": "run",
    "RunConfig": "run",
}

__all__ = [*_HOMES, "__version__"]

if TYPE_CHECKING:  # what type checkers and editors read
    from .checkpoint import save_quantized as save_quantized
    from .config import AqlmConfig as AqlmConfig
    from .data import load_sequences as load_sequences
    from .data import token_stream as token_stream
    from .evaluate import perplexity as perplexity
    from .hf.card import push_to_hub as push_to_hub
    from .joined import join_linears as join_linears
    from .linear import QuantizedLinear as QuantizedLinear
    from .models import load_model as load_model
    from .quantize import quantize_linear as quantize_linear
    from .quantize import quantize_model as quantize_model
    from .report import LayerReport as LayerReport
    from .report import QuantizationReport as QuantizationReport
    from .run import PRESETS as PRESETS
    from .run import RunConfig as RunConfig
    from .solver import Hessian as Hessian
    from .solver import QuantizedWeight as QuantizedWeight
    from .solver import quantize_weight as quantize_weight

logging.getLogger(__name__).addHandler(logging.NullHandler())  # the program decides what is shown


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
