"""The verbs of methods that round weights to grids and lattices, and the transforms before (csrc/aqlm/rounding.h).

All but `hadamard` are computed in CPU memory, also for a layer on a GPU, of which a copy is made. Errors as in `verbs`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .. import _core
from . import arrays
from .verbs import Array, hadamard

__all__ = [
    "Columns",
    "factor_columns",
    "hadamard",
    "hadamard_order",
    "lattice_vectors",
    "nearest_in_lattice",
    "random_orthogonal",
    "rotate",
    "round_columns",
    "round_lattice",
]


class Columns(NamedTuple):
    """Weights on grids scales (codes - zeros): uint8 codes [out, in], scales and zeros float32 [out, in / group]."""

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray

    def decode(self) -> np.ndarray:
        """float32 [out, in]."""
        out, groups = self.scales.shape
        steps = self.codes.reshape(out, groups, -1).astype(np.float32) - self.zeros[:, :, None]
        return (self.scales[:, :, None] * steps).reshape(out, -1)


def factor_columns(H: np.ndarray, ordered: bool, relative_damp: float) -> tuple[np.ndarray, np.ndarray]:
    """(order int32 [in], feedback float32 [in, in]): the factor of H for error feedback from column to column."""
    return _core.factor_columns(H, ordered, relative_damp)


def round_columns(
    weight: Array,
    factor: tuple[np.ndarray, np.ndarray] | None,
    bits: int,
    group_size: int,
    *,
    symmetric: bool = False,
    at_start: bool = False,
    grids: tuple[np.ndarray, np.ndarray] | None = None,
) -> Columns:
    """Columns of weight [out, in] one after another to 2^bits values of the grid of their row and group.

    factor: of `factor_columns`; None: no column makes up for another. grids: scales and zeros [out, in / group_size]
    that are given; else those of least squared error are found, from the weight or `at_start` of each group from what
    errors have made of it.
    """
    W = arrays.to_numpy(weight)
    order, feedback = factor or (np.arange(W.shape[1], dtype=np.int32), None)
    return Columns(*_core.round_columns(W, order, feedback, bits, group_size, symmetric, at_start, *(grids or ())))


def round_lattice(
    weight: Array,
    factor: tuple[Array, Array] | None,
    scale: float,
    second: int = 0,
    residual_scale: float = 1.0,
    fitted: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """(decoded float32 [out, in], codes uint16 [out, in / 8, stages]) of groups of 8 columns in turn to scale E8P.

    factor: (order, feedback) of `verbs.factor_hessian` for groups of 8; None: no group makes up for another. second:
    bits per weight of a second codebook for what is left, times scale residual_scale: 2, 1 or 0, which is none. fitted:
    the first has the magnitudes that stand best for normal numbers.
    """
    W = arrays.to_numpy(weight)
    order, feedback = map(arrays.to_numpy, factor) if factor else (np.arange(W.shape[1] // 8, dtype=np.int32), None)
    return _core.round_lattice(W, order, feedback, scale, second, residual_scale, fitted)


def hadamard_order(n: int) -> int:
    """The largest divisor of n of which a Hadamard matrix is known; `hadamard` is block-diagonal where it is not n."""
    return _core.hadamard_order(n)


def random_orthogonal(n: int, seed: int) -> np.ndarray:
    """A random orthogonal matrix, float32 [n, n], n up to 4096."""
    return _core.random_orthogonal(n, seed)


def rotate(x: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """left^T X right of each row of x [rows, p q] as X [p, q]: its product with the Kronecker product of the two."""
    return _core.rotate(x, left, right)


def lattice_vectors(codes: np.ndarray, fitted: bool = True) -> np.ndarray:
    """Vectors [n, 8] of E8P, fitted to normal numbers or plain, with these codes uint16 [n]."""
    return _core.e8p_decode(codes, fitted)


def nearest_in_lattice(x: np.ndarray, fitted: bool = True) -> np.ndarray:
    """Codes uint16 [n] of the vectors of E8P nearest to x [n, 8]."""
    return _core.e8p_nearest(x, fitted)
