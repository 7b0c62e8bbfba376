"""What fine-tuning trains: tensors in steps relative to their size, and the dense weights that these come to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..nn import ops
from ..nn.linear import QuantizedLayer

_SMALL = 0.1  # of a tensor's rms: the least size that a single weight of a norm is given


class Trained:
    """A tensor in training, as start + size * change, so that Adam's steps are relative to size (where that is zero, it
    stays). All of them change in a few calls: `values_of`, or as one tensor: `Together`.
    """

    def __init__(
        self, parameter: nn.Parameter, rate: float, *, common_size: bool = False, zeros_stay: bool = False
    ) -> None:
        self.parameter, self.rate = parameter, rate
        self.start = parameter.detach().to(torch.float32, copy=True)
        rms = self.start.square().mean().sqrt()
        size = rms.expand_as(self.start) if common_size else self.start.abs().clamp(min=_SMALL * rms)
        self.size = (size * (self.start != 0) if zeros_stay else size).contiguous()
        self.change = torch.zeros_like(self.start).requires_grad_()


@torch.no_grad()
def values_of(trained: Sequence[Trained], rounded: bool = False) -> list[Tensor]:
    """The values of `trained`, float32; rounded: to what is saved."""
    values = torch._foreach_mul([tensor.size for tensor in trained], [tensor.change for tensor in trained])
    torch._foreach_add_(values, [tensor.start for tensor in trained])
    if not rounded:
        return list(values)
    return [value.to(tensor.parameter.dtype).float() for tensor, value in zip(trained, values, strict=True)]


def add_gradients(reached: Sequence[tuple[Trained, Tensor]]) -> None:
    """Add gradients to the values of some tensors to those of their changes."""
    grads = torch._foreach_mul([grad for _, grad in reached], [tensor.size for tensor, _ in reached])
    for (tensor, _), grad in zip(reached, grads, strict=True):
        if tensor.change.grad is None:
            tensor.change.grad = grad
        else:
            tensor.change.grad.add_(grad)


class Decoder:
    """Dense weights of a layer with these codes."""

    def __init__(self, layer: QuantizedLayer, codes: Tensor, dtype: torch.dtype) -> None:
        self.codes, self.dtype = codes, dtype
        self._format = layer.codebooks.float(), layer.scales.float()
        self.index: Tensor | None = ops.index_codes(codes, *self._format)

    def index_anew(self) -> None:
        """Where codes are others now."""
        if self.index is not None and self.index.numel():
            self.index.copy_(ops.index_codes(self.codes, *self._format))

    def forget_index(self) -> None:
        """Index the codes for each use from now on: it takes as much memory as four codes of 8 bits."""
        self.index = None

    def __call__(self, codebooks: Tensor, scales: Tensor) -> Tensor:
        if self.dtype.itemsize > 4:
            return ops.decode_rows(self.codes, codebooks, scales).to(self.dtype)
        return ops.decode_rows(self.codes, codebooks, scales, self.dtype, self.index)

    def gradients(self, grad_rows: Tensor, codebooks: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        """Those to codebooks and scales from the gradient to the weight, [out, in]."""
        grad_rows = grad_rows.float() if grad_rows.dtype.itemsize > 4 else grad_rows
        index = ops.index_codes(self.codes, *self._format) if self.index is None else self.index
        return ops.decode_rows_backward(grad_rows, self.codes, codebooks, scales, index)


class Run(NamedTuple):
    """Tensors of one rate that follow each other: their change as one parameter, and its place in all."""

    parameter: nn.Parameter
    rate: float
    place: slice


class Together:
    """Many tensors in training as one of each kind: start, size, change, and the gradient to their values.

    Adam sees the parameters of `runs`, few where tensors with one rate follow each other.
    """

    def __init__(self, trained: Sequence[Trained]) -> None:
        self.parameters = [tensor.parameter for tensor in trained]
        self.dtypes = [parameter.dtype for parameter in self.parameters]  # in which they are saved
        self.start, self.size = (
            torch.cat([getattr(tensor, name).flatten() for tensor in trained]) for name in ("start", "size")
        )
        self.change, self.gradient = torch.zeros_like(self.start), torch.zeros_like(self.start)
        self._shapes = [tensor.start.shape for tensor in trained]
        self._values = torch.empty_like(self.start)
        self.gradients = self._parts(self.gradient)
        self.runs: list[Run] = []
        begin, end = 0, 0
        for tensor, following in zip(trained, [*trained[1:], None], strict=True):
            end += tensor.start.numel()
            if following is None or following.rate != tensor.rate:
                part = nn.Parameter(self.change[begin:end], requires_grad=True)
                self.runs.append(Run(part, tensor.rate, slice(begin, end)))
                begin = end

    @torch.no_grad()
    def values(self, rounded: bool = False) -> list[Tensor]:
        """Their values, float32, always in the same memory; rounded: to what is saved."""
        values = self._parts(torch.addcmul(self.start, self.size, self.change, out=self._values))
        for value, dtype in zip(values, self.dtypes, strict=True) if rounded else ():
            value.copy_(value.to(dtype))
        return values

    @torch.no_grad()
    def settle(self, divisor: float) -> None:
        """Give Adam the gradients of the changes, those to the values divided by `divisor`; then none are left."""
        for part, _, place in self.runs:
            part.grad = torch.mul(self.gradient[place], self.size[place]).div_(divisor)
        self.gradient.zero_()

    def _parts(self, flat: Tensor) -> list[Tensor]:
        parts = flat.split([shape.numel() for shape in self._shapes])
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]


def load_moments(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, prefix: str, state: Mapping[str, Tensor]
) -> None:
    """The state of Adam for a parameter, of tensors by name; step stays where Adam has it."""
    for name in ("step", "exp_avg", "exp_avg_sq"):
        value = state.get(prefix + name)
        if value is not None:
            on_cpu = name == "step" and not optimizer.param_groups[0].get("fused")
            optimizer.state[parameter][name] = value.clone() if on_cpu else value.to(parameter.device, copy=True)
