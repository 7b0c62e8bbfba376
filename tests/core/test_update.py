import itertools
import signal
import threading
import time

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


@pytest.mark.parametrize("K,B,g", [(1, 3, 8), (2, 4, 4), (3, 2, 16)])
def test_adam_agrees_with_numpy(isa, K, B, g):
    W, H = layers.random_layer(33, 64, seed=K)
    codes, codebooks, scales = layers.random_state(33, 64, K, B, g)
    moments = np.zeros((2, codebooks.size + 33))
    found = _core.update_adam(codebooks, scales, moments, W, H, codes, 7, 1e-3)
    truth = reference.update_adam(codebooks, scales, moments, W, H, codes, 7, 1e-3)
    for before, mine, his in zip((codebooks, scales, moments), found, truth, strict=True):
        assert np.abs(mine - his).max() < 1e-3 * np.abs(his - before).max()
    again = _core.update_adam(*found, W, H, codes, 5, 1e-3, 7)
    at_once = _core.update_adam(codebooks, scales, moments, W, H, codes, 12, 1e-3)
    assert all((a == b).all() for a, b in zip(again, at_once, strict=True))


def test_adam_is_that_of_torch():
    torch = pytest.importorskip("torch")
    W, H = layers.random_layer(16, 32)
    codes, codebooks, scales = layers.random_state(16, 32, 2, 3, 8)
    books, sizes = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (codebooks, scales))
    adam = torch.optim.Adam([books, sizes], lr=1e-3, betas=(0.0, 0.95), amsgrad=True)
    for _ in range(20):
        groups = sum(books[k][torch.tensor(codes[:, :, k].astype(np.int64))] for k in range(2))
        D = torch.tensor(W) - sizes[:, None] * groups.reshape(16, 32)
        adam.zero_grad()
        (((D @ torch.tensor(H, dtype=torch.float64)) * D).sum() / 16).backward()
        adam.step()
    found = _core.update_adam(codebooks, scales, np.zeros((2, codebooks.size + 16)), W, H, codes, 20, 1e-3)
    np.testing.assert_allclose(found[0], books.detach().numpy(), atol=2e-5)
    np.testing.assert_allclose(found[1], sizes.detach().numpy(), atol=2e-5)


def test_small_steps_of_adam_lower_the_error():
    W, H = layers.random_layer(64, 128)
    codes, codebooks, scales = layers.random_state(64, 128, 2, 5, 8)
    moments, errors = np.zeros((2, codebooks.size + 64)), []
    for steps in (0, 10, 30, 100):
        state = _core.update_adam(codebooks, scales, moments, W, H, codes, steps, 1e-3)
        errors.append(_core.quantization_error(W, H, codes, *state[:2]))
    assert all(b < a for a, b in itertools.pairwise(errors)) and not moments.any()
    least = _core.quantization_error(W, H, codes, _core.update_codebooks(codebooks, W, H, codes, scales, 200), scales)
    assert errors[0] == _core.quantization_error(W, H, codes, codebooks, scales) and errors[-1] > 0.5 * least


def test_ctrl_c_stops_adam():
    W, H = layers.random_layer(256, 256)
    codes, codebooks, scales = layers.random_state(256, 256, 2, 8, 8)
    moments = np.zeros((2, codebooks.size + 256))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    started = time.monotonic()
    threading.Timer(0.3, signal.raise_signal, (signal.SIGINT,)).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            _core.update_adam(codebooks, scales, moments, W, H, codes, 10**7, 1e-4)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - started < 2.3 and not moments.any()


def test_same_bits_on_every_isa_and_thread_count(every_isa):
    W, H = layers.random_layer(150, 136)
    codes, codebooks, scales = layers.random_state(150, 136, 2, 6, 8)
    assert every_isa(
        lambda: (
            _core.update_codebooks(codebooks, W, H, codes, scales, 4),
            _core.update_scales(scales, W, H, codes, codebooks),
            *_core.update_adam(codebooks, scales, np.zeros((2, codebooks.size + 150)), W, H, codes, 3, 1e-2),
            np.float64(_core.quantization_error(W, H, codes, codebooks, scales)),
        )
    )


def test_wrong_arguments():
    W, H = layers.random_layer(8, 32)
    codes, codebooks, scales = layers.random_state(8, 32, 2, 4, 8)
    with pytest.raises(ValueError, match="cg_steps: got -1"):
        _core.update_codebooks(codebooks, W, H, codes, scales, -1)
    moments = np.zeros((2, codebooks.size + 8))
    for name, arguments in [
        ("steps: got -1", (moments, W, H, codes, -1, 1e-4)),
        ("learning_rate: got nan", (moments, W, H, codes, 1, np.nan)),
        ("steps_before: got -2", (moments, W, H, codes, 1, 1e-4, -2)),
        (r"moments: got shape \(2, 7\), expected \(2, 264\)", (moments[:, :7], W, H, codes, 1, 1e-4)),
    ]:
        with pytest.raises(ValueError, match=name):
            _core.update_adam(codebooks, scales, *arguments)
    with pytest.raises(ValueError, match="codebooks: got None, expected an array beside codes"):
        _core.quantization_error(W, H, codes)
    with pytest.raises(ValueError, match=r"codes: got [123][0-9] at flat index 0, expected 0"):
        _core.update_scales(scales, W, H, codes + 16, codebooks)
