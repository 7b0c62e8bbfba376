"""The torch ops, their gradients, and the layer that calls them."""

import copy
import subprocess
import sys
import warnings

import pytest
import torch
from tolerances import error_budget, max_error
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from weights import SHAPE_IDS, SHAPES, SMALL, dense, random_weight

from aqlm_c.format import Format
from aqlm_c.methods.base import QuantizedWeight
from aqlm_c.nn import ops
from aqlm_c.nn.linear import QuantizedLinear


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_decode_rows(shape, dtype, isa):
    codes, codebooks, scales = random_weight(shape, dtype)
    rows, truth = ops.decode_rows(codes, codebooks, scales), dense(codes, codebooks, scales)
    assert rows.dtype == dtype and rows.shape == shape[:2]
    assert max_error(rows, truth) <= error_budget(truth.to(dtype), truth)


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
@pytest.mark.parametrize("leading", [(1,), (2, 3), (65,)], ids=str)
def test_matmul(shape, leading, dtype, isa):
    weight = random_weight(shape, dtype)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*leading, shape[1], generator=generator).to(dtype)
    bias = torch.randn(shape[0], generator=generator).to(dtype)
    W = dense(*weight)
    for b in (None, bias):
        y = ops.matmul(x, *weight, b)
        truth = nn.functional.linear(x.double(), W, None if b is None else b.double())
        plain = nn.functional.linear(x, W.to(dtype), b)
        assert y.dtype == dtype and y.shape == (*leading, shape[0])
        assert max_error(y, truth) <= error_budget(plain, truth)


def test_matmul_takes_a_vector_and_no_rows():
    weight = random_weight(SMALL)
    x = torch.randn(3, SMALL[1])
    assert torch.equal(ops.matmul(x[1], *weight), ops.matmul(x, *weight)[1])
    assert ops.matmul(x[:0], *weight).shape == (0, SMALL[0])
    assert ops.matmul(x[None, :0], *weight).shape == (1, 0, SMALL[0])


def test_matmul_mixes_dtypes_of_input_and_weight(dtype):
    weight = random_weight(SMALL, torch.float16)
    x = torch.randn(5, SMALL[1]).to(dtype)
    W = dense(*weight)
    truth, plain = x.double() @ W.T, x @ W.to(dtype).T
    assert max_error(ops.matmul(x, *weight), truth) <= error_budget(plain, truth)


def test_views_give_the_same_bits(dtype):
    """Strided and unaligned arguments, inside buffers of NaN and of wrong codes."""

    def spread(t, filler):
        buffer = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 1), filler, dtype=t.dtype)
        view = buffer[..., 1::2]
        return view.copy_(t)

    weight = random_weight(SMALL, dtype)
    x, bias = torch.randn(7, SMALL[1]).to(dtype), torch.randn(SMALL[0]).to(dtype)
    nan = float("nan")
    views = [spread(t, 0 if t.dtype == torch.int8 else nan) for t in (*weight[:2], bias)]
    codes, codebooks, bias_view = views
    y = ops.matmul(spread(x, nan), codes, codebooks, weight[2].view(-1), bias_view)
    assert torch.equal(y, ops.matmul(x, *weight, bias))
    shifted = torch.full((x.numel() + 1,), nan, dtype=dtype)[1:].view_as(x).copy_(x)  # contiguous, unaligned
    assert torch.equal(ops.matmul(shifted, *weight, bias), y)


def test_threads_give_the_same_bits(dtype):
    shape = (200, 256, 2, 8, 1, 8)
    weight, x = random_weight(shape, dtype), torch.randn(67, shape[1]).to(dtype)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append((ops.matmul(x, *weight), ops.decode_rows(*weight)))
    finally:
        torch.set_num_threads(threads)
    for y, rows in results[1:]:
        assert torch.equal(y, results[0][0]) and torch.equal(rows, results[0][1])


BAD = {
    "x: got shape": lambda a: a.update(x=a["x"][:, 1:]),
    "x: got dtype float64": lambda a: a.update(x=a["x"].double()),
    "codes: got shape": lambda a: a.update(codes=a["codes"][0]),
    "codes: got dtype int16, expected int8": lambda a: a.update(codes=a["codes"].short()),
    "codebooks: got shape": lambda a: a.update(codebooks=a["codebooks"][0]),
    "codebooks: got 7 entries": lambda a: a.update(codebooks=a["codebooks"][:, 1:]),
    "codebooks: got 1 codebooks, expected 2": lambda a: a.update(codebooks=a["codebooks"][:1]),
    "codebooks: got dtype int32": lambda a: a.update(codebooks=a["codebooks"].int(), scales=a["scales"].int()),
    "codes and codebooks: got shapes [6, 4, 2] and [2, 8, 2, 3], expected a valid layer": lambda a: a.update(
        codebooks=a["codebooks"][..., :3]
    ),
    "scales: got shape": lambda a: a.update(scales=a["scales"][1:]),
    "scales: got dtype float16": lambda a: a.update(scales=a["scales"].half()),
    "bias: got shape": lambda a: a.update(bias=a["bias"][1:]),
    "bias: got dtype float16": lambda a: a.update(bias=a["bias"].half()),
}


