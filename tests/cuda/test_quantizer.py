"""The quantizer on a GPU: what the C core finds, up to rounding; the same bits every time; the same refusals."""

import numpy as np
import pytest
import torch
from layers import random_layer

from aqlm_c import AqlmConfig, _core, quantize_weight
from aqlm_c.core import verbs
from aqlm_c.core.hessian import Hessian
from aqlm_c.format import Format
from aqlm_c.nn import ops

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a GPU that torch can use", allow_module_level=True)
if not ops.has_cuda:
    pytest.skip("aqlm_c was built without _cuda", allow_module_level=True)

# out, in, K, B, g, beam_size, pairs: every kernel of the searches, edges of their tiles, several blocks of groups.
SEARCHES = [
    (300, 576, 2, 8, 8, 0, False),
    (4224, 576, 2, 8, 8, 0, False),
    (1700, 264, 2, 8, 8, 0, False),
    (77, 1088, 2, 8, 8, 0, False),
    (130, 144, 2, 5, 8, 0, False),
    (50, 96, 2, 1, 4, 0, False),
    (200, 256, 2, 7, 4, 0, False),
    (90, 256, 2, 8, 16, 0, False),
    (90, 256, 2, 8, 32, 0, False),
    (150, 192, 3, 8, 8, 0, False),
    (1200, 192, 3, 8, 8, 4, True),
    (60, 192, 4, 6, 8, 7, True),
    (40, 96, 3, 1, 8, 4, True),
    (33, 128, 8, 3, 16, 2, True),
    (20, 64, 3, 4, 8, 64, True),
    (300, 576, 1, 8, 8, 1, False),
    (4300, 144, 1, 12, 8, 1, False),
    (130, 288, 1, 16, 8, 1, False),
    (60, 128, 2, 12, 8, 1, False),
    (60, 128, 2, 8, 8, 5, False),
    (40, 128, 3, 3, 4, 3, False),
    (40, 128, 2, 10, 16, 1, False),
    (40, 128, 1, 9, 32, 1, False),
    (30, 64, 2, 6, 32, 2, False),
]
IDS = ["{2}x{3}g{4}-{5}-{6}-{0}x{1}".format(*s) for s in SEARCHES]


def cuda(*arrays):
    found = [a if a is None else torch.from_numpy(np.ascontiguousarray(a)).cuda() for a in arrays]
    return found[0] if len(found) == 1 else found


def layer(out, inp, K, B, g):
    """W, H, scales and a start that k-means found."""
    W, H = random_layer(out, inp, seed=K)
    scales = np.sqrt(np.square(W).mean(1)).astype(np.float32)
    return W, H, scales, *_core.residual_kmeans(W, scales, K, B, g, 3, 1e-3, 1)


def same_rows(found, truth, codebooks):
    """Share of the rows that are the same; codes may differ where entries are equal."""

    def rows(codes):
        return sum(book[codes[:, :, k]] for k, book in enumerate(codebooks))

    return np.isclose(rows(found.cpu().numpy()), rows(truth), rtol=1e-5, atol=1e-6).all((1, 2)).mean()


@pytest.mark.parametrize("search", SEARCHES, ids=IDS)
def test_search_finds_what_the_core_finds(search):
    out, inp, K, B, g, beam_size, pairs = search
    W, H, scales, codes, codebooks = layer(out, inp, K, B, g)
    factor = _core.factor_hessian(H, g, 1e-3)
    on_gpu = cuda(W, H, codebooks, scales)

    def error(codes):
        return _core.quantization_error(W, H, codes, codebooks, scales)

    truth = _core.search_ldl(W, *factor, codebooks, scales, beam_size, pairs)
    arguments = (on_gpu[0], *cuda(*factor), *on_gpu[2:], beam_size, pairs)
    found = verbs.search_ldl(*arguments)
    assert torch.equal(found.view(torch.int16), verbs.search_ldl(*arguments).view(torch.int16))
    assert error(found.cpu().numpy()) == pytest.approx(error(truth), rel=4e-3)
    assert same_rows(found, truth, codebooks) > 0.5

    truth = _core.search_sweep(codes, W, H, codebooks, scales, beam_size, 5, pairs)
    arguments = (cuda(codes), *on_gpu, beam_size, 5, pairs)
    found = verbs.search_sweep(*arguments)
    assert torch.equal(found.view(torch.int16), verbs.search_sweep(*arguments).view(torch.int16))
    assert error(found.cpu().numpy()) == pytest.approx(error(truth), rel=4e-3)
    assert error(found.cpu().numpy()) <= error(codes) * (1 + 1e-5)
    assert same_rows(found, truth, codebooks) > 0.5


