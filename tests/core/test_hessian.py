import layers
import numpy as np
import pytest
import reference

from aqlm_c import _core


@pytest.mark.parametrize("n,inp", [(1, 4), (7, 40), (100, 97), (5000, 100)])
def test_sum_agrees_with_numpy(isa, n, inp):
    x = np.random.default_rng(0).standard_normal((n, inp)).astype(np.float32)
    total = np.full((inp, inp), 0.5)
    _core.accumulate_hessian(total, x)
    truth = x.astype(np.float64).T @ x.astype(np.float64) + 0.5
    np.testing.assert_allclose(total, truth, rtol=2e-6, atol=2e-6 * n**0.5)
    np.testing.assert_array_equal(total, total.T)


def test_same_bits_on_every_isa_and_thread_count(every_isa):
    x = np.random.default_rng(0).standard_normal((300, 200)).astype(np.float32)

    def run():
        total = np.zeros((200, 200))
        _core.accumulate_hessian(total, x)
        return total, *_core.factor_hessian((total / 300).astype(np.float32), 8, 1e-3)

    assert every_isa(run)


def test_sum_must_be_writable_and_contiguous():
    x = np.ones((2, 8), np.float32)
    frozen = np.zeros((8, 8))
    frozen.flags.writeable = False
    for bad in (frozen, np.zeros((8, 16))[:, ::2]):
        with pytest.raises(ValueError, match="sum: got a read-only or strided array"):
            _core.accumulate_hessian(bad, x)
    with pytest.raises(ValueError, match=r"sum: got shape \(4, 4\), expected \(8, 8\)"):
        _core.accumulate_hessian(np.zeros((4, 4)), x)


@pytest.mark.parametrize("n,rows,columns", [(1, 4, 3), (100, 97, 200), (2500, 40, 64)])
def test_product_agrees_with_numpy(isa, n, rows, columns):
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal((n, width)).astype(np.float32) for width in (rows, columns))
    total = np.full((rows, columns), 0.5)
    _core.accumulate_product(total, x, y)
    np.testing.assert_allclose(total, x.astype(np.float64).T @ y + 0.5, rtol=2e-6, atol=2e-6 * n**0.5)


def inputs_that_change(n=3000, width=72, out=50):
    """A weight, inputs that it was made for, and those that it gets: float64 [out, in], [n, in], [n, in]."""
    rng = np.random.default_rng(0)
    X = rng.standard_normal((n, width)) @ rng.standard_normal((width, width))
    changed = 0.8 * X + rng.standard_normal((n, width)) @ rng.standard_normal((width, width))
    return rng.standard_normal((out, width)), X, changed


def test_a_corrected_weight_makes_up_for_its_inputs(isa):
    W, X, changed = inputs_that_change()
    H, C = (changed.T @ changed / len(X)).astype(np.float32), ((X - changed).T @ changed / len(X)).astype(np.float32)
    for alpha, damp in ((1.0, 0.0), (0.3, 0.02)):
        found = _core.correct_weight(W.astype(np.float32), C, H, alpha, damp)
        truth = reference.correct_weight(W, C, H, alpha, damp)
        np.testing.assert_allclose(found, truth, rtol=1e-4, atol=1e-5 * np.abs(truth).max())
    best = np.linalg.lstsq(changed, X @ W.T, rcond=None)[0].T
    found = _core.correct_weight(W.astype(np.float32), C, H, 1.0, 0.0)
    np.testing.assert_allclose(found, best, rtol=1e-3, atol=1e-4 * np.abs(best).max())
    np.testing.assert_array_equal(_core.correct_weight(W.astype(np.float32), C, H, 0.0, 0.0), W.astype(np.float32))


def test_corrections_have_the_same_bits_on_every_isa_and_thread_count(every_isa):
    W, X, changed = (array.astype(np.float32) for array in inputs_that_change())

    def run():
        H, C = np.zeros((72, 72)), np.zeros((72, 72))
        _core.accumulate_hessian(H, changed)
        _core.accumulate_product(C, X - changed, changed)
        return H, C, _core.correct_weight(W, C.astype(np.float32), H.astype(np.float32), 0.5, 0.01)

    assert every_isa(run)


