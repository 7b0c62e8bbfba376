"""The ops on a GPU: against float64, by torch's own error in the same dtype; the same bits every time."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tolerances import error_budget, max_error

from aqlm_c import QuantizedLinear, join_linears
from aqlm_c.format import Format
from aqlm_c.nn import ops

if not torch.cuda.is_available():
    pytest.skip("needs a GPU that torch can use", allow_module_level=True)
if not ops.has_cuda:
    pytest.skip("aqlm_c was built without _cuda", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
CORE = ("quantizer/working.c", "rounding/hadamard.c", "runtime/rng.c", "runtime/shape.c")  # that csrc/cuda calls

# out, in, K, B, og, g: each kernel (tables; gathers from shared memory and L2, of one format and of any; planes; tiles;
# plain) and sizes around its tiles.
SHAPES = [
    (4096, 4096, 2, 8, 1, 8),
    (1000, 4096, 4, 8, 1, 8),
    (777, 1024, 8, 8, 1, 8),
    (1, 1024, 2, 8, 1, 8),
    (17, 11008, 1, 8, 1, 8),
    (192, 576, 3, 8, 1, 8),
    (333, 768, 7, 7, 1, 8),
    (641, 512, 2, 8, 1, 4),
    (641, 512, 1, 8, 1, 16),
    (300, 512, 2, 2, 1, 32),
    (300, 512, 2, 6, 1, 8),
    (1031, 2048, 1, 16, 1, 8),
    (515, 768, 2, 12, 1, 8),
    (128, 264, 1, 16, 1, 8),
    (128, 512, 3, 10, 1, 16),
    (128, 520, 2, 8, 2, 8),
    (100, 8, 1, 8, 1, 8),
    (300, 11008, 2, 8, 1, 8),
    (70, 16640, 1, 16, 1, 8),
    (203, 1088, 1, 14, 1, 8),
    (1030, 4096, 3, 8, 1, 8),
    (129, 640, 5, 8, 1, 8),
    (200, 512, 6, 8, 1, 4),
    (333, 1024, 3, 8, 1, 16),
    (130, 2048, 5, 5, 1, 32),
    (40, 12288, 6, 8, 1, 8),
    (300, 1024, 1, 16, 1, 16),
    (190, 512, 4, 8, 1, 16),
    (131, 1024, 2, 8, 1, 32),
    (257, 640, 1, 8, 1, 4),
    (1000, 4096, 1, 16, 1, 16),
    (515, 2048, 2, 16, 1, 8),
    (70, 16640, 2, 15, 1, 8),
    (261, 768, 1, 12, 1, 4),
    (200, 1024, 3, 12, 1, 8),
    (100, 1024, 2, 9, 1, 32),
    (64, 144, 1, 16, 1, 16),
    (130, 640, 5, 8, 1, 16),
    (131, 2048, 7, 8, 1, 32),
    (133, 516, 7, 8, 1, 4),
    (96, 520, 1, 12, 4, 8),
    (90, 512, 5, 8, 3, 16),
    (144, 1024, 8, 8, 12, 32),
    (41, 8, 3, 16, 1, 4),
    (8200, 4096, 1, 16, 1, 8),
    (12032, 2048, 2, 16, 1, 8),
]
IDS = ["{2}x{3}g{5}-og{4}-{0}x{1}".format(*s) for s in SHAPES]
DTYPES = ["float16", "bfloat16", "float32"]


def generator(seed):
    return torch.Generator("cuda").manual_seed(seed)


def random(*size, dtype, seed=1):
    return torch.randn(size, generator=generator(seed), device="cuda").to(dtype)


def random_weight(shape, dtype, seed=0):
    out, in_features, K, B, og, g = shape
    half = 2 ** (B - 1)
    stored = torch.int8 if B <= 8 else torch.int16
    codes = torch.randint(
        -half, half, (out // og, in_features // g, K), generator=generator(seed), device="cuda", dtype=stored
    )
    codebooks = random(K, 2 * half, og, g, dtype=dtype, seed=seed)
    scales = (torch.rand(out // og, 1, 1, 1, generator=generator(seed), device="cuda") + 0.5).to(dtype)
    return codes, codebooks, scales


def dense(codes, codebooks, scales, dtype=torch.float64):
    """W [out, in] as the format defines it."""
    _, entries, og, _ = codebooks.shape
    index = codes.long() & (entries - 1)
    groups = sum(book[index[:, :, k]] for k, book in enumerate(codebooks.to(dtype)))
    return (groups * scales.to(dtype)).permute(0, 2, 1, 3).reshape(len(codes) * og, -1)


def memory_order(codes, order):
    """The same codes with the last of `order` next to each other in memory."""
    back = [order.index(i) for i in range(3)]
    return codes.permute(order).contiguous().permute(back)


def check_close(y, plain, truth):
    assert y.dtype == plain.dtype and y.shape == plain.shape
    assert max_error(y.cpu(), truth.cpu()) <= error_budget(plain.cpu(), truth.cpu())


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_matmul(shape, name):
    dtype = getattr(torch, name)
    weight = random_weight(shape, dtype)
    W = dense(*weight)
    for rows in (1, 2, 3, 8, 9, 16, 17, 40, 70, 130, 300):
        x, bias = random(rows, shape[1], dtype=dtype), random(shape[0], dtype=dtype, seed=2)
        for b in (None, bias):
            y = ops.matmul(x, *weight, b)
            truth = x.double() @ W.T + (0 if b is None else b.double())
            check_close(y, torch.nn.functional.linear(x, W.to(dtype), b), truth)
            for _ in range(3):
                assert torch.equal(ops.matmul(x, *weight, b), y)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_decode_rows(shape, name):
    weight = random_weight(shape, getattr(torch, name))
    assert torch.equal(ops.decode_rows(*weight), dense(*weight, dtype=torch.float32).to(weight[1].dtype))


@pytest.mark.parametrize("shape", SHAPES[:1] + SHAPES[11:13] + SHAPES[-2:], ids=IDS[:1] + IDS[11:13] + IDS[-2:])
@pytest.mark.parametrize("size", [1e-4, 1e2])
def test_magnitudes(shape, size):
    """Activations and codebooks far from one, and a few outliers."""
    codes, codebooks, scales = random_weight(shape, torch.float16)
    weight = codes, codebooks * 0.01, scales
    x = random(1, shape[1], dtype=torch.float16) * size
    x[0, ::97] *= 30
    W = dense(*weight)
    check_close(ops.matmul(x, *weight), torch.nn.functional.linear(x, W.half()), x.double() @ W.T)


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_mixed_dtypes(x_dtype, weight_dtype):
    weight = random_weight((130, 512, 2, 8, 1, 8), getattr(torch, weight_dtype))
    W = dense(*weight)
    for rows in (1, 5, 30):
        x = random(rows, 512, dtype=getattr(torch, x_dtype))
        check_close(ops.matmul(x, *weight), torch.nn.functional.linear(x, W.to(x.dtype)), x.double() @ W.T)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (2, 1, 0)])
@pytest.mark.parametrize("rows", [1, 4, 50])
def test_memory_order_of_codes(order, rows):
    codes, *rest = random_weight((96, 256, 2, 8, 1, 8), torch.float16)
    other = memory_order(codes, order)
    x = random(rows, 256, dtype=torch.float16)
    assert torch.equal(ops.matmul(x, other, *rest), ops.matmul(x, codes, *rest))
    assert torch.equal(ops.decode_rows(other, *rest), ops.decode_rows(codes, *rest))


@pytest.mark.parametrize("rows", [1, 4, 50])
def test_views(rows):
    """Rows and weights that do not start at an aligned address, and rows that are not next to each other."""
    shape = (96, 256, 2, 8, 1, 8)
    weight = random_weight(shape, torch.float16)
    x = random(rows, 300, dtype=torch.float16)[:, 7:263]
    y = ops.matmul(x.contiguous(), *weight)
    assert torch.equal(ops.matmul(x, *weight), y)
    moved = []
    for t in weight:
        buffer = torch.empty(t.numel() + 1, dtype=t.dtype, device="cuda")
        buffer[1:] = t.flatten()
        moved.append(buffer[1:].view(t.shape))
    assert torch.equal(ops.matmul(x, *moved), y)
    assert torch.equal(ops.matmul(x[None, :, None], *weight)[0, :, 0], y)
    assert ops.matmul(x[:0], *weight).shape == (0, 96)


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_nothing_is_written_outside(shape):
    """A result in the middle of a buffer: allocations next to each other stay as they were."""
    weight = random_weight(shape, torch.float16)
    for rows in (1, 3, 12, 50):
        x = random(rows, shape[1], dtype=torch.float16)
        before = [t.clone() for t in (x, *weight)]
        ops.matmul(x, *weight)
        assert all(torch.equal(a, b) for a, b in zip(before, (x, *weight), strict=True))


@pytest.mark.parametrize("rows", [1, 4, 12, 50, 300])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[11], SHAPES[-2]], ids=[IDS[0], IDS[11], IDS[-2]])
def test_graph_and_streams(shape, rows):
    weight = random_weight(shape, torch.float16)
    x = random(rows, shape[1], dtype=torch.float16)
    y = ops.matmul(x, *weight)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(20):
            assert torch.equal(ops.matmul(x, *weight), y)
    torch.cuda.current_stream().wait_stream(side)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.matmul(x, *weight)
    x.copy_(random(rows, shape[1], dtype=torch.float16, seed=5))
    expected = ops.matmul(x, *weight)
    for _ in range(20):
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, expected)


@pytest.mark.parametrize("shape", [(1024, 1024, 2, 8, 1, 8), (3520, 3520, 1, 16, 1, 8)], ids=["2x8g8", "1x16g8"])
def test_kernels_in_a_row(shape):
    """Each may start before the last ends: chains whose every input is the output before, 100 times."""
    codes, codebooks, scales = random_weight(shape, torch.float16)
    weight = codes, codebooks, scales * 0.02
    first = None
    for _ in range(100):
        x = random(1, shape[1], dtype=torch.float16)
        for _ in range(10):
            x = ops.matmul(x, *weight)
        first = x if first is None else first
        assert torch.equal(x, first)
        weight = tuple(t.clone() for t in weight)  # written just before it is read


GROUPED = [
    ((4096, 1024, 1024), 4096, 2, 8, 1, 8),  # a cluster of blocks a weight's outputs
    ((1000, 1000), 11008, 4, 8, 1, 8),  # a row in parts
    ((77, 300), 2048, 8, 8, 1, 8),
    ((64, 16, 200), 512, 3, 8, 1, 4),
    ((128, 40), 2048, 1, 16, 1, 8),  # apart
    ((128, 8, 64), 512, 2, 8, 1, 8),
    ((64, 64, 64, 64), 512, 2, 8, 1, 8),
]


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("outs, shape", [(outs, shape) for outs, *shape in GROUPED], ids=str)
def test_grouped(outs, shape, name):
    dtype = getattr(torch, name)
    weights = [random_weight((out, *shape), dtype, seed=i) for i, out in enumerate(outs)]
    for rows in (1, 3):
        x = random(rows, shape[0], dtype=dtype)
        for biases in ([None] * len(outs), [random(out, dtype=dtype, seed=out) for out in outs]):
            all_of = [(*weight, bias) for weight, bias in zip(weights, biases, strict=True)]
            ys = ops.matmul_grouped(x, all_of)
            for y, weight, bias in zip(ys, weights, biases, strict=True):
                W = dense(*weight)
                truth = x.double() @ W.T + (0 if bias is None else bias.double())
                check_close(y, torch.nn.functional.linear(x, W.to(dtype), bias), truth)
            assert all(torch.equal(y, z) for y, z in zip(ys, ops.matmul_grouped(x, all_of), strict=True))


def test_grouped_linears():
    """q, k and v of a module: eager, captured and compiled they are the same products."""

    class Attention(torch.nn.Module):
        def forward(self, x):
            return [linear(x) for linear in self.children()]

    attention = Attention()
    for i, (name, out) in enumerate((("q_proj", 512), ("k_proj", 128), ("v_proj", 128))):
        linear = QuantizedLinear(512, out, False, Format(), device="cuda", dtype=torch.float16).requires_grad_(False)
        for parameter, value in zip(
            linear.parameters(), random_weight((out, 512, 2, 8, 1, 8), torch.float16, seed=i), strict=True
        ):
            parameter.copy_(value)
        attention.add_module(name, linear)
    assert join_linears(attention) == 1
    x = random(1, 512, dtype=torch.float16)

    with torch.no_grad():
        expected = ops.matmul_grouped(x, [(*linear.parameters(), None) for linear in attention.children()])
        launches = kernels_of(lambda: attention(x))
        assert len(launches) == 1, launches
        compiled = torch.compile(attention, fullgraph=True)
        graph = torch.cuda.CUDAGraph()
        assert all(torch.equal(y, z) for y, z in zip(attention(x), expected, strict=True))
        with torch.cuda.graph(graph):
            captured = attention(x)
        graph.replay()
        for ys in (captured, compiled(x), compiled(x)):
            assert all(torch.equal(y, z) for y, z in zip(ys, expected, strict=True))


EXPERTS = [  # outs of weights with one input, in, K, B, og, g
    ((1024, 1024), 512, 2, 8, 1, 8),
    ((4096,), 1024, 1, 8, 1, 8),
    ((300, 44), 11008, 4, 8, 1, 8),  # rows in parts, by tables
    ((64, 32, 16), 512, 3, 8, 1, 8),
    ((100,), 1024, 1, 16, 1, 16),
    ((48, 80), 768, 2, 12, 1, 8),
    ((60,), 512, 2, 8, 3, 16),
    ((33,), 40, 3, 7, 1, 8),  # codes that are not aligned
]


def stacked(shape, dtype, experts):
    """Codes, codebooks and scales of several weights, each in one tensor."""
    weights = [random_weight(shape, dtype, seed=e) for e in range(experts)]
    return tuple(torch.stack(tensors) for tensors in zip(*weights, strict=True))


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("outs, shape", [(outs, shape) for outs, *shape in EXPERTS], ids=str)
@pytest.mark.parametrize("tokens, k", [(1, 2), (3, 2), (40, 1), (32, 4)], ids=str)
def test_experts(tokens, k, outs, shape, name):
    """Each row by its own weights; some have none; the bits of the kernel's product with one of them."""
    dtype, experts = getattr(torch, name), 7
    stacks = [stacked((out, *shape), dtype, experts) for out in outs]
    x = random(tokens, shape[0], dtype=dtype)
    index = torch.randint(-1, experts + 1, (tokens, k), generator=generator(3), device="cuda")
    y = ops.matmul_experts(x, index, stacks)
    assert y.shape == (tokens * k, sum(outs)) and torch.equal(y, ops.matmul_experts(x, index, stacks))
    truth = torch.zeros(tokens * k, sum(outs), dtype=torch.float64, device="cuda")
    plain = torch.zeros_like(truth, dtype=dtype)
    for row, e in enumerate(index.flatten().tolist()):
        if not 0 <= e < experts:
            assert not y[row].any()
            continue
        given, first = x[row // k][None], 0
        for out, stack in zip(outs, stacks, strict=True):
            W, part = dense(*(t[e] for t in stack)), slice(first, first + out)
            truth[row, part] = (given.double() @ W.T)[0]
            plain[row, part] = torch.nn.functional.linear(given, W.to(dtype))[0]
            first += out
    check_close(y, plain, truth)


@pytest.mark.parametrize("shape", [(1024, 512, 2, 8, 1, 8), (96, 1024, 1, 16, 1, 16)], ids=["2x8g8", "1x16g16"])
def test_experts_have_the_bits_of_products(shape):
    """Where the same kernel runs: one row by tables, up to 8 by gathers."""
    stack = stacked(shape, torch.float16, 4)
    for rows in (1, 8):
        x = random(rows, shape[1], dtype=torch.float16)
        for e in range(4):
            index = torch.full((rows,), e, device="cuda")
            y = ops.matmul_experts(x, index, [stack])
            assert torch.equal(y, ops.matmul(x, *(t[e] for t in stack)))
            others = torch.arange(rows, device="cuda") % 4
            mixed = ops.matmul_experts(x, others, [stack])
            if rows > 4:  # by the same kernel
                assert torch.equal(mixed[others == e], y[others == e])


@pytest.mark.parametrize("tokens", [1, 32])
def test_experts_in_a_graph(tokens):
    """Captured with one choice, replayed with others: nothing that is launched depends on it."""
    stacks = [stacked((1024, 512, 2, 8, 1, 8), torch.float16, 8) for _ in range(2)]
    x = random(tokens, 512, dtype=torch.float16)
    index = torch.randint(0, 8, (tokens, 2), generator=generator(1), device="cuda")
    ops.matmul_experts(x, index, stacks)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.matmul_experts(x, index, stacks)
    for seed in range(20):
        x.copy_(random(tokens, 512, dtype=torch.float16, seed=seed))
        index.copy_(torch.randint(-1, 8, (tokens, 2), generator=generator(seed), device="cuda"))
        expected = ops.matmul_experts(x, index, stacks)
        captured.fill_(float("nan"))
        graph.replay()
        assert torch.equal(captured, expected)


def kernels_of(call):
    from torch.profiler import ProfilerActivity, profile

    call()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return [event.name for event in profiler.events() if "kernel" in event.name]


def test_compile_and_opcheck():
    weight = random_weight((64, 128, 2, 8, 1, 8), torch.float16)
    x = random(3, 128, dtype=torch.float16)
    compiled = torch.compile(lambda x: ops.matmul(x, *weight) * 2, fullgraph=True)
    assert torch.equal(compiled(x), ops.matmul(x, *weight) * 2)
    codes, codebooks, scales = weight
    float_weight = codes, codebooks.float().requires_grad_(), scales.float().requires_grad_()
    x = x.float().requires_grad_()
    torch.library.opcheck(torch.ops.aqlm_c.matmul.default, (x, *float_weight, None))
    torch.library.opcheck(torch.ops.aqlm_c.decode_rows.default, float_weight)


@pytest.mark.parametrize(
    "shape", [s for s in SHAPES if s[0] < 700], ids=[i for s, i in zip(SHAPES, IDS, strict=True) if s[0] < 700]
)
def test_gradients(shape):
    """To x, codebooks, scales and bias, as float64 has them, and the same bits again."""
    codes, codebooks, scales = random_weight(shape, torch.float32)
    x, bias = random(5, shape[1], dtype=torch.float32), random(shape[0], dtype=torch.float32, seed=2)
    grad_y = random(5, shape[0], dtype=torch.float32, seed=3)

    def gradients(product, *inputs):
        inputs = [t.detach().clone().requires_grad_() for t in inputs]
        return torch.autograd.grad(product(*inputs), inputs, grad_y.to(inputs[0].dtype))

    def ours(x, codebooks, scales, bias):
        return ops.matmul(x, codes, codebooks, scales, bias)

    def plain(x, codebooks, scales, bias):
        return torch.nn.functional.linear(x, dense(codes, codebooks, scales, dtype=x.dtype), bias)

    inputs = x, codebooks, scales, bias
    results = gradients(ours, *inputs)
    truth = gradients(plain, *(t.double() for t in inputs))
    for got, again, true in zip(results, gradients(ours, *inputs), truth, strict=True):
        assert float((got.double() - true).norm()) <= 1e-5 * float(true.norm())
        assert torch.equal(got, again)


@pytest.mark.parametrize("out, in_features", [(28672, 8192), (9100, 8200)], ids=str)
def test_slices(out, in_features):
    """A weight that is decoded in more than one slice, forwards and backwards."""
    weight = random_weight((out, in_features, 2, 8, 1, 8), torch.float16)
    W = ops.decode_rows(*weight).double()
    x = random(3, 11, in_features, dtype=torch.float16).requires_grad_()
    for bias in (None, random(out, dtype=torch.float16, seed=2) * 100):
        y = ops.matmul(x, *weight, bias)
        truth = x.double() @ W.T + (0 if bias is None else bias)
        assert float((y - truth).norm()) <= 1e-3 * float(truth.norm())
    grad_y = random(3, 11, out, dtype=torch.float16, seed=4) * 0.01
    (grad_x,) = torch.autograd.grad(y, x, grad_y)
    true = grad_y.double() @ W
    assert float((grad_x - true).norm()) <= 1e-3 * float(true.norm())


def test_errors():
    codes, codebooks, scales = random_weight((64, 128, 2, 8, 1, 8), torch.float16)
    x = random(1, 128, dtype=torch.float16)
    with pytest.raises(RuntimeError, match=r"codebooks: got a tensor elsewhere, expected it on cuda:0 as codes"):
        ops.matmul(x, codes, codebooks.cpu(), scales)
    with pytest.raises(RuntimeError, match=r"x: got shape \[1, 127\], expected \[..., 128\]"):
        ops.matmul(x[:, 1:], codes, codebooks, scales)


@pytest.mark.skipif("AQLM_C_TILES" in os.environ, reason="AQLM_C_TILES is set: all tests here are of it")
@pytest.mark.skipif(torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU")
def test_tiles():
    """The tests of products once more, many rows by tiles: the variable is read once by a process."""
    tests = "test_matmul or magnitudes or mixed or memory_order or views or outside or graph or row or gradients"
    command = [sys.executable, "-m", "pytest", "-q", "-x", __file__, "-k", tests]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"AQLM_C_TILES": "1"}, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc on the PATH")
def test_without_torch(tmp_path):
    """cuda_check.cu, which is also what compute-sanitizer runs."""
    program = tmp_path / "cuda_check"
    core = [ROOT / "csrc/core" / name for name in CORE]
    kernels = [*sorted((ROOT / "csrc/cuda").rglob("*.cu")), *core]
    major, minor = torch.cuda.get_device_capability()
    gpu = f"{major}{minor}" + ("a" if major == 9 else "")  # as setup.py: wgmma is 90a's
    flags = ["-std=c++17", "-O3", f"-gencode=arch=compute_{gpu},code=sm_{gpu}", "--threads=0", f"-I{ROOT / 'csrc'}"]
    subprocess.run(["nvcc", *flags, ROOT / "tests/cuda/cuda_check.cu", *kernels, "-o", program], check=True)
    for tiles in ({}, {"AQLM_C_TILES": "1"}):
        result = subprocess.run([program], capture_output=True, text=True, env=os.environ | tiles)
        assert result.returncode == 0, result.stdout + result.stderr
