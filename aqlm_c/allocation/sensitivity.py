"""What an error in each weight does to the model's predictions: second-order, from one pass of gradients."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..calibrate.hessians import HessianSums
from ..calibrate.sources import embedding_hessian
from ..core.hessian import Hessian
from ..core.runtime import deterministic
from ..files import available_memory
from ..model.embeddings import Embeddings
from ..model.probe import input_device
from .rates import water_level

log = logging.getLogger("aqlm_c")

_BYTES = 24  # for each value of H: its sum in float64, H, eigenvectors and what finding them takes
_SHARE = 0.5  # of the memory that is free
_SCALE = 256.0  # of float16's gradients, which are small


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """Of one weight [out, in].

    eigenvalues: float64 [in] of H = X^T X / n_tokens, whose diagonal has the mean 1. squares: float64 [in], for each
    eigenvector u the sum over rows o of r_o^2 (g_o u)^2 per token, r_o^2 being the mean square of a row of the weight
    and g_o its gradient of -log p of tokens drawn from p, what the model says: their mean is the diagonal of Fisher's
    matrix. energy: the sum of r_o^2. signal: tr(W H W^T). damp: of H while it is quantized, over its mean diagonal.
    """

    name: str
    out_features: int
    in_features: int
    eigenvalues: np.ndarray
    squares: np.ndarray
    energy: float
    signal: float
    damp: float

    def _shares(self, rate: float) -> np.ndarray:
        """Of a row's mean square that is its error along each eigenvector, coded at `rate` bits by reverse
        water-filling, to which error feedback over groups comes close.
        """
        damped = self.eigenvalues + self.damp * self.eigenvalues.mean()
        with np.errstate(divide="ignore"):
            return np.minimum(water_level(damped, rate) / damped, 1.0)

    def kl(self, rate: float) -> float:
        """KL(original || model) per token in nats, to second order, if this weight alone is coded at `rate` bits."""
        return float(0.5 * self.squares @ self._shares(rate))

    def relative_error(self, rate: float) -> float:
        """tr(D H D^T) / tr(W H W^T) that is expected then."""
        error = self.energy * float(self.eigenvalues @ self._shares(rate))
        return error / self.signal if self.signal > 0 else 0.0

    @property
    def kl_per_error(self) -> float:
        """Nats per token and relative error, at the rate of 2 bits."""
        error = self.relative_error(2.0)
        return self.kl(2.0) / error if error > 0 else 0.0


def measure(
    model: Any,
    sequences: Tensor,
    modules: Mapping[str, Any],
    embeddings: Embeddings,
    *,
    samples: int = 8,
    damp: float = 0.0,
    seed: int = 0,
    on_step: Callable[[int, int], None] | None = None,
) -> dict[str, Sensitivity]:
    """Sensitivities of the weights of `modules`, linears and embeddings, by their names.

    KL(p || q) of a model with the weights W + D is, to second order, half of the mean of (sum of g D)^2 over tokens
    drawn from p, g being the gradient of -log p of these: Fisher's information is the curvature of KL. (That KL, and
    with it log-perplexity, adds up over layers in proportion to their squared errors is the linearity theorem of
    HIGGS, arXiv 2411.17525, section 3, which measures its coefficients with noise, one layer after another.)
    The error D of a layer has the shape that error feedback gives it under H: the less, the larger H is.

    The model is on one device. It runs over token ids `sequences` [n, length] for H, and again, with gradients, over
    `samples` of them that are spread evenly; once for each part of the layers whose H memory holds. on_step: told of
    sequences done with gradients, of so many. Raises ValueError, naming the layer, for NaN or Inf in gradients.
    """
    model.eval()
    drawn = sequences[torch.linspace(0, len(sequences) - 1, min(samples, len(sequences))).round().long()]
    parts = list(_parts(modules, embeddings, _room(input_device(model))))
    found: dict[str, Sensitivity] = {}
    if len(parts) > 1:
        log.info("H of all layers do not fit memory: sensitivities are measured in %d parts", len(parts))
    for number, part in enumerate(parts):
        measured = _Part(part, hessians_of(model, sequences, part, embeddings), damp)
        with deterministic():
            measured.run(model, drawn, seed, _shifted(on_step, number, len(parts), len(drawn)))
        found |= measured.sensitivities(drawn.numel())
    return {name: found[name] for name in modules}


def _shifted(on_step: Callable[[int, int], None] | None, part: int, parts: int, n: int) -> Callable[[int], None]:
    return lambda done: None if on_step is None else on_step(part * n + done, parts * n)


def _room(device: torch.device) -> int:
    """Values of H that may be there at once."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    return int(_SHARE * (2**34 if free is None else free) / _BYTES)


def _parts(modules: Mapping[str, Any], embeddings: Embeddings, room: int) -> Iterator[dict[str, Any]]:
    """`modules` in their order, so many at a time that their H fit."""
    part: dict[str, Any] = {}
    values = 0
    for name, module in modules.items():
        size = module.weight.shape[1] ** 2
        if part and values + size > room:
            yield part
            part, values = {}, 0
        part[name] = module
        values += size
    if part:
        yield part


