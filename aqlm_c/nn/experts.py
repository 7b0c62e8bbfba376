"""Experts of a mixture together: one linear of all of them as one weight, whose rows each have an expert.

An expert at a time, the host waits to know which experts there is work for, and a GPU for each small launch. Together
nothing waits, and a CUDA graph holds for any choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import ops
from .linear import QuantizedLinear

__all__ = ["ExpertStacks", "Stack"]

MOST_EXPERTS = 1024
MOST_ROWS = 32  # for each expert on average; more are faster an expert at a time, as dense products


class Stack(NamedTuple):
    """One linear of all experts, each of its tensors in one: codes [experts, O, J, K], codebooks, scales."""

    codes: Tensor
    codebooks: Tensor
    scales: Tensor

    @classmethod
    def of(cls, linears: Sequence[Any]) -> Stack:
        """Of linears of one format, which are views of it then."""
        kept = []
        with torch.inference_mode(False), torch.no_grad():
            for name in cls._fields:
                stack = torch.stack([getattr(linear, name).detach() for linear in linears])
                for linear, tensor in zip(linears, stack, strict=True):
                    getattr(linear, name).data = tensor
                kept.append(stack)
        return cls(*kept)

    def is_like(self, other: Stack) -> bool:
        """Whether they differ in `out` alone: products of both may be one."""
        return self.codes.shape[2:] == other.codes.shape[2:] and (
            (self.codebooks.shape, self.codebooks.dtype) == (other.codebooks.shape, other.codebooks.dtype)
        )


class ExpertStacks:
    """The linears of experts that are gated units, ``down(act(gate(x), up(x)))``, together.

    gate, up, down: those of each expert, without biases. `made` gives None for linears that are not alike.
    """

    def __init__(self, gate: Stack, up: Stack, down: Stack) -> None:
        self.gate, self.up, self.down = gate, up, down
        self.watched: list[tuple[Any, ...]] = []

    @classmethod
    def made(cls, gate: Sequence[nn.Module], up: Sequence[nn.Module], down: Sequence[nn.Module]) -> ExpertStacks | None:
        """The codes of all experts are moved into one tensor for each linear, of which they are views then."""
        roles = (gate, up, down)
        if len(gate) > MOST_EXPERTS or not all(_are_alike(linears) for linears in roles):
            return None
        return cls(Stack.of(gate), Stack.of(up), Stack.of(down))

    def are_faster(self, x: Tensor, index: Tensor) -> bool:
        """Than an expert at a time: for few choices, on a GPU of 16-bit numbers of one dtype."""
        if x.is_cuda and (x.dtype == torch.float32 or x.dtype != self.gate.codebooks.dtype):
            return False
        return index.numel() <= MOST_ROWS * len(self.gate.codes)

    def watch(self, places: Iterable[tuple[nn.Module, str]]) -> None:
        """Remember the linears, children of modules by name, for `are_current`."""
        self.watched = []
        for parent, name in places:
            linear = parent.get_submodule(name)
            tensors = [getattr(linear, part) for part in Stack._fields]
            pointers = [tensor.data_ptr() for tensor in tensors]
            self.watched.append(
                (parent._modules, name, linear, linear.__dict__, linear._parameters, *tensors, *pointers)
            )

    def are_current(self) -> bool:
        """Whether the linears are as they were: there, views of the stacks, and nothing listens on them. Dictionaries
        are read as they are: of 384 linears, by their attributes, it took 2.4 ms.
        """
        for modules, name, linear, own, parts, codes, codebooks, scales, *pointers in self.watched:
            if (
                modules.get(name) is not linear
                or own["_forward_hooks"]
                or own["_forward_pre_hooks"]
                or "forward" in own
            ):
                return False
            if parts["codes"] is not codes or parts["codebooks"] is not codebooks or parts["scales"] is not scales:
                return False
            if [codes.data_ptr(), codebooks.data_ptr(), scales.data_ptr()] != pointers:
                return False
        return True

    def __call__(self, x: Tensor, weights: Tensor, index: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        """The weighted sum of each token's experts, summed in float32.

        x: [tokens, in]. weights: [tokens, k], float. index: [tokens, k], int64; no expert's: nothing is added.
        activation: [rows, 2 I], gates beside ups, -> [rows, I]. Returns [tokens, in], of x's dtype.
        """
        tokens, k = index.shape
        if self.gate.is_like(self.up):
            gate_up = ops.matmul_experts(x, index, (self.gate, self.up))
        else:
            gate_up = torch.cat([ops.matmul_experts(x, index, (stack,)) for stack in (self.gate, self.up)], dim=-1)
        y = ops.matmul_experts(activation(gate_up), index, (self.down,)).view(tokens, k, -1)
        return (y * weights.float().unsqueeze(-1)).sum(1).to(x.dtype)

    def __reduce__(self) -> tuple[Any, ...]:  # copies of linears are no views: they have none
        return type(None), ()


def _are_alike(linears: Sequence[Any]) -> bool:
    """Whether they are plain, and of one format, size, dtype and place."""

    def kind(tensor: Tensor) -> tuple[Any, ...]:
        return tensor.shape, tensor.dtype, tensor.device

    if not all(map(_is_plain, linears)):
        return False
    return len({tuple(kind(getattr(linear, name)) for name in Stack._fields) for linear in linears}) == 1


def _is_plain(linear: Any) -> bool:
    """Whether calling it is the product and nothing more."""
    return (
        type(linear) is QuantizedLinear
        and linear.bias is None
        and not (linear._forward_pre_hooks or linear._forward_hooks or "forward" in linear.__dict__)
    )
