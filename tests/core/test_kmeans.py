import layers
import numpy as np
import pytest
import reference

from aqlm_c import _core


def start(W):
    return np.sqrt((W**2).mean(1)).astype(np.float32)


@pytest.mark.parametrize("K,B,g", [(1, 2, 4), (2, 4, 8), (3, 3, 16), (1, 5, 32)])
@pytest.mark.parametrize("weighted", [False, True])
def test_agrees_with_numpy(isa, K, B, g, weighted):
    W, H = layers.random_layer(19, 96, seed=B)
    weight = H.diagonal().copy() if weighted else None
    codes, codebooks = _core.residual_kmeans(W, start(W), K, B, g, 6, 1e-3, 11, weight)
    truth = reference.residual_kmeans(W, start(W), K, B, g, 6, 1e-3, 11, weight)
    np.testing.assert_array_equal(codes, truth[0])
    np.testing.assert_allclose(codebooks, truth[1], atol=2e-5)


def test_same_bits_on_every_isa_and_thread_count(every_isa):
    W, H = layers.random_layer(300, 64)
    assert every_isa(lambda: _core.residual_kmeans(W, start(W), 2, 6, 8, 20, 1e-3, 3, H.diagonal().copy()))


def test_more_rounds_and_more_entries_never_hurt():
    W, _ = layers.random_layer(64, 64)
    eye, errors = np.eye(64, dtype=np.float32), []
    for B, rounds in [(3, 1), (3, 30), (5, 30), (7, 30)]:
        codes, codebooks = _core.residual_kmeans(W, start(W), 1, B, 8, rounds, 0.0, 0)
        errors.append(_core.quantization_error(W, eye, codes, codebooks, start(W)))
    assert errors == sorted(errors, reverse=True) and errors[0] > 1.2 * errors[-1]


def test_seeds_differ_and_repeat():
    W, _ = layers.random_layer(32, 64)
    runs = [_core.residual_kmeans(W, start(W), 1, 6, 8, 5, 1e-3, seed)[1] for seed in (1, 1, 2)]
    assert (runs[0] == runs[1]).all() and (runs[0] != runs[2]).any()


def test_empty_clusters_are_seeded_again():
    # Four distinct groups drawn as eight seeds leave at least four clusters empty at first.
    points = np.repeat(np.eye(4, dtype=np.float32), 16, axis=0)
    codes, codebooks = _core.residual_kmeans(points, np.ones(64, np.float32), 1, 2, 4, 20, 0.0, 5)
    np.testing.assert_array_equal(codebooks[0][codes[:, 0, 0]], points)


def test_more_entries_than_groups_is_exact():
    W, _ = layers.random_layer(4, 16)
    codes, codebooks = _core.residual_kmeans(W, np.ones(4, np.float32), 1, 8, 8, 3)
    np.testing.assert_array_equal(codebooks[0][codes[:, :, 0]].reshape(4, 16), W)


@pytest.mark.parametrize(
    "change,error,message",
    [
        ({"num_codebooks": 9}, ValueError, "num_codebooks must be in 1..8.*num_codebooks=9"),
        ({"nbits_per_codebook": 0}, ValueError, "nbits_per_codebook must be in 1..16"),
        ({"in_group_size": 5}, ValueError, "in_group_size must be 4, 8, 16 or 32.*in_group_size=5"),
        ({"in_group_size": 32}, ValueError, "multiple of in_group_size.*in_features=48"),
        ({"init_max_iter": 0}, ValueError, "init_max_iter: got 0, expected at least 1"),
        ({"tolerance": -0.5}, ValueError, "tolerance: got -0.5, expected a number >= 0"),
        ({"scales": np.ones(3, np.float32)}, ValueError, r"scales: got shape \(3,\), expected \(4,\)"),
        ({"weight": np.ones((4, 48))}, TypeError, "weight: got dtype float64, expected float32"),
        ({"weight": [[1.0]]}, TypeError, "weight: .*list.*expected a NumPy array of float32"),
        ({"column_weight": np.ones((1, 48), np.float32)}, ValueError, "column_weight: got shape"),
    ],
)
def test_wrong_arguments(change, error, message):
    arguments = {
        "weight": np.ones((4, 48), np.float32),
        "scales": np.ones(4, np.float32),
        "num_codebooks": 1,
        "nbits_per_codebook": 2,
        "in_group_size": 8,
    }
    with pytest.raises(error, match=message):
        _core.residual_kmeans(**{**arguments, **change})
