"""The gradients of both ops, in C: against float64 autograd of the formula, and against their own definition."""

from itertools import product

import pytest
import torch
from tolerances import EPS, max_error
from torch import nn
from weights import SHAPES, SMALL, dense, random_weight

from aqlm_c import _core
from aqlm_c.nn import ops

# Every K, stored dtype and group size, sizes that fill neither lanes nor tiles; then those of test_ops.
FORMATS = [(12, 48, K, B, og, g) for K, B, og, g in product((1, 2, 3, 4), (4, 8, 12), (1, 2), (4, 8, 16))] + SHAPES


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def gradients(function, tensors, upstream, needed=None):
    """d <function(*tensors), upstream> / d tensors, those of `needed` (all if None); the others stay None."""
    leaves = [t.detach().clone().requires_grad_(needed is None or needed[i]) for i, t in enumerate(tensors)]
    function(*leaves).backward(upstream)
    return [leaf.grad for leaf in leaves]


def agree(ours, truth):
    """Summed in float32 and rounded once to the dtype of the parameter."""
    largest = float(truth.abs().max())
    tolerance = (EPS[str(ours.dtype).removeprefix("torch.")] / 2 + 1e-5) * largest
    return ours.shape == truth.shape and max_error(ours, truth) <= tolerance


@pytest.mark.parametrize("shape", FORMATS, ids=str)
def test_matmul(shape, dtype):
    codes, codebooks, scales = random_weight(shape, dtype)
    out, in_features, *_ = shape
    x = torch.randn(3, in_features, 7, dtype=dtype).mT  # strided, as is what comes from above
    tensors = x, codebooks, scales, torch.randn(out, dtype=dtype)
    upstream = torch.randn(3, out, 7, dtype=dtype).mT
    ours = gradients(lambda x, c, s, b: ops.matmul(x, codes, c, s, b), tensors, upstream)
    op = gradients(lambda x, c, s, b: torch.ops.aqlm_c.matmul(x, codes, c, s, b), tensors, upstream)
    assert all(map(torch.equal, ours, op))  # what torch.compile sees
    exact = [t.double() for t in tensors]
    truth = gradients(lambda x, c, s, b: nn.functional.linear(x, dense(codes, c, s), b), exact, upstream.double())
    for name, a, b in zip(("x", "codebooks", "scales", "bias"), ours, truth, strict=True):
        assert a.dtype == dtype and agree(a, b), name


@pytest.mark.parametrize("shape", FORMATS, ids=str)
def test_decode_rows(shape, dtype):
    codes, *weight = random_weight(shape, dtype)
    upstream = torch.randn(shape[1], shape[0], dtype=dtype).T
    ours = gradients(lambda c, s: ops.decode_rows(codes, c, s), weight, upstream)
    truth = gradients(lambda c, s: dense(codes, c, s), [t.double() for t in weight], upstream.double())
    assert all(agree(*pair) for pair in zip(ours, truth, strict=True))


def test_large_layers_use_every_chunk():
    shape = (600, 256, 2, 4, 1, 8)
    codes, *weight = random_weight(shape)
    upstream = torch.randn(shape[:2])
    ours = gradients(lambda c, s: ops.decode_rows(codes, c, s), weight, upstream)
    truth = gradients(lambda c, s: dense(codes, c, s), [t.double() for t in weight], upstream.double())
    assert all(agree(*pair) for pair in zip(ours, truth, strict=True))


def test_float32_weight_under_a_linear_of_another_dtype(dtype):
    """As block fine-tuning has it: decode in float32, multiply in the model's dtype."""
    codes, *weight = random_weight(SMALL)
    x, upstream = torch.randn(5, SMALL[1]).to(dtype), torch.randn(5, SMALL[0]).to(dtype)
    ours = gradients(lambda c, s: nn.functional.linear(x, ops.decode_rows(codes, c, s).to(dtype)), weight, upstream)
    rows = (upstream.T @ x).double()
    truth = gradients(lambda c, s: dense(codes, c, s), [t.double() for t in weight], rows)
    assert all(a.dtype == torch.float32 and agree(a, b) for a, b in zip(ours, truth, strict=True))


