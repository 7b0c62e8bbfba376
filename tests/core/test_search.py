import itertools

import layers
import numpy as np
import pytest
import reference

from aqlm_c import _core

SCHEMES = [
    (2, 3, 4, 0, False),
    (2, 4, 8, 0, False),
    (3, 3, 8, 0, False),
    (4, 2, 16, 0, False),
    (3, 4, 8, 1, True),
    (3, 3, 8, 3, True),
    (5, 2, 8, 2, True),
    (1, 5, 8, 1, False),
    (2, 4, 8, 1, False),
    (2, 4, 8, 3, False),
    (3, 2, 8, 4, False),
]


def layer_and_state(out, inp, K, B, g):
    return *layers.random_layer(out, inp, seed=K), *layers.random_state(out, inp, K, B, g, seed=B)


@pytest.mark.parametrize("K,B,g,beam_size,pairs", SCHEMES)
def test_sweep_agrees_with_numpy(isa, K, B, g, beam_size, pairs):
    W, H, codes, codebooks, scales = layer_and_state(7, 144, K, B, g)
    found = _core.search_sweep(codes, W, H, codebooks, scales, beam_size, 5, pairs)
    truth = reference.search_sweep(codes, W, H, codebooks.astype(np.float64), scales, beam_size, 5, pairs)
    np.testing.assert_array_equal(found, truth)


@pytest.mark.parametrize("K,B,g,beam_size,pairs", SCHEMES)
def test_ldl_agrees_with_numpy(isa, K, B, g, beam_size, pairs):
    W, H, _, codebooks, scales = layer_and_state(7, 144, K, B, g)
    factor = _core.factor_hessian(H, g, 1e-3)
    found = _core.search_ldl(W, *factor, codebooks, scales, beam_size, pairs)
    truth = reference.search_ldl(W, *factor, codebooks.astype(np.float64), scales, beam_size, pairs)
    np.testing.assert_array_equal(found, truth)


@pytest.mark.parametrize(
    "K,B,g,beam_size,pairs",
    [(2, 8, 8, 0, False), (3, 5, 8, 0, False), (4, 6, 8, 7, True), (2, 6, 4, 4, False), (1, 10, 8, 1, False)],
)
def test_same_bits_on_every_isa_and_thread_count(every_isa, K, B, g, beam_size, pairs):
    W, H, codes, codebooks, scales = layer_and_state(97, 144, K, B, g)
    factor = _core.factor_hessian(H, g, 1e-3)
    assert every_isa(
        lambda: (
            _core.search_sweep(codes, W, H, codebooks, scales, beam_size, 1, pairs),
            _core.search_ldl(W, *factor, codebooks, scales, beam_size, pairs),
        )
    )


def test_the_pair_search_is_exact_at_full_size():
    """Pruning never loses the best of 65,536 pairs, also with a few far-away entries."""
    W, H, codes, codebooks, scales = layer_and_state(40, 8, 2, 8, 8)
    codebooks[1, :3] *= 20
    found = _core.search_sweep(codes, W, H, codebooks, scales, 0, 0)
    wide, S = codebooks.astype(np.float64), H.astype(np.float64)
    for o in range(len(W)):
        target = W[o] @ S / scales[o]
        q = wide[0][:, None] + wide[1][None]
        cost = np.einsum("abd,de,abe->ab", q, S, q) - 2 * q @ target
        assert cost[tuple(found[o, 0])] <= cost.min() + 1e-5 * np.abs(cost).max()


def error_of(W, H, codes, codebooks, scales):
    return _core.quantization_error(W, H, codes, codebooks, scales)


@pytest.mark.parametrize(
    "K,B,beam_size,pairs", [(2, 8, 0, 0), (4, 4, 0, 0), (3, 6, 1, 1), (1, 8, 1, 0), (2, 6, 2, 0), (3, 5, 8, 0)]
)
def test_sweeps_never_raise_the_error(K, B, beam_size, pairs):
    W, H, codes, codebooks, scales = layer_and_state(48, 96, K, B, 8)
    before = error_of(W, H, codes, codebooks, scales)
    for seed in range(4):
        codes = _core.search_sweep(codes, W, H, codebooks, scales, beam_size, seed, pairs)
        after = error_of(W, H, codes, codebooks, scales)
        assert after <= before * (1 + 1e-6)
        before = after


def test_a_larger_beam_is_never_worse_and_pairs_are_best():
    """On one group the search is a single step, where exact pairs bound every beam from below."""
    W, H, codes, codebooks, scales = layer_and_state(200, 8, 2, 8, 8)
    errors = [
        error_of(W, H, _core.search_sweep(codes, W, H, codebooks, scales, beam, 0), codebooks, scales)
        for beam in (1, 2, 4, 8, 16, 64, 0)
    ]
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(errors))
    assert errors[-1] < 0.9 * errors[0]


