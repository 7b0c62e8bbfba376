"""The compute verbs of quantization by kind of array: NumPy arrays go to `_core`, tensors to ``torch.ops.aqlm_c``.

Both are the same C on a CPU; the tensors of a GPU take what is registered there under the same schema. `_core` answers
Ctrl-C and needs no torch, so weights in CPU memory are given to it as NumPy arrays (`arrays.as_matrix`).

Letters: out, in = features; g = in_group_size; J = in / g; K = num_codebooks; E = 2 ** nbits_per_codebook. Arrays are
float32 unless said otherwise; working codes are uint16 [out, J, K]; out_group_size is 1. Each verb raises, naming the
argument, for a wrong dtype, shape or value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias, Union

import numpy as np

from .. import _core
from ..format import Format

if TYPE_CHECKING:
    import torch

Array: TypeAlias = Union[np.ndarray, "torch.Tensor"]


def _library(array: Array) -> Any:
    """What has the verbs for arrays of this kind."""
    if isinstance(array, np.ndarray):
        return _core
    return _Ops()


class _Ops:
    """``torch.ops.aqlm_c`` with the Ctrl-C of `_core`, of which torch makes another error's cause."""

    def __getattr__(self, verb: str) -> Callable[..., Any]:
        from .extensions import ops

        def call(*arguments: Any) -> Any:
            try:
                return getattr(ops, verb)(*arguments)
            except Exception as error:
                if isinstance(error.__cause__, KeyboardInterrupt):
                    raise error.__cause__ from None
                raise

        return call


def residual_kmeans(
    weight: Array,
    scales: Array,
    format: Format,
    init_max_iter: int,
    tolerance: float,
    seed: int,
    column_weight: Array | None = None,
) -> tuple[Array, Array]:
    """Codes and codebooks [K, E, g] by residual k-means of weight [out, in] / scales [out] (AQLM, section 3.1).

    column_weight [in] weighs each input's squared distance.
    """
    sizes = (format.num_codebooks, format.nbits_per_codebook, format.in_group_size)
    return _library(weight).residual_kmeans(weight, scales, *sizes, init_max_iter, tolerance, seed, column_weight)


def accumulate_hessian(sum: Array, x: Array) -> None:
    """sum [in, in], float64, += x^T x for x [n, in], in place."""
    _library(sum).accumulate_hessian(sum, x)


def accumulate_product(sum: Array, x: Array, y: Array) -> None:
    """sum [in_x, in_y], float64, += x^T y for x [n, in_x] and y [n, in_y], in place."""
    _library(sum).accumulate_product(sum, x, y)


def correct_weight(weight: Array, cross: Array, H: Array, alpha: float, relative_damp: float) -> Array:
    """weight + alpha weight cross (H + relative_damp mean(diag H) I)^-1 (QEP, arXiv 2504.09629).

    cross: (X - X^)^T X^ / n [in, in] of the inputs X that the weight was made for and those X^ that it gets, H: X^^T X^
    / n. At alpha 1 and without damping no weight's outputs for X^ come nearer those of `weight` for X.
    """
    return _library(weight).correct_weight(weight, cross, H, alpha, relative_damp)


def factor_hessian(H: Array, in_group_size: int, relative_damp: float) -> tuple[Array, Array, Array]:
    """(order int32 [J], feedback [in, in], metric [J, g, g]): the block factor of H for sequential error feedback."""
    return _library(H).factor_hessian(H, in_group_size, relative_damp)


def search_ldl(
    weight: Array,
    order: Array,
    feedback: Array,
    metric: Array,
    codebooks: Array,
    scales: Array,
    beam_size: int,
    pairs: bool,
) -> Array:
    """Codes by one pass of sequential error feedback; order, feedback and metric of `factor_hessian`."""
    return _library(weight).search_ldl(weight, order, feedback, metric, codebooks, scales, beam_size, pairs)


def search_sweep(
    codes: Array,
    weight: Array,
    H: Array,
    codebooks: Array,
    scales: Array,
    beam_size: int,
    seed: int,
    pairs: bool = False,
) -> Array:
    """New codes by one coordinate sweep over the groups in a random order (AQLM, section 3.2)."""
    return _library(weight).search_sweep(codes, weight, H, codebooks, scales, beam_size, seed, pairs)


