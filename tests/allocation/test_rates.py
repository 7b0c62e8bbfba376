"""Errors of schemes: water-filling, and the rate of a scheme."""

import numpy as np
import pytest

from aqlm_c.allocation.rates import SchemeRates, water_level
from aqlm_c.core.verbs import gaussian_reference
from aqlm_c.format import Format
from aqlm_c.recipe import AqlmConfig

CONFIG = AqlmConfig.from_scheme("2x8g8", ldl_passes=2, max_sweeps=2)


@pytest.mark.parametrize("rate", [0.1, 1.0, 2.0, 4.0])
def test_water_level_is_that_of_the_reference(rate):
    eigenvalues = np.random.default_rng(0).exponential(size=64) ** 3
    level = water_level(eigenvalues, rate)
    error = np.minimum(level, eigenvalues).sum() / eigenvalues.sum()
    assert error == pytest.approx(gaussian_reference(np.sort(eigenvalues), rate), rel=1e-6)
    coded = np.maximum(0, np.log2(eigenvalues / level) / 2).mean()
    assert coded == pytest.approx(rate, rel=1e-9)


def test_water_level_of_zeros():
    assert water_level(np.zeros(4), 2.0) == pytest.approx(1 / 16)
    assert 0 < water_level(np.array([1.0, 0.0]), 2.0) < 1


def test_rates_rise_with_bits_and_stay_below_them():
    rates = SchemeRates(CONFIG)
    found = [rates.rate(Format.parse(scheme), (512, 512)) for scheme in ("1x8g8", "2x8g8", "3x8g8")]
    assert found == sorted(found)
    for rate, bits in zip(found, (1, 2, 3), strict=True):
        assert 0.75 * bits < rate < bits + 0.1


def test_codebooks_that_are_large_for_a_layer_fit_it():
    rates, format = SchemeRates(CONFIG), Format.parse("1x8g8")
    assert rates.rate(format, (32, 64)) > rates.rate(format, (512, 512)) + 0.5