def hessians_of(
    model: Any, sequences: Tensor, modules: Mapping[str, Any], embeddings: Embeddings
) -> dict[str, Hessian]:
    """H of each weight in the model as it is; of an input embedding as in its quantization."""
    linears = {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
    tied = embeddings.tied and embeddings.input in modules
    if tied:
        linears[embeddings.output] = model.get_submodule(embeddings.output)
    found: dict[str, Hessian] = {}
    if linears:
        sums = HessianSums(linears)
        sums.gather_whole(model, sequences, 1)
        found = sums.hessians()
    if embeddings.input in modules:
        width, device = modules[embeddings.input].weight.shape[1], input_device(model)
        of_output = found[embeddings.output] if tied else None
        found[embeddings.input] = embedding_hessian(width, of_output, device)
    return {name: found[name] for name in modules}


class _Part:
    """Weights whose gradients are seen in one pass."""

    def __init__(self, modules: Mapping[str, Any], hessians: Mapping[str, Hessian], damp: float) -> None:
        self.modules, self.damp = modules, damp
        self._bases: dict[int, tuple[Tensor, Tensor]] = {}
        self._of: dict[str, tuple[Tensor, Tensor]] = {}  # eigenvalues, eigenvectors
        self._rows: dict[str, Tensor] = {}
        self._squares: dict[str, Tensor] = {}
        self._kept = list(hessians.values())  # whose ids are keys
        for name, module in modules.items():
            hessian, weight = hessians[name], module.weight.detach()
            if id(hessian) not in self._bases:
                self._bases[id(hessian)] = _eigen(torch.as_tensor(hessian.H).to(weight.device))
            self._of[name] = self._bases[id(hessian)]
            self._rows[name] = weight.float().square().mean(1).sqrt()[:, None]
            self._squares[name] = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)

    def run(self, model: Any, sequences: Tensor, seed: int, on_step: Callable[[int], None]) -> None:
        """Add up the squares of gradients of all sequences."""
        with _gradients_of(model, self.modules, self._add):
            for number, ids in enumerate(sequences.to(input_device(model))):
                generator = torch.Generator(ids.device).manual_seed(seed + 7919 * number)
                logits = model(input_ids=ids[None], use_cache=False).logits[0].float()
                drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
                loss = nn.functional.cross_entropy(logits, drawn, reduction="sum")
                (loss * self._scale(model)).backward()
                on_step(number + 1)
        scale = self._scale(model) ** 2
        for squares in self._squares.values():
            squares /= scale

    @staticmethod
    def _scale(model: Any) -> float:
        return _SCALE if model.dtype == torch.float16 else 1.0

    def _add(self, name: str, gradient: Tensor) -> None:
        scaled = gradient.float() * self._rows[name]
        _, vectors = self._of[name]
        self._squares[name] += (scaled @ vectors if vectors.numel() else scaled).square().sum(0).double()

    def sensitivities(self, tokens: int) -> dict[str, Sensitivity]:
        """Of each weight, after `run` over so many tokens."""
        found = {}
        for name, module in self.modules.items():
            values, vectors = self._of[name]
            weight, squares = module.weight.detach().float(), self._squares[name] / tokens
            if not torch.isfinite(squares).all():
                raise ValueError(f"{name}: got NaN or Inf in gradients, expected finite values")
            along = weight @ vectors if vectors.numel() else weight
            found[name] = Sensitivity(
                name=name,
                out_features=weight.shape[0],
                in_features=weight.shape[1],
                eigenvalues=values.double().cpu().numpy(),
                squares=squares.cpu().numpy(),
                energy=self._rows[name].double().square().sum().item(),
                signal=(along.double().square().sum(0) @ values.double()).item(),
                damp=self.damp,
            )
        return found


def _eigen(H: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues float32 [in] of H with a diagonal of mean 1, and eigenvectors [in, in], empty where H is white."""
    mean = H.diagonal().mean()
    if not mean > 0:
        return torch.ones_like(H.diagonal()), H.new_empty(0)
    H = H / mean
    if torch.equal(H, torch.eye(len(H), dtype=H.dtype, device=H.device)):
        return torch.ones_like(H.diagonal()), H.new_empty(0)
    values, vectors = torch.linalg.eigh(H)
    return values.clamp(min=0), vectors


@contextlib.contextmanager
def _gradients_of(model: Any, modules: Mapping[str, Any], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Backward passes give `see` the gradient of each weight, and keep none of them."""
    asked = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.requires_grad_(False)
    handles = []

    def hook(name: str) -> Callable[[Tensor], None]:
        def take(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None:
                with torch.no_grad():
                    see(name, gradient)

        return take

    for name, module in modules.items():
        module.weight.requires_grad_(True)
        handles.append(module.weight.register_post_accumulate_grad_hook(hook(name)))
    try:
        with torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(asked[name])
