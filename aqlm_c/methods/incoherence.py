"""Transforms after which a weight and its H are incoherent, without outliers (QuIP, arXiv 2307.13304, section 4)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Protocol

import numpy as np

from ..core import arrays, rounding, verbs
from ..core.hessian import Hessian
from ..core.verbs import Array
from ..errors import wrong

_MOST_ORTHOGONAL = 4096  # order of a random orthogonal matrix
_SAMPLED = 128  # rows on which scales are tried


class Rotation(Protocol):
    """An orthogonal matrix V [n, n], by a seed."""

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for equal matrices."""

    def apply(self, x: Array) -> Array:
        """x V^T of rows x [rows, n]."""

    def undo(self, x: Array) -> Array:
        """x V."""


@dataclasses.dataclass(frozen=True)
class RandomOrthogonal:
    """The Kronecker product of two random orthogonal matrices whose orders multiply to n and are as equal as can be.

    In CPU memory. side: 0 of the inputs, 1 of the outputs, which have other matrices of the same seed.
    """

    n: int
    seed: int
    side: int

    @staticmethod
    def orders(n: int) -> tuple[int, int]:
        """p <= q, p q = n."""
        p = next(p for p in range(math.isqrt(n), 0, -1) if n % p == 0)
        return p, n // p

    @classmethod
    def check(cls, name: str, n: int) -> None:
        """Raise ValueError for an n that is no product of two orders of matrices."""
        if cls.orders(n)[1] > _MOST_ORTHOGONAL:
            raise wrong(name, n, f"a product of two numbers up to {_MOST_ORTHOGONAL} for random orthogonal matrices")

    @property
    def key(self) -> tuple[object, ...]:
        return ("orthogonal", self.n, self.seed, self.side)

    @cached_property
    def _factors(self) -> tuple[np.ndarray, np.ndarray]:
        seeds = np.random.SeedSequence([self.seed, self.side]).generate_state(2, np.uint64)
        p, q = (rounding.random_orthogonal(*each) for each in zip(self.orders(self.n), map(int, seeds), strict=True))
        return p, q

    def apply(self, x: Array) -> np.ndarray:
        left, right = self._factors
        return rounding.rotate(arrays.to_numpy(x), left, right)

    def undo(self, x: Array) -> np.ndarray:
        left, right = (np.ascontiguousarray(factor.T) for factor in self._factors)
        return rounding.rotate(arrays.to_numpy(x), left, right)


@dataclasses.dataclass(frozen=True)
class RandomHadamard:
    """A Hadamard matrix after random signs: where the values are. It is block-diagonal where none of order n is known
    (`rounding.hadamard_order`).
    """

    n: int
    seed: int
    side: int

    @property
    def key(self) -> tuple[object, ...]:
        return ("hadamard", self.n, self.seed, self.side)

    @cached_property
    def _signs(self) -> np.ndarray:
        drawn = np.random.default_rng([self.seed, self.side]).integers(0, 2, self.n)
        return (2 * drawn - 1).astype(np.float32)

    def apply(self, x: Array) -> Array:
        return verbs.hadamard(x * arrays.to_kind(self._signs, x))

    def undo(self, x: Array) -> Array:
        return verbs.hadamard(x, True) * arrays.to_kind(self._signs, x)


def rotated(weight: Array, inputs: Rotation, outputs: Rotation) -> Array:
    """U W V^T of weight W [out, in] for `outputs` U and `inputs` V."""
    return arrays.transposed(outputs.apply(arrays.transposed(inputs.apply(weight))))


def rotated_back(weight: Array, inputs: Rotation, outputs: Rotation) -> Array:
    """U^T W V of weight W [out, in]."""
    return arrays.transposed(outputs.undo(arrays.transposed(inputs.undo(weight))))


def rotated_hessian(hessian: Hessian, inputs: Rotation) -> Hessian:
    """V H V^T, once for all layers that share H."""

    def compute() -> Hessian:
        H = inputs.apply(arrays.transposed(inputs.apply(hessian.H)))
        return Hessian((H + arrays.transposed(H)) * 0.5)

    return hessian.derived(inputs.key, compute)


def decoded_at_best(
    weight: np.ndarray,
    hessian: Hessian,
    seed: int,
    scale: float,
    tried: Sequence[float],
    decode: Callable[[np.ndarray, float], np.ndarray],
) -> np.ndarray:
    """What a rotated weight [out, in] decodes to, by `decode`, at the scale of least error under H on some of its rows.

    scale: that of a weight of rms 1, times which `tried` are tried, rounded to float16 as it is stored. The rows are
    drawn: neighbours share a part of a Kronecker product.
    """
    rms = float(np.sqrt(np.square(weight, dtype=np.float64).mean()))
    scales = [float(np.float16(rms * scale * factor)) or rms * factor for factor in tried]
    rows = np.sort(np.random.default_rng(seed).permutation(len(weight))[:_SAMPLED])
    sample, H = weight[rows], arrays.to_numpy(hessian.H)
    errors = [verbs.quantization_error(sample - decode(sample, each), H) for each in scales]
    return decode(weight, scales[int(np.argmin(errors))])
