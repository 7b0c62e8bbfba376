"""What a method is given, what it gives back and what it can be asked: the protocol of `aqlm_c.methods`."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Protocol, TypeAlias

import numpy as np

from ..core import arrays, grid, verbs
from ..core.hessian import Hessian
from ..core.verbs import Array
from ..errors import wrong
from ..format import Format

log = logging.getLogger("aqlm_c")


@dataclasses.dataclass(frozen=True)
class LayerProblem:
    """One weight to quantize: what every method is given.

    name: the layer's, for messages. weight: finite float32 [out, in], the layer's times 2^-exponent. hessian: of its
    inputs. dtype: "float16", "bfloat16" or "float32", to whose values codebooks and scales are restricted. seed: of
    everything random.
    """

    name: str
    weight: Array
    hessian: Hessian
    format: Format
    dtype: str = "float16"
    seed: int = 0
    exponent: int = 0

    @cached_property
    def signal(self) -> float:
        """tr(W H W^T) of `weight` under `hessian.H`; 0 where the weight has no output."""
        return max(verbs.quantization_error(self.weight, self.hessian.H), 0.0)

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
    relative_error: tr(D H D^T) / tr(W H W^T) of these very values, D = W - Wq, and 0 for a weight of zeros, which they
    are then too; signal: tr(W H W^T). seconds: by step.
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

    @property
    def bits_per_weight(self) -> float:
        """True bits per weight, those of tables and scales among them."""
        rows, groups, _ = self.codes.shape
        return self.format.bits_per_weight(rows * self.format.out_group_size, groups * self.format.in_group_size)

    def tensors(self) -> dict[str, Array]:
        """Codes, codebooks and scales by name."""
        return {"codes": self.codes, "codebooks": self.codebooks, "scales": self.scales}

    def decode(self) -> Array:
        """The quantized weight, float32 [out, in]."""
        return verbs.decode_rows(self.codes, self.codebooks, self.scales)


@dataclasses.dataclass
class DenseWeight:
    """A quantized weight that is no AQLM checkpoint, as what it decodes to, and how it came about.

    weight: float32 [out, in], values of `dtype`, the model's. bits_per_weight: of a file of the method, codes, scales,
    tables and signs counted, whatever the dense weight takes. The rest: as in `QuantizedWeight`, relative_error being
    that of these very values.
    """

    weight: Array
    dtype: str
    bits_per_weight: float
    relative_error: float
    seconds: dict[str, float]
    history: list[tuple[str, float]]
    signal: float = 0.0

    def tensors(self) -> dict[str, Array]:
        """The weight by its name."""
        return {"weight": self.weight}

    def decode(self) -> Array:
        """The quantized weight, float32 [out, in]."""
        return self.weight


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
    tunable: bool  # whether block fine-tuning may train codebooks and scales that it gives

    def is_dense(self, options: Any) -> bool:
        """Whether results are `DenseWeight`, no AQLM checkpoint."""

    def bits_per_weight(self, format: Format, shape: tuple[int, int], options: Any) -> float:
        """True bits per weight of a weight [out, in] in a file of this method, tables, scales and signs counted."""

    def check_layer(self, name: str, shape: tuple[int, int], format: Format, options: Any) -> None:
        """Raise ValueError, before any work, for the shape [out, in] of a layer that the method cannot quantize."""

    def check(self, format: Format, options: Any) -> None:
        """Raise ValueError, before any work, for a format that the method cannot quantize to."""

    def quantize(self, problem: LayerProblem, options: Any) -> Result:
        """Find codes, codebooks and scales of a weight that is not zero everywhere, scales of 0 for rows of zeros."""

    def search_again(self, problem: LayerProblem, quantized: QuantizedWeight, options: Any) -> Array | None:
        """Better codes, as on disk, under the codebooks and scales of `quantized`; None: the method has no such."""

    def cost(self, format: Format, shape: tuple[int, int], options: Any) -> Cost:
        """What `quantize` costs for a weight of this shape."""

    def remedies(self, format: Format, options: Mapping[str, Any]) -> list[str]:
        """What may lower the error of a layer of this format, in words after "give the layer"; options: as they were,
        by name, where known.
        """

    def seconds_per_group(self, format: Format, options: Any, like: Array | None = None) -> float:
        """How long one of `Cost.group_searches` takes here and now, where `like` is (None: on the CPU); 0 for a method
        without. Takes a few 10 ms.
        """


Result: TypeAlias = QuantizedWeight | DenseWeight


class CodesMethod:
    """What methods share whose results are AQLM checkpoints."""

    tunable = True

    def is_dense(self, options: Any) -> bool:
        return False

    def bits_per_weight(self, format: Format, shape: tuple[int, int], options: Any) -> float:
        return format.bits_per_weight(*shape)

    def check_layer(self, name: str, shape: tuple[int, int], format: Format, options: Any) -> None:
        format.check_layer(name, *shape)


class UntunedMethod:
    """What methods share whose results nothing tunes nor searches again."""

    tunable = False

    def search_again(self, problem: LayerProblem, quantized: QuantizedWeight, options: Any) -> Array | None:
        return None

    def remedies(self, format: Format, options: Mapping[str, Any]) -> list[str]:
        return ["more bits", "another method"]

    def seconds_per_group(self, format: Format, options: Any, like: Array | None = None) -> float:
        return 0.0


class DenseMethod(UntunedMethod):
    """What methods share whose results are dense weights."""

    def is_dense(self, options: Any) -> bool:
        return True


def whole_bits(format: Format, most: int = 8) -> int:
    """Bits of a weight's code where the scheme has a whole number of them for each; ValueError naming it otherwise."""
    bits = format.code_bits_per_weight()
    if bits != int(bits) or not 1 <= bits <= most or format.out_group_size != 1:
        what = f"of 1 to {most} whole bits per weight, such as '2x8g8' for 2, '3x8g8' for 3 and '4x8g8' for 4"
        raise wrong("scheme", format.scheme, what)
    return int(bits)


