"""The layers of vLLM's plugin in CUDA graphs: captured with one routing, replayed with others."""

import pytest
import torch
from weights import random_weight

from aqlm_c.format import WEIGHT, Format
from aqlm_c.nn import ops
from aqlm_c.nn.linear import QuantizedLinear
from aqlm_c.vllm.layers import Experts, JoinedLinears

if not torch.cuda.is_available():
    pytest.skip("needs a GPU that torch can use", allow_module_level=True)
if not ops.has_cuda:
    pytest.skip("aqlm_c was built without _cuda", allow_module_level=True)

IN, INNER, EXPERTS = 512, 1024, 8


def linear(scheme, out, in_features, seed):
    format = Format.parse(scheme)
    layer = QuantizedLinear(in_features, out, False, format, "meta").requires_grad_(False)
    shape = (out, in_features, format.num_codebooks, format.nbits_per_codebook, 1, format.in_group_size)
    for name, tensor in zip(WEIGHT, random_weight(shape, torch.float16, seed), strict=True):
        scaled = tensor / 32 if name == "codebooks" else tensor
        setattr(layer, name, torch.nn.Parameter(scaled.cuda(), requires_grad=False))
    return layer


def silu_and_mul(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def captured(function, *inputs):
    """A graph of the call, and its output. What is recorded may be another way than that of the calls before it."""
    torch.cuda.current_blas_handle()  # which cannot be made while a graph is recorded
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.inference_mode():
        for _ in range(2):
            function(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        output = function(*inputs)
    return graph, output


def routing(tokens, k, seed):
    generator = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(EXPERTS, generator=generator)[:k] for _ in range(tokens)])
    weights = torch.rand(tokens, k, generator=generator)
    return torch.randn(tokens, IN, generator=generator).half().cuda(), weights.cuda(), index.cuda()


@pytest.mark.parametrize("schemes", [("2x8g8",) * 3, ("2x8g8", "2x8g8", "1x16g8"), ("2x8g8", "1x12g8", "2x8g8")])
@pytest.mark.parametrize(("tokens", "k"), [(1, 1), (1, 2), (4, 2), (5, 2), (32, 2)])
def test_experts_in_a_graph(schemes, tokens, k):
    """All together, a row for each choice, by tables or by gathers: as if every expert saw all tokens."""
    shapes = ((INNER, IN), (INNER, IN), (IN, INNER))
    linears = [
        [linear(scheme, *shape, 10 * e + place) for e in range(EXPERTS)]
        for place, (scheme, shape) in enumerate(zip(schemes, shapes, strict=True))
    ]
    experts = Experts(*linears, silu_and_mul)
    assert experts.stacks is not None
    inputs = routing(tokens, k, seed=0)
    graph, output = captured(experts, *inputs)
    for seed in (1, 2):
        for place, value in zip(inputs, routing(tokens, k, seed), strict=True):
            place.copy_(value)
        if tokens * k > 1:
            inputs[2][-1, -1] = -1  # of another rank
        graph.replay()
        with torch.inference_mode():
            expected = experts.without_reading(*inputs).float()
        scale = expected.abs().max()
        assert scale > 0 and (output.float() - expected).abs().max() <= 4e-3 * scale


@pytest.mark.parametrize("rows", [1, 3, 8, 9, 40, 300])
@pytest.mark.parametrize("schemes", [("2x8g8", "2x8g8", "2x8g8"), ("2x8g8", "1x16g8")])
def test_linears_side_by_side_in_a_graph(schemes, rows):
    joined = JoinedLinears([linear(scheme, 256 * (place + 1), IN, place) for place, scheme in enumerate(schemes)])
    bias = torch.randn(sum(joined.sizes), device="cuda").half()
    x = torch.randn(rows, IN, device="cuda").half()
    graph, output = captured(joined, x, bias)
    x.copy_(torch.randn(rows, IN, device="cuda"))
    graph.replay()
    with torch.inference_mode():
        assert torch.equal(output, joined(x, bias))
