"""A quantized model that is trained: its layers run by dense weights, decoded where they are needed.

Inside of a block that is checkpointed, weights are decoded again for its gradients, so that those of one block alone
are in memory. What a weight's gradient comes to is added up at once: as the gradients to codebooks and scales or, where
codes are trained too, as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config import FinetuneOptions
from ..io.checkpoint import quantized_linears
from ..model.embeddings import find_embeddings
from ..model.probe import replaced_forward
from ..nn.embedding import QuantizedEmbedding
from ..nn.linear import QuantizedLayer
from .relative import Decoder, Together, Trained


class TunedWeight:
    """The weight of a quantized layer.

    names: in the model, of the layers that have it; two where embeddings are tied. codebooks, scales: its values now,
    float32. trained: whether it has gradients: to codebooks and scales, unless gradients to the weight itself are asked
    for, of which `spread` is then to be called. gradient: their sum, [out, in]; or on_gradient: is given that of a
    pass, once all uses of the weight have added to it.
    """

    def __init__(self, name: str, layer: QuantizedLayer, trained: bool) -> None:
        self.names, self.layer, self.trained = [name], layer, trained
        self.codes = layer.codes.detach().contiguous()
        self.decoder = Decoder(layer, self.codes, torch.float32)
        self.codebooks, self.scales = layer.codebooks.detach().float(), layer.scales.detach().float()
        self.gradient: Tensor | None = None
        self.on_gradient: Callable[[Tensor], None] | None = None
        self.gradients: tuple[Tensor, Tensor] = (self.codebooks, self.scales)  # `Student` gives it places of its own
        self._anchor = torch.zeros(0, device=self.codes.device, requires_grad=True)
        self._held: Tensor | None = None
        self._uses = 0
        self._part: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]"""
        rows, groups, _ = self.codes.shape
        return rows * self.layer.out_group_size, groups * self.layer.in_group_size

    def __call__(self, dtype: torch.dtype) -> Tensor:
        """[out, in], decoded."""
        if self._held is not None:
            return self._held
        if self.trained and torch.is_grad_enabled():
            self._uses += not _again.runs
            return _Decoded.apply(self._anchor, self, dtype)
        return self.decoded(dtype)

    @torch.no_grad()
    def decoded(self, dtype: torch.dtype) -> Tensor:
        self.decoder.dtype = dtype
        return self.decoder(self.codebooks, self.scales)

    def receive(self, gradient: Tensor) -> None:
        """Add a gradient to the weight to those that there are."""
        self._uses -= 1
        if self.gradient is not None:
            self.gradient.add_(gradient)
        elif self.on_gradient is None:
            self.spread(gradient)
        else:
            self._part = gradient if self._part is None else self._part + gradient
            if self._uses == 0:
                self.end_pass()

    def end_pass(self) -> None:
        """Give on the gradient that there is, though uses are missing: they had no part in the loss."""
        part, self._part, self._uses = self._part, None, 0
        if part is not None and self.on_gradient is not None:
            self.on_gradient(part)

    def forget_pass(self) -> None:
        """No gradients are left, those of a pass that was broken off neither."""
        self._part, self._uses, self._held = None, 0, None
        if self.gradient is not None:
            self.gradient.zero_()

    def own_codes(self, codes: Tensor | None = None) -> None:
        """Codes that change: other ones than the layer's, which has them when the tuning is over; codes: a copy."""
        self.codes = self.codes.clone() if codes is None else codes
        self.decoder.codes = self.codes

    @torch.no_grad()
    def set_codes(self, codes: Tensor) -> None:
        """Other codes [O, J, K], as stored, where those were: the memory stays the same."""
        self.codes.copy_(codes)
        self.decoder.index_anew()

    @contextlib.contextmanager
    def held(self, dtype: torch.dtype) -> Iterator[None]:
        """Decoded once for all calls until the block is left."""
        held = self._held = self.decoded(dtype)
        total = None
        if self.trained and torch.is_grad_enabled():
            total = torch.zeros_like(held, dtype=torch.float32)
            held.requires_grad_().register_post_accumulate_grad_hook(_moving(total))
        try:
            yield
            if total is not None:
                self.receive(total)
        finally:
            self._held = None

    def is_of(self, layer: QuantizedLayer) -> bool:
        return self.layer.codes is layer.codes

    def spread(self, gradient: Tensor) -> None:
        """Add what a gradient to the weight comes to, to those of codebooks and scales."""
        for total, part in zip(
            self.gradients, self.decoder.gradients(gradient, self.codebooks, self.scales), strict=True
        ):
            total.add_(part)


