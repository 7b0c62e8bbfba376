"""QuIP (arXiv 2307.13304): random orthogonal matrices on both sides, then LDLQ to a uniform grid."""

from __future__ import annotations

import dataclasses
import time

import numpy as np

from ..config import MethodOptions
from ..core import arrays, rounding
from ..errors import share
from ..format import Format
from .base import Cost, DenseMethod, DenseWeight, LayerProblem, dense_result, whole_bits
from .incoherence import RandomOrthogonal, decoded_at_best, rotated, rotated_back, rotated_hessian

# Steps of the grid of 2^b values that lie best for normal numbers of variance 1 (Max, 1960), and those tried beside.
_STEPS = {1: 1.596, 2: 0.996, 3: 0.586, 4: 0.335, 5: 0.188, 6: 0.104, 7: 0.0569, 8: 0.0308}
_TRIED = (0.9, 1.0, 1.1, 1.2, 1.35, 1.6, 2.0, 2.5)


@dataclasses.dataclass(frozen=True)
class QuipOptions(MethodOptions):
    """Options of QuIP and QuIP#. quip_damp: added to H's diagonal, in units of its mean.

    Raises ValueError naming the field, its value and what was expected.
    """

    quip_damp: float = 0.01

    def __post_init__(self) -> None:
        share("quip_damp", self.quip_damp)


class Quip(DenseMethod):
    """W and H are rotated by Kronecker products of random orthogonal matrices, on the sides of the inputs and of the
    outputs. Each column then goes to the nearest of the 2^b values of one grid for the whole weight, b being the
    scheme's bits per weight, and its error is made up for by the columns after it (LDLQ), largest diagonal of H first.
    The scale is the one of least error on some rows. Computed in CPU memory, also for a GPU's layer.

    Its file has b bits for each weight, a scale of 16 bits and a seed of 64.
    """

    options_type = QuipOptions

    def check(self, format: Format, options: QuipOptions) -> None:
        whole_bits(format)

    def check_layer(self, name: str, shape: tuple[int, int], format: Format, options: QuipOptions) -> None:
        for side, n in zip(("out_features", "in_features"), shape, strict=True):
            RandomOrthogonal.check(f"{name}: {side}", n)

    def bits_per_weight(self, format: Format, shape: tuple[int, int], options: QuipOptions) -> float:
        return whole_bits(format) + (16 + 64) / (shape[0] * shape[1])

    def quantize(self, problem: LayerProblem, options: QuipOptions) -> DenseWeight:
        started = time.perf_counter()
        (out, n), bits = problem.shape, whole_bits(problem.format)
        inputs, outputs = RandomOrthogonal(n, problem.seed, 0), RandomOrthogonal(out, problem.seed, 1)
        W = arrays.to_numpy(rotated(problem.weight, inputs, outputs))
        hessian = rotated_hessian(problem.hessian, inputs)
        factor = hessian.factor_columns(True, options.quip_damp)
        factored = time.perf_counter()

        def decode(weight: np.ndarray, step: float) -> np.ndarray:
            return _rounded(weight, factor, bits, step)

        decoded = decoded_at_best(W, hessian, problem.seed, _STEPS[bits], _TRIED, decode)
        found = arrays.to_kind(rotated_back(decoded, inputs, outputs), problem.weight)
        seconds = {"factor": factored - started, "round": time.perf_counter() - factored}
        return dense_result(
            problem, found, self.bits_per_weight(problem.format, problem.shape, options), seconds, "rounded"
        )

    def cost(self, format: Format, shape: tuple[int, int], options: QuipOptions) -> Cost:
        out, n = shape
        return Cost(flop=float(out) * n * n + 8.0 * out * n * (out**0.5 + n**0.5), factors=True)


def _rounded(weight: np.ndarray, factor: tuple[np.ndarray, np.ndarray], bits: int, step: float) -> np.ndarray:
    """What weight [out, in] decodes to on the grid of `step`."""
    zero = (2**bits - 1) / 2
    grids = (np.full((len(weight), 1), step, np.float32), np.full((len(weight), 1), zero, np.float32))
    return rounding.round_columns(weight, factor, bits, weight.shape[1], grids=grids).decode()


METHOD = Quip()