@pytest.mark.parametrize("row_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_grad_rows_of_any_dtype(row_dtype, dtype):
    weight = random_weight(SMALL, dtype)
    rows = torch.randn(SMALL[:2]).to(row_dtype)
    backward = torch.ops.aqlm_c.decode_rows_backward
    results = backward(rows, *weight, True, True), backward(rows.float(), *weight, True, True)
    assert all(torch.equal(a, b) and a.dtype == dtype for a, b in zip(*results, strict=True))


def test_only_what_is_needed_is_given():
    codes, *weight = random_weight(SMALL)
    x, bias, upstream = torch.randn(5, SMALL[1]), torch.randn(SMALL[0]), torch.randn(5, SMALL[0])
    cases = [
        (lambda x, c, s, b: ops.matmul(x, codes, c, s, b), (x, *weight, bias), upstream),
        (lambda c, s: ops.decode_rows(codes, c, s), weight, torch.randn(SMALL[:2])),
    ]
    for function, tensors, grad in cases:
        full = gradients(function, tensors, grad)
        for needed in product((False, True), repeat=len(tensors)):
            if any(needed):
                for result, same, asked in zip(gradients(function, tensors, grad, needed), full, needed, strict=True):
                    assert torch.equal(result, same) if asked else result is None


def test_no_rows_and_a_vector_and_an_expanded_gradient():
    codes, *weight = random_weight(SMALL)
    x = torch.randn(1, SMALL[1])

    def run(x, c, s):
        return ops.matmul(x, codes, c, s)

    empty = gradients(run, (x[:0], *weight), torch.empty(0, SMALL[0]))
    assert empty[0].shape == (0, SMALL[1]) and not empty[1].any() and not empty[2].any()
    rows = gradients(run, (x, *weight), torch.ones(1, SMALL[0]))
    vector = gradients(run, (x[0], *weight), torch.ones(()).expand(SMALL[0]))
    assert all(torch.equal(a.reshape(b.shape), b) for a, b in zip(vector, rows, strict=True))


# Linear in each number by itself: a central difference is exact for any eps, so a large one drowns the rounding.
CHECK = dict(eps=0.5, atol=1e-3, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:Input #. requires gradient and is not a double")
@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
@pytest.mark.parametrize("shape", [(4, 8, 2, 2, 2, 4), (3, 8, 1, 2, 1, 4)], ids=str)
def test_gradcheck(check, shape):
    """First and second order."""
    codes, codebooks, scales = random_weight(shape)
    x, bias = torch.randn(2, shape[1]), torch.randn(shape[0])
    x, codebooks, scales, bias = (t.requires_grad_() for t in (x, codebooks, scales, bias))
    assert check(lambda x, c, s, b: ops.matmul(x, codes, c, s, b), (x, codebooks, scales, bias), **CHECK)
    assert check(lambda c, s: ops.decode_rows(codes, c, s), (codebooks, scales), **CHECK)


def test_every_isa_and_thread_count_gives_the_same_bits(dtype):
    shapes = [(200, 256, 2, 8, 1, 8), (66, 96, 1, 12, 2, 16)]
    isa, threads, results = ops.get_isa(), torch.get_num_threads(), []
    try:
        for name, n in product(_core.available_isas(), (1, 2, 3)):
            ops.set_isa(name)
            torch.set_num_threads(n)
            bits = []
            for shape in shapes:
                weight = random_weight(shape, dtype)
                generator = torch.Generator().manual_seed(1)
                rows = torch.randn(600, max(shape[:2]), generator=generator).to(dtype)
                bits += [torch.ops.aqlm_c.matmul_backward(rows[:m, : shape[0]], *weight) for m in (1, 13, 600)]
                bits += torch.ops.aqlm_c.decode_rows_backward(rows[: shape[0], : shape[1]], *weight, True, True)
            results.append(bits)
    finally:
        ops.set_isa(isa)
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for bits in results[1:] for a, b in zip(bits, results[0], strict=True))


def test_compiles_whole_and_gives_the_bits_of_eager():
    codes, *weight = random_weight(SMALL)
    tensors = torch.randn(4, SMALL[1]), *weight, torch.randn(SMALL[0])

    def model(x, c, s, b):
        return ops.matmul(x.sin(), codes, c * 2, s, b) + nn.functional.linear(x, ops.decode_rows(codes, c, s))

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    upstream = torch.randn(4, SMALL[0])
    assert torch.equal(compiled(*tensors), model(*tensors))
    for needed in ((True,) * 4, (True, False, True, False)):
        results = [gradients(f, tensors, upstream, needed) for f in (compiled, model)]
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(*results, strict=True))


