"""Linears of one input that share launches: whose product is whose, and when each is by itself. On the CPU, where
`matmul_joined` is one product after the other, groups are told to join."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from tiny import random_tokens, write_published
from torch import nn
from transformers import AutoModelForCausalLM

import aqlm_c.hf  # noqa: F401
from aqlm_c import QuantizedLinear, join_linears, ops
from aqlm_c.joined import MOST_MISSES, Joined

IN = 32


def linear(out, bias=False, num_codebooks=2, seed=0):
    torch.manual_seed(seed + out)
    layer = QuantizedLinear(IN, out, bias, 8, 1, num_codebooks, 8).requires_grad_(False)
    layer.codes.random_(-128, 128)
    for parameter in layer.parameters():
        if parameter.is_floating_point():
            parameter.normal_()
    return layer


class Attention(nn.Module):
    def __init__(self, bias=False, num_codebooks=(2, 2, 2)):
        super().__init__()
        sizes = zip((64, 40, 48), num_codebooks, strict=True)
        self.q_proj, self.k_proj, self.v_proj = (linear(out, bias, K) for out, K in sizes)

    def apart(self, x):
        return [ops.matmul(x, m.codes, m.codebooks, m.scales, m.bias) for m in self.children()]

    def forward(self, x):
        return [m(x) for m in self.children()]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def calls(monkeypatch):
    """How many weights each call of `matmul_joined` had."""
    found = []

    def joined(x, weights):
        found.append(len(weights))
        return operator(x, weights)

    operator = ops.matmul_joined
    monkeypatch.setattr(Joined, "device_type", "cpu")
    monkeypatch.setattr(ops, "matmul_joined", joined)
    return found


def row(seed=0, rows=1):
    return torch.randn(rows, IN, generator=torch.Generator().manual_seed(seed))


def check(module, x):
    assert all(torch.equal(y, z) for y, z in zip(module(x), module.apart(x), strict=True))


@pytest.mark.parametrize("bias", [False, True])
def test_all_at_the_first(calls, bias):
    attention = Attention(bias)
    assert join_linears(attention) == 1
    for seed in range(3):
        check(attention, row(seed)[None])
    assert calls == [3] * 3


def test_only_what_has_one_format(calls):
    assert join_linears(Attention(num_codebooks=(2, 2, 4))) == 0
    unlike = Attention()
    unlike.v_proj = nn.Linear(IN, 48)
    assert join_linears(unlike) == 0
    unlike = Attention()
    unlike.k_proj = linear(40, bias=True)
    assert join_linears(unlike) == 0


def test_several_rows_are_apart(calls):
    attention = Attention()
    join_linears(attention)
    check(attention, row(rows=2))
    check(attention, row(rows=0))
    assert calls == []


def test_an_input_that_was_changed(calls):
    attention = Attention()
    join_linears(attention)
    x = row()
    attention.q_proj(x)
    x += 1
    assert torch.equal(attention.k_proj(x), attention.apart(x)[1])
    with torch.inference_mode():  # where nobody counts
        x = row()
        attention.q_proj(x)
        x += 1
        assert torch.equal(attention.k_proj(x), attention.apart(x)[1])


def test_any_order_and_other_inputs_between(calls):
    attention = Attention()
    join_linears(attention)
    x, z = row(0), row(1)
    for place, name, of in [(2, "v_proj", x), (0, "q_proj", x), (0, "q_proj", z), (1, "k_proj", x), (1, "k_proj", z)]:
        assert torch.equal(attention.get_submodule(name)(of), attention.apart(of)[place])


def test_a_product_is_given_once(calls):
    """It may be changed in place by who gets it."""
    attention = Attention()
    join_linears(attention)
    x = row()
    first = attention.q_proj(x).zero_()
    second = attention.q_proj(x)
    assert torch.equal(second, attention.apart(x)[0]) and not first.any()


def test_gives_up_where_inputs_differ(calls):
    attention = Attention()
    join_linears(attention)
    for seed in range(50):  # cross attention
        assert torch.equal(attention.q_proj(row(seed)), attention.apart(row(seed))[0])
        y, z = attention.k_proj(context := row(100)), attention.v_proj(context)
        assert torch.equal(y, attention.apart(context)[1]) and torch.equal(z, attention.apart(context)[2])
    assert len(calls) <= 2 * MOST_MISSES
    assert attention.q_proj.joined[0]._left is None


def test_a_miss_now_and_then_is_forgiven(calls):
    attention = Attention()
    join_linears(attention)
    for seed in range(3 * MOST_MISSES):
        attention.q_proj(row(seed))
        check(attention, row(seed))
    assert len(calls) == 2 * 3 * MOST_MISSES


def test_a_member_that_is_replaced(calls):
    attention = Attention()
    join_linears(attention)
    for other in (linear(40, seed=9), nn.Linear(IN, 40)):
        attention.k_proj = other
        x = row()
        assert torch.equal(attention.q_proj(x), ops.matmul(x, *list(attention.q_proj.parameters())))
        assert torch.equal(attention.k_proj(x), other(x))
    assert calls == []
    attention.k_proj = linear(40, seed=9)
    assert join_linears(attention) == 1
    check(attention, row())
    attention.k_proj.codes = nn.Parameter(linear(40, seed=10).codes, requires_grad=False)
    check(attention, row())


def test_training(calls):
    attention = Attention()
    join_linears(attention)
    with torch.enable_grad():
        x = row().requires_grad_()
        y = torch.cat(attention(x), -1)
        (grad,) = torch.autograd.grad(y.sum(), x)
        (true,) = torch.autograd.grad(torch.cat(attention.apart(x), -1).sum(), x)
        assert torch.equal(grad, true)
        attention.v_proj.scales.requires_grad_()
        y = attention(row())
        assert y[2].requires_grad and not y[0].requires_grad


def test_members_elsewhere(calls):
    """Offloaded, for one: each module's weights come when it is called."""
    attention = Attention()
    join_linears(attention)
    attention.k_proj.to("meta")
    assert torch.equal(attention.q_proj(row()), attention.apart(row())[0])
    assert calls == []


