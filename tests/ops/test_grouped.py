"""Linears of one input that share launches: whose product is whose, and when each is by itself. On the CPU, where
`matmul_grouped` is one product after the other, groups are told to share launches."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
import torch.utils.checkpoint
from tiny import random_tokens, write_published
from torch import nn
from transformers import AutoModelForCausalLM

import aqlm_c.hf  # noqa: F401
from aqlm_c import QuantizedLinear, join_linears
from aqlm_c.format import Format
from aqlm_c.nn import ops
from aqlm_c.nn.grouped import LinearGroup

pytestmark = pytest.mark.hf

IN = 32


def linear(out, bias=False, num_codebooks=2, seed=0):
    torch.manual_seed(seed + out)
    layer = QuantizedLinear(IN, out, bias, Format(num_codebooks)).requires_grad_(False)
    layer.codes.random_(-128, 128)
    for parameter in layer.parameters():
        if parameter.is_floating_point():
            parameter.normal_()
    return layer


class Attention(nn.Module):
    """`use`: what its forward does with them and x; as a rule, all of their products."""

    def __init__(self, bias=False, num_codebooks=(2, 2, 2), use=None):
        super().__init__()
        sizes = zip((64, 40, 48), num_codebooks, strict=True)
        self.q_proj, self.k_proj, self.v_proj = (linear(out, bias, K) for out, K in sizes)
        self.use = use

    def apart(self, x):
        return [ops.matmul(x, m.codes, m.codebooks, m.scales, m.bias) for m in self.children()]

    def forward(self, x):
        return self.use(self, x) if self.use else [self.q_proj(x), self.k_proj(x), self.v_proj(x)]


@pytest.fixture(autouse=True)
def no_grad():
    torch._dynamo.reset()
    with torch.no_grad():
        yield


@pytest.fixture
def calls(monkeypatch):
    """How many weights each call of `matmul_grouped` had."""
    found = []

    def counted(x, weights):
        found.append(len(weights))
        return operator(x, weights)

    operator = ops.matmul_grouped
    monkeypatch.setattr(LinearGroup, "device_type", "cpu")
    monkeypatch.setattr(ops, "matmul_grouped", counted)
    return found


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(LinearGroup, "device_type", "cpu")


def grouped(**options):
    attention = Attention(**options)
    assert join_linears(attention) == 1
    return attention


def row(seed=0, rows=1):
    return torch.randn(rows, IN, generator=torch.Generator().manual_seed(seed))


def equal(ys, zs):
    return len(ys) == len(zs) and all(torch.equal(y, z) for y, z in zip(ys, zs, strict=True))


def check(attention, x):
    assert equal(attention(x), attention.apart(x))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("inference", [False, True])
def test_all_at_the_first(calls, bias, inference):
    attention = grouped(bias=bias)
    with torch.inference_mode() if inference else torch.no_grad():
        for seed in range(3):
            check(attention, row(seed)[None])
    assert calls == [3] * 3
    assert join_linears(attention) == 1 and len(attention._forward_hooks) == 1  # the same group


def test_only_what_has_one_format(calls):
    assert join_linears(Attention(num_codebooks=(2, 2, 4))) == 0
    unlike = Attention()
    unlike.v_proj = nn.Linear(IN, 48)
    assert join_linears(unlike) == 0
    unlike = Attention()
    unlike.k_proj = linear(40, bias=True)
    assert join_linears(unlike) == 0


def test_several_rows_are_apart(calls):
    attention = grouped()
    for rows in (0, 2):
        check(attention, row(rows=rows))
    assert calls == [] and attention.q_proj.grouped[0].is_on


def test_outside_of_the_forward_each_is_by_itself(calls):
    attention = grouped()
    x = row()
    for _ in range(2):
        assert torch.equal(attention.q_proj(x), attention.apart(x)[0])
        x.data[0, 0] += 1  # which nobody sees
        assert torch.equal(attention.k_proj(x), attention.apart(x)[1])
    assert calls == []


def test_an_input_that_was_changed(calls):
    def use(self, x):
        y = self.q_proj(x)
        x += 1
        return [y, self.k_proj(x), self.v_proj(x)]

    attention = grouped(use=use)
    q, k, v = attention(row())
    assert torch.equal(q, attention.apart(row())[0])
    assert equal([k, v], attention.apart(row() + 1)[1:])


def test_any_order_and_other_inputs_between(calls):
    def use(self, x):
        z = x * 2
        return [self.v_proj(x), self.q_proj(z), self.q_proj(x), self.k_proj(z), self.k_proj(x), self.v_proj(z)]

    attention = grouped(use=use)
    (q, k, v), (q2, k2, v2) = attention.apart(row()), attention.apart(row() * 2)
    assert equal(attention(row()), [v, q2, q, k2, k, v2])


def test_a_product_is_given_once(calls):
    """It may be changed in place by who gets it."""
    attention = grouped(use=lambda self, x: [self.q_proj(x).zero_(), self.q_proj(x)])
    first, second = attention(row())
    assert torch.equal(second, attention.apart(row())[0]) and not first.any()


def test_a_forward_that_wants_less_ends_it(calls):
    attention = grouped(use=lambda self, x: [self.q_proj(x)])  # cross attention, its keys in a cache
    for seed in range(5):
        assert equal(attention(row(seed)), attention.apart(row(seed))[:1])
    assert calls == [3]
    group = attention.q_proj.grouped[0]
    assert not group.is_on and group._left is None
    attention.use = None
    check(attention, row())
    assert calls == [3] and join_linears(attention) == 1  # until it is asked again
    check(attention, row())
    assert calls == [3, 3]


def test_a_forward_that_fails_leaves_nothing(calls):
    def use(self, x):
        self.q_proj(x)
        raise ValueError

    attention = grouped(use=use)
    with pytest.raises(ValueError):
        attention(row())
    assert attention.q_proj.grouped[0]._left is None
    attention.use = None  # and is no reason to stop
    check(attention, row())
    assert calls == [3, 3]


def test_a_member_that_is_replaced(calls):
    attention = grouped()
    for other in (linear(40, seed=9), nn.Linear(IN, 40)):
        attention.k_proj = other
        q, k, _ = attention(row())
        assert torch.equal(q, ops.matmul(row(), *list(attention.q_proj.parameters()))) and torch.equal(k, other(row()))
    assert calls == []
    attention.k_proj = linear(40, seed=9)
    assert join_linears(attention) == 1
    check(attention, row())
    attention.k_proj.codes = nn.Parameter(linear(40, seed=10).codes, requires_grad=False)
    check(attention, row(1))
    assert calls == [3, 3]


def test_members_with_hooks_are_apart(calls):
    """An offloaded one gets its weights just before it is called."""
    attention = grouped()
    scales = attention.k_proj.scales.clone()
    attention.k_proj.scales.fill_(float("nan"))

    def load(module, _):
        module.scales.copy_(scales)

    hook = attention.k_proj.register_forward_pre_hook(load)
    ys = attention(row())
    assert equal(ys, attention.apart(row())) and calls == []
    hook.remove()
    check(attention, row())
    assert calls == [3]


def test_members_elsewhere(calls):
    attention = grouped(use=lambda self, x: [self.q_proj(x)])
    attention.k_proj.to("meta")
    assert torch.equal(attention(row())[0], ops.matmul(row(), *list(attention.q_proj.parameters())))
    assert calls == []


def test_gradients_within_a_forward(calls):
    """What shares no launch has them, whatever came before."""

    def use(self, x):
        with torch.no_grad():
            q = self.q_proj(x)
        return [q, self.k_proj(x), self.v_proj(x)]

    attention = grouped(use=use)
    with torch.enable_grad():
        q, k, v = attention(row().requires_grad_())
    assert (q.requires_grad, k.requires_grad, v.requires_grad) == (False, True, True)


@pytest.mark.parametrize("compiled", [False, True])
def test_checkpointing(on_cpu, compiled):
    """It runs the forward again, and torch 2.11 compiles nothing that stores an attribute in it."""

    def forward(x):
        return torch.cat(torch.utils.checkpoint.checkpoint(attention, x, use_reentrant=False), -1)

    attention = grouped()
    f = torch.compile(forward, fullgraph=True, backend="aot_eager") if compiled else forward
    with torch.enable_grad():
        x = row().requires_grad_()
        (grad,) = torch.autograd.grad(f(x).sum(), x)
        (true,) = torch.autograd.grad(torch.cat(attention.apart(x), -1).sum(), x)
    assert torch.equal(grad, true)


def test_training(calls):
    attention = grouped()
    with torch.enable_grad():
        x = row().requires_grad_()
        (grad,) = torch.autograd.grad(torch.cat(attention(x), -1).sum(), x)
        (true,) = torch.autograd.grad(torch.cat(attention.apart(x), -1).sum(), x)
        assert torch.equal(grad, true)
        attention.v_proj.scales.requires_grad_()
        y = attention(row())
        assert y[2].requires_grad and not y[0].requires_grad


def test_biases_that_are_not_alike():
    """None is left out, whichever comes first."""
    for without in ("q_proj", "k_proj"):
        attention = Attention(bias=True)
        attention.get_submodule(without).bias = None
        weights = [(m.codes, m.codebooks, m.scales, m.bias) for m in attention.children()]
        assert equal(ops.matmul_grouped(row(), weights), attention.apart(row()))
    assert ops.matmul_grouped(row(), []) == []


def test_threads(calls):
    attention = grouped()
    inputs = [row(seed) for seed in range(4)]
    expected = [attention.apart(x) for x in inputs]
    wrong = []

    def run(x, zs):
        try:
            with torch.no_grad():
                for _ in range(300):
                    assert equal(attention(x), zs)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=run, args=pair) for pair in zip(inputs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and attention.q_proj.grouped[0].is_on


def test_copies_and_memory(calls):
    attention = grouped()
    for other in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
        assert other.q_proj.grouped is None
        check(other, row())
        assert calls == []
        assert join_linears(other) == 1
        check(other, row())
        assert calls.pop() == 3
    attention.q_proj.compile(backend="eager")
    for other in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
        other.q_proj.scales.zero_()
        assert not other.q_proj(row()).any()
    gc.collect()
    gc.disable()
    try:
        reference = weakref.ref(attention)
        del attention
        assert reference() is None
    finally:
        gc.enable()


def recorder():
    """A backend that runs graphs as they are, and a list of the operators of ours in each that it compiled."""
    found = []

    def backend(graph, inputs):
        names = [str(node.target).removesuffix(".default") for node in graph.graph.nodes]
        found.append([name.removeprefix("aqlm_c.") for name in names if name.startswith("aqlm_c.")])
        return graph.forward

    return backend, found


def test_compiled(on_cpu):
    recording, found = recorder()
    attention = grouped(bias=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for backend in (recording, "inductor"):
            f = torch.compile(attention, fullgraph=True, backend=backend)
            for seed in range(3):
                assert equal(f(row(seed)), attention.apart(row(seed)))
            torch._dynamo.reset()
    assert found == [["matmul_grouped"]]


def test_compiled_cross_attention(on_cpu):
    backend, found = recorder()
    attention = grouped(use=lambda self, x: [self.q_proj(x)])
    f = torch.compile(attention, fullgraph=True, backend=backend)
    for seed in range(10):
        assert equal(f(row(seed)), attention.apart(row(seed))[:1])
    assert found == [["matmul_grouped"], ["matmul"]]


def test_members_compiled_by_themselves(on_cpu):
    """What is between them is not compiled, and may change x."""

    def use(self, x):
        y = self.q_proj(x)
        x.data += 1
        return [y, self.k_proj(x), self.v_proj(x)]

    attention = grouped(use=use)
    backend, found = recorder()
    for member in attention.children():
        member.compile(backend=backend)
    truth = Attention()
    for seed in range(10):
        q, k, v = attention(row(seed))
        assert torch.equal(q, truth.apart(row(seed))[0])
        assert equal([k, v], truth.apart(row(seed) + 1)[1:])
    assert found and all(names == ["matmul"] for names in found)


def test_numbers_of_rows_that_nobody_knows(on_cpu):
    """Of experts, for one: compiled and exported as before."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = grouped()

        def forward(self, x):
            return self.attention(x[(x[:, 0] > 0).nonzero()[:, 0]])

    experts = Experts()
    backend, found = recorder()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        f = torch.compile(experts, fullgraph=True, dynamic=True, backend=backend)
        for x in (row(rows=5), row(1, rows=9)):
            assert equal(f(x), experts.attention.apart(x[x[:, 0] > 0]))
    assert found == [["matmul"] * 3]
    torch.export.export(experts, (row(rows=5),))


