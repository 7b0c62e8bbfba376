import numpy as np
import pytest
import reference
from tolerances import error_budget, max_error

from aqlm_c import _core

FORMATS = [
    (K, B, g, og)
    for K, B in [(1, 1), (1, 16), (2, 8), (3, 7), (8, 8), (2, 9), (1, 12), (5, 4)]
    for g in (4, 8, 16, 32)
    for og in (1, 2)
]


def stored(out, inp, K, B, g, og, seed=0):
    rng = np.random.default_rng(seed)
    dtype = np.int8 if B <= 8 else np.int16
    codes = rng.integers(-(2 ** (B - 1)), 2 ** (B - 1), (out // og, inp // g, K)).astype(dtype)
    codebooks = rng.standard_normal((K, 2**B, og, g)).astype(np.float32)
    return codes, codebooks, rng.uniform(0.5, 2, (out // og, 1, 1, 1)).astype(np.float32)


@pytest.mark.parametrize("K,B,g,og", FORMATS)
def test_decode_agrees_with_numpy(K, B, g, og):
    weight = stored(6, 96, K, B, g, og)
    np.testing.assert_allclose(_core.decode_rows(*weight), reference.decode_stored(*weight), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("K,B,g,og", FORMATS[::3])
@pytest.mark.parametrize("rows", [1, 3, 4, 33])
@pytest.mark.parametrize("bias", [False, True])
def test_matmul_agrees_with_numpy(isa, K, B, g, og, rows, bias, exact):
    weight = stored(134, 96, K, B, g, og)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((rows, 96)).astype(np.float32)
    b = rng.standard_normal(134).astype(np.float32) if bias else None
    W = reference.decode_stored(*weight)
    truth = x.astype(np.float64) @ W.T + (0 if b is None else b)
    products = x[:, None] * W.astype(np.float32)
    plain = np.add.accumulate(products, axis=2, dtype=np.float32)[:, :, -1] + (0 if b is None else b)
    assert max_error(_core.matmul(x, *weight, b), truth) <= error_budget(plain, truth)


@pytest.mark.parametrize("rows", [1, 5, 600])
def test_same_bits_on_every_isa_and_thread_count(every_isa, rows):
    weight = stored(300, 72, 2, 8, 8, 1)
    x = np.random.default_rng(1).standard_normal((rows, 72)).astype(np.float32)
    assert every_isa(lambda: (_core.matmul(x, *weight), _core.decode_rows(*weight)))


def test_no_rows_and_strided_inputs():
    weight = stored(16, 32, 2, 8, 8, 1)
    assert _core.matmul(np.zeros((0, 32), np.float32), *weight).shape == (0, 16)
    x = np.random.default_rng(1).standard_normal((5, 64)).astype(np.float32)
    np.testing.assert_array_equal(_core.matmul(x[:, ::2], *weight), _core.matmul(x[:, ::2].copy(), *weight))


@pytest.mark.parametrize("nbits", range(1, 17))
def test_pack_and_unpack(nbits):
    codes = np.random.default_rng(nbits).integers(0, 2**nbits, (3, 5, 2)).astype(np.uint16)
    codes[0, 0] = 0, 2**nbits - 1
    packed = _core.pack_codes(codes, nbits)
    assert packed.dtype == (np.int8 if nbits <= 8 else np.int16)
    assert packed.min() >= -(2 ** (nbits - 1)) and packed.max() < 2 ** (nbits - 1)
    np.testing.assert_array_equal(_core.unpack_codes(packed, nbits), codes)
    np.testing.assert_array_equal(reference.unpack_codes(packed, nbits), codes)


def test_codes_out_of_range_are_named():
    with pytest.raises(ValueError, match=r"codes: got 4 at flat index 2, expected 0..3 for nbits_per_codebook=2"):
        _core.pack_codes(np.array([[[0, 1], [4, 3]]], np.uint16), 2)
    with pytest.raises(ValueError, match=r"codes: got -3 at flat index 1, expected -2..1"):
        _core.unpack_codes(np.array([[[0, -3]]], np.int8), 2)


@pytest.mark.parametrize(
    "which,value,error,message",
    [
        ("codes", np.zeros((4, 4, 1), np.int8), ValueError, r"codes: got shape \(4, 4, 1\), expected \(any, any, 2\)"),
        ("codes", np.zeros((4, 4, 2), np.int16), TypeError, "codes: got dtype int16, expected int8"),
        ("codebooks", np.zeros((2, 200, 1, 8), np.float32), ValueError, "codebooks: got 200 entries"),
        ("codebooks", np.zeros((2, 256, 1, 6), np.float32), ValueError, "in_group_size must be 4, 8, 16 or 32"),
        ("scales", np.zeros((5,), np.float32), ValueError, r"scales: got shape \(5,\), expected \(4,\)"),
        ("x", np.zeros((1, 31), np.float32), ValueError, r"x: got shape \(1, 31\), expected \(any, 32\)"),
        ("bias", np.zeros((5,), np.float32), ValueError, r"bias: got shape \(5,\), expected \(4,\)"),
    ],
)
def test_wrong_arguments(which, value, error, message):
    codes, codebooks, scales = stored(4, 32, 2, 8, 8, 1)
    arguments = {"x": np.zeros((1, 32), np.float32), "codes": codes, "codebooks": codebooks, "scales": scales}
    with pytest.raises(error, match=message):
        _core.matmul(**{**arguments, which: value})
