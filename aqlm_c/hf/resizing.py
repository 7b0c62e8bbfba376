"""`resize_token_embeddings` of transformers, where the embedding or the output layer holds codes."""

from __future__ import annotations

import functools
from typing import Any

from transformers import PreTrainedModel

from ..nn.linear import QuantizedLayer


def guard_resizing() -> None:
    """Refuse to resize what is quantized before anything of the model is changed; its own size is no change."""
    resize: Any = PreTrainedModel.resize_token_embeddings

    @functools.wraps(resize)
    def guarded(
        self: Any, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        embeddings = self.get_input_embeddings()
        layers = (embeddings, self.get_output_embeddings())
        for layer in layers:
            if not isinstance(layer, QuantizedLayer):
                continue
            rows = layer.weight.shape[0]
            asked = rows if new_num_tokens is None else new_num_tokens
            if pad_to_multiple_of:
                asked += -asked % pad_to_multiple_of
            if asked != rows:
                raise ValueError(
                    f"resize_token_embeddings: got {asked}, expected {rows}, the rows of a {type(layer).__name__}: "
                    "new rows have no codes. Call dequantize() on the loaded model first, or quantize a resized one"
                )
        if any(isinstance(layer, QuantizedLayer) for layer in layers):
            return embeddings
        return resize(self, new_num_tokens, pad_to_multiple_of, *args, **kwargs)

    PreTrainedModel.resize_token_embeddings = guarded