def dense_result(
    problem: LayerProblem, decoded: Array, bits_per_weight: float, seconds: dict[str, float], step: str
) -> DenseWeight:
    """The result of a weight [out, in] that decodes to `decoded`, rounded to the problem's dtype; `step`: its last."""
    rounded = arrays.round_to(decoded, problem.dtype, problem.exponent)
    error = relative_error(problem, rounded)
    signal = math.ldexp(problem.signal, 2 * problem.exponent + problem.hessian.exponent)
    kept = arrays.scaled(rounded, problem.exponent)
    return DenseWeight(kept, problem.dtype, bits_per_weight, error, seconds, [(step, error)], signal)


def relative_error(problem: LayerProblem, decoded: Array) -> float:
    """tr(D H D^T) / tr(W H W^T) of D = W - decoded, [out, in]; 0 where a sum over a rounded H falls below it."""
    return max(verbs.quantization_error(problem.weight - decoded, problem.hessian.H) / problem.signal, 0.0)


def rounded_scales(problem: LayerProblem, scales: Array, moved: grid.Moved) -> Array:
    """Scales [out] on the grid of the problem's dtype; a warning if rows become zero by it."""
    rounded = arrays.round_to(scales, problem.dtype, moved.scales)
    lost = int(((scales != 0) & (rounded == 0)).sum())
    if lost:
        log.warning(
            *("%s: %d of %d rows are too small for %s beside the largest and become zero", problem.name, lost),
            *(problem.shape[0], problem.dtype),
        )
    return rounded


def finished(
    problem: LayerProblem,
    state: tuple[Array, Array, Array],
    moved: grid.Moved,
    seconds: dict[str, float],
    history: list[tuple[str, float]],
) -> QuantizedWeight:
    """The result of working codes [out, J, K], codebooks [K, E, g] and scales [out], with its error under H itself."""
    codes, codebooks, scales = state
    error = verbs.quantization_error(problem.weight, problem.hessian.H, *state) / problem.signal
    return QuantizedWeight(
        codes=verbs.codes_to_disk(codes, problem.format.nbits_per_codebook),
        codebooks=arrays.scaled(codebooks, moved.codebooks)[:, :, None, :],
        scales=arrays.scaled(scales, moved.scales)[:, None, None, None],
        dtype=problem.dtype,
        relative_error=max(error, 0.0),  # a sum over a rounded H may fall a little below
        seconds=seconds,
        history=history,
        signal=math.ldexp(problem.signal, 2 * problem.exponent + problem.hessian.exponent),
    )


def zero_weight(problem: LayerProblem) -> QuantizedWeight:
    """A weight of zeros, exactly: codes, codebooks and scales of zero."""
    (out, width), format = problem.shape, problem.format
    codes = np.zeros((out, width // format.in_group_size, format.num_codebooks), np.uint16)
    books = np.zeros((format.num_codebooks, format.entries, 1, format.in_group_size), np.float32)
    parts = (verbs.codes_to_disk(codes, format.nbits_per_codebook), books, np.zeros((out, 1, 1, 1), np.float32))
    found, zeros, none = (arrays.to_kind(arrays.to_numpy(part), problem.weight) for part in parts)
    return QuantizedWeight(found, zeros, none, problem.dtype, 0.0, {}, [("zero", 0.0)])


def gaussian_references(
    problem: LayerProblem, bits_per_weight: float | None = None
) -> tuple[float | None, float | None]:
    """Relative errors of Gaussian weights under this H at the code rate and at the true rate (docs/method.md), which is
    the format's where no other is given; None
    for a weight of zeros, and where the eigenvalues of H were not found.
    """
    eigenvalues = problem.hessian.eigenvalues if problem.signal > 0 else None
    if eigenvalues is None:
        return None, None
    share = arrays.gaussian_signal(problem.weight, problem.hessian.H)
    true = problem.format.bits_per_weight(*problem.shape) if bits_per_weight is None else bits_per_weight
    rates = (problem.format.code_bits_per_weight(), true)
    code, at_true = (verbs.gaussian_reference(eigenvalues, rate) * share / problem.signal for rate in rates)
    return code, at_true
