"""How many positions a model has. For longer sequences there are no learned ones, and rotary ones were not trained."""

from __future__ import annotations

import logging
from typing import Any

import torch

from ..errors import wrong

log = logging.getLogger("aqlm_c")


def check_length(name: str, length: int, model: Any) -> None:
    """Raise ValueError, naming the argument `name`, for sequences longer than a transformers model has positions; a
    warning for those longer than the model says of itself (rotary positions go on, but were not trained there).
    """
    most = most_positions(model)
    if most is not None and length > most:
        raise wrong(name, length, f"at most {most}, as many positions as the model has")
    rated = rated_positions(model)
    if rated is not None and length > rated:
        log.warning("%s: got %d, more than the %d positions that the model's config says", name, length, rated)


def most_positions(model: Any) -> int | None:
    """The length that no sequence of the model can exceed: of learned positions and of tables; None without such."""
    config = model.config.get_text_config()
    found = [buffer.shape[0] for name, buffer in model.named_buffers() if name.endswith("embed_positions")]
    found += [_length(embedding) for embedding in _position_embeddings(model)]
    if isinstance(seen := getattr(config, "max_seq_len", None), int):  # MPT's table of biases
        found.append(seen)
    return min(found, default=None)


def rated_positions(model: Any) -> int | None:
    """The longest sequence that the model's config is for, with what scales its positions; None if it does not say."""
    config = model.config.get_text_config()
    most = getattr(config, "max_position_embeddings", None)
    if not isinstance(most, int) or most < 1 or getattr(config, "alibi", False):
        return None
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    longest = most
    for fields in (scaling, *(value for value in scaling.values() if isinstance(value, dict))):  # one by kind of layer
        factor, original = fields.get("factor"), fields.get("original_max_position_embeddings") or most
        if isinstance(factor, (int, float)):
            longest = max(longest, int(factor * original))
    return longest


def _position_embeddings(model: Any) -> list[torch.nn.Embedding]:
    """Beside the input embedding, and called so: those of a vision tower are elsewhere."""
    embedding = model.get_input_embeddings()
    name = next((name for name, module in model.named_modules() if module is embedding), "")
    beside = model.get_submodule(name.rpartition(".")[0]).named_children() if name else ()
    return [
        module
        for child, module in beside
        if isinstance(module, torch.nn.Embedding) and module is not embedding and ("pos" in child or child == "wpe")
    ]


def _length(embedding: torch.nn.Embedding) -> int:
    """Positions begin after an offset (OPT) or after that of padding (RoBERTa)."""
    first = getattr(embedding, "offset", None)
    if not isinstance(first, int):
        first = 0 if embedding.padding_idx is None else embedding.padding_idx + 1
    return embedding.num_embeddings - first
