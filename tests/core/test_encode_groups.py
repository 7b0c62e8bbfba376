"""Single groups encoded in plain L2: exactly where that is promised, and never worse than before."""

import numpy as np
import pytest
import torch

from aqlm_c.core import verbs
from aqlm_c.core.extensions import has_cuda

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not (has_cuda and torch.cuda.is_available()), reason="needs an NVIDIA GPU"),
        ],
    ),
]


def problem(K, B, g, n=40, seed=0):
    rng = np.random.default_rng(seed)
    codebooks = rng.standard_normal((K, 2**B, g)).astype(np.float32)
    scales = (rng.uniform(0.5, 1.5, n) * rng.choice([-1, 1], n)).astype(np.float32)
    groups = (rng.standard_normal((n, g)) * K**0.5).astype(np.float32)
    return groups, codebooks, scales, rng.integers(0, 2**B, (n, K)).astype(np.uint16)


def errors(groups, codebooks, scales, codes):
    decoded = sum(codebooks[k][codes[:, k]] for k in range(len(codebooks))) * scales[:, None]
    return np.square(groups - decoded, dtype=np.float64).sum(1)


def encoded(device, groups, codebooks, scales, codes, beam_size, pairs):
    found = verbs.encode_groups(
        *(torch.tensor(a).to(device) for a in (codes, groups, codebooks, scales)), beam_size, pairs
    )
    return found.cpu().numpy()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("K", "B", "g"), [(1, 6, 8), (1, 10, 4), (2, 4, 8), (2, 8, 8), (2, 5, 16)])
def test_one_and_two_codebooks_are_searched_exactly(device, K, B, g):
    groups, codebooks, scales, codes = problem(K, B, g)
    found = encoded(device, groups, codebooks, scales, codes, 0 if K == 2 else 1, False)
    entries = codebooks[0] if K == 1 else (codebooks[0][:, None] + codebooks[1][None]).reshape(-1, g)
    least = [np.square(x - s * entries, dtype=np.float64).sum(1).min() for x, s in zip(groups, scales, strict=True)]
    np.testing.assert_allclose(errors(groups, codebooks, scales, found), least, rtol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("K", [3, 4])
def test_more_codebooks_never_get_worse(device, K):
    groups, codebooks, scales, codes = problem(K, 5, 8)
    first = encoded(device, groups, codebooks, scales, codes, 4, True)
    again = encoded(device, groups, codebooks, scales, first, 4, True)
    before, after, last = (errors(groups, codebooks, scales, one) for one in (codes, first, again))
    assert (after <= before * (1 + 1e-5)).all() and after.mean() < 0.2 * before.mean()
    assert (last <= after * (1 + 1e-5)).all()
