"""Dense layers with the weight that a quantized one decodes to."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch

Layer = TypeVar("Layer", bound=torch.nn.Linear | torch.nn.Embedding)


def with_weight(module: Layer, weight: torch.Tensor) -> Layer:
    """The layer with `weight` [out, in], where `module` and its other parameters are, in place of its own; frozen."""
    layer = copy.copy(module)
    layer._parameters = dict(module._parameters)  # a copy of a module has those of the original
    layer.weight = torch.nn.Parameter(weight.to(module.weight.device), requires_grad=False)
    return layer
