"""What error a scheme makes: measured once on Gaussian weights, carried to a layer by reverse water-filling."""

from __future__ import annotations

import math

import numpy as np

from ..core.hessian import Hessian
from ..format import Format
from ..recipe import AqlmConfig
from ..weights import quantize_weight

_GROUPS = 2**15  # of the weight that is quantized, at most; more where codebooks are larger
_GROUPS_PER_ENTRY = 16
_WIDTH = 512
_MOST_RATE = 24.0  # bits: an error of 2^-48, beyond float32


class SchemeRates:
    """The rate at which ideal coding of Gaussian weights errs as much as the method of `config` does with a scheme.

    Measured on i.i.d. Gaussian weights under white inputs, where ideal coding at R bits has the relative error 4^-R.
    Codebooks that are large for a layer fit its very weights, which counts: there are as many groups as the layer has,
    up to 2^15.
    """

    def __init__(self, config: AqlmConfig) -> None:
        self._config = config
        self._known: dict[tuple[AqlmConfig, tuple[int, int]], float] = {}

    def rate(self, format: Format, shape: tuple[int, int], config: AqlmConfig | None = None) -> float:
        """Bits per weight of ideal coding for a layer [out, in]; config: with the options of this layer."""
        config = (config or self._config).replace(**format.to_dict(), rules=None, gaussian_reference=False)
        sample = _sample_shape(format, shape)
        if (config, sample) not in self._known:
            rng = np.random.default_rng(config.seed)
            weight = rng.standard_normal(sample, dtype=np.float32)
            error = quantize_weight(weight, Hessian.identity(sample[1]), config).relative_error
            rate = -math.log2(error) / 2 if error > 0 else _MOST_RATE
            self._known[config, sample] = min(max(rate, 0.0), _MOST_RATE)
        return self._known[config, sample]


def _sample_shape(format: Format, shape: tuple[int, int]) -> tuple[int, int]:
    """Of the weight that stands for a layer: its groups, in rows that are no longer."""
    out_features, in_features = shape
    groups = out_features * in_features // format.group_weights
    groups = min(groups, max(_GROUPS, _GROUPS_PER_ENTRY * format.entries))
    width = min(in_features, _WIDTH) // format.in_group_size * format.in_group_size
    rows = max(1, round(groups * format.group_weights / width / format.out_group_size)) * format.out_group_size
    return rows, width


def water_level(eigenvalues: np.ndarray, rate: float) -> float:
    """The level at which reverse water-filling codes components of these variances, float64 [n], at `rate` bits each in
    the mean: those above it have this error, the others are left out.
    """
    falling = np.sort(eigenvalues)[::-1]
    falling = np.maximum(falling, falling[0] * 1e-12) if falling[0] > 0 else np.ones_like(falling)
    counts = np.arange(1, len(falling) + 1)
    levels = (np.cumsum(np.log2(falling)) - 2 * len(falling) * rate) / counts  # log2, if so many are coded
    fits = np.append(levels[:-1] >= np.log2(falling[1:]), True)
    return float(2.0 ** levels[np.argmax(fits)])