def test_refusals_of_corrections():
    W, H, x = np.ones((3, 8), np.float32), np.eye(8, dtype=np.float32), np.ones((2, 8), np.float32)
    for call, message in [
        (lambda: _core.correct_weight(W, H, -H, 1.0, 0.0), "correct_weight: H is not positive definite"),
        (lambda: _core.correct_weight(W, H[:4], H, 1.0, 0.0), r"cross: got shape \(4, 8\), expected \(8, 8\)"),
        (lambda: _core.correct_weight(W, H, H, 1.0, -1.0), "relative_damp: got -1.0, expected a number >= 0"),
        (lambda: _core.accumulate_product(np.zeros((8, 4)), x, x), r"sum: got shape \(8, 4\), expected \(8, 8\)"),
        (lambda: _core.accumulate_product(np.zeros((8, 8)), x, x[:1]), r"y: got shape \(1, 8\), expected \(2, "),
        (lambda: _core.accumulate_product(np.zeros((8, 16))[:, ::2], x, x), "sum: got a read-only or strided array"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("g", [4, 8, 16, 32])
def test_factor_agrees_with_numpy(g):
    _, H = layers.random_layer(1, 160, seed=g)
    order, feedback, metric = _core.factor_hessian(H, g, 1e-3)
    truth = reference.factor_hessian(H, g, 1e-3)
    np.testing.assert_array_equal(order, truth[0])
    np.testing.assert_allclose(metric, truth[2], rtol=1e-4, atol=1e-6 * np.abs(truth[2]).max())
    np.testing.assert_allclose(feedback, truth[1], rtol=1e-3, atol=1e-5 * np.abs(truth[1]).max())


def test_factor_splits_the_error_into_groups():
    """tr(D H D^T) is the sum over groups of what each adds to the errors before it (damping is part of H)."""
    _, H = layers.random_layer(1, 64)
    order, feedback, metric = _core.factor_hessian(H, 8, 1e-3)
    D = np.random.default_rng(1).standard_normal(64)
    index = np.concatenate([np.arange(j * 8, j * 8 + 8) for j in order])
    parts = (D[index] + D[index] @ feedback).reshape(-1, 8)
    damped = H + 1e-3 * H.diagonal().mean() * np.eye(64)
    assert np.einsum("jd,jde,je->", parts, metric, parts) == pytest.approx(D @ damped @ D, rel=1e-4)


@pytest.mark.parametrize("bad", ["nan", "inf", "indefinite", "zero"])
def test_factor_rejects_what_is_not_positive(bad):
    H = np.eye(16, dtype=np.float32)
    if bad == "zero":
        H[:] = 0
    else:
        H[3, 3] = {"nan": np.nan, "inf": np.inf, "indefinite": -1.0}[bad]
    with pytest.raises(ValueError, match="not positive definite after damping, or holds NaN or Inf"):
        _core.factor_hessian(H, 8, 1e-3)


def test_damping_must_not_be_negative():
    for damp in (-1e-3, float("nan")):
        with pytest.raises(ValueError, match=f"relative_damp: got {damp}, expected a number >= 0"):
            _core.factor_hessian(np.eye(8, dtype=np.float32), 8, damp)


@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0, 2.0, 2.1, 4.0])
def test_gaussian_reference_agrees_with_numpy(rate):
    eigenvalues = 1.0 / (1.0 + np.arange(200.0)) ** 2
    assert _core.gaussian_reference(eigenvalues, rate) == pytest.approx(
        reference.gaussian_reference(eigenvalues, rate), rel=1e-6
    )


def test_gaussian_reference_of_white_inputs_is_the_rate_distortion_function():
    for rate in (1.0, 2.0, 3.0):
        assert _core.gaussian_reference(np.ones(64), rate) == pytest.approx(4.0**-rate)
    for values, rate, message in [
        (np.zeros(4), 2.0, "gaussian_reference: "),
        (np.ones(4), -1.0, "rate: got -1.0, expected a number >= 0"),
        (np.zeros(0), 2.0, "eigenvalues: got none"),
    ]:
        with pytest.raises(ValueError, match=message):
            _core.gaussian_reference(values, rate)
