"""Small layers with correlated inputs, as the quantizer meets them."""

import numpy as np


def random_layer(out, inp, seed=0, tokens=None):
    """W [out, in] with unequal rows and H [in, in] of correlated inputs with unequal scales, float32."""
    rng = np.random.default_rng(seed)
    W = rng.standard_normal((out, inp)) * np.exp(0.25 * rng.standard_normal((out, 1))) / np.sqrt(inp)
    basis = np.linalg.qr(rng.standard_normal((inp, inp)))[0] / np.sqrt(1.0 + np.arange(inp))
    X = rng.standard_normal((tokens or 4 * inp, inp)) @ basis.T * np.exp(0.5 * rng.standard_normal(inp))
    return W.astype(np.float32), (X.T @ X / len(X)).astype(np.float32)


def random_state(out, inp, K, B, g, seed=0):
    """Any codes uint16 [out, J, K], codebooks float32 [K, E, g] and scales float32 [out], of the weights' size."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**B, (out, inp // g, K)).astype(np.uint16)
    codebooks = (rng.standard_normal((K, 2**B, g)) * 0.7 ** np.arange(K)[:, None, None]).astype(np.float32)
    scales = (np.exp(0.25 * rng.standard_normal(out)) / np.sqrt(inp)).astype(np.float32)
    return codes, codebooks, scales
