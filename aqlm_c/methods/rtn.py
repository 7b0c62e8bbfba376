"""Round to nearest: each weight on a uniform grid of its row or group, whatever H is; no calibration."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..config import MethodOptions
from ..core import arrays, grid, rounding
from ..core.verbs import Array
from ..errors import int_between, wrong
from ..format import Format
from .base import (
    CodesMethod,
    Cost,
    DenseWeight,
    LayerProblem,
    QuantizedWeight,
    Result,
    dense_result,
    finished,
    rounded_scales,
    whole_bits,
)
from .gptq import check_group_size
from .state import check_searchable

_MOST_BITS = 16  # of a weight


@dataclasses.dataclass(frozen=True)
class RtnOptions(MethodOptions):
    """Options of rounding to nearest. group_size: inputs that share a scale in each row, the best one by squared error;
    0: all of a row, whose scale is its largest weight, in the AQLM format.

    Raises ValueError naming the field, its value and what was expected.
    """

    group_size: int = 0

    def __post_init__(self) -> None:
        int_between("group_size", self.group_size, 0)


class RoundToNearest(CodesMethod):
    """A row's scale is its largest absolute weight, and each weight takes the nearest of 2^b values from -scale to
    scale, evenly spaced, where b is the scheme's bits per weight.

    Additive codebooks hold such a grid exactly: the K B bits of a group's codes are assigned to its g weights in order,
    and each entry is the sum of what its set bits are worth. Where g does not divide K B, the first weights of a group
    get one bit more.

    With a `group_size` each group of a row has a grid of its own, with a zero point, of least squared error among those
    shrunk from its extent: no AQLM checkpoint. Its file has b bits for each weight and for each group 16 bits for a
    scale and b for a zero point.
    """

    options_type = RtnOptions

    def is_dense(self, options: RtnOptions) -> bool:
        return options.group_size > 0

    def bits_per_weight(self, format: Format, shape: tuple[int, int], options: RtnOptions) -> float:
        if not options.group_size:
            return format.bits_per_weight(*shape)
        return whole_bits(format) + (16 + whole_bits(format)) / options.group_size

    def check_layer(self, name: str, shape: tuple[int, int], format: Format, options: RtnOptions) -> None:
        if options.group_size:
            check_group_size(name, shape, options.group_size)
        else:
            format.check_layer(name, *shape)

    def check(self, format: Format, options: RtnOptions) -> None:
        check_searchable(format)
        if options.group_size:
            whole_bits(format)
        if format.code_bits_per_weight() > _MOST_BITS:
            raise wrong("scheme", format.scheme, f"at most {_MOST_BITS} bits per weight to round to")

    def quantize(self, problem: LayerProblem, options: RtnOptions) -> Result:
        return self._in_groups(problem, options) if options.group_size else self._in_rows(problem)

    def _in_groups(self, problem: LayerProblem, options: RtnOptions) -> DenseWeight:
        started = time.perf_counter()
        found = rounding.round_columns(problem.weight, None, whole_bits(problem.format), options.group_size)
        seconds = {"round": time.perf_counter() - started}
        bits = self.bits_per_weight(problem.format, problem.shape, options)
        return dense_result(problem, arrays.to_kind(found.decode(), problem.weight), bits, seconds, "rounded")

    def _in_rows(self, problem: LayerProblem) -> QuantizedWeight:
        started = time.perf_counter()
        weight = arrays.to_numpy(problem.weight)
        values = _Grid(problem.format)
        scales = np.abs(weight).max(axis=1) / np.float32(values.largest)
        moved = grid.share(scales, values.codebooks, problem.exponent, problem.dtype)
        scales = arrays.to_numpy(rounded_scales(problem, scales, moved))
        codebooks = arrays.to_numpy(arrays.round_to(values.codebooks, problem.dtype, moved.codebooks))
        state = (values.codes(weight, scales), codebooks, scales)
        seconds = {"round": time.perf_counter() - started}
        codes, books, scales_ = (arrays.to_kind(array, problem.weight) for array in state)
        result = finished(problem, (codes, books, scales_), moved, seconds, [])
        result.history.append(("rounded", result.relative_error))
        return result

    def search_again(self, problem: LayerProblem, quantized: QuantizedWeight, options: RtnOptions) -> Array | None:
        return None

    def cost(self, format: Format, shape: tuple[int, int], options: RtnOptions) -> Cost:
        return Cost(flop=4.0 * shape[0] * shape[1])

    def remedies(self, format: Format, options: Mapping[str, Any]) -> list[str]:
        return ["another solver"]

    def seconds_per_group(self, format: Format, options: RtnOptions, like: Array | None = None) -> float:
        return 0.0


class _Grid:
    """The grid in a format: weight i of a group has bits[i] bits, whose number v is (2 v - 2^bits + 1) steps[i].

    Steps are powers of two where all weights have equally many bits, so that 16-bit floats hold the codebooks exactly.
    """

    def __init__(self, format: Format) -> None:
        self.format = format
        total, g = format.num_codebooks * format.nbits_per_codebook, format.in_group_size
        self.bits = [total // g + (i < total % g) for i in range(g)]
        most = max(self.bits)
        self.largest = (2**most - 1) / 2 ** (most - 1)
        self.steps = np.array([self.largest / (2**b - 1) if b else 0.0 for b in self.bits], np.float32)
        self.places = [(i, p) for i, b in enumerate(self.bits) for p in range(b)]  # of each bit of a group's codes
        self.codebooks = self._codebooks()

    def _codebooks(self) -> np.ndarray:
        """float32 [K, E, g]."""
        format = self.format
        books = np.zeros((format.num_codebooks, format.entries, format.in_group_size), np.float32)
        books[0] -= self.steps * [2**b - 1 for b in self.bits]
        entry = np.arange(format.entries)
        for place, (i, p) in enumerate(self.places):
            k, q = divmod(place, format.nbits_per_codebook)
            books[k, :, i] += (entry >> q & 1) * (2 ** (p + 1) * self.steps[i])
        return books

    def codes(self, weight: np.ndarray, scales: np.ndarray) -> np.ndarray:
        """Working codes uint16 [out, J, K] of weight [out, in] under scales [out]."""
        format, most = self.format, np.array([2**b - 1 for b in self.bits], np.float32)
        groups = weight.reshape(len(weight), -1, format.in_group_size)
        units = np.where(scales > 0, scales, 1)[:, None, None] * np.where(self.steps > 0, self.steps, 1)
        numbers = np.rint((groups / units + most) / 2).clip(0, most).astype(np.uint32)
        codes = np.zeros((*groups.shape[:2], format.num_codebooks), np.uint16)
        for place, (i, p) in enumerate(self.places):
            k, q = divmod(place, format.nbits_per_codebook)
            codes[..., k] |= ((numbers[..., i] >> p & 1) << q).astype(np.uint16)
        return codes


METHOD = RoundToNearest()
