"""QuIP# (arXiv 2402.04396): random Hadamard transforms on both sides, then LDLQ of groups of 8 to the E8P codebook."""

from __future__ import annotations

import time

import numpy as np

from ..core import arrays, rounding
from ..errors import wrong
from ..format import Format
from .base import Cost, DenseMethod, DenseWeight, LayerProblem, dense_result, whole_bits
from .incoherence import RandomHadamard, decoded_at_best, rotated, rotated_back, rotated_hessian
from .quip import QuipOptions

# By bits per weight: the scale and the residual codebook's that lie best for normal numbers of variance 1, and scales
# that are tried beside it: errors that are fed back make the weights larger.
_SCALES = {2: 1.0, 3: 1.07, 4: 1.12}
_RESIDUAL = {2: 1.0, 3: 1 / 2.15, 4: 1 / 3.8}
_TRIED = (0.9, 0.95, 1.0, 1.05, 1.1, 1.2, 1.4, 1.7)


class QuipSharp(DenseMethod):
    """W and H are multiplied by Hadamard matrices after random signs, on the sides of the inputs and of the outputs
    (block-diagonal ones where no matrix of that order is known). Groups of 8 columns then go to the nearest vector of
    E8P, 2^16 of them, and their errors are made up for by the groups after them, largest trace of H first. 3 and 4 bits
    have a second codebook for what is left: 256 short vectors of E8, and E8P again. The scale is the one of least error
    on some rows. E8P's magnitudes are fitted to normal numbers, of which its squared error is .0888, else .0916. On a
    GPU's layer the transforms and the factor of H are the GPU's, the rounding is done in CPU memory.

    Its file has b bits for each weight, a scale of 16 bits and a sign for each input and output; the codebooks are the
    same for all models, and part of the method.
    """

    options_type = QuipOptions

    def check(self, format: Format, options: QuipOptions) -> None:
        if whole_bits(format) not in _SCALES:
            raise wrong("scheme", format.scheme, "2, 3 or 4 bits per weight, such as '2x8g8', '3x8g8' or '4x8g8'")

    def check_layer(self, name: str, shape: tuple[int, int], format: Format, options: QuipOptions) -> None:
        if shape[1] % 8:
            raise wrong("in_features", shape[1], f"a multiple of 8 of layer {name}")

    def bits_per_weight(self, format: Format, shape: tuple[int, int], options: QuipOptions) -> float:
        out, n = shape
        return whole_bits(format) + (16 + out + n) / (out * n)

    def quantize(self, problem: LayerProblem, options: QuipOptions) -> DenseWeight:
        started = time.perf_counter()
        (out, n), bits = problem.shape, whole_bits(problem.format)
        inputs, outputs = RandomHadamard(n, problem.seed, 0), RandomHadamard(out, problem.seed, 1)
        W = arrays.to_numpy(rotated(problem.weight, inputs, outputs))
        hessian = rotated_hessian(problem.hessian, inputs)
        order, feedback, _ = hessian.factor(8, options.quip_damp)
        factor = (arrays.to_numpy(order), arrays.to_numpy(feedback))
        factored = time.perf_counter()

        def decode(weight: np.ndarray, scale: float) -> np.ndarray:
            return rounding.round_lattice(weight, factor, scale, bits - 2, _RESIDUAL[bits])[0]

        decoded = decoded_at_best(W, hessian, problem.seed, _SCALES[bits], _TRIED, decode)
        best = arrays.to_kind(decoded, problem.weight)
        seconds = {"factor": factored - started, "round": time.perf_counter() - factored}
        true = self.bits_per_weight(problem.format, problem.shape, options)
        return dense_result(problem, rotated_back(best, inputs, outputs), true, seconds, "rounded")

    def cost(self, format: Format, shape: tuple[int, int], options: QuipOptions) -> Cost:
        out, n = shape
        return Cost(flop=float(out) * n * n + 1500.0 * out * n, factors=True)


METHOD = QuipSharp()
