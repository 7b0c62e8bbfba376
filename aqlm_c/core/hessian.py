"""H of a layer's inputs, with what is derived from it once for all layers that share them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from . import arrays, grid, rounding, verbs
from .verbs import Array

if TYPE_CHECKING:
    import torch

log = logging.getLogger("aqlm_c")

T = TypeVar("T")


class Hessian:
    """H = X^T X / n_tokens of a layer's inputs, and what is derived from it once for all layers that share it.

    H: float32 [in, in], symmetric; an array or the tensor of a GPU. One whose diagonal is far from ordinary is kept
    times 2^-exponent, which no relative error sees. Raises ValueError for another shape, and for NaN or Inf.
    """

    def __init__(self, H: Array) -> None:
        self.H: Array = H.float().contiguous() if arrays.is_tensor(H) else np.ascontiguousarray(H, dtype=np.float32)
        if self.H.ndim != 2 or self.H.shape[0] != self.H.shape[1]:
            raise ValueError(f"H: got shape {tuple(self.H.shape)}, expected a square matrix [in_features, in_features]")
        if not arrays.is_finite(self.H):
            raise ValueError("H: got NaN or Inf, expected finite values")
        self.exponent = grid.hessian_exponent(self.H)
        self.H = arrays.scaled(self.H, -self.exponent)
        self._damped: dict[float, Array] = {}
        self._derived: dict[tuple[Any, ...], Any] = {}
        self._factors: dict[tuple[int, float], tuple[Array, Array, Array]] = {}

    @classmethod
    def identity(cls, in_features: int, device: torch.device | None = None) -> Hessian:
        """That of white inputs, on a device; None: the CPU."""
        return cls(arrays.identity(in_features, device))

    def like(self, array: Array) -> Hessian:
        """The same H where `array` is; itself if it is there."""
        there = arrays.to_kind(self.H, array)
        if there is self.H:
            return self
        moved = Hessian(there)
        moved.exponent += self.exponent
        return moved

    def damped(self, relative_damp: float) -> Array:
        """H + relative_damp * mean(diag H) * I, float32 [in, in]."""
        if relative_damp not in self._damped:
            self._damped[relative_damp] = arrays.damped(self.H, relative_damp)
        return self._damped[relative_damp]

    def factor(self, in_group_size: int, relative_damp: float) -> tuple[Array, Array, Array]:
        """(order int32 [J], feedback float32 [in, in], metric float32 [J, g, g]) of the block LDL of `damped`."""
        key = (in_group_size, relative_damp)
        if key not in self._factors:
            self._factors[key] = self._factor(in_group_size, self.damped(relative_damp))
        return self._factors[key]

    def factor_columns(self, ordered: bool, relative_damp: float) -> tuple[np.ndarray, np.ndarray]:
        """(order int32 [in], feedback float32 [in, in]) of single columns of `damped`, largest diagonal first if
        `ordered`; in CPU memory, wherever H is.
        """

        def compute() -> tuple[np.ndarray, np.ndarray]:
            H = arrays.to_numpy(self.damped(relative_damp))
            return self._damping_more(lambda more: rounding.factor_columns(H, ordered, more))

        return self.derived(("columns", ordered, relative_damp), compute)

    def derived(self, key: tuple[Any, ...], compute: Callable[[], T]) -> T:
        """What `compute` gives, once for all layers that share this H; `key` says what it is."""
        if key not in self._derived:
            self._derived[key] = compute()
        return self._derived[key]

    def _factor(self, in_group_size: int, H: Array) -> tuple[Array, Array, Array]:
        return self._damping_more(lambda more: verbs.factor_hessian(H, in_group_size, more))

    @staticmethod
    def _damping_more(compute: Callable[[float], T]) -> T:
        """More damping where rounding left H short of positive definite: it costs less than the run that would end."""
        for more in (0.0, 1e-3, 1e-2, 1e-1):
            try:
                found = compute(more)
            except ValueError:
                if more == 1e-1:
                    raise
            else:
                break
        if more:
            log.warning("H is not positive definite after damping: its diagonal is raised by %g of its mean more", more)
        return found

    def corrected(self, weight: Array, cross: Array, alpha: float, relative_damp: float) -> Array:
        """weight [out, in] + alpha weight C (H + relative_damp * mean(diag H) * I)^-1, float32, with more damping as in
        `factor`; cross: C [in, in], where the weight is.
        """
        H, C = self.like(weight).H, arrays.scaled(cross, -self.exponent)
        return self._damping_more(lambda more: verbs.correct_weight(weight, C, H, alpha, relative_damp + more))

    @cached_property
    def eigenvalues(self) -> np.ndarray | None:
        """Eigenvalues of H, float64 [in], ascending; none below zero. None if they were not found."""
        return arrays.eigenvalues(self.H)
