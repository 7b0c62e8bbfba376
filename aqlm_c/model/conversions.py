"""Conversions between a checkpoint's tensors and the model's, such as joining q, k and v, where layers are quantized.

transformers 5 has them by name, whatever is called so. Codes of a linear can be neither joined nor split: a quantized
layer is stored under its own name in the model. Older transformers convert nothing but names.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable
from typing import Any

from torch import nn

from ..nn.linear import QuantizedLayer

try:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, WeightConverter
except ImportError:  # transformers 4, or a 5 without them
    get_model_conversion_mapping = None


def without_quantized(conversions: list[Any], model: nn.Module) -> list[Any]:
    """`conversions` of a checkpoint's tensors to the model's less those that would take a part of a quantized layer."""
    if get_model_conversion_mapping is None:
        return conversions
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, QuantizedLayer))
    parts = [f"{name}.{part}" for name, layer in layers for part in dict(layer.named_parameters())]
    return [each for each in conversions if not isinstance(each, WeightConverter) or not _takes(each, parts)]


def keep_names(model: Any) -> None:
    """Let `save_pretrained` store the quantized layers of `model` under their own names."""
    if get_model_conversion_mapping is None:
        return
    own = getattr(model, "_weight_conversions", None)
    if own is None:  # as transformers has it for a model that was not loaded
        own = [
            each for each in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(each, PrefixChange)
        ]
    kept = without_quantized(own, model)
    if len(kept) < len(own):
        model._weight_conversions = kept


def _takes(converter: Any, names: Iterable[str]) -> bool:
    """Whether a converter, on saving or on loading, takes one of the tensors `names`."""
    ways = [copy.deepcopy(converter)]  # which remember what they were used for
    with contextlib.suppress(NotImplementedError, ValueError, AttributeError):  # it cannot be saved
        ways.append(converter.reverse_transform())
    return any(way.rename_source_key(name)[1] is not None for way in ways for name in names)
