"""What a method is given, what it gives back and what it can be asked: the protocol of `aqlm_c.methods`."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import numpy as np

from ..core import arrays, verbs
from ..core.hessian import Hessian
from ..core.verbs import Array
from ..format import Format


@dataclasses.dataclass(frozen=True)
class LayerProblem:
    """One weight to quantize: what every method is given.

    name: the layer's, for messages. weight: finite float32 [out, in]. hessian: of its inputs. dtype: "float16",
    "bfloat16" or "float32", to whose values codebooks and scales are restricted. seed: of everything random.
    """

    name: str
    weight: Array
    hessian: Hessian
    format: Format
    dtype: str = "float16"
    seed: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        out_features, in_features = self.weight.shape
        return int(out_features), int(in_features)


@dataclasses.dataclass
class QuantizedWeight:
    """A weight in the AQLM format (arXiv 2401.06118, section 3) and how it came about.

    codes: int8 (nbits_per_codebook <= 8) or int16 [out, in / g, num_codebooks], as on disk. codebooks:
    float32 [num_codebooks, 2^nbits, 1, g]; scales: float32 [out, 1, 1, 1]; both hold only values of `dtype`.
    relative_error: tr(D H D^T) / tr(W H W^T) of these very values, D = W - Wq; signal: tr(W H W^T). seconds: by step.
    history: (step, relative error after it under the damped H), from the start to the end.
    """

    codes: Array
    codebooks: Array
    scales: Array
    dtype: str
    relative_error: float
    seconds: dict[str, float]
    history: list[tuple[str, float]]
    signal: float = 0.0

    @property
    def format(self) -> Format:
        """By the shape of the codebooks."""
        return Format.of_codebooks(tuple(self.codebooks.shape))

    def tensors(self) -> dict[str, Array]:
        """Codes, codebooks and scales by name."""
        return {"codes": self.codes, "codebooks": self.codebooks, "scales": self.scales}

    def decode(self) -> Array:
        """The quantized weight, float32 [out, in]."""
        return verbs.decode_rows(self.codes, self.codebooks, self.scales)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a method does to one weight, in units whose speed a machine has.

    flop: in fp32, of the C core. group_searches: searches of one group's codes. Those of `again` are of one
    `search_again`. factors: whether H is factored for it, once for all layers with the same inputs.
    """

    flop: float = 0.0
    group_searches: float = 0.0
    flop_again: float = 0.0
    group_searches_again: float = 0.0
    factors: bool = False


class Method(Protocol):
    """A method to quantize a weight, behind its name in `aqlm_c.methods.METHODS`; without state.

    `options` are an instance of `options_type`, whose fields are the method's options on the command line, in YAML
    files and in Python.
    """

    options_type: type[Any]

    def check(self, format: Format, options: Any) -> None:
        """Raise ValueError, before any work, for a format that the method cannot quantize to."""

    def quantize(self, problem: LayerProblem, options: Any) -> QuantizedWeight:
        """Find codes, codebooks and scales. Raises ValueError for an H under which the weight has no output."""

    def search_again(self, problem: LayerProblem, quantized: QuantizedWeight, options: Any) -> Array | None:
        """Better codes, as on disk, under the codebooks and scales of `quantized`; None: the method has no such."""

    def cost(self, format: Format, shape: tuple[int, int], options: Any) -> Cost:
        """What `quantize` costs for a weight of this shape."""

    def seconds_per_group(self, format: Format, options: Any) -> float:
        """How long one of `Cost.group_searches` takes here and now; 0 for a method without. Takes a few 10 ms."""


def signal_of(weight: Array, hessian: Hessian) -> float:
    """tr(W H W^T); ValueError if it is not above zero."""
    signal = verbs.quantization_error(weight, hessian.H)
    if not signal > 0:
        raise ValueError("H: got one under which this weight has no output (tr(W H W^T) is 0), expected some signal")
    return signal


def finished(
    problem: LayerProblem,
    codes: Array,
    codebooks: Array,
    scales: Array,
    signal: float,
    seconds: dict[str, float],
    history: list[tuple[str, float]],
) -> QuantizedWeight:
    """The result of working codes [out, J, K], codebooks [K, E, g] and scales [out], with its error under H itself."""
    error = verbs.quantization_error(problem.weight, problem.hessian.H, codes, codebooks, scales) / signal
    return QuantizedWeight(
        codes=verbs.codes_to_disk(codes, problem.format.nbits_per_codebook),
        codebooks=codebooks[:, :, None, :],
        scales=scales[:, None, None, None],
        dtype=problem.dtype,
        relative_error=max(error, 0.0),  # a sum over a rounded H may fall a little below
        seconds=seconds,
        history=history,
        signal=signal,
    )


def gaussian_references(problem: LayerProblem, signal: float) -> tuple[float | None, float | None]:
    """Relative errors of Gaussian weights under this H at the code rate and at the true rate (docs/method.md)."""
    if not signal > 0:
        return None, None
    share = arrays.gaussian_signal(problem.weight, problem.hessian.H)
    rates = (problem.format.code_bits_per_weight(), problem.format.bits_per_weight(*problem.shape))
    eigenvalues: np.ndarray = problem.hessian.eigenvalues
    code, true = (verbs.gaussian_reference(eigenvalues, rate) * share / signal for rate in rates)
    return code, true
