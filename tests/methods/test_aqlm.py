"""quantize_weight: the loop over the C steps."""

import layers
import numpy as np
import pytest
import reference

from aqlm_c import AqlmConfig
from aqlm_c.core.arrays import round_to
from aqlm_c.core.hessian import Hessian
from aqlm_c.weights import quantize_weight


def relative_error(W, H, quantized):
    return reference.error(W, H, quantized.decode()) / reference.error(W, H)


@pytest.mark.parametrize("scheme", ["2x6g8", "3x4g8", "1x9g8", "2x4g4", "1x6g16", "2x5g32"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_reported_error_is_that_of_the_stored_values(scheme, dtype):
    W, H = layers.random_layer(48, 96)
    config = AqlmConfig.from_scheme(scheme)
    found = quantize_weight(W, H, config, dtype=dtype)
    assert found.relative_error == pytest.approx(relative_error(W, H, found), rel=1e-4)
    assert found.relative_error < 0.5 * found.history[0][1]  # k-means comes first
    for part in (found.codebooks, found.scales):
        assert part.dtype == np.float32
        if dtype != "float32":
            np.testing.assert_array_equal(part, round_to(part, dtype))
    K, B, g = config.format.num_codebooks, config.format.nbits_per_codebook, config.format.in_group_size
    assert found.codes.dtype == (np.int8 if B <= 8 else np.int16) and found.codes.shape == (48, 96 // g, K)
    assert found.codebooks.shape == (K, 2**B, 1, g) and found.scales.shape == (48, 1, 1, 1)


@pytest.mark.parametrize("scheme,beam_size", [("2x8g8", 0), ("3x4g8", 0), ("2x5g8", 2), ("1x9g8", 0)])
def test_same_bits_on_every_isa_and_thread_count(every_isa, scheme, beam_size):
    W, H = layers.random_layer(65, 72)
    config = AqlmConfig.from_scheme(scheme, beam_size=beam_size, ldl_passes=2, max_sweeps=2)

    def run():
        found = quantize_weight(W, H, config)
        return found.codes, found.codebooks, found.scales

    assert every_isa(run)


@pytest.mark.parametrize("scheme", ["2x5g8", "3x3g8", "1x6g8"])
def test_the_paper_s_solver(every_isa, scheme):
    W, H = layers.random_layer(48, 64)
    config = AqlmConfig.from_scheme(scheme, solver="paper", adam_steps=20)
    found = quantize_weight(W, H, config, dtype="float32")
    assert found.relative_error == pytest.approx(relative_error(W, H, found), rel=1e-4)
    errors = [error for _, error in found.history]
    assert errors[-1] == min(errors) < 0.8 * errors[0] and found.seconds.keys() >= {"kmeans", "codebooks", "search"}
    assert "factor" not in found.seconds and config.options.relative_mse_tolerance == 0.01
    few = AqlmConfig.from_scheme(scheme, solver="paper", adam_steps=3, ldl_passes=1, max_sweeps=1)

    def run():
        found = quantize_weight(W, H, few)
        return found.codes, found.codebooks, found.scales

    assert every_isa(run)


def test_a_larger_beam_is_never_worse_for_the_paper():
    W, H = layers.random_layer(128, 96, seed=1)
    errors = [
        quantize_weight(W, H, AqlmConfig.from_scheme("2x6g8", solver="paper", beam_size=beam)).relative_error
        for beam in (1, 2, 4, 8)
    ]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.95 * errors[0]
    assert quantize_weight(W, H, AqlmConfig.from_scheme("2x6g8", solver="paper")).relative_error == errors[0]


def test_seeds_repeat_and_differ():
    W, H = layers.random_layer(32, 64)
    codes = [quantize_weight(W, H, AqlmConfig.from_scheme("2x4g8", seed=seed)).codes for seed in (1, 1, 2)]
    np.testing.assert_array_equal(codes[0], codes[1])
    assert (codes[0] != codes[2]).any()


def test_the_best_state_is_kept_and_more_work_is_never_worse():
    W, H = layers.random_layer(64, 96)
    errors = []
    for passes, sweeps in [(0, 0), (1, 0), (4, 0), (4, 8)]:
        config = AqlmConfig.from_scheme("2x5g8", ldl_passes=passes, max_sweeps=sweeps, relative_mse_tolerance=0.0)
        found = quantize_weight(W, H, config, dtype="float32")
        assert found.history[-1][1] == min(error for _, error in found.history)
        assert len(found.history) <= 2 + passes + sweeps
        errors.append(found.relative_error)
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.5 * errors[0]


def test_the_tolerance_ends_the_sweeps():
    W, H = layers.random_layer(48, 64)
    eager, patient = (
        quantize_weight(W, H, AqlmConfig.from_scheme("2x5g8", max_sweeps=30, relative_mse_tolerance=tolerance))
        for tolerance in (0.2, 1e-4)
    )
    assert len(eager.history) < len(patient.history) and patient.relative_error <= eager.relative_error


def test_a_hessian_is_shared_and_gives_the_same():
    W, H = layers.random_layer(24, 64)
    shared, config = Hessian(H), AqlmConfig.from_scheme("2x4g8")
    assert shared.factor(8, 1e-3) is shared.factor(8, 1e-3)
    np.testing.assert_array_equal(quantize_weight(W, shared, config).codes, quantize_weight(W, H, config).codes)
    np.testing.assert_allclose(shared.eigenvalues, np.linalg.eigvalsh(H.astype(np.float64)), atol=1e-9)


def test_error_feedback_and_pairs_beat_the_paper():
    W, H = layers.random_layer(128, 128)
    best = quantize_weight(W, H, AqlmConfig.from_scheme("2x6g8")).relative_error
    for options in ({"ldl_passes": 0, "beam_size": 1, "max_sweeps": 14}, {"solver": "paper"}):
        assert best < 0.9 * quantize_weight(W, H, AqlmConfig.from_scheme("2x6g8", **options)).relative_error


@pytest.mark.parametrize("scheme", ["2x4g4", "2x8g8", "1x6g8"])
@pytest.mark.parametrize("rank,noise", [(1, 0.0), (1, 1e-3), (2, 0.0), (8, 1e-4)])
def test_inputs_of_low_rank(scheme, rank, noise):
    """Directions that no input takes must not be bent without bound."""
    W, _ = layers.random_layer(32, 64)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((256, rank)) @ rng.standard_normal((rank, 64)) + noise * rng.standard_normal((256, 64))
    H = (x.T @ x / 256).astype(np.float32)
    found = quantize_weight(W, H, AqlmConfig.from_scheme(scheme), dtype="bfloat16")
    assert 0 <= found.relative_error < 0.1
    assert np.abs(found.decode() - W).max() < 2 * np.abs(W).max()


def test_a_weight_without_rows_that_matter():
    W, H = layers.random_layer(16, 32)
    W[5] = 0.0
    found = quantize_weight(W, H, AqlmConfig.from_scheme("2x4g8"))
    assert np.isfinite(found.decode()).all()


@pytest.mark.parametrize(
    "change,message",
    [
        ({"weight": np.full((4, 32), np.nan)}, "weight: got NaN or Inf"),
        ({"weight": np.zeros(32)}, r"weight: got shape \(32,\), expected a matrix"),
        ({"H": np.full((32, 32), np.inf)}, "H: got NaN or Inf"),
        ({"H": np.eye(16)}, r"H: got shape \(16, 16\), expected \(32, 32\)"),
        ({"H": np.zeros((3, 4))}, r"H: got shape \(3, 4\), expected a square matrix"),
        ({"dtype": "int8"}, "dtype: got 'int8', expected one of"),
        ({"config": AqlmConfig.from_scheme("2x4g8o2")}, "out_group_size: got 2 .*, expected 1"),
        ({"weight": np.ones((4, 36)), "H": np.eye(36)}, "in_group_size: got 8, expected a divisor of in_features=36"),
        ({"weight": np.full((4, 32), 1e12)}, "weight: got 99.*, expected a largest value of 2.3e-13 to 1.3e8"),
    ],
)
def test_wrong_arguments(change, message):
    W, H = layers.random_layer(4, 32)
    arguments = {"weight": W, "H": H, "config": AqlmConfig.from_scheme("2x4g8")}
    with pytest.raises(ValueError, match=message):
        quantize_weight(**{**arguments, **change})


def test_rounding():
    x = np.array([1.0, 1 + 2**-9, 1 + 3 * 2**-9, -3.14159], np.float32)
    torch = pytest.importorskip("torch")
    for dtype in ("float16", "bfloat16"):
        truth = torch.tensor(x).to(getattr(torch, dtype)).float().numpy()
        np.testing.assert_array_equal(round_to(x, dtype), truth)
