"""Linears side by side and experts, without vLLM."""

import pytest
import torch
from tolerances import error_budget, max_error
from weights import dense, random_weight

from aqlm_c.format import WEIGHT, Format
from aqlm_c.nn.linear import QuantizedLinear
from aqlm_c.vllm.layers import Experts, JoinedLinears

IN, INNER = 64, 48
SCHEMES = {"2x8g8": (2, 8, 1, 8), "1x12g8": (1, 12, 1, 8)}


def linear(scheme, out, in_features, seed, device="cpu", dtype=torch.float32):
    if scheme == "dense":
        layer = torch.nn.Linear(in_features, out, bias=False)
        generator = torch.Generator().manual_seed(seed)
        layer.weight.data = torch.randn(out, in_features, generator=generator).to(device, dtype) / 8
        return layer.requires_grad_(False)
    layer = QuantizedLinear(in_features, out, False, Format.parse(scheme), dtype=dtype).requires_grad_(False)
    tensors = random_weight((out, in_features, *SCHEMES[scheme]), seed=seed)
    for name, tensor in zip(WEIGHT, tensors, strict=True):
        getattr(layer, name).data = (tensor / 8 if name == "codebooks" else tensor).to(getattr(layer, name).dtype)
    return layer.to(device)


def weight_of(layer):
    if isinstance(layer, QuantizedLinear):
        return dense(layer.codes, layer.codebooks, layer.scales)
    return layer.weight.double()


def silu_and_mul(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def experts_of(schemes, n=5, **options):
    """Gates, ups and downs of each scheme."""
    shapes = ((INNER, IN), (INNER, IN), (IN, INNER))
    linears = [
        [linear(scheme, *shape, 10 * e + place) for e in range(n)]
        for place, (scheme, shape) in enumerate(zip(schemes, shapes, strict=True))
    ]
    return Experts(*linears, silu_and_mul, **options), linears


def by_the_formula(linears, x, weights, index, dtype=torch.float64):
    gates, ups, downs = ([weight_of(layer).to(dtype) for layer in each] for each in linears)
    y = torch.zeros(x.shape, dtype=dtype)
    for token, choice in ((t, c) for t in range(len(x)) for c in range(index.shape[1])):
        e = int(index[token, choice])
        if e >= 0:
            row = x[token].to(dtype)
            hidden = torch.nn.functional.silu(gates[e] @ row) * (ups[e] @ row)
            y[token] += weights[token, choice].to(dtype) * (downs[e] @ hidden)
    return y


def routed(tokens, k, n=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(n, generator=generator)[:k] for _ in range(tokens)])
    weights = torch.rand(tokens, k, generator=generator)
    return torch.randn(tokens, IN, generator=generator), weights, index


@pytest.mark.parametrize("rows", [(), (1,), (3,), (2, 5)])
@pytest.mark.parametrize("schemes", [["2x8g8"], ["2x8g8", "2x8g8", "2x8g8"], ["2x8g8", "dense", "1x12g8"]])
@pytest.mark.parametrize("has_bias", [False, True])
def test_linears_side_by_side(schemes, rows, has_bias):
    parts = [linear(scheme, out, IN, out) for scheme, out in zip(schemes, (96, 24, 32), strict=False)]
    joined, x = JoinedLinears(parts), torch.randn(*rows, IN)
    assert joined.alike == (set(schemes) == {"2x8g8"})
    whole = torch.cat([weight_of(part) for part in parts])
    bias = torch.randn(len(whole)) if has_bias else None
    truth = x.double() @ whole.T + (0 if bias is None else bias.double())
    plain = x @ whole.float().T + (0 if bias is None else bias)
    got = joined(x, bias)
    assert got.shape == (*rows, len(whole))
    assert max_error(got, truth) <= error_budget(plain, truth) + 1e-5 * truth.abs().max()


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("schemes", [("2x8g8",) * 3, ("2x8g8", "1x12g8", "2x8g8"), ("2x8g8", "1x12g8", "dense")])
@pytest.mark.parametrize(("tokens", "k"), [(1, 1), (1, 2), (2, 2), (7, 3)])
def test_experts(schemes, tokens, k, stacked):
    """An expert at a time, all together, and every expert with all tokens."""
    experts, linears = experts_of(schemes, stacked=stacked)
    assert (experts.stacks is not None) == (stacked and "dense" not in schemes)
    x, weights, index = routed(tokens, k)
    index[-1, -1] = -1  # of another rank
    truth = by_the_formula(linears, x, weights, index)
    budget = error_budget(by_the_formula(linears, x, weights, index, torch.float32), truth) + 2e-5 * truth.abs().max()
    assert max_error(experts(x, weights, index), truth) <= budget
    assert max_error(experts.without_reading(x, weights, index), truth) <= budget


def test_experts_of_one_rank_add_up():
    """With experts spread over ranks, each of which has those of its own."""
    _, linears = experts_of(("2x8g8",) * 3, n=4)
    x, weights, index = routed(6, 2, n=4)
    halves = [Experts(*([*each[low : low + 2]] for each in linears), silu_and_mul) for low in (0, 2)]
    local = [torch.where((index >= low) & (index < low + 2), index - low, -1) for low in (0, 2)]
    got = sum(half(x, weights, places) for half, places in zip(halves, local, strict=True))
    truth = by_the_formula(linears, x, weights, index)
    assert max_error(got, truth) <= 1e-4 * truth.abs().max()


def test_weights_on_the_input():
    experts, linears = experts_of(("2x8g8",) * 3)
    x, weights, index = routed(4, 1)
    truth = by_the_formula(linears, x * weights, torch.ones_like(weights), index)
    assert max_error(experts(x, weights, index, on_input=True), truth) <= 1e-4 * truth.abs().max()


def test_experts_of_no_token():
    experts, _ = experts_of(("2x8g8",) * 3)
    x, weights, index = routed(1, 2)
    assert experts(x[:0], weights[:0], index[:0]).shape == (0, IN)
    assert not experts(x, weights, torch.full_like(index, -1)).any()


def test_sides_are_compiled():
    """vLLM compiles models whole: no break in the graph, and the same product."""
    parts = [linear(scheme, 32, IN, place) for place, scheme in enumerate(("2x8g8", "dense", "1x12g8"))]
    for joined in (JoinedLinears(parts), JoinedLinears([parts[0], linear("2x8g8", 16, IN, 7)])):
        compiled = torch.compile(joined, fullgraph=True, backend="eager")
        x, bias = torch.randn(3, IN), torch.randn(sum(joined.sizes))
        with torch.inference_mode():
            assert torch.equal(compiled(x, bias), joined(x, bias))
