"""How large a model is, as it is stored: all of it, not the quantized layers alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..nn.linear import QuantizedLayer


def stored_size(model: Any, decoded: Mapping[str, float] | None = None) -> tuple[int, int]:
    """(parameters, bytes of the tensors that are stored for them), each shared one counted once.

    A quantized layer has as many parameters as the dense one in whose place it is. decoded: bits per weight of layers
    that hold what a method's codes decode to, by name: they count as a file of that method has them.
    """
    bits = {id(model.get_submodule(name).weight): value for name, value in (decoded or {}).items()}
    parameters = n_bytes = 0
    counted: set[int] = set()
    for module in model.modules():
        if isinstance(module, QuantizedLayer) and id(module.codes) not in counted:
            parameters += module.codes.shape[0] * module.codes.shape[1] * module.format.group_weights
        for name, tensor in module.named_parameters(recurse=False):
            if id(tensor) in counted:
                continue
            counted.add(id(tensor))
            n_bytes += round(tensor.numel() * bits.get(id(tensor), 8 * tensor.itemsize) / 8)
            if name == "bias" or not isinstance(module, QuantizedLayer):
                parameters += tensor.numel()
    return parameters, n_bytes
