"""Linears of one input, such as q, k and v, in one launch: a small product on a GPU is a launch above all.

Products kept for a sibling are used within the parent's forward alone. While they lived from call to call they could be
stale: in compiled code, behind hooks that load weights, and where tensors do not count changes. Where gradients are
wanted nothing is kept, since checkpoints run a forward twice and torch 2.11 compiles none that stores an attribute. One
thread at a time shares launches.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import guard_or_false
from torch.nn.modules import module as global_hooks

from . import ops
from .linear import QuantizedLinear

__all__ = ["LinearGroup", "join_linears"]

# Children that the forward of a module calls with one tensor.
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"), ("w1", "w3"))


class LinearGroup:
    """Children of a module, called by its forward with one tensor: the first that has one row, on a GPU, makes the
    products of all, and the others take theirs.

    They do so without gradients, within one call of the parent's forward, if they get that very tensor; products that
    are left when it returns switch the group off for good: that forward has another use for them, such as cross
    attention. A change of the tensor in place between the calls is seen, except between calls in a compiled function or
    in inference mode, where tensors do not count changes. While a member is replaced, elsewhere or has hooks, each is
    by itself.
    """

    device_type = "cuda"

    def __init__(self, parent: nn.Module, names: tuple[str, ...]) -> None:
        self.parent, self.names = weakref.ref(parent), names  # weak: a model that is deleted frees its memory at once
        self.is_on = True
        self._runs: int | None = None  # in which thread the parent's forward does, of those that may share; 0: compiled
        self._left: tuple[Tensor, tuple[int | None, ...], dict[int, Tensor]] | None = None  # x, its state, by place

    def begin(self, parent: nn.Module, *_: Any) -> None:
        """The forward of the parent begins: its hook. Nothing is stored where no launch will be shared: inside of
        torch's higher-order operators, such as checkpoint, that cannot be compiled."""
        thread = _thread()
        if self._runs == thread:  # it was interrupted
            self._runs = self._left = None
        first = parent._modules.get(self.names[0])
        if (
            not self.is_on
            or self._runs is not None
            or torch.is_grad_enabled()
            or not isinstance(first, QuantizedLinear)
        ):
            return
        if first.codes.device.type == self.device_type and (thread == 0 or not ops.is_transformed()):
            self._runs = thread

    def end(self, _parent: nn.Module, _arguments: Any, output: Any) -> None:
        """It has ended, or failed: then there is no output."""
        if self._runs != _thread():
            return
        if self._left is not None:
            self.is_on, self._left = output is None, None
        self._runs = None

    def take(self, place: int, x: Tensor) -> Tensor | None:
        """The product of member `place` with x, or None if it is to make it by itself."""
        if self._runs != _thread() or torch.is_grad_enabled() or not isinstance(x, Tensor):
            return None
        left = self._left
        if left is not None and left[0] is x and left[1] == _state(x):
            y = left[2].pop(place, None)
            if not left[2]:
                self._left = None
            return y
        if x.device.type != self.device_type or x.dim() == 0 or not guard_or_false(x.numel() == x.shape[-1]):
            return None
        weights = self._weights(x.device)
        if weights is None:
            return None
        products = dict(enumerate(ops.matmul_grouped(x, weights)))
        y = products.pop(place)
        self._left = x, _state(x), products
        return y

    def _weights(self, device: torch.device) -> list[ops.Weight] | None:
        """Those of all members, if they are as they were when they were grouped."""
        parent = self.parent()
        found = [parent._modules.get(name) for name in self.names] if parent is not None else []
        members = [member for member in found if self._has(member)]
        hooked = global_hooks._global_forward_pre_hooks or global_hooks._global_forward_hooks
        if hooked or len(members) < len(self.names):
            return None
        weights: list[ops.Weight] = [(m.codes, m.codebooks, m.scales, m.bias) for m in members]
        return weights if all(codes.device == device for codes, *_ in weights) else None

    def _has(self, member: nn.Module | None) -> TypeGuard[QuantizedLinear]:
        return (
            isinstance(member, QuantizedLinear)
            and member.grouped is not None
            and member.grouped[0] is self
            and not (member._forward_pre_hooks or member._forward_hooks or "forward" in member.__dict__)
        )

    def __reduce__(self) -> tuple[Any, ...]:  # for the hooks of a copied parent: a group of nobody
        return LinearGroup, (nn.Module(), self.names)


def _thread() -> int:
    """0: while compiling."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _state(x: Tensor) -> tuple[int | None, ...]:
    """Of the caller, and how often x was changed in place, where that is known."""
    if torch.compiler.is_compiling():
        return ()
    return torch.is_inference_mode_enabled(), None if x.is_inference() else x._version


def join_linears(model: nn.Module) -> int:
    """Let quantized linears of `model` that get one input share launches (`LinearGroup`); returns how many groups do.

    They are children of one module, by the names of `TOGETHER`, and have one format, in_features, dtype, and all or
    none a bias. Results are the same but for the order of sums. transformers models that this package loads or
    quantizes share launches already; copies of a model are not.
    """
    groups = 0
    for module in list(model.modules()):
        for names in TOGETHER:
            children = [module._modules.get(name) for name in names]
            members = [child for child in children if type(child) is QuantizedLinear]
            if len(members) < len(names) or len({_format(m) for m in members}) > 1:
                continue
            groups += 1
            hook = f"aqlm_c.grouped.{names[0]}"
            before: dict[Any, Any] = module._forward_pre_hooks
            after: dict[Any, Any] = module._forward_hooks
            always_called: dict[Any, bool] = module._forward_hooks_always_called
            found = {m.grouped[0] if m.grouped else None for m in members}
            if all(isinstance(old, LinearGroup) and old.is_on and before.get(hook) == old.begin for old in found):
                continue
            group = LinearGroup(module, names)
            # as register_forward_*hook do, but by one name in all layers: torch.compile guards the keys of hooks, and
            # with torch's ids every layer would be a graph of its own
            before[hook] = group.begin
            after[hook], always_called[hook] = group.end, True
            for place, member in enumerate(members):
                member.grouped = group, place
    return groups


def _format(linear: QuantizedLinear) -> tuple[Any, ...]:
    return linear.format, linear.in_features, linear.codebooks.dtype, linear.bias is not None