class _Decoded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, _anchor: Tensor, weight: TunedWeight, dtype: torch.dtype) -> Tensor:
        ctx.weight = weight
        return weight.decoded(dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        ctx.weight.receive(gradient)
        return None, None, None


class Student:
    """A quantized model in training.

    weights: of its quantized layers, but those of embeddings that are looked up and not trained. together: all that is
    trained. blocks: what is checkpointed. Raises ValueError for a model without quantized layers.
    """

    def __init__(self, model: Any, options: FinetuneOptions, blocks: Sequence[nn.Module] = ()) -> None:
        self.model, self.blocks = model, list(blocks)
        self.embeddings = find_embeddings(model)
        layers = dict(quantized_linears(model))
        if not layers:
            raise ValueError(f"model: got {type(model).__name__} without a quantized layer, expected a quantized model")
        self.weights = self._weights(layers, options.embeddings)
        self.looked_up = [
            layer for layer in layers.values() if isinstance(layer, QuantizedEmbedding) and options.embeddings
        ]
        self._dtypes = [layer.weight_dtype for layer in self.looked_up]
        trained = [weight for weight in self.weights if weight.trained]
        rate, other = options.learning_rate, options.learning_rate * options.scale_rate
        codebooks = [Trained(weight.layer.codebooks, rate, common_size=True) for weight in trained]
        scales = [Trained(weight.layer.scales, other, zeros_stay=True) for weight in trained]
        own = {id(parameter) for layer in layers.values() for parameter in (layer.codebooks, layer.scales)}
        self.others = [
            parameter
            for parameter in model.parameters()
            if parameter.is_floating_point() and parameter.squeeze().ndim <= 1 and id(parameter) not in own
        ]
        self.together = Together([*codebooks, *scales, *(Trained(parameter, other) for parameter in self.others)])
        self._trained = trained
        gradients = self.together.gradients
        for weight, *given in zip(trained, gradients, gradients[len(trained) :], strict=False):
            weight.gradients = (given[0], given[1])

    def _weights(self, layers: dict[str, QuantizedLayer], embeddings: bool) -> list[TunedWeight]:
        found: dict[int, TunedWeight] = {}
        for name, layer in layers.items():
            if id(layer.codes) in found:
                found[id(layer.codes)].names.append(name)
            elif embeddings or name != self.embeddings.input:
                trained = embeddings or name != self.embeddings.output
                found[id(layer.codes)] = TunedWeight(name, layer, trained)
        return list(found.values())

    @property
    def output_weight(self) -> TunedWeight | None:
        """That of a quantized output layer."""
        return next((weight for weight in self.weights if self.embeddings.output in weight.names), None)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Layers run by their values now, and what is trained gathers gradients; afterwards they are as ever, with the
        values of `store`.
        """
        by_name = {name: weight for weight in self.weights for name in weight.names}
        linears = {
            name: self.model.get_submodule(name)
            for name in by_name
            if not isinstance(self.model.get_submodule(name), QuantizedEmbedding)
        }
        names = list(linears)
        asked = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        count = 2 * len(self._trained)
        trained = list(zip(self.others, self.together.gradients[count:], strict=True))
        for layer in self.looked_up:
            place = next(i for i, weight in enumerate(self._trained) if weight.is_of(layer))
            trained += [
                (layer.codebooks, self.together.gradients[place]),
                (layer.scales, self.together.gradients[place + len(self._trained)]),
            ]
        self.model.requires_grad_(False)
        with contextlib.ExitStack() as stack:
            stack.callback(_ask, self.model, asked)
            for layer, dtype in zip(self.looked_up, self._dtypes, strict=True):
                layer.output_dtype = dtype
            for parameter in self.others:
                parameter.data = parameter.data.clone()  # not of a mapped file, nor where the model has it
            for parameter, total in trained:
                parameter.requires_grad_()
                handle = parameter.register_post_accumulate_grad_hook(_moving(total))
                stack.callback(handle.remove)
            self.update()
            stack.enter_context(
                replaced_forward(list(linears.values()), lambda i, layer: _linear(layer, by_name[names[i]]))
            )
            stack.enter_context(replaced_forward(self.blocks, lambda _, block: _checkpointed(block)))
            yield

    @torch.no_grad()
    def update(self, rounded: bool = False) -> None:
        """Take over the values of what is trained, in the same memory each time; rounded: as they are saved."""
        values = self.together.values(rounded)
        n = len(self._trained)
        for weight, codebooks, scales in zip(self._trained, values, values[n:], strict=False):
            weight.codebooks, weight.scales = codebooks, scales
        for parameter, value in zip(self.others, values[2 * n :], strict=True):
            parameter.data.copy_(value)
        for layer in self.looked_up:
            weight = next(weight for weight in self._trained if weight.is_of(layer))
            layer.codebooks.data, layer.scales.data = weight.codebooks, weight.scales

    @torch.no_grad()
    def forget_pass(self) -> None:
        """A pass that does not count was made, or broken off: none of its gradients stay."""
        self.together.gradient.zero_()
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.grad = None
        for weight in self.weights:
            weight.forget_pass()

    @torch.no_grad()
    def store(self) -> None:
        """Put the values, rounded, and the codes into the model."""
        for parameter, dtype, value in zip(
            self.together.parameters, self.together.dtypes, self.together.values(), strict=True
        ):
            parameter.data = value.to(dtype, copy=True)
        for layer, _ in zip(self.looked_up, self._dtypes, strict=True):
            layer.output_dtype = None
        for weight in self._trained:
            weight.layer.codes.copy_(weight.codes)


def _ask(model: nn.Module, asked: Sequence[nn.Parameter]) -> None:
    model.requires_grad_(False)
    for parameter in asked:
        parameter.requires_grad_()


def _moving(total: Tensor) -> Callable[[Tensor], None]:
    def move(parameter: Tensor) -> None:
        assert parameter.grad is not None
        total.add_(parameter.grad)
        parameter.grad = None

    return move


def _linear(layer: Any, weight: TunedWeight) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        return nn.functional.linear(x, weight(x.dtype), layer.bias)

    return forward


def _checkpointed(block: nn.Module) -> Callable[..., Any]:
    run = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return run(*args, **kwargs)
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": _contexts}
        return checkpoint(run, *args, **options, **kwargs)

    return forward


class _Again:
    """Around what is run again for its gradients: uses of weights in it were counted before."""

    runs = False

    def __enter__(self) -> None:
        self.runs = True

    def __exit__(self, *exception: object) -> None:
        self.runs = False


_again = _Again()


def _contexts() -> tuple[contextlib.AbstractContextManager[Any], contextlib.AbstractContextManager[Any]]:
    return contextlib.nullcontext(), _again
