"""The layers that vLLM's are made of: linears of one input side by side, experts. Knows nothing of vLLM.

On a GPU both may be captured in a CUDA graph: nothing of what they launch depends on values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import ops
from ..nn.experts import ExpertStacks
from ..nn.linear import QuantizedLinear

__all__ = ["Experts", "JoinedLinears"]

Linear = QuantizedLinear | nn.Linear


class JoinedLinears(nn.Module):
    """``y = [x W1^T | x W2^T | ...] + bias``: each part quantized to a format of its own, or dense.

    parts: without biases, of one in_features, in the order of their outputs.
    """

    def __init__(self, parts: Sequence[Linear]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.sizes = [part.out_features for part in parts]
        first = parts[0]
        self.alike = isinstance(first, QuantizedLinear) and all(
            isinstance(part, QuantizedLinear)
            and part.format == first.format
            and part.codebooks.dtype == first.codebooks.dtype
            for part in parts
        )

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., in], bias [out] of all parts -> [..., out], of x's dtype."""
        biases = [None] * len(self.sizes) if bias is None else list(bias.split(self.sizes))
        if len(self.sizes) == 1:
            return product(self.parts[0], x, bias)
        if self.alike:
            parts: Iterable[Any] = self.parts
            weights = [(p.codes, p.codebooks, p.scales, b) for p, b in zip(parts, biases, strict=True)]
            return torch.cat(ops.matmul_grouped(x, weights), dim=-1)
        return torch.cat([product(part, x, b) for part, b in zip(self.parts, biases, strict=True)], dim=-1)


def product(linear: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] -> [..., out], of a quantized or a dense linear's weight."""
    if isinstance(linear, QuantizedLinear):
        return ops.matmul(x, linear.codes, linear.codebooks, linear.scales, bias)
    return nn.functional.linear(x, linear.weight, bias)


class Experts(nn.Module):
    """Experts of a mixture, each a gated unit ``down(act(gate(x), up(x)))``, all or the rank's own.

    gate, up, down: the linears of each, quantized to formats of their own, or dense. activation: [rows, 2 I], gates
    beside ups, -> [rows, I]. stacked: whether the codes of all experts are one tensor, for their products together;
    None: on a GPU.
    """

    def __init__(
        self,
        gate: Sequence[Linear],
        up: Sequence[Linear],
        down: Sequence[Linear],
        activation: Callable[[Tensor], Tensor],
        stacked: bool | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation
        on_gpu = next(gate[0].parameters()).device.type == "cuda"
        stacked = on_gpu if stacked is None else stacked
        self.stacks = ExpertStacks.made(gate, up, down) if stacked else None
        self.gate_up = nn.ModuleList(JoinedLinears(pair) for pair in zip(gate, up, strict=True))
        self.down = nn.ModuleList(down)

    def forward(self, x: Tensor, weights: Tensor, index: Tensor, on_input: bool = False) -> Tensor:
        """The weighted sum of each token's experts, summed in float32.

        x: [tokens, in]. weights: [tokens, k], float. index: [tokens, k], int: which experts; -1 for one of another
        rank. on_input: weights multiply x, not what experts give (k = 1). Returns [tokens, in], of x's dtype.
        """
        if on_input:
            x, weights = x * weights.to(x.dtype), torch.ones_like(weights)
        if self.stacks is not None and self.stacks.are_faster(x, index):
            return self.stacks(x, weights, index, self.activation)
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return self.without_reading(x, weights, index)
        output = x.new_zeros(x.shape, dtype=torch.float32)
        for expert in index.unique().tolist():
            if expert < 0:
                continue
            token, choice = torch.where(index == expert)
            y = self._expert(expert, x[token])
            output.index_add_(0, token, y.float() * weights[token, choice, None].float())
        return output.to(x.dtype)

    def without_reading(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        """The same by a fixed sequence of products, whatever `index` says: every expert sees all tokens."""
        output = x.new_zeros(x.shape, dtype=torch.float32)
        for expert in range(len(self.down)):
            share = ((index == expert) * weights).sum(-1, keepdim=True).float()
            output += self._expert(expert, x).float() * share
        return output.to(x.dtype)

    def _expert(self, expert: int, x: Tensor) -> Tensor:
        return product(self.down[expert], self.activation(self.gate_up[expert](x)))