def encode_groups(
    codes: torch.Tensor,
    groups: torch.Tensor,
    codebooks: torch.Tensor,
    scales: torch.Tensor,
    beam_size: int,
    pairs: bool = False,
) -> torch.Tensor:
    """Codes [n, K] of single groups [n, g], each of the scale [n] that it has, nearest in plain L2: `search_sweep` of n
    rows of one group under H = I, so exact for K = 1, and for K = 2 with beam_size 0; else no worse than `codes`.
    """
    n, g = groups.shape
    identity = groups.new_zeros(g, g).fill_diagonal_(1)
    arguments = codes.view(n, 1, -1), groups, identity, codebooks, scales, beam_size, 0, pairs
    found: torch.Tensor = _library(groups).search_sweep(*arguments)
    return found.view(n, -1)


def hadamard(x: Array, inverse: bool = False) -> Array:
    """x H^T / sqrt(order) of each run of `order` values of the rows of x [rows, n]; x H / sqrt(order) if `inverse`.

    H is a Hadamard matrix of the largest order that divides n and is known (`rounding.hadamard_order`).
    """
    return _library(x).hadamard(x, inverse)


def update_codebooks(codebooks: Array, weight: Array, H: Array, codes: Array, scales: Array, cg_steps: int) -> Array:
    """Codebooks [K, E, g] after cg_steps conjugate-gradient steps towards the least-squares ones."""
    return _library(weight).update_codebooks(codebooks, weight, H, codes, scales, cg_steps)


def update_scales(scales: Array, weight: Array, H: Array, codes: Array, codebooks: Array) -> Array:
    """The scales [out] that minimise the error, in closed form."""
    return _library(weight).update_scales(scales, weight, H, codes, codebooks)


def update_adam(
    state: tuple[Array, Array, Array],
    weight: Array,
    H: Array,
    codes: Array,
    steps: int,
    learning_rate: float,
    steps_before: int,
) -> tuple[Array, Array, Array]:
    """(codebooks, scales, moments) after steps of Adam from `state` (AQLM, section 3.3).

    moments: float64 [2, K E g + out], zeros before the first of steps_before + steps.
    """
    return _library(weight).update_adam(*state, weight, H, codes, steps, learning_rate, steps_before)


def buffer_step(
    buffer: Array,
    gradient: Array,
    moments: tuple[Array | None, Array, Array | None],
    divisor: float,
    learning_rate: float,
    betas: tuple[float, float],
    step: int,
) -> None:
    """Step number `step`, from 1 on, of Adam for a buffer [out, in] of PV-Tuning (arXiv 2405.14852), in place.

    gradient: [out, in], of tensors also float16 or bfloat16; it is divided by `divisor`. moments: first, second and
    scales, in place, zeros before step 1: float32 [out, in] twice and None, or int8, uint8 and float32 [2, ceil(out in
    / 256)]; the first is None for a beta1 of 0. eps is 1e-12.
    """
    _library(buffer).buffer_step(buffer, gradient, *moments, divisor, learning_rate, *betas, step)


def quantization_error(
    weight: Array, H: Array, codes: Array | None = None, codebooks: Array | None = None, scales: Array | None = None
) -> float:
    """tr(D H D^T), D = W - Wq; without codes Wq is 0, which gives the signal tr(W H W^T)."""
    return float(_library(weight).quantization_error(weight, H, codes, codebooks, scales))


def gaussian_reference(eigenvalues: np.ndarray, rate: float) -> float:
    """Relative error of ideal coding of Gaussian weights at `rate` bits per weight; eigenvalues float64 [in] of H."""
    return _core.gaussian_reference(eigenvalues, rate)


def codes_to_disk(codes: Array, nbits_per_codebook: int) -> Array:
    """Working codes as they are stored: int8 for up to 8 bits, else int16; code - 2^B from 2^(B-1) on."""
    return _library(codes).pack_codes(codes, nbits_per_codebook)


def codes_from_disk(codes: Array, nbits_per_codebook: int) -> Array:
    """Working codes of stored ones."""
    return _library(codes).unpack_codes(codes, nbits_per_codebook)


def decode_rows(codes: Array, codebooks: Array, scales: Array) -> Array:
    """W [out, in] of a stored weight: codes [O, J, K] as on disk, codebooks [K, E, og, g], scales [O, 1, 1, 1]."""
    return _library(codes).decode_rows(codes, codebooks, scales)