def test_rows_of_scale_zero_and_of_zeros_are_searched():
    W, H, scales, codes, codebooks = layer(40, 96, 2, 6, 8)
    W[3], scales[3], scales[5] = 0, 0, 0
    factor = _core.factor_hessian(H, 8, 1e-3)
    found = verbs.search_ldl(cuda(W), *cuda(*factor), *cuda(codebooks, scales), 0, False)
    assert (found.cpu().numpy() < 64).all()
    found = verbs.search_sweep(cuda(codes), *cuda(W, H, codebooks, scales), 0, 1, False)
    assert (found.cpu().numpy() < 64).all()


SHAPES = [(300, 576, 2, 8, 8), (4224, 264, 2, 8, 8), (130, 96, 3, 4, 4), (64, 128, 1, 12, 16), (50, 96, 4, 2, 32)]
SHAPE_IDS = ["{2}x{3}g{4}-{0}x{1}".format(*s) for s in SHAPES]


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_updates_and_error(shape):
    out = shape[0]
    W, H, scales, codes, codebooks = layer(*shape)
    w, h, c, books, s = cuda(W, H, codes, codebooks, scales)
    truth = _core.quantization_error(W, H, codes, codebooks, scales)
    assert verbs.quantization_error(w, h, c, books, s) == pytest.approx(truth, rel=1e-4)
    assert verbs.quantization_error(w, h) == pytest.approx(_core.quantization_error(W, H), rel=1e-4)

    truth = _core.update_scales(scales, W, H, codes, codebooks)
    found = verbs.update_scales(s, w, h, c, books)
    np.testing.assert_allclose(found.cpu().numpy(), truth, rtol=1e-3)

    for steps in (0, 1, 3):
        truth = _core.update_codebooks(codebooks, W, H, codes, scales, steps)
        found = verbs.update_codebooks(books, w, h, c, s, steps)
        assert torch.equal(found, verbs.update_codebooks(books, w, h, c, s, steps))
        error = _core.quantization_error(W, H, codes, found.cpu().numpy(), scales)
        assert error == pytest.approx(_core.quantization_error(W, H, codes, truth, scales), rel=1e-3)

    moments = np.zeros((2, codebooks.size + out))
    truth = _core.update_adam(codebooks, scales, moments, W, H, codes, 5, 1e-3, 0)
    found = verbs.update_adam((books, s, cuda(moments)), w, h, c, 5, 1e-3, 0)
    for ours, theirs in zip(found, truth, strict=True):
        size = np.abs(theirs).max()
        np.testing.assert_allclose(ours.cpu().numpy(), theirs, atol=2e-3 * size)


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("of_bytes", [False, True])
@pytest.mark.parametrize("beta1", [0.0, 0.5])
@pytest.mark.parametrize("shape", [(1, 5), (3, 85), (16, 16), (130, 264)], ids=str)
def test_buffer_steps_have_the_bits_of_a_cpu(shape, beta1, of_bytes, kind):
    generator = torch.Generator().manual_seed(0)
    count = -(-shape[0] * shape[1] // 256)
    dtypes = (torch.int8, torch.uint8) if of_bytes else (torch.float32, torch.float32)
    state = [torch.randn(shape, generator=generator), *(torch.zeros(shape, dtype=dtype) for dtype in dtypes)]
    state.append(torch.zeros(2, count) if of_bytes else None)
    if beta1 == 0:
        state[1] = None
    there = [None if one is None else one.cuda() for one in state]
    for step in range(1, 6):
        sizes = torch.randn(shape, generator=generator).mul_(2).exp_()
        gradient = (1e-3 * sizes * torch.randn(shape, generator=generator)).to(getattr(torch, kind))
        for buffer, *moments in (state, there):
            given = gradient.to(buffer.device)
            verbs.buffer_step(buffer, given, tuple(moments), 7.0, 1e-2, (beta1, 0.95), step)
    for ours, theirs in zip(there, state, strict=True):
        assert ours is theirs is None or torch.equal(ours.cpu(), theirs)
    with pytest.raises(ValueError, match="second: got a tensor elsewhere, expected it on cuda:0 as the others"):
        verbs.buffer_step(there[0], gradient.cuda(), (*there[1:2], state[2], there[3]), 7.0, 1e-2, (beta1, 0.95), 1)


def test_an_entry_without_members_stays():
    W, H, scales, codes, codebooks = layer(40, 96, 2, 6, 8)
    codes[codes == 7] = 0
    found = verbs.update_codebooks(*cuda(codebooks, W, H, codes, scales), 3)
    assert np.array_equal(found.cpu().numpy()[:, 7], codebooks[:, 7])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("inp", [96, 260, 33])
def test_accumulate_hessian(dtype, inp):
    x = torch.randn(9000, inp, generator=torch.Generator().manual_seed(1)).to(getattr(torch, dtype))
    x[:, 1] *= 100
    sums = torch.zeros(inp, inp, dtype=torch.float64, device="cuda")
    for rows in x.split(4000):
        verbs.accumulate_hessian(sums, rows.cuda())
    truth = x.double().T @ x.double()
    size = truth.diagonal().sqrt()
    assert ((sums.cpu() - truth) / (size[:, None] * size)).abs().max() < 4e-5
    assert torch.equal(sums, sums.T)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("inp", [96, 260, 33])
def test_accumulate_product(dtype, inp):
    x, y = torch.randn(2, 9000, inp, generator=torch.Generator().manual_seed(1)).to(getattr(torch, dtype))
    y = y[:, 1:]
    x[:, 1] *= 100
    sums = torch.zeros(inp, inp - 1, dtype=torch.float64, device="cuda")
    for rows, columns in zip(x.split(4000), y.split(4000), strict=True):
        verbs.accumulate_product(sums, rows.cuda(), columns.cuda())
    sizes = [matrix.double().square().sum(0).sqrt() for matrix in (x, y)]
    truth = x.double().T @ y.double()
    assert ((sums.cpu() - truth) / (sizes[0][:, None] * sizes[1])).abs().max() < 4e-5


def test_sums_that_are_refused():
    x, sums = torch.ones(5, 32, device="cuda"), torch.zeros(32, 32, dtype=torch.float64, device="cuda")
    refused = [
        ((sums.float(), x), "sum: got dtype float32, expected float64"),
        ((sums[:, :31], x), r"sum: got shape \[32, 31\], expected \[32, 32\]"),
        ((torch.zeros(32, 64, dtype=torch.float64, device="cuda")[:, ::2], x), "sum: got a strided tensor"),
        ((sums.cpu(), x), "sum: got a tensor elsewhere"),
        ((sums, x.double()), "x: got dtype float64"),
        ((sums, x, x.half()), "y: got dtype float16, expected float32 as x"),
        ((sums, x, x[:3]), r"y: got shape \[3, 32\], expected \[5, any\]"),
        ((sums, x, x.cpu()), "y: got a tensor elsewhere"),
    ]
    for arguments, said in refused:
        verb = verbs.accumulate_hessian if len(arguments) == 2 else verbs.accumulate_product
        with pytest.raises(ValueError, match=said):
            verb(*arguments)
    assert not sums.any()


@pytest.mark.parametrize("out,inp", [(50, 96), (300, 264), (7, 33), (1536, 576)])
def test_correct_weight(out, inp):
    W, H = random_layer(out, inp)
    cross = (H @ np.random.default_rng(0).standard_normal((inp, inp), dtype=np.float32)).T / inp**0.5
    truth = _core.correct_weight(W, np.ascontiguousarray(cross), H, 0.5, 1e-2)
    found = verbs.correct_weight(*cuda(W, cross, H), 0.5, 1e-2)
    again = verbs.correct_weight(*cuda(W, cross, H), 0.5, 1e-2)
    np.testing.assert_allclose(found.cpu().numpy(), truth, rtol=1e-4, atol=1e-4 * np.abs(truth - W).max())
    assert torch.equal(found, again)
    with pytest.raises(ValueError, match=r"correct_weight: .*positive"):
        verbs.correct_weight(*cuda(W, cross, -H), 0.5, 1e-2)
    with pytest.raises(ValueError, match="cross: got a tensor elsewhere"):
        verbs.correct_weight(cuda(W), torch.from_numpy(cross), cuda(H), 0.5, 1e-2)


@pytest.mark.parametrize("inp,g", [(96, 4), (264, 8), (576, 16), (544, 32)])
def test_factor_hessian(inp, g):
    _, H = random_layer(4, inp)
    truth = _core.factor_hessian(H, g, 1e-3)
    found = verbs.factor_hessian(cuda(H), g, 1e-3)
    assert np.array_equal(found[0].cpu().numpy(), truth[0])
    for ours, theirs in zip(found[1:], truth[1:], strict=True):
        np.testing.assert_allclose(ours.cpu().numpy(), theirs, rtol=1e-5, atol=1e-6 * np.abs(theirs).max())


@pytest.mark.parametrize("shape", [(4096, 256, 2, 8, 8), (300, 96, 2, 10, 16), (512, 64, 8, 5, 4), (64, 64, 1, 16, 8)])
def test_kmeans(shape):
    out, inp, K, B, g = shape
    W, H = random_layer(out, inp, seed=1)
    scales = np.sqrt(np.square(W).mean(1)).astype(np.float32)
    columns = H.diagonal().copy()
    arguments = (Format(K, B, g), 5, 1e-3, 3)
    w, s = cuda(W, scales)
    codes, books = verbs.residual_kmeans(w, s, *arguments, cuda(columns))
    again = verbs.residual_kmeans(w, s, *arguments, cuda(columns))
    assert torch.equal(codes.view(torch.int16), again[0].view(torch.int16)) and torch.equal(books, again[1])

    def error(codes, books):
        diagonal = np.diag(columns)
        return _core.quantization_error(W, diagonal, np.ascontiguousarray(codes), np.ascontiguousarray(books), scales)

    truth = verbs.residual_kmeans(W, scales, *arguments, columns)
    assert error(codes.cpu().numpy(), books.cpu().numpy()) <= 1.03 * error(*truth) + 1e-9


@pytest.mark.parametrize("bits", [1, 7, 8, 9, 16])
def test_codes_to_disk_and_back(bits):
    codes = np.random.default_rng(0).integers(0, 1 << bits, (13, 6, 2)).astype(np.uint16)
    stored = verbs.codes_to_disk(cuda(codes), bits)
    assert np.array_equal(stored.cpu().numpy(), verbs.codes_to_disk(codes, bits))
    assert np.array_equal(verbs.codes_from_disk(stored, bits).cpu().numpy(), codes)


def test_refusals():
    W, H, scales, codes, codebooks = layer(40, 96, 2, 6, 8)
    outside = codes.copy()
    outside[3, 2, 1] = 64
    with pytest.raises(ValueError, match=r"codes: got one outside, expected 0..63"):
        verbs.update_scales(*cuda(scales, W, H, outside, codebooks))
    with pytest.raises(ValueError, match=r"codes: got 64 at flat index 77, expected 0..63"):
        verbs.codes_to_disk(cuda(outside), 6)
    with pytest.raises(ValueError, match="H: got a tensor elsewhere"):
        verbs.quantization_error(cuda(W), torch.from_numpy(H))
    with pytest.raises(ValueError, match="H: got dtype float64"):
        verbs.quantization_error(cuda(W), cuda(H.astype(np.float64)))
    with pytest.raises(ValueError, match=r"factor_hessian: .*positive"):
        verbs.factor_hessian(cuda(-np.eye(16, dtype=np.float32)), 8, 0.0)
    with pytest.raises(ValueError, match=r"factor_hessian: .*positive"):
        verbs.factor_hessian(cuda(np.diag([1] * 15 + [-1]).astype(np.float32)), 8, 0.0)


SOLVES = [
    ("ldl", "2x8g8", 512, 576),
    ("ldl", "3x8g8", 256, 256),
    ("ldl", "4x6g8", 256, 192),
    ("ldl", "1x12g8", 1024, 256),
    ("ldl", "2x8g16", 512, 256),
    ("paper", "2x6g8", 256, 256),
    ("rtn", "2x8g4", 128, 128),
]


@pytest.mark.parametrize("solver,scheme,out,inp", SOLVES)
def test_quantize_weight_agrees_with_the_cpu(solver, scheme, out, inp):
    W, H = random_layer(out, inp, seed=2)
    config = AqlmConfig.from_scheme(scheme, solver=solver)
    on_cpu = quantize_weight(W, H, config)
    on_gpu = quantize_weight(cuda(W), Hessian(cuda(H)), config)
    again = quantize_weight(cuda(W), Hessian(cuda(H)), config)
    for name, tensor in on_gpu.tensors().items():
        assert tensor.is_cuda and torch.equal(tensor, again.tensors()[name])
    assert on_gpu.relative_error == pytest.approx(on_cpu.relative_error, rel=5e-2)  # other trajectories of k-means
    D = W.astype(np.float64) - on_gpu.decode().cpu().numpy()
    signal = np.einsum("oi,ij,oj", W, H, W, optimize=True)
    assert np.einsum("oi,ij,oj", D, H, D, optimize=True) / signal == pytest.approx(on_gpu.relative_error, rel=1e-3)


@pytest.mark.parametrize("n", [8, 12, 64, 192, 576, 1536, 4096, 11008, 13824, 28672, 49152, 131072])
def test_hadamard_has_the_bits_of_the_cpu(n):
    x = np.random.default_rng(0).standard_normal((5, n)).astype(np.float32)
    on_gpu = torch.from_numpy(x).cuda()
    for inverse in (False, True):
        found = verbs.hadamard(on_gpu, inverse)
        np.testing.assert_array_equal(found.cpu().numpy(), _core.hadamard(x, inverse))
    torch.testing.assert_close(verbs.hadamard(verbs.hadamard(on_gpu), True), on_gpu, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="x: got dtype"):
        verbs.hadamard(on_gpu.double())


@pytest.mark.parametrize("solver", ["gptq", "quip", "quip_sharp", "product", "additive"])
def test_other_methods_on_a_gpu(solver):
    """The error of the CPU, on the layer's device."""
    W, H = random_layer(96, 192)
    config = AqlmConfig.from_scheme("2x8g8", solver=solver)
    errors = []
    for convert in (np.asarray, lambda array: torch.from_numpy(array).cuda()):
        found = quantize_weight(convert(W), convert(H), config)
        errors.append(found.relative_error)
    assert found.decode().is_cuda and errors[1] == pytest.approx(errors[0], rel=0.02)
