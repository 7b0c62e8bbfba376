"""Training a quantized model itself, its codes fixed: the tuning of codebooks and scales."""

from __future__ import annotations

from typing import TypeVar

import torch

from ..nn.embedding import QuantizedEmbedding
from ..nn.linear import QuantizedLayer

Model = TypeVar("Model", bound=torch.nn.Module)


def prepare_model_for_tuning(model: Model) -> Model:
    """Make codebooks and scales of the quantized layers, in float32, all that training changes; returns the model.

    As loaded, every float parameter is trainable, as with any model of transformers. float32 because Adam divides
    by squares of gradients that 16-bit floats round to zero. The activations keep their dtype; a saved model has
    float32 codebooks and scales, which load as any others. Raises ValueError if no layer is quantized.
    """
    layers = [module for module in model.modules() if isinstance(module, QuantizedLayer)]
    if not layers:
        raise ValueError("model: got no quantized layer, expected a model with AQLM layers")
    model.requires_grad_(False)
    for layer in layers:
        if isinstance(layer, QuantizedEmbedding):
            layer.output_dtype = layer.output_dtype or layer.codebooks.dtype
        for parameter in (layer.codebooks, layer.scales):
            parameter.data = parameter.data.float()  # the same Parameter: tied layers share it
            parameter.requires_grad_(True)
    return model