@pytest.mark.parametrize("message", BAD)
def test_wrong_arguments_are_named(message):
    codes, codebooks, scales = random_weight(SMALL)
    arguments = dict(
        x=torch.randn(3, SMALL[1]), codes=codes, codebooks=codebooks, scales=scales, bias=torch.randn(SMALL[0])
    )
    BAD[message](arguments)
    with pytest.raises(RuntimeError) as error:
        ops.matmul(**arguments)
    text = str(error.value)
    assert text.startswith(message) and "expected" in text and "\n" not in text.strip()


@pytest.mark.parametrize("op", ["matmul", "matmul_backward", "decode_rows", "decode_rows_backward"])
def test_opcheck(op):
    codes, codebooks, scales = random_weight(SMALL)
    weight = codes, codebooks.requires_grad_(), scales.requires_grad_()
    out, in_features, *_ = SMALL
    x, y, bias, rows = (
        torch.randn(s, requires_grad=True) for s in ((2, 3, in_features), (2, 3, out), (out,), (out, in_features))
    )
    arguments = {
        "matmul": [(x, *weight, None), (x, *weight, bias)],
        "matmul_backward": [(y, *weight)],
        "decode_rows": [weight],
        "decode_rows_backward": [(rows, *weight, *need) for need in ((True, True), (True, False), (False, True))],
    }
    for args in arguments[op]:
        torch.library.opcheck(getattr(torch.ops.aqlm_c, op).default, args)


def make_layer(shape=SMALL, dtype=torch.float32, bias=True):
    codes, codebooks, scales = random_weight(shape)
    grid = [t.to(dtype).float().numpy() for t in (codebooks, scales)]
    qw = QuantizedWeight(codes.numpy(), *grid, str(dtype).removeprefix("torch."), 0.0, {}, [])
    linear = torch.nn.Linear(shape[1], shape[0], bias, device="meta")
    if bias:
        linear.bias = torch.nn.Parameter(torch.linspace(-1, 1, shape[0]).to(dtype))
    return QuantizedLinear.from_quantized_weight(qw, linear, dtype)


@pytest.mark.parametrize("bias", [False, True])
def test_layer_agrees_with_its_dense_self(dtype, bias):
    layer = make_layer(dtype=dtype, bias=bias)
    x = torch.randn(4, SMALL[1]).to(dtype)
    linear = layer.dequantize()
    assert linear.weight.dtype == dtype and (linear.bias is not None) == bias
    truth = layer.dequantize(torch.float64)(x.double())
    assert max_error(layer(x), truth) <= error_budget(linear(x), truth)


def test_layer_survives_state_dict_copy_and_dtype_moves():
    layer = make_layer()
    x = torch.randn(4, SMALL[1])
    y = layer(x)
    kinds = {name: (t.dtype, tuple(t.shape)) for name, t in layer.state_dict().items()}
    assert kinds == {
        "codes": (torch.int8, (6, 4, 2)),
        "codebooks": (torch.float32, (2, 8, 2, 4)),
        "scales": (torch.float32, (6, 1, 1, 1)),
        "bias": (torch.float32, (12,)),
    }
    fresh = QuantizedLinear(16, 12, True, Format(2, 3, 4, 2))
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), y) and torch.equal(copy.deepcopy(layer)(x), y)
    half = copy.deepcopy(layer).half()
    assert half.codes.dtype == torch.int8 and half(x.half()).dtype == torch.float16
    assert "16, out_features=12, bias=True, scheme=2x3g4o2" in repr(layer)


def test_layer_output_may_be_modified_in_place():
    layer, x = make_layer(), torch.randn(4, SMALL[1], requires_grad=True)
    layer(x).add_(1).sum().backward()
    assert max_error(x.grad, layer.dequantize().weight.sum(0).expand(4, -1)) < 1e-5


