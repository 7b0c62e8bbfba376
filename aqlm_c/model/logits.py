"""Logits of a model a few positions at a time, so that never all of a sequence's are there in float32.

Between the last hidden states and the logits stands more than a matrix: scales, soft caps, layers. None of it is known
here. The model's own forward runs for each slice, while its body, which was run once, answers with that slice.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .probe import input_device, replaced_forward, token_ids, watching

log = logging.getLogger("aqlm_c")

_CPU_LOGITS = 2**24  # in a slice at most, of float32 64 MiB
_GPU_LOGITS = 2**26


def slices(positions: int, vocabulary: int, device: torch.device, most: int | None = None) -> Iterator[slice]:
    """The positions in runs, at most `most` of them in one, whose float32 logits take 64 MiB on a CPU, 256 on a GPU."""
    room = (_CPU_LOGITS if device.type == "cpu" else _GPU_LOGITS) // max(1, vocabulary)
    step = max(1, min(room, most or positions))
    return (slice(start, min(start + step, positions)) for start in range(0, positions, step))


def kl_divergence(original: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(softmax(original) || softmax(logits)) of each row, in nats: float32 [n].

    Both are float32 logits [n, vocabulary] and are overwritten. Words that the original rules out (-inf) add nothing,
    those that the model alone rules out make it inf.
    """
    # The sum of p (log p - log q) + q - p: the last two add up to 0, and with them errors of the normalisation, which
    # all words share, cancel, where the distributions are close and those errors would be all that there is.
    log_p, log_q = _log_softmax_(original), _log_softmax_(logits)
    q = log_q.exp()
    difference, p = log_q.neg_().add_(log_p), log_p.exp_()
    terms = difference.mul_(p).masked_fill_(p == 0, 0)
    return terms.add_(q.sub_(p)).sum(-1).clamp_(min=0)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log softmax(logits) of each row's target, in nats: float32 [n]; logits are float32 [n, vocabulary]."""
    return nn.functional.cross_entropy(logits, targets, reduction="none")


def _log_softmax_(logits: torch.Tensor) -> torch.Tensor:
    return logits.sub_(logits.logsumexp(-1, keepdim=True))