def test_a_larger_beam_before_the_pairs_is_never_worse_and_the_largest_is_exact():
    """On one group: with as many states as entries, no triple of codes is better."""
    W, H, codes, codebooks, scales = layer_and_state(60, 8, 3, 5, 8)
    codes[:] = 0
    errors = [
        error_of(W, H, _core.search_sweep(codes, W, H, codebooks, scales, beam, 0, pairs=True), codebooks, scales)
        for beam in (1, 2, 4, 8, 16, 32)
    ]
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(errors))
    wide, S = codebooks.astype(np.float64), H.astype(np.float64)
    q = (wide[0][:, None, None] + wide[1][:, None] + wide[2]).reshape(-1, 8)
    D = W[:, None] - scales[:, None, None] * q
    least = np.einsum("oqd,de,oqe->oq", D, S, D).min(1).sum()
    assert errors[-1] == pytest.approx(least, rel=1e-5)
    assert errors[-1] < 0.95 * errors[0]


def test_error_feedback_beats_coordinate_sweeps_from_kmeans():
    W, H = layers.random_layer(128, 128, seed=4)
    scales = np.sqrt((W**2).mean(1))
    codes, codebooks = _core.residual_kmeans(W, scales, 2, 6, 8)
    sweep = _core.search_sweep(codes, W, H, codebooks, scales, 0, 0)
    ldl = _core.search_ldl(W, *_core.factor_hessian(H, 8, 1e-3), codebooks, scales, 0)
    errors = [error_of(W, H, c, codebooks, scales) for c in (codes, sweep, ldl)]
    assert errors[2] < errors[1] < errors[0]


@pytest.mark.parametrize("beam_size", [0, 2])
@pytest.mark.parametrize("noise", [0.0, 1e-4, 1e-3])
def test_strongly_correlated_inputs(noise, beam_size):
    """Groups whose block of H is rank one but for rounding: a search without the pruning bound, still exact."""
    W, _, codes, codebooks, scales = layer_and_state(16, 32, 2, 4, 8)
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(32) + noise * rng.standard_normal((1024, 32))).astype(np.float32)
    H = np.zeros((32, 32))
    _core.accumulate_hessian(H, x)
    H = (H / 1024).astype(np.float32)
    before = error_of(W, H, codes, codebooks, scales)
    codes = _core.search_sweep(codes, W, H, codebooks, scales, beam_size, 0)
    assert error_of(W, H, codes, codebooks, scales) < before
    assert (_core.search_ldl(W, *_core.factor_hessian(H, 8, 1e-3), codebooks, scales, beam_size) < 16).all()


def test_zero_rows_and_dead_inputs_stay_finite():
    W, H, codes, codebooks, scales = layer_and_state(9, 32, 2, 4, 8)
    W[3], scales[3] = 0.0, 0.0
    H[8:16] = 0.0
    H[:, 8:16] = 0.0
    codes = _core.search_sweep(codes, W, H, codebooks, scales, 0, 0)
    codes = _core.search_ldl(W, *_core.factor_hessian(H, 8, 1e-3), codebooks, scales, 0)
    assert codes.max() < 16 and np.isfinite(error_of(W, H, codes, codebooks, scales))


@pytest.mark.parametrize(
    "change,error,message",
    [
        ({"beam_size": 65}, ValueError, "beam_size: got 65, expected 0"),
        ({"beam_size": -1}, ValueError, "beam_size: got -1"),
        ({"codes": np.full((4, 4, 2), 16, np.uint16)}, ValueError, r"codes: got 16 at flat index 0, expected 0\.\.15"),
        ({"codes": np.zeros((4, 4, 3), np.uint16)}, ValueError, r"codes: got shape \(4, 4, 3\), expected \(4, 4, 2\)"),
        ({"codes": np.zeros((4, 4, 2), np.int64)}, TypeError, "codes: got dtype int64, expected uint16"),
        ({"codebooks": np.zeros((2, 15, 8), np.float32)}, ValueError, "codebooks: got 15 entries, expected a power"),
        ({"H": np.eye(8, dtype=np.float32)}, ValueError, r"H: got shape \(8, 8\), expected \(32, 32\)"),
        ({"H": np.full((32, 32), np.nan, np.float32)}, ValueError, "NaN or Inf"),
    ],
)
def test_wrong_arguments(change, error, message):
    W, H, codes, codebooks, scales = layer_and_state(4, 32, 2, 4, 8)
    arguments = {"codes": codes, "weight": W, "H": H, "codebooks": codebooks, "scales": scales}
    with pytest.raises(error, match=message):
        _core.search_sweep(**{**arguments, **change})


def test_pairs_need_two_codebooks_of_at_most_8_bits():
    W, H, codes, codebooks, scales = layer_and_state(4, 32, 1, 4, 8)
    with pytest.raises(ValueError, match=r"beam_size: got 0 .exact pairs. with 1x4"):
        _core.search_sweep(codes, W, H, codebooks, scales, 0)
    with pytest.raises(ValueError, match=r"pairs: got True .exact pairs. with 1x4"):
        _core.search_sweep(codes, W, H, codebooks, scales, 4, pairs=True)


def test_order_must_be_a_permutation():
    W, H, _, codebooks, scales = layer_and_state(4, 32, 2, 4, 8)
    order, feedback, metric = _core.factor_hessian(H, 8, 1e-3)
    with pytest.raises(ValueError, match="order: expected a permutation"):
        _core.search_ldl(W, np.array([0, 1, 1, 3], np.int32), feedback, metric, codebooks, scales)
    with pytest.raises(ValueError, match="order: expected a permutation"):
        _core.search_ldl(W, np.array([0, 1, 2, 9], np.int32), feedback, metric, codebooks, scales)
    assert order.dtype == np.int32
