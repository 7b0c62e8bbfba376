"""Steps of Adam for the buffers of PV-Tuning: plain Adam with float32 moments, and near it with those of 8 bits."""

import numpy as np
import pytest
import reference

from aqlm_c import _core

SHAPES = [(1, 1), (3, 17), (16, 16), (5, 103), (33, 264)]  # values around lanes, blocks of 256 and pieces of threads
OPTIONS = (4.0, 1e-2, 0.5, 0.95)  # divisor, learning_rate, beta1, beta2


def gradients(shape, steps, seed=0):
    """Of sizes that differ from value to value as those of weights do, and from step to step."""
    generator = np.random.default_rng(seed)
    sizes = np.exp(2 * generator.standard_normal(shape))
    return [(1e-4 * sizes * generator.standard_normal(shape)).astype(np.float32) for _ in range(steps)]


def state(shape, of_bytes=False, first=True):
    blocks = -(-shape[0] * shape[1] // 256)
    kinds = (np.int8, np.uint8) if of_bytes else (np.float32, np.float32)
    moments = [np.zeros(shape, kind) for kind in kinds]
    return moments[0] if first else None, moments[1], np.zeros((2, blocks), np.float32) if of_bytes else None


def run(shape, steps=5, of_bytes=False, beta1=0.5, options=OPTIONS, seed=0):
    """The buffer and the moments after some steps, from an uneven start."""
    buffer = np.random.default_rng(9).standard_normal(shape).astype(np.float32)
    moments = state(shape, of_bytes, first=beta1 > 0)
    for step, gradient in enumerate(gradients(shape, steps, seed), 1):
        _core.buffer_step(buffer, gradient, *moments, options[0], options[1], beta1, options[3], step)
    return [buffer, *(one for one in moments if one is not None)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("beta1", [0.5, 0.0])
def test_floats_agree_with_numpy(isa, shape, beta1):
    buffer = np.random.default_rng(9).standard_normal(shape)
    first = second = np.zeros(shape)
    for step, gradient in enumerate(gradients(shape, 5), 1):
        arguments = gradient.astype(np.float64), first, second, *OPTIONS[:2], beta1, OPTIONS[3], step
        buffer, first, second = reference.buffer_step(buffer, *arguments)
    found, *moments = run(shape, beta1=beta1)
    np.testing.assert_allclose(found, buffer.astype(np.float32), rtol=0, atol=5e-7 * np.abs(buffer).max())
    np.testing.assert_allclose(moments[-1], second, rtol=3e-6)
    assert len(moments) == 1 + (beta1 > 0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("beta1", [0.5, 0.0])
def test_bytes_agree_with_numpy(isa, shape, beta1):
    """Moments are within one byte of the reference's, which a value between two bytes may go to either of."""
    buffer = np.random.default_rng(9).standard_normal(shape)
    first = second = np.zeros(shape)
    moments = state(shape, True, first=beta1 > 0)
    found = buffer.astype(np.float32)
    for step, gradient in enumerate(gradients(shape, 4), 1):
        options = (*OPTIONS[:2], beta1, OPTIONS[3], step)
        buffer, first, second = reference.buffer_step(buffer, gradient.astype(np.float64), first, second, *options)
        first, second = reference.blocks_of_moments(first, 4, 127), reference.blocks_of_moments(second, 8, 255, 1)
        _core.buffer_step(found, gradient, *moments, *options)
        kept_first, kept_second, scales = moments
        block = np.arange(found.size).reshape(shape) // 256
        roots = kept_second * scales[1][block]
        assert (np.abs(roots - second**0.125) <= 1.01 * scales[1][block]).all() and (kept_second > 0).all()
        if beta1:
            roots = np.sign(first) * np.abs(first) ** 0.25
            assert (np.abs(kept_first * scales[0][block] - roots) <= 1.01 * scales[0][block]).all()
    assert np.abs(found - buffer).max() < 2e-2 * OPTIONS[1] * 4


def test_bytes_are_near_floats():
    """After 100 steps by gradients whose sizes differ by e^2 (one standard deviation) the buffer is off by 6% of its
    way at most, in the root mean square (seeds 0 to 2: 5.1% to 5.9%)."""
    start = np.random.default_rng(9).standard_normal((64, 256)).astype(np.float32)
    for beta1 in (0.5, 0.0):
        exact, near = (run((64, 256), 100, of_bytes, beta1)[0] for of_bytes in (False, True))
        way = np.sqrt(np.square(exact - start).mean())
        assert 1e-3 * way < np.sqrt(np.square(near - exact).mean()) < 6e-2 * way


def test_small_second_moments_do_not_become_zero():
    gradient = np.full((1, 256), 1e-9, np.float32)
    gradient[0, 0], gradient[0, 1] = 1e3, 0
    moments, buffer = state((1, 256), True), np.zeros((1, 256), np.float32)
    _core.buffer_step(buffer, gradient, *moments, 1.0, 1e-2, 0.5, 0.95, 1)
    assert moments[1][0, 0] == 255 and moments[1][0, 1] == 0 and (moments[1][0, 2:] == 1).all()
    assert buffer[0, 1] == 0 and np.isfinite(buffer).all()
    for step in range(2, 6):  # steps of theirs are too small from then on, never too large
        before = buffer.copy()
        _core.buffer_step(buffer, gradient, *moments, 1.0, 1e-2, 0.5, 0.95, step)
        assert (np.abs(buffer - before)[0, 2:] < 1e-2).all()


@pytest.mark.parametrize("of_bytes", [False, True])
def test_numbers_at_the_ends_of_their_range(isa, of_bytes):
    for size in (0.0, 1e-45, 1e-38, 1e-22, 1e18):
        moments, buffer = state((2, 200), of_bytes), np.zeros((2, 200), np.float32)
        for step in (1, 2):
            gradient = np.full((2, 200), size, np.float32)
            _core.buffer_step(buffer, gradient, *moments, 1.0, 1e-2, 0.5, 0.95, step)
        assert np.isfinite(buffer).all() and (buffer <= 0).all() and (np.abs(buffer) <= 2.1e-2).all(), size
        assert (buffer < 0).all() or size < 1e-30
    moments, buffer = state((2, 200), of_bytes), np.zeros((2, 200), np.float32)
    gradient = np.ones((2, 200), np.float32)
    gradient[0, 3] = np.nan
    _core.buffer_step(buffer, gradient, *moments, 1.0, 1e-2, 0.5, 0.95, 1)
    _core.buffer_step(buffer, np.ones((2, 200), np.float32), *moments, 1.0, 1e-2, 0.5, 0.95, 2)
    assert np.isnan(buffer[0, 3]) and np.isfinite(buffer[1, 60:]).all()  # of the other block


def test_same_bits_on_every_isa_and_thread_count(every_isa):
    kinds = [(True, 0.5), (False, 0.5), (True, 0.0)]
    assert every_isa(lambda: tuple(x for kind in kinds for x in run((67, 264), of_bytes=kind[0], beta1=kind[1])))


def test_wrong_arguments():
    shape = (3, 17)
    buffer, gradient = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    first, second, scales = state(shape, True)
    floats = state(shape)

    def step(*moments, buffer=buffer, gradient=gradient, options=OPTIONS, step=1):
        _core.buffer_step(buffer, gradient, *moments, *options, step)

    for error, words, call in [
        (ValueError, "step: got 0, expected at least 1", lambda: step(*floats, step=0)),
        (ValueError, "beta1: got a number >= 1", lambda: step(*floats, options=(1, 0.1, 1.0, 0.9))),
        (ValueError, "beta2: got nan, expected a number >= 0", lambda: step(*floats, options=(1, 0.1, 0.9, np.nan))),
        (ValueError, "divisor: got 0, expected a number > 0", lambda: step(*floats, options=(0, 0.1, 0.9, 0.9))),
        (ValueError, "learning_rate: got -0.1, expected", lambda: step(*floats, options=(1, -0.1, 0.9, 0.9))),
        (ValueError, "first: got None, expected an array for a beta1 above 0", lambda: step(None, *floats[1:])),
        (TypeError, "first: got dtype float32, expected int8", lambda: step(floats[0], second, scales)),
        (TypeError, "second: got dtype float32, expected uint8", lambda: step(first, floats[1], scales)),
        (ValueError, r"scales: got shape \(2, 0\), expected \(2, 1\)", lambda: step(first, second, scales[:, :0])),
        (
            ValueError,
            r"gradient: got shape \(2, 17\), expected \(3, 17\)",
            lambda: step(*floats, gradient=gradient[:2]),
        ),
        (ValueError, "buffer: got a read-only or strided array", lambda: step(*floats, buffer=buffer.T.copy().T)),
    ]:
        with pytest.raises(error, match=words):
            call()
