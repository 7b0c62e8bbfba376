import itertools

import layers
import numpy as np
import pytest
import reference

from aqlm_c import _core


@pytest.mark.parametrize("K,B,g", [(1, 3, 8), (2, 3, 4), (2, 4, 8), (3, 2, 16)])
def test_conjugate_gradients_reach_the_least_squares_solution(isa, K, B, g):
    W, H = layers.random_layer(40, 96, seed=K)
    codes, codebooks, scales = layers.random_state(40, 96, K, B, g)
    found = _core.update_codebooks(codebooks, W, H, codes, scales, 200)
    best, least = reference.update_codebooks(W, H, codes, scales, K, 2**B, g)
    error = reference.error(W, H, reference.decode(codes, found, scales))
    assert least <= error * (1 + 1e-9) and error <= least * (1 + 1e-4)
    truth = reference.decode(codes, best, scales)
    assert np.abs(reference.decode(codes, found, scales) - truth).max() < 2e-2 * np.abs(truth).max()


def test_every_step_lowers_the_error():
    W, H = layers.random_layer(64, 128)
    codes, codebooks, scales = layers.random_state(64, 128, 2, 5, 8)
    errors = [
        _core.quantization_error(W, H, codes, _core.update_codebooks(codebooks, W, H, codes, scales, n), scales)
        for n in (0, 1, 2, 4, 8, 16)
    ]
    assert all(b < a for a, b in itertools.pairwise(errors))
    assert errors[0] == _core.quantization_error(W, H, codes, codebooks, scales)


def test_entries_without_members_stay():
    W, H = layers.random_layer(8, 32)
    codes, codebooks, scales = layers.random_state(8, 32, 2, 4, 8)
    codes[codes == 5] = 6
    found = _core.update_codebooks(codebooks, W, H, codes, scales, 5)
    np.testing.assert_array_equal(found[:, 5], codebooks[:, 5])
    assert (found[:, 6] != codebooks[:, 6]).any()


def test_scales_agree_with_numpy(isa):
    W, H = layers.random_layer(33, 64)
    codes, codebooks, scales = layers.random_state(33, 64, 2, 4, 8)
    codebooks[:, 0] = 0.0
    codes[7] = 0  # a row that decodes to zero keeps its scale
    found = _core.update_scales(scales, W, H, codes, codebooks)
    np.testing.assert_allclose(found, reference.update_scales(W, H, codes, codebooks, scales), rtol=2e-4, atol=1e-6)
    assert found[7] == scales[7]
    before, after = (_core.quantization_error(W, H, codes, codebooks, s) for s in (scales, found))
    assert after < before


def test_error_agrees_with_numpy(isa):
    W, H = layers.random_layer(33, 64)
    codes, codebooks, scales = layers.random_state(33, 64, 3, 4, 8)
    truth = reference.error(W, H, reference.decode(codes, codebooks, scales))
    assert _core.quantization_error(W, H, codes, codebooks, scales) == pytest.approx(truth, rel=1e-5)
    assert _core.quantization_error(W, H) == pytest.approx(reference.error(W, H), rel=1e-5)


def test_same_bits_on_every_isa_and_thread_count(each_way):
    W, H = layers.random_layer(150, 136)
    codes, codebooks, scales = layers.random_state(150, 136, 2, 6, 8)
    assert each_way(
        lambda: (
            _core.update_codebooks(codebooks, W, H, codes, scales, 4),
            _core.update_scales(scales, W, H, codes, codebooks),
            np.float64(_core.quantization_error(W, H, codes, codebooks, scales)),
        )
    )


def test_wrong_arguments():
    W, H = layers.random_layer(8, 32)
    codes, codebooks, scales = layers.random_state(8, 32, 2, 4, 8)
    with pytest.raises(ValueError, match="cg_steps: got -1"):
        _core.update_codebooks(codebooks, W, H, codes, scales, -1)
    with pytest.raises(ValueError, match="codebooks: got None, expected an array beside codes"):
        _core.quantization_error(W, H, codes)
    with pytest.raises(ValueError, match=r"codes: got [123][0-9] at flat index 0, expected 0"):
        _core.update_scales(scales, W, H, codes + 16, codebooks)