class SplitModel:
    """A causal language model as two functions: token ids to hidden states, and those to logits.

    model: of transformers, on any device. Where its body is not found, or logits of slices are not the model's own,
    "hidden states" are its logits in its own dtype (`is_split` is false).
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._body = _Body.of(model)
        if self._body is None:
            log.info("%s: logits are computed for whole windows: its output layer was not found", type(model).__name__)

    @property
    def is_split(self) -> bool:
        """Whether logits are computed slice by slice."""
        return self._body is not None

    @torch.no_grad()
    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """Last hidden states [length, width] of one sequence of token ids [length], in the model's dtype."""
        ids = ids.to(input_device(self.model))[None]
        if self._body is None:
            return self.model(input_ids=ids, use_cache=False).logits[0]
        return self._body.hidden(self.model, ids)

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits, float32 [n, vocabulary], of hidden states [n, width], a slice of what `hidden` gave; a copy."""
        if self._body is None:
            return hidden.to(torch.float32, copy=True)
        return self._body.logits(self.model, hidden).to(torch.float32, copy=True)

    @torch.no_grad()
    def release(self) -> bool:
        """Leave nothing of the model but what `logits` needs, where that is possible; returns whether it was.

        Other references to the model's body keep its memory.
        """
        return self._body is not None and self._body.leave(self.model)


@dataclasses.dataclass
class _Body:
    """The module of a model that makes hidden states; one output of it, into which others are put."""

    module: nn.Module
    output: Any
    ids: torch.Tensor  # [1, N], for a forward whose body does not run
    device: torch.device  # of hidden states

    @classmethod
    def of(cls, model: nn.Module) -> _Body | None:
        """The body of a model, tried: logits by way of it are the model's own. None where there is none such."""
        try:
            with watching(model):
                ids = token_ids(model)
                calls = _calls(model, ids)
                module, output = max(calls, key=lambda call: sum(1 for _ in call[0].modules()))
                states = _states(output)
                if states.shape[:2] != ids.shape or sum(module is called for called, _ in calls) != 1:
                    return None
                found = cls(module, _with_states(output, states[:, :1]), ids[:, :1], states.device)
                expected = model(input_ids=ids, use_cache=False).logits[0]
                hidden = found.hidden(model, ids)
                parts = [found.logits(model, hidden[part]) for part in (slice(0, 3), slice(3, None))]
                return found if _close(torch.cat(parts), expected) else None
        except Exception:  # of a model's code, of any type: it may want more than a slice
            log.debug("%s: no hidden states were found", type(model).__name__, exc_info=True)
            return None

    def hidden(self, model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        """The states [length, width] of ids [1, length]; the model goes on with the first position alone."""
        seen: list[torch.Tensor] = []

        def keep(module: nn.Module, arguments: Any, output: Any) -> Any:
            seen.append(_states(output)[0])
            return _with_states(output, _states(output)[:, :1])

        handle = self.module.register_forward_hook(keep)
        try:
            model(input_ids=ids, use_cache=False)
        finally:
            handle.remove()
        (hidden,) = seen
        return hidden

    def logits(self, model: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Those [n, vocabulary] of states [n, width], in the model's dtype."""
        output = _with_states(self.output, hidden[None].to(self.device))
        with replaced_forward([self.module], lambda number, module: lambda *args, **kwargs: output):
            logits: torch.Tensor = model(input_ids=self.ids.expand(1, len(hidden)), use_cache=False).logits[0]
        return logits

    def leave(self, model: nn.Module) -> bool:
        """Take the body out of the model, if logits are the same without it."""
        name = next(name for name, module in model.named_modules() if module is self.module)
        states = _states(self.output)[0]
        expected, module = self.logits(model, states), self.module
        self.module = nn.Module()
        model.set_submodule(name, self.module)
        try:
            if torch.equal(self.logits(model, states), expected):
                return True
        except Exception:  # it needs more of its body than the states
            log.debug("%s: its body stays", type(model).__name__, exc_info=True)
        self.module = module
        model.set_submodule(name, module)
        return False


def _calls(model: nn.Module, ids: torch.Tensor) -> list[tuple[nn.Module, Any]]:
    """(module, output) of what the forward of `model` itself calls, in order."""
    found: list[tuple[nn.Module, Any]] = []
    depth = 0

    def before(module: nn.Module, arguments: Any) -> None:
        nonlocal depth
        depth += 1

    def after(module: nn.Module, arguments: Any, output: Any) -> None:
        nonlocal depth
        depth -= 1
        if depth == 0:
            found.append((module, output))

    handles = []
    try:
        for module in model.modules():
            if module is not model:
                handles.append(module.register_forward_pre_hook(before))
                handles.append(module.register_forward_hook(after))
        model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _states(output: Any) -> torch.Tensor:
    """The last hidden states [1, length, width] in what a body returned: a tensor, a tuple or a ModelOutput."""
    if isinstance(output, dict):
        states = output["last_hidden_state"]
    else:
        states = output if isinstance(output, torch.Tensor) else output[0]
    if states.ndim != 3 or not states.is_floating_point():
        raise ValueError(f"hidden states: got {states.dtype} {list(states.shape)}, expected [1, length, width]")
    return states


def _with_states(output: Any, states: torch.Tensor) -> Any:
    """Such an output with other states, and nothing else that has a length."""
    if isinstance(output, dict):
        return type(output)(last_hidden_state=states)
    return states if isinstance(output, torch.Tensor) else (states, *output[1:])


def _close(logits: torch.Tensor, expected: torch.Tensor) -> bool:
    """To the last bits of the dtype: slices may be multiplied in another order."""
    if logits.shape != expected.shape:
        return False
    finite = expected.float().nan_to_num(nan=0, posinf=0, neginf=0)
    tolerance = 8 * torch.finfo(expected.dtype).eps * finite.abs().max().item()
    return torch.allclose(logits, expected, rtol=0, atol=tolerance, equal_nan=True)
