"""Text that a model makes itself, to be tuned on: sampled at temperature 1."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import one_line
from ..model.probe import input_device

BATCH = 64  # sequences that are made together; on a GPU four times as many


def sample_sequences(
    model: Any,
    tokens: int,
    length: int,
    starts: Tensor,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """Token ids [n, length] of at least so many tokens that a transformers model samples by itself at temperature 1,
    each sequence from one of the tokens `starts`, drawn at random; ends of texts are tokens as any other. The same for
    a seed and a kind of device.

    Raises ValueError for a model that cannot generate.
    """
    count = math.ceil(tokens / length)
    generator = torch.Generator().manual_seed(seed)
    first = starts[torch.randint(len(starts), (count,), generator=generator)].view(count, 1)
    device = input_device(model)
    size = BATCH * (4 if device.type == "cuda" else 1)
    found = []
    for number, begin in enumerate(range(0, count, size)):
        ids = first[begin : begin + size].to(device)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), _plainly(model):
            torch.manual_seed(seed + 104729 * (number + 1))
            try:
                with torch.no_grad():
                    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=length - 1)
            except Exception as error:  # of the model's code, of any type
                name = type(model).__name__
                raise ValueError(f"data: got self with {name}, which cannot generate: {one_line(error)}") from error
        found.append(made[:, :length].cpu())
        progress(min(count, begin + size), count)
    return torch.cat(found)


@contextlib.contextmanager
def _plainly(model: Any) -> Iterator[None]:
    """The distribution as it is, and no end, whatever the model's own settings of generation say."""
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0)
    try:
        yield
    finally:
        model.generation_config = own