BAD = {
    "matmul_backward": {
        "grad_y: got shape [3, 11], expected [..., 12]": dict(grad=torch.zeros(3, 11)),
        "grad_y: got dtype float64": dict(grad=torch.zeros(3, 12).double()),
        "scales: got shape": dict(scales=torch.ones(5, 1, 1, 1)),
    },
    "decode_rows_backward": {
        "grad_rows: got shape [12, 15], expected [12, 16]": dict(grad=torch.zeros(12, 15)),
        "grad_rows: got shape [16], expected [12, 16]": dict(grad=torch.zeros(16)),
        "grad_rows: got dtype float64": dict(grad=torch.zeros(12, 16).double()),
        "codes: got dtype int16, expected int8": dict(codes=torch.zeros(6, 4, 2).short()),
    },
}


@pytest.mark.parametrize("op, message", [(op, message) for op, cases in BAD.items() for message in cases])
def test_wrong_arguments_are_named(op, message):
    codes, codebooks, scales = random_weight(SMALL)
    grad = torch.zeros(3, 12) if op == "matmul_backward" else torch.zeros(12, 16)
    arguments = dict(grad=grad, codes=codes, codebooks=codebooks, scales=scales) | BAD[op][message]
    flags = () if op == "matmul_backward" else (True, True)
    with pytest.raises(RuntimeError) as error:
        getattr(torch.ops.aqlm_c, op)(*arguments.values(), *flags)
    text = str(error.value)
    assert text.startswith(message) and "expected" in text and "\n" not in text.strip()


@pytest.mark.parametrize("rows_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [SMALL, (12, 48, 1, 12, 1, 8), (12, 48, 2, 8, 2, 4)], ids=str)
def test_rows_of_a_dtype_of_their_own(shape, rows_dtype):
    """As block fine-tuning has it: float32 codebooks, rows and their gradients in the model's dtype, an index kept."""
    codes, *weight = random_weight(shape)
    upstream = torch.randn(*shape[:2]).to(rows_dtype)
    index = ops.index_codes(codes, *weight)
    with_index = gradients(lambda c, s: ops.decode_rows(codes, c, s, rows_dtype, index), weight, upstream)
    without = gradients(lambda c, s: ops.decode_rows(codes, c, s, rows_dtype), weight, upstream)
    truth = gradients(lambda c, s: dense(codes, c, s), [t.double() for t in weight], upstream.double())
    rows = ops.decode_rows(codes, *weight, rows_dtype)
    assert torch.equal(rows, ops.decode_rows(codes, *weight).to(rows_dtype))
    assert torch.equal(rows, ops.decode_rows(codes, *weight, rows_dtype, index))
    for ours, plain, exact in zip(with_index, without, truth, strict=True):
        assert torch.equal(ours, plain) and ours.dtype == torch.float32 and agree(ours, exact)


def test_an_index_is_empty_where_none_is_needed():
    codes, *weight = random_weight(SMALL)
    index = ops.index_codes(codes, *weight)
    assert index.dtype == torch.int32 and index.numel() == 0


def test_gradients_with_an_index_reach_one_of_two():
    codes, codebooks, scales = random_weight(SMALL)
    index, upstream = ops.index_codes(codes, codebooks, scales), torch.randn(*SMALL[:2])
    call = lambda c, s: ops.decode_rows(codes, c, s, None, index)  # noqa: E731
    both = gradients(call, (codebooks, scales), upstream)
    for needed in ((True, False), (False, True)):
        found = gradients(call, (codebooks, scales), upstream, needed)
        for grad, whole, wanted in zip(found, both, needed, strict=True):
            assert torch.equal(grad, whole) if wanted else grad is None


def test_rows_of_no_float_dtype_are_refused():
    codes, *weight = random_weight(SMALL)
    with pytest.raises((RuntimeError, ValueError), match="dtype"):
        ops.decode_rows(codes, *weight, torch.int32)
