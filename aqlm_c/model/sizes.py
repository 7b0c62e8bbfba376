"""How large a model is, as it is stored: all of it, not the quantized layers alone."""

from __future__ import annotations

from typing import Any

from ..nn.linear import QuantizedLayer


def stored_size(model: Any) -> tuple[int, int]:
    """(parameters, bytes of the tensors that are stored for them), each shared one counted once.

    A quantized layer has as many parameters as the dense one in whose place it is.
    """
    parameters = n_bytes = 0
    counted: set[int] = set()
    for module in model.modules():
        if isinstance(module, QuantizedLayer) and id(module.codes) not in counted:
            parameters += module.codes.shape[0] * module.codes.shape[1] * module.format.group_weights
        for name, tensor in module.named_parameters(recurse=False):
            if id(tensor) in counted:
                continue
            counted.add(id(tensor))
            n_bytes += tensor.numel() * tensor.itemsize
            if name == "bias" or not isinstance(module, QuantizedLayer):
                parameters += tensor.numel()
    return parameters, n_bytes
