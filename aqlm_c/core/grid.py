"""Powers of two that keep numbers in range: of a whole problem while it is solved, and between scales and codebooks as
they are stored. Multiplying by them rounds nothing, and ordinary layers are not touched.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from ..errors import wrong
from . import arrays
from .verbs import Array

_ORDINARY_WEIGHT = 20  # largest weights between 2^-20 and 2^20, and
_ORDINARY_HESSIAN = 40  # mean diagonals of H between 2^-40 and 2^40, square and sum well inside float32
_FEW_BITS = 6  # below `Range.smallest` a float16 still has some bits
_DEAD = 2.0**-60  # of the largest row: what is smaller never matters beside it


class Range(NamedTuple):
    """Exponents of a float: numbers from 2^smallest on have at least bfloat16's precision, those below 2^(largest + 1)
    are finite. entry: least exponent of a codebook's largest number, so that rounding loses no more than elsewhere.
    """

    smallest: int
    largest: int
    entry: int


_RANGES = {"float16": Range(-16, 15, -10), "bfloat16": Range(-126, 127, -100), "float32": Range(-126, 127, -100)}


class Moved(NamedTuple):
    """Stored scales are those of the problem times 2^scales, stored codebooks times 2^codebooks."""

    scales: int = 0
    codebooks: int = 0


def exponent_of(x: float) -> int:
    """floor(log2 |x|); 0 for 0."""
    return math.frexp(x)[1] - 1 if x else 0


def weight_exponent(weight: Array) -> int:
    """e such that weight * 2^-e is of ordinary size; 0 where it is."""
    exponent = exponent_of(arrays.largest(weight))
    return exponent if abs(exponent) > _ORDINARY_WEIGHT else 0


def hessian_exponent(H: Array) -> int:
    """e such that H * 2^-e is of ordinary size; 0 where it is."""
    exponent = exponent_of(arrays.mean_diagonal(H))
    return exponent if abs(exponent) > _ORDINARY_HESSIAN else 0


def check_range(weight: Array, dtype: str) -> None:
    """Raise ValueError for a weight too large or too small as a whole for any codebooks and scales of `dtype`."""
    if dtype == "float16" and (largest := arrays.largest(weight)) and not -42 <= exponent_of(largest) <= 26:
        raise wrong("weight", largest, "a largest value of 2.3e-13 to 1.3e8 for codebooks and scales of float16")


def holds(row_sizes: np.ndarray, dtype: str) -> bool:
    """Whether scales of `dtype`, with the codebooks' help, hold rows of these root mean squares [out]."""
    limits, sizes = _RANGES[dtype], row_sizes[row_sizes > 0]
    if not sizes.size:
        return True
    high = exponent_of(float(sizes.max()))
    low = exponent_of(float(sizes[sizes >= _DEAD * sizes.max()].min()))
    book = 2  # exponent of the largest entry of codebooks whose root mean square is 1
    most, least = limits.largest - 1, limits.smallest
    return (
        high - low <= most - least and high <= most + limits.largest - 2 - book and low >= least + limits.entry - book
    )


def share(scales: Array, codebooks: Array, exponent: int, dtype: str) -> Moved:
    """How 2^exponent is shared out to scales [out] and codebooks [K, E, g], so that the grid of `dtype` holds both.

    Scales take all of it unless they would be too large, or so small that they lose precision; codebooks then take a
    part. Rows far smaller than the largest may be lost. Raises ValueError if the largest are beyond both.
    """
    limits, sizes = _RANGES[dtype], np.abs(arrays.to_numpy(scales).astype(np.float64))
    exponents = np.frexp(sizes[sizes > 0])[1] - 1 + exponent
    if not exponents.size:
        return Moved(exponent)
    book, high = exponent_of(arrays.largest(codebooks)), int(exponents.max())
    most, least = limits.largest - 2 - book, max(limits.entry - book, high - (limits.largest - 1))
    if least > most:
        raise ValueError(f"weight: got one with rows of up to 2^{high}, too large for codebooks and scales of {dtype}")
    if (lacking := limits.smallest - (high - least)) > 0:  # a layer too small as a whole: both give up precision
        least -= lacking * 2 // 3
    low = int(exponents[exponents - least >= min(limits.smallest - _FEW_BITS, high - least)].min())
    part = min(max(min(0, low - limits.smallest), least), most)
    return Moved(exponent - part, part)