def test_layer_trains_codebooks_and_scales_but_not_codes():
    layer = make_layer()
    layer(torch.randn(4, SMALL[1])).square().sum().backward()
    assert {n for n, p in layer.named_parameters() if p.grad is not None} == {"codebooks", "scales", "bias"}


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_product_and_its_name_are_the_same(without):
    """Without autograd's Python, yet through the dispatcher: profilers and modes see the op."""
    weight = [t.requires_grad_(t.is_floating_point()) for t in random_weight(SMALL)]
    x = torch.randn(3, SMALL[1])
    with_gradient = ops.matmul(x, *weight)
    with without(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        y = ops.matmul(x, *weight)
    assert torch.equal(y, with_gradient) and with_gradient.requires_grad and not y.requires_grad
    assert [event.name for event in profiler.events()].count("aqlm_c::matmul") == 1
    with without(), FakeTensorMode() as fake:
        assert ops.matmul(*map(fake.from_tensor, (x, *weight))).shape == y.shape
    if without is torch.no_grad:  # elsewhere it is no tensor for autograd
        bias = torch.zeros((), requires_grad=True)
        (y + bias).sum().backward()
        assert bias.grad == y.numel()


def test_layer_compiles_whole():
    """fullgraph; a new number of rows does not recompile once it is known to change."""
    layer = make_layer()
    model = nn.Sequential(layer, nn.ReLU(), make_layer((8, 12, 1, 8, 1, 4)))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (2, 3, 7):
            x, y = (torch.randn(rows, SMALL[1]).requires_grad_() for _ in range(2))
            y.data.copy_(x)
            compiled(x).sum().backward()
            model(y).sum().backward()
            assert torch.equal(x.grad, y.grad)


def test_layer_compiles_whole_by_default():
    layer = make_layer()
    x = torch.randn(3, SMALL[1])
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)
    gradients = []
    for module in (compiled, layer):
        layer.zero_grad()
        inputs = x.clone().requires_grad_()
        (y := module(inputs)).square().sum().backward()
        gradients.append([y, inputs.grad, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)])
    assert len(gradients[0]) == 5
    for ours, eager in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)


def test_layer_refuses_codes_outside_the_codebook():
    layer = make_layer()
    state = layer.state_dict()
    state["codes"] = torch.full_like(state["codes"], 4)
    fresh = nn.ModuleDict({"proj": QuantizedLinear(16, 12, True, Format(2, 3, 4, 2))})
    with pytest.raises(ValueError, match=r"proj\.codes: got codes from 4 to 4, expected -4 to 3 for 3 bits"):
        fresh.load_state_dict({f"proj.{name}": t for name, t in state.items()})
    with pytest.raises(RuntimeError, match=r"size mismatch for proj\.codes"):
        fresh.load_state_dict({f"proj.{name}": t[:1] for name, t in layer.state_dict().items()})


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(in_group_size=5), "in_group_size: got 5, expected one of"),
        (dict(in_features=18), "in_group_size: got 4, expected a divisor of in_features=18 of layer QuantizedLinear"),
        (
            dict(out_group_size=5),
            "out_group_size: got 5, expected a divisor of out_features=12 of layer QuantizedLinear",
        ),
        (dict(out_group_size=0), "out_group_size: got 0, expected an integer >= 1"),
        (dict(num_codebooks=9), "num_codebooks: got 9, expected an integer in 1..8"),
        (dict(nbits_per_codebook=17), "nbits_per_codebook: got 17, expected an integer in 1..16"),
    ],
)
def test_layer_names_the_wrong_size(change, message):
    numbers = dict(in_group_size=4, out_group_size=2, num_codebooks=2, nbits_per_codebook=3, in_features=16) | change
    with pytest.raises(ValueError, match=message):
        QuantizedLinear(numbers.pop("in_features"), 12, False, Format(**numbers))


def test_a_layer_can_be_traced(tmp_path):
    """By torch.fx and, gradients on, by torch.jit, which saves the op."""
    codes, codebooks, scales = random_weight((32, 64, 2, 8, 1, 8))
    layer = QuantizedLinear(64, 32, False, Format())
    layer.load_state_dict({"codes": codes, "codebooks": codebooks, "scales": scales})
    model, x = nn.Sequential(layer), torch.randn(3, 64)
    expected = model(x)
    assert expected.requires_grad
    assert torch.equal(torch.fx.symbolic_trace(model)(x), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.trace(model, x), tmp_path / "traced.pt")
        assert torch.equal(torch.jit.load(tmp_path / "traced.pt")(x), expected)


def test_missing_binding_gives_the_cure():
    code = "import sys; sys.modules['aqlm_c._torch'] = None; import aqlm_c.nn.ops"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1
    assert "ImportError: aqlm_c._torch: got none that loads here" in run.stderr and "--no-build-isolation" in run.stderr
