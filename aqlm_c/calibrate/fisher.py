"""How much each calibration token says to each linear: by the gradient of the model's loss to the linear's outputs."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.runtime import deterministic
from ..distributed import group
from ..model.probe import input_device
from .hessians import same_tensor

log = logging.getLogger("aqlm_c")


class TokenWeights(NamedTuple):
    """Weights of tokens, float32 [n, length] of this rank's sequences, by the linear's name; 1 in the mean.

    batch_size: sequences in each batch.
    """

    weights: Mapping[str, Tensor]
    batch_size: int

    def of(self, name: str, batch: int) -> Tensor | None:
        """[tokens] of a batch; None for a linear that has none."""
        found = self.weights.get(name)
        return None if found is None else found[batch * self.batch_size : (batch + 1) * self.batch_size].flatten()

    def applied(self, name: str, batch: int, x: Tensor) -> Tensor:
        """The inputs x [..., in] of a linear times the roots of their tokens' weights, [tokens, in]; of bfloat16 on a
        GPU in it, else float32.
        """
        weights, rows = self.of(name, batch), x.reshape(-1, x.shape[-1])
        if weights is None or len(weights) != len(rows):
            return rows
        weighted = rows.float() * weights.sqrt()[:, None]
        return weighted.to(x.dtype) if x.device.type != "cpu" and x.dtype == torch.bfloat16 else weighted


def token_weights(
    model: Any, linears: Mapping[str, nn.Linear], sequences: Tensor, first: int, share: float, seed: int
) -> dict[str, Tensor]:
    """1 - share + share s / mean(s), s the square of the gradient of a token's outputs in a linear (GuidedQuant, arXiv
    2505.07004, with one group of outputs): [n, length], the same tensor for linears that share an input, whose outputs
    are taken together.

    The loss is the cross-entropy of tokens drawn from what the model says, summed. sequences: token ids [n, length] of
    this rank, of which the first is number `first` of all. A linear that is not given all tokens, as an expert, has no
    weights.
    """
    sums: dict[str, Tensor] = {}
    leaders: dict[str, str] = {}
    n, length = sequences.shape
    with _gradients_from(model), deterministic():
        for number, ids in enumerate(sequences.to(input_device(model))):
            generator = torch.Generator(ids.device).manual_seed(seed + 7919 * (first + number))
            for name, square in _squares(model, linears, leaders, ids, generator).items():
                if square.numel() == length:
                    place = sums.setdefault(name, square.new_zeros(n, length))
                    place[number] = square
    found = {}
    for leader, values in sums.items():
        of_sequences = [each for there in group().gather(values.double().sum(1).tolist()) for each in there]
        mean = math.fsum(of_sequences) / (len(of_sequences) * length)
        if 0 < mean < math.inf:
            found[leader] = 1 - share + share * (values / mean)
    if without := [name for name in linears if leaders.get(name) not in found]:
        log.warning("not weighted by token, since they see a part of the tokens or have no gradient: %s", without)
    return {name: found[leader] for name, leader in leaders.items() if leader in found}


def _squares(
    model: Any, linears: Mapping[str, nn.Linear], leaders: dict[str, str], ids: Tensor, generator: torch.Generator
) -> dict[str, Tensor]:
    """Squared gradients of a sequence's tokens, float32 [tokens], by the first linear with the same input."""
    seen: dict[str, Tensor] = {}
    found: dict[str, Tensor] = {}

    def before(name: str, x: Tensor) -> None:
        if name not in leaders:
            leaders[name] = next((other for other, y in seen.items() if same_tensor(y, x)), name)
        seen[name] = x

    def after(name: str, output: Tensor) -> None:
        def add(grad: Tensor) -> None:
            square = grad.float().square().sum(-1).flatten()
            known = found.get(leaders[name])
            fits = known is not None and known.shape == square.shape
            found[leaders[name]] = known + square if fits and known is not None else square

        if output.requires_grad:
            output.register_hook(add)

    handles = []
    for name, linear in linears.items():
        handles.append(linear.register_forward_pre_hook(lambda _, args, name=name: before(name, args[0])))
        handles.append(linear.register_forward_hook(lambda _, __, output, name=name: after(name, output)))
    try:
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        drawn = torch.multinomial(logits.detach().float().softmax(-1), 1, generator=generator)[:, 0]
        loss = nn.functional.cross_entropy(logits.float(), drawn, reduction="sum")
        (loss * (256.0 if logits.dtype == torch.float16 else 1.0)).backward()
    finally:
        for handle in handles:
            handle.remove()
    return found


@contextlib.contextmanager
def _gradients_from(model: Any) -> Iterator[None]:
    """Gradients flow back to what the input embedding gives, to no parameter."""
    asked = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.requires_grad_(False)
    handle = model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.requires_grad_())
    try:
        with torch.enable_grad():
            yield
    finally:
        handle.remove()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in asked)