def test_loaded_models_are_grouped(calls, tmp_path):
    write_published(tmp_path / "model", (2, 8, 8, 1))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokens = random_tokens(1, 6)
    apart = copy.deepcopy(model).generate(tokens, max_new_tokens=5, do_sample=False)
    assert calls == []
    assert torch.equal(model.generate(tokens, max_new_tokens=5, do_sample=False), apart)
    assert calls == [3, 2] * 2 * 4  # q, k and v, then gate and up, of two layers; the first step has many rows


def test_layers_share_a_compiled_graph(on_cpu, tmp_path):
    write_published(tmp_path / "model", (2, 8, 8, 1))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    expected = model(random_tokens(1, 1), use_cache=False).logits
    backend, found = recorder()
    for layer in model.model.layers:
        layer.self_attn.layer_idx = 0  # else every layer is compiled anew
        layer.compile(fullgraph=True, backend=backend)
    for _ in range(2):
        assert torch.equal(model(random_tokens(1, 1), use_cache=False).logits, expected)
    assert found == [["matmul_grouped", "matmul", "matmul_grouped", "matmul"]]


def test_the_operator():
    x = row()
    weights = [(m.codes, m.codebooks, m.scales, m.bias) for m in Attention(bias=True).children()]
    codes, codebooks, scales, biases = map(list, zip(*weights, strict=True))
    torch.library.opcheck(torch.ops.aqlm_c.matmul_grouped.default, (x, codes, codebooks, scales, biases))
    torch.library.opcheck(torch.ops.aqlm_c.matmul_grouped.default, (row(rows=3), codes, codebooks, scales, []))
    with pytest.raises(RuntimeError, match="scales: got 2 tensors, expected 3 as in codes"):
        torch.ops.aqlm_c.matmul_grouped(x, codes, codebooks, scales[:2], [])
    with pytest.raises(RuntimeError, match="biases: got 1 tensors, expected 3 as in codes"):
        torch.ops.aqlm_c.matmul_grouped(x, codes, codebooks, scales, biases[:1])
    with pytest.raises(RuntimeError, match="codes: got an empty list, expected a tensor for each weight"):
        torch.ops.aqlm_c.matmul_grouped(x, [], [], [], [])
    with pytest.raises(RuntimeError, match=r"x: got shape \[1, 31\], expected \[..., 32\]"):
        torch.ops.aqlm_c.matmul_grouped(x[:, 1:], codes, codebooks, scales, [])
    with pytest.raises(RuntimeError, match=r"x: got shape \[\], expected \[..., 32\]"):
        grouped()(torch.tensor(1.0))
