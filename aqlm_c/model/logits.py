"""Logits of a model a few positions at a time, so that never all of a sequence's are there in float32; KL of them.

Between the last hidden states and the logits stands more than a matrix: scales, soft caps, layers. None of it is known
here. The model's own forward runs for each slice, while its body, which was run once, answers with that slice.
Gradients go the same way, where they are asked for: evaluation and tuning share what is here.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..errors import one_line
from ..nn import ops
from .probe import input_device, replaced_forward, token_ids, watching

log = logging.getLogger("aqlm_c")

_CPU_LOGITS = 2**24  # in a slice at most, of float32 64 MiB
_GPU_LOGITS = 2**26
_OTHER_ORDER = 1e-4  # of the largest logit: what products of fewer rows may differ by, at least


def slice_bytes(device: torch.device) -> int:
    """Of the float32 logits of a slice, at most."""
    return 4 * (_CPU_LOGITS if device.type == "cpu" else _GPU_LOGITS)


def slices(positions: int, vocabulary: int, device: torch.device, most: int | None = None) -> Iterator[slice]:
    """The positions in runs, at most `most` of them in one, whose float32 logits take 64 MiB on a CPU, 256 on a GPU."""
    room = slice_bytes(device) // (4 * max(1, vocabulary))
    step = max(1, min(room, most or positions))
    return (slice(start, min(start + step, positions)) for start in range(0, positions, step))


def kl_divergence(original: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(softmax(original) || softmax(logits)) of each row, in nats: float32 [n].

    Both are logits [n, vocabulary] of any floating dtype; what is computed is float32. Words that the original rules
    out (-inf) add nothing, those that the model alone rules out make it inf.
    """
    if _is_one_kernel(original, logits):
        return ops.divergence(original, logits, need_gradient=False)[0]
    return kl_and_gradient(original, logits)[0]