def test_copies_and_memory(calls):
    attention = Attention()
    join_linears(attention)
    attention.q_proj(row())
    for other in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
        assert other.q_proj.joined is None
        check(other, row())
    assert attention.q_proj.joined[0]._left is not None  # and are not the original's
    gc.collect()
    gc.disable()
    try:
        reference = weakref.ref(attention)
        del attention
        assert reference() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_compiled(calls, backend, monkeypatch):
    torch._dynamo.reset()
    attention = Attention(bias=True)
    join_linears(attention)
    found = []

    def counting(graph, inputs):
        found.extend(str(node.target) for node in graph.graph.nodes if "aqlm_c" in str(node.target))
        return graph.forward

    monkeypatch.undo()  # the operator itself; dynamo would not see through the list
    monkeypatch.setattr(Joined, "device_type", "cpu")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for f in (torch.compile(attention, fullgraph=True, backend=b) for b in (backend, counting)):
            for seed in range(3):
                x = row(seed)
                assert all(torch.equal(y, z) for y, z in zip(f(x), attention.apart(x), strict=True))
            torch._dynamo.reset()
    assert found == ["aqlm_c.matmul_joined"]


def test_loaded_models_are_joined(calls, tmp_path):
    write_published(tmp_path / "model", (2, 8, 8, 1))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokens = random_tokens(1, 6)
    apart = copy.deepcopy(model).generate(tokens, max_new_tokens=5, do_sample=False)
    assert calls == []
    assert torch.equal(model.generate(tokens, max_new_tokens=5, do_sample=False), apart)
    assert calls == [3, 2] * 2 * 4  # q, k and v, then gate and up, of two layers; the first step has many rows


def test_the_operator():
    x = row()
    weights = [(m.codes, m.codebooks, m.scales, m.bias) for m in Attention(bias=True).children()]
    codes, codebooks, scales, biases = map(list, zip(*weights, strict=True))
    torch.library.opcheck(torch.ops.aqlm_c.matmul_joined.default, (x, codes, codebooks, scales, biases))
    torch.library.opcheck(torch.ops.aqlm_c.matmul_joined.default, (row(rows=3), codes, codebooks, scales, []))
    with pytest.raises(RuntimeError, match="scales: got 2 tensors, expected 3 as in codes"):
        torch.ops.aqlm_c.matmul_joined(x, codes, codebooks, scales[:2], [])
    with pytest.raises(RuntimeError, match="biases: got 1 tensors, expected 3 as in codes"):
        torch.ops.aqlm_c.matmul_joined(x, codes, codebooks, scales, biases[:1])
    with pytest.raises(RuntimeError, match="codes: got an empty list, expected a tensor for each weight"):
        torch.ops.aqlm_c.matmul_joined(x, [], [], [], [])
    with pytest.raises(RuntimeError, match=r"x: got shape \[1, 31\], expected \[..., 32\]"):
        torch.ops.aqlm_c.matmul_joined(x[:, 1:], codes, codebooks, scales, [])
