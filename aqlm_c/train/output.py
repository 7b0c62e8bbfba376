"""What a model makes of its last hidden states, a few positions at a time: logits are never whole.

A model's own code runs, with its body replaced by what gives these hidden states, so that whatever it does to logits
(scales, soft caps) is done. The KL divergence of two models and its gradient to the hidden states are computed slice by
slice of positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import one_line
from ..model.probe import hidden_of, input_device, replaced_forward, token_ids, watching

_SLICE_BYTES = 2**28  # of the logits of a slice in float32, on a GPU
_SLICE_BYTES_ON_CPU = 2**25

Head = Callable[[Tensor], Tensor]


class Output:
    """The body of a model, which gives hidden states, and the rest of it, which makes logits of them.

    Raises ValueError for a model whose logits are not made of the last hidden states position by position.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.device = input_device(model)
        self.body: nn.Module = model
        self._returned: Any = None
        self.vocabulary = self._find_body()

    def hidden(self, ids: Tensor) -> Tensor:
        """The last hidden states [n, length, width] of token ids [n, length]."""
        return hidden_of(self.body(input_ids=ids.to(self.device), use_cache=False))

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, vocabulary] of hidden states [n, width], each a position."""
        ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=self.device)

        def body(*_args: Any, **_kwargs: Any) -> Any:
            return _with_hidden(self._returned, hidden[None])

        with replaced_forward([self.body], lambda *_: body):
            return self.model(input_ids=ids, use_cache=False).logits[0]

    def _find_body(self) -> int:
        """Set the body, that of whose hidden states the model makes its logits; the size of the vocabulary."""
        wrong = f"model: got {type(self.model).__name__}, expected one whose logits are made of its last hidden states"
        ids, reason = token_ids(self.model), ""
        with watching(self.model):
            for body in _bodies(self.model):
                self.body = body
                try:
                    whole = self.model(input_ids=ids, use_cache=False).logits[0]
                    self._returned = self.body(input_ids=ids, use_cache=False)
                    hidden = hidden_of(self._returned)[0]
                    parts = torch.cat([self.logits(part) for part in hidden.split(3)])
                except Exception as error:  # of the model's code, of any type
                    reason = f"; it raises {type(error).__name__}: {one_line(error)[:200]}"
                    continue
                tolerance = 1e-4 if whole.dtype.itemsize >= 4 else 5e-2
                atol = tolerance * float(whole.float().std())
                if parts.shape == whole.shape and torch.allclose(parts, whole, tolerance, atol):
                    self._returned = _with_hidden(self._returned, hidden[None, :0])  # no memory for what is replaced
                    return whole.shape[-1]
        raise ValueError(f"{wrong}, each position by itself{reason}")


def _bodies(model: Any) -> list[nn.Module]:
    """What may be the body: the model's own, or the decoder in it."""
    body = getattr(model, "base_model", model)
    found = [body, getattr(body, "decoder", None), getattr(model, "model", None)]
    return [module for module in found if isinstance(module, nn.Module) and module is not model]


def _with_hidden(returned: Any, hidden: Tensor) -> Any:
    """What a body returned, with other hidden states."""
    if isinstance(returned, Tensor):
        return hidden
    if isinstance(returned, dict):  # a ModelOutput
        first = next(iter(returned))
        return type(returned)(**{**returned, first: hidden})
    return type(returned)((hidden, *returned[1:]))


def slices(n: int, vocabulary: int, device: torch.device) -> Iterator[slice]:
    """Positions whose logits are in memory together."""
    most = _SLICE_BYTES if device.type == "cuda" else _SLICE_BYTES_ON_CPU
    size = max(16, most // (4 * vocabulary))
    size = math.ceil(n / math.ceil(n / size))
    return (slice(begin, min(n, begin + size)) for begin in range(0, n, size))


def kl_divergence(student: Output, teacher: Output, hidden: Tensor, targets: Tensor, gradient: bool) -> Tensor:
    """The sum over positions of KL(teacher || student), float64, of last hidden states [..., width] of both; gradient:
    to the student's hidden states and to whatever its output layer trains, as `backward` of this sum would add it.
    """
    found = torch.zeros((), dtype=torch.float64, device=hidden.device)
    own, other = hidden.detach().flatten(0, -2), targets.detach().flatten(0, -2)
    given = torch.empty_like(own) if gradient else None
    for place in slices(len(own), student.vocabulary, own.device):
        part = own[place]
        with torch.no_grad():
            targets_of = teacher.logits(other[place])
        with torch.set_grad_enabled(gradient):
            part.requires_grad_(gradient)
            logits = student.logits(part)
        square, to_logits = _kl_of(logits.detach(), targets_of.to(logits.device), gradient)
        del targets_of
        found += square
        if given is not None:
            logits.backward(to_logits)
            assert part.grad is not None
            given[place] = part.grad
    if given is not None:
        hidden.backward(given.view_as(hidden))
    return found


@torch.no_grad()
def _kl_of(logits: Tensor, targets: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Sum over rows of the divergence, float64, and its gradient to the logits, softmax(logits) - softmax(targets)."""
    log_q = torch.log_softmax(logits.float(), -1)
    log_p = torch.log_softmax(targets.float(), -1)
    p = log_p.exp()
    terms = log_p.sub_(log_q).mul_(p).masked_fill_(p == 0, 0)  # also of words that the teacher rules out: -inf
    found = terms.sum(-1).double().sum()
    return found, log_q.exp_().sub_(p).to(logits.dtype) if gradient else None