@torch.no_grad()
def kl_and_gradient(original: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`kl_divergence` and its gradient to `logits`, softmax(logits) - softmax(original), [n, vocabulary], float32 or
    on a GPU of the dtype of both.
    """
    if _is_one_kernel(original, logits):
        return ops.divergence(original, logits)
    # The sum of p (log p - log q) + q - p: the last two add up to 0, and with them errors of the normalisation, which
    # all words share, cancel, where the distributions are close and those errors would be all that there is.
    log_p, log_q = (torch.log_softmax(one, -1, dtype=torch.float32) for one in (original, logits))
    q = log_q.exp()
    difference, p = log_q.neg_().add_(log_p), log_p.exp_()
    terms = difference.mul_(p).masked_fill_(p == 0, 0)
    gradient = q.sub_(p)
    return terms.add_(gradient).sum(-1).clamp_(min=0), gradient


def _is_one_kernel(original: torch.Tensor, logits: torch.Tensor) -> bool:
    known = logits.dtype in (torch.float32, torch.float16, torch.bfloat16) and original.dtype == logits.dtype
    return known and ops.has_cuda and logits.is_cuda and original.device == logits.device


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log softmax(logits) of each row's target, in nats: float32 [n]; logits are float32 [n, vocabulary]."""
    return nn.functional.cross_entropy(logits, targets, reduction="none")


class SplitModel:
    """A causal language model as two functions: token ids to hidden states, and those to logits; differentiable.

    model: of transformers, on any device. Where its body is not found, or logits of slices are not the model's own,
    "hidden states" are its logits in its own dtype (`is_split` is false), or, unless `whole`, ValueError is raised.
    """

    def __init__(self, model: nn.Module, whole: bool = True) -> None:
        self.model = model
        self._body, reason = _find_body(model)
        if self._body is None and not whole:
            raise ValueError(
                f"model: got {type(model).__name__}, expected one whose logits are made of its last hidden states, "
                f"each position by itself{reason}"
            )
        if self._body is None:
            log.info("%s: logits are computed for whole windows: its output layer was not found", type(model).__name__)

    @property
    def is_split(self) -> bool:
        """Whether logits are computed slice by slice."""
        return self._body is not None

    @property
    def vocabulary(self) -> int:
        """Words that have logits; 0 where the model is not split."""
        return 0 if self._body is None else self._body.vocabulary

    @property
    def dtype(self) -> torch.dtype | None:
        """Of hidden states; None where the model is not split."""
        return None if self._body is None else self._body.dtype

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """Last hidden states [n, length, width] of token ids [n, length], in the model's dtype; n may be left out."""
        if ids.ndim == 1:
            return self.hidden(ids[None])[0]
        ids = ids.to(input_device(self.model))
        if self._body is None:
            logits: torch.Tensor = self.model(input_ids=ids, use_cache=False).logits
            return logits
        return self._body.hidden(self.model, ids)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [n, vocabulary] of hidden states [n, width], some positions of what `hidden` gave, in the model's
        dtype; where the model is not split, they are `hidden`.
        """
        return hidden if self._body is None else self._body.logits(self.model, hidden)

    def float_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`logits` in float32: a copy, without gradients, that may be overwritten."""
        with torch.no_grad():
            return self.logits(hidden).to(torch.float32, copy=True)

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
    ids: torch.Tensor  # [1, 1], for a forward whose body does not run
    dtype: torch.dtype  # of hidden states
    device: torch.device
    vocabulary: int  # words that have logits

    def hidden(self, model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        """The states [n, length, width] of ids [n, length]; the model goes on with the first position alone."""
        seen: list[torch.Tensor] = []

        def keep(module: nn.Module, arguments: Any, output: Any) -> Any:
            seen.append(_states(output))
            return _with_states(output, seen[0][:, :1])

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


def _find_body(model: nn.Module) -> tuple[_Body | None, str]:
    """The body of a model, by way of which logits are the model's own; or None, and why as the end of a sentence."""
    reason = ""
    try:
        with watching(model):
            ids = token_ids(model)
            calls, expected = _calls(model, ids)
            for module in _candidates(model, calls):
                try:
                    if found := _tried(model, module, calls, ids, expected):
                        return found, ""
                except Exception as error:  # of a model's code, of any type: it may want more than a slice
                    reason = reason or f"; it raises {type(error).__name__}: {one_line(error)[:200]}"
                    log.debug("%s: not split at %s", type(model).__name__, type(module).__name__, exc_info=True)
    except Exception as error:
        reason = f"; it raises {type(error).__name__}: {one_line(error)[:200]}"
        log.debug("%s: no hidden states were found", type(model).__name__, exc_info=True)
    return None, reason


def _candidates(model: Any, calls: list[tuple[nn.Module, Any, int]]) -> list[nn.Module]:
    """What may be the body: the largest module that the model's own forward calls, then those that have its names."""
    outermost = [module for module, _, depth in calls if depth == 0]
    body = getattr(model, "base_model", None)
    named = [body, getattr(body, "decoder", None), getattr(model, "model", None)]
    found = [max(outermost, key=lambda module: sum(1 for _ in module.modules())), *named]
    return [module for module in dict.fromkeys(found) if isinstance(module, nn.Module) and module is not model]


def _tried(
    model: nn.Module,
    module: nn.Module,
    calls: list[tuple[nn.Module, Any, int]],
    ids: torch.Tensor,
    expected: torch.Tensor,
) -> _Body | None:
    """`module` as the body, if it is called once and logits by way of it are `expected`, together and in slices."""
    outputs = [output for called, output, _ in calls if called is module]
    if len(outputs) != 1:
        return None
    states = _states(outputs[0])
    if states.shape[:2] != ids.shape:
        return None
    output = _with_states(outputs[0], states[:, :1].clone())  # of which the rest may go
    found = _Body(module, output, ids[:, :1].clone(), states.dtype, states.device, expected.shape[-1])
    hidden = found.hidden(model, ids)[0]
    parts = torch.cat([found.logits(model, part) for part in (hidden[:3], hidden[3:])])
    together = found.logits(model, hidden)
    return found if _close(together, expected) and _close(parts, expected, _OTHER_ORDER) else None


def _calls(model: nn.Module, ids: torch.Tensor) -> tuple[list[tuple[nn.Module, Any, int]], torch.Tensor]:
    """(module, output, how many others it is called in) of all calls of a pass over ids [1, length], as they end; the
    logits [length, vocabulary].
    """
    found: list[tuple[nn.Module, Any, int]] = []
    depth = 0

    def before(module: nn.Module, arguments: Any) -> None:
        nonlocal depth
        depth += 1

    def after(module: nn.Module, arguments: Any, output: Any) -> None:
        nonlocal depth
        depth -= 1
        found.append((module, output, depth))

    handles = []
    try:
        for module in model.modules():
            if module is not model:
                handles.append(module.register_forward_pre_hook(before))
                handles.append(module.register_forward_hook(after))
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    return found, logits


def _states(output: Any) -> torch.Tensor:
    """The last hidden states [n, length, width] in what a body returned: a tensor, a tuple or a ModelOutput."""
    if isinstance(output, dict):
        states = output["last_hidden_state"]
    else:
        states = output if isinstance(output, torch.Tensor) else output[0]
    if states.ndim != 3 or not states.is_floating_point():
        raise ValueError(f"hidden states: got {states.dtype} {list(states.shape)}, expected [n, length, width]")
    return states


def _with_states(output: Any, states: torch.Tensor) -> Any:
    """Such an output with other states, and nothing else that has a length."""
    if isinstance(output, dict):
        return type(output)(last_hidden_state=states)
    return states if isinstance(output, torch.Tensor) else (states, *output[1:])


def _close(logits: torch.Tensor, expected: torch.Tensor, least: float = 0) -> bool:
    """To the last bits of the dtype, and `least` of the largest."""
    if logits.shape != expected.shape:
        return False
    finite = expected.float().nan_to_num(nan=0, posinf=0, neginf=0)
    tolerance = max(8 * torch.finfo(expected.dtype).eps, least) * finite.abs().max().item()
    return torch.allclose(logits, expected, rtol=0, atol=tolerance, equal_nan=True)
