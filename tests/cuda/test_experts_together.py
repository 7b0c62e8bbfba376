"""Experts of transformers' mixtures on a GPU: all together they are what an expert at a time gives, in a graph too."""

import copy

import pytest
import torch
from torch import nn
from weights import random_weight

from aqlm_c.format import WEIGHT, Format
from aqlm_c.model.experts import Experts
from aqlm_c.nn import ops
from aqlm_c.nn.linear import QuantizedLinear

if not torch.cuda.is_available():
    pytest.skip("needs a GPU that torch can use", allow_module_level=True)
if not ops.has_cuda:
    pytest.skip("aqlm_c was built without _cuda", allow_module_level=True)

HIDDEN, WIDTH = 512, 768


class Fused(nn.Module):
    """The parameters and the activation that Mixtral's and Qwen's fused experts have."""

    def __init__(self, experts):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(experts, 2 * WIDTH, HIDDEN, device="cuda").half())
        self.down_proj = nn.Parameter(torch.zeros(experts, HIDDEN, WIDTH, device="cuda").half())

    def _apply_gate(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return nn.functional.silu(gate) * up


def quantized(experts, scheme="2x8g8", dtype=torch.float16):
    module, format = Experts(Fused(experts), ("w1", "w3", "w2")), Format.parse(scheme)
    for e, expert in enumerate(module):
        for place, (name, linear) in enumerate(list(expert.items())):
            layer = QuantizedLinear(linear.in_features, linear.out_features, False, format, "meta")
            shape = (linear.out_features, linear.in_features, format.num_codebooks, format.nbits_per_codebook)
            tensors = random_weight((*shape, format.out_group_size, format.in_group_size), dtype, seed=10 * e + place)
            for part, tensor in zip(WEIGHT, tensors, strict=True):
                scaled = tensor / 16 if part == "codebooks" else tensor
                setattr(layer, part, nn.Parameter(scaled.cuda(), requires_grad=False))
            expert[name] = layer
    return module


def routed(tokens, k, experts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(experts, generator=generator)[:k] for _ in range(tokens)])
    weights = torch.rand(tokens, k, generator=generator)
    return torch.randn(tokens, HIDDEN, generator=generator).half().cuda(), index.cuda(), weights.half().cuda()


@pytest.mark.parametrize("scheme", ["2x8g8", "1x16g8", "1x16g16"])
@pytest.mark.parametrize(("tokens", "k", "experts"), [(1, 2, 8), (32, 2, 8), (1, 8, 64), (40, 4, 16)])
@torch.no_grad()
def test_together(tokens, k, experts, scheme):
    module = quantized(experts, scheme)
    x, index, weights = routed(tokens, k, experts)
    index[-1, -1] = experts  # of none
    together = module(x, index, weights).float()
    assert module.stacks is not None
    module[0]["w1"].register_forward_hook(lambda *_: None)
    apart = module(x, index, weights).float()
    assert module.stacks is None
    assert (together - apart).abs().max() <= 4e-3 * apart.abs().max()


@pytest.mark.parametrize("tokens", [1, 32])
@torch.no_grad()
def test_in_a_graph(tokens):
    module = quantized(8)
    inputs = routed(tokens, 2, 8)
    module(*inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = module(*inputs)
    for seed in range(5):
        for to, value in zip(inputs, routed(tokens, 2, 8, seed), strict=True):
            to.copy_(value)
        expected = module(*inputs)
        graph.replay()
        assert torch.equal(captured, expected)


@torch.no_grad()
def test_copied_and_moved():
    """Linears are views of the stacks; those of a copy, and of one that was elsewhere, are found again."""
    module = quantized(8)
    inputs = routed(4, 2, 8)
    expected = module(*inputs)
    assert torch.equal(copy.deepcopy(module)(*inputs), expected)
    module.cpu()
    assert module.stacks is None
    module.cuda()
    assert torch.equal(module(*inputs), expected)


def test_gradients_are_an_expert_at_a_time():
    module = quantized(8)
    x, index, weights = routed(4, 2, 8)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(module(x, index, weights).float().sum(), x)
    assert grad.abs().max() > 0 and module.stacks is None
