"""Perplexity by the protocol of the GPTQ paper (arXiv 2210.17323)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from .errors import missing

try:
    import torch
except ModuleNotFoundError as error:
    raise missing(error) from error

from .io.data import as_token_ids, check_token_ids, cut
from .model.positions import check_length

_SLICE = 256  # positions whose logits are held in float32 at a time
_MAX_LOSS = 700.0  # exp of a little more overflows


@torch.no_grad()
def perplexity(
    model: Any,
    input_ids: torch.Tensor,
    sequence_length: int = 2048,
    windows: int | None = None,
    progress: Callable[[int, int, float], None] | None = None,
    bos_token: int | None = None,
) -> dict[str, Any]:
    """Token perplexity of a causal language model over one stream of token ids [n].

    The stream is cut into windows of `sequence_length` that do not overlap (the first `windows` of them;
    None: all), each is one forward pass, and every token but a window's first is predicted: exp(sum over
    windows of (mean loss * sequence_length) / (number of windows * sequence_length)). With `bos_token` (what
    `window_start` gives) each window is that token and the next sequence_length - 1 of the stream.

    `progress(done, total, perplexity_so_far)` is called after each window. Returns `perplexity`, `windows`,
    `sequence_length`, `tokens` (read) and `seconds`. Raises ValueError for a text shorter than what was
    asked for, for windows longer than the model has positions, for a token id that the model does not know and for a
    loss that is not finite or beyond 700.
    """
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"model: got {type(model).__name__}, expected a transformers model, as load_model gives it")
    stream = as_token_ids("input_ids", input_ids, "token ids [n], as token_stream gives them").reshape(-1)
    if sequence_length < 2:
        raise ValueError(f"sequence_length: got {sequence_length}, expected at least 2")
    if windows is not None and windows < 1:
        raise ValueError(f"windows: got {windows}, expected at least 1")
    check_length("sequence_length", sequence_length, model)
    cuts = cut(stream[None].long(), sequence_length, bos_token)
    if len(cuts) < (windows or 1):
        needed = (windows or 1) * sequence_length
        raise ValueError(
            f"input_ids: {stream.numel()} tokens, expected at least {needed} "
            f"for windows={windows or 1} of sequence_length={sequence_length}"
        )
    count = windows or len(cuts)
    check_token_ids("input_ids", cuts[:count], model)
    started = time.perf_counter()
    model.eval()
    device = next(model.parameters()).device
    total = 0.0
    for index in range(count):
        ids = cuts[index].to(device)
        logits = model(ids[None], use_cache=False).logits[0]
        loss = _mean_loss(logits, ids)
        if not loss < _MAX_LOSS:
            raise ValueError(f"model: the loss of window {index} is {loss}, expected a number below {_MAX_LOSS:g}")
        total += loss
        if progress is not None:
            progress(index + 1, count, math.exp(total / (index + 1)))
    return {
        "perplexity": math.exp(total / count),
        "windows": count,
        "sequence_length": sequence_length,
        "tokens": count * sequence_length,
        "seconds": time.perf_counter() - started,
    }


def _mean_loss(logits: torch.Tensor, ids: torch.Tensor) -> float:
    """Mean negative log likelihood of ids[1:] under logits [length, vocabulary] of the tokens before."""
    losses = [
        torch.nn.functional.cross_entropy(part.float(), target, reduction="none")
        for part, target in zip(logits[:-1].split(_SLICE), ids[1:].split(_SLICE), strict=True)
    ]
    return torch.cat(losses).double().mean().item()
