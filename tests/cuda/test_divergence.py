"""KL and its gradient by one kernel, beside float64."""

import math

import pytest
import torch

from aqlm_c.model.logits import kl_and_gradient, kl_divergence
from aqlm_c.nn import ops

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a GPU that torch can use", allow_module_level=True)
if not ops.has_cuda:
    pytest.skip("aqlm_c was built without _cuda", allow_module_level=True)

EPS = {torch.float32: 2e-7, torch.float16: 5e-4, torch.bfloat16: 4e-3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("words", [1, 7, 96, 4100, 49152, 151_937])
def test_divergence(dtype, words):
    generator = torch.Generator().manual_seed(words)
    p = 3 * torch.randn(5, words, generator=generator) + 20
    for scale in (1e-3, 1e-1, 3.0):
        q = p + scale * torch.randn(p.shape, generator=generator)
        original, logits = p.to(dtype).cuda(), q.to(dtype).cuda()
        kl, gradient = ops.divergence(original, logits)
        again = ops.divergence(original, logits)
        assert torch.equal(kl, again[0]) and torch.equal(gradient, again[1]) and gradient.dtype == dtype
        log_p, log_q = (one.double().log_softmax(-1) for one in (original, logits))
        torch.testing.assert_close(kl.double(), (log_p.exp() * (log_p - log_q)).sum(-1), rtol=2e-5, atol=3e-7)
        wanted = log_q.exp() - log_p.exp()
        torch.testing.assert_close(gradient.double(), wanted, rtol=2 * EPS[dtype] + 1e-5, atol=3e-6)
        assert torch.equal(kl_divergence(original, logits), kl) and torch.equal(
            kl_and_gradient(original, logits)[0], kl
        )
        alone = ops.divergence(original, logits, need_gradient=False)
        assert torch.equal(alone[0], kl) and alone[1].shape == (0, words)


def test_words_that_are_ruled_out():
    p = torch.tensor([[0.0, 0.0, -torch.inf], [1.0, 2.0, 3.0], [-torch.inf, 5.0, -torch.inf]]).cuda()
    q = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, -torch.inf], [-torch.inf, 1.0, -torch.inf]]).cuda()
    kl, gradient = ops.divergence(p, q)
    assert kl.tolist() == [pytest.approx(math.log(1.5)), math.inf, 0] and gradient[2].tolist() == [0, 0, 0]
    assert ops.divergence(p, p)[0].tolist() == [0, 0, 0]
    p[1, 1] = math.nan
    assert ops.divergence(p, q)[0].isnan().tolist() == [False, True, False]
    assert ops.divergence(q, p)[0].isnan().tolist() == [False, True, False]


def test_views_and_places_that_are_not_aligned():
    whole = torch.randn(2, 6, 1001, generator=torch.Generator().manual_seed(0)).cuda()
    for rows in (whole, whole[:, ::2], whole[:, 1:, 1:], whole.transpose(1, 2)):
        p, q = rows
        log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        kl, gradient = ops.divergence(p, q)
        torch.testing.assert_close(kl.double(), (log_p.exp() * (log_p - log_q)).sum(-1), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient.double(), log_q.exp() - log_p.exp(), rtol=1e-5, atol=1e-6)
    assert ops.divergence(whole[0, :0], whole[1, :0])[0].shape == (0,)


def test_refusals():
    p = torch.zeros(3, 8, device="cuda")
    for original, logits, said in (
        (p[0], p[0], r"logits: got shape \[8\], expected \[n, words\]"),
        (p[:2], p, r"original: got shape \[2, 8\], expected \[3, 8\] as logits"),
        (p.half(), p, "original: got dtype float16, expected float32 as logits"),
        (p.cpu(), p, "original: got a tensor elsewhere, expected it on cuda:0 as logits"),
        (p.double(), p.double(), "logits: got dtype float64"),
    ):
        with pytest.raises(RuntimeError, match=said):
            ops.divergence(original, logits)
