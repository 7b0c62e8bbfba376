"""Few rows by tables of rounded products: their error, packed codes, the same bits everywhere, the exact path."""

import pytest
import torch
from tolerances import EPS
from weights import dense, random_weight

from aqlm_c.nn import ops

# out, in, K, B, og, g: outputs around the panel of 64 and the 256 of one call, codes around the block of 64.
SHAPES = [
    (64, 64, 1, 8, 1, 8),
    (65, 512, 2, 8, 1, 8),
    (255, 520, 2, 8, 1, 8),
    (257, 1032, 3, 8, 1, 8),
    (333, 264, 4, 8, 1, 4),
    (700, 192, 8, 8, 1, 8),
    (100, 4096, 1, 8, 1, 16),
    (90, 320, 5, 3, 1, 32),
    (576, 1536, 2, 8, 1, 8),
    (200, 96, 2, 1, 1, 8),
]
IDS = ["{2}x{3}g{5}-{0}x{1}".format(*s) for s in SHAPES]
ROWS = [1, 2, 5, 16]


BUDGET = {False: 2e-4, None: 1e-5}  # of float32 by the planes of its tables: two, three


@pytest.fixture(autouse=True, params=BUDGET, ids=["16bits", "23bits"])
def rounding(request):
    """Tables of 16 bits for float32 too, or its own."""
    before = ops.get_exact()
    ops.set_exact(request.param)
    yield request.param
    ops.set_exact(before)


def packed(weight):
    codes, *rest = weight
    return ops.pack(codes), *rest


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def error_of(y, truth):
    """The largest over rows of |y - truth| / |truth|, norms over the outputs."""
    return float(((y.double() - truth).norm(dim=-1) / truth.norm(dim=-1)).max())


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
@pytest.mark.parametrize("rows", ROWS)
def test_error(shape, rows, dtype, isa, rounding):
    weight = random_weight(shape, dtype)
    x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    bias = torch.randn(shape[0], generator=torch.Generator().manual_seed(2)).to(dtype)
    truth = x.double() @ dense(*weight).T
    budget = BUDGET[rounding if dtype == torch.float32 else False] + EPS[str(dtype).removeprefix("torch.")] / 2
    y = ops.matmul(x, *weight)
    assert error_of(y, truth) <= budget
    assert error_of(ops.matmul(x, *weight, bias), truth + bias.double()) <= budget
    assert torch.equal(ops.matmul(x, *packed(weight)), y)


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
@pytest.mark.parametrize("rows", ROWS)
def test_exact(shape, rows, isa, exact):
    weight, x = random_weight(shape), torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(1))
    assert error_of(ops.matmul(x, *weight), x.double() @ dense(*weight).T) <= 1e-5


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e4, 1e30])
@pytest.mark.parametrize("outliers", [1, 3, 64])
def test_error_with_outliers(size, outliers, rounding):
    """A few inputs far larger than the rest, as language models have them."""
    weight = random_weight((300, 2048, 2, 8, 1, 8))
    x = torch.randn(4, 2048, generator=torch.Generator().manual_seed(1)) * size
    for ratio in (1e1, 1e3, 1e5):
        y = x.clone()
        y[:, torch.randperm(2048, generator=torch.Generator().manual_seed(2))[:outliers]] *= ratio
        assert error_of(ops.matmul(y, *weight), y.double() @ dense(*weight).T) <= 5 * BUDGET[rounding]


def test_error_of_unequal_codebooks(rounding):
    codes, codebooks, scales = random_weight((300, 1024, 4, 8, 1, 8))
    codebooks *= torch.tensor([100.0, 10.0, 1.0, 0.01]).view(4, 1, 1, 1)
    x = torch.randn(2, 1024, generator=torch.Generator().manual_seed(1))
    y, truth = ops.matmul(x, codes, codebooks, scales), x.double() @ dense(codes, codebooks, scales).T
    assert error_of(y, truth) <= 5 * BUDGET[rounding]


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_same_bits_on_every_isa_and_thread_count(shape, threads):
    from aqlm_c import _core

    weight, isa, results = random_weight(shape), ops.get_isa(), []
    x = torch.randn(16, shape[1], generator=torch.Generator().manual_seed(1))
    try:
        for name in _core.available_isas():
            ops.set_isa(name)
            for n in (1, 2, 3, 4):
                torch.set_num_threads(n)
                results += [ops.matmul(x, *weight), ops.matmul(x, *packed(weight))]
    finally:
        ops.set_isa(isa)
    assert all(torch.equal(y, results[0]) for y in results)
    for rows in (1, 3, 7):  # whatever rows come together
        assert torch.equal(torch.cat([ops.matmul(part, *weight) for part in x.split(rows)]), results[0])


def test_repeated_calls_give_the_same_bits(threads):
    weight, x = packed(random_weight((640, 512, 2, 8, 1, 8))), torch.randn(1, 512)
    first = ops.matmul(x, *weight)
    for n in range(400):
        torch.set_num_threads(1 + n % 4)
        assert torch.equal(ops.matmul(x, *weight), first)


def test_no_numbers_and_zeros():
    weight = random_weight((100, 512, 2, 8, 1, 8))
    x = torch.zeros(3, 512)
    x[1, 7], x[2, 300] = float("nan"), float("inf")
    y = ops.matmul(x, *weight)
    assert torch.equal(y[0], torch.zeros(100))
    assert not y[1].isfinite().any() and not y[2].isfinite().any()


def test_exact_is_a_choice():
    weight, x = random_weight((128, 512, 2, 8, 1, 8)), torch.randn(1, 512)
    results = {}
    for choice in (False, None, True):
        ops.set_exact(choice)
        assert ops.get_exact() is choice
        results[choice] = ops.matmul(x, *weight), ops.matmul(x.half(), *weight)
    assert not torch.equal(results[False][0], results[None][0])  # float32 has tables of its own
    assert torch.equal(results[False][1], results[None][1])
    assert not torch.equal(results[True][1], results[None][1])


@pytest.mark.parametrize("shape", [*SHAPES, (136, 64, 1, 12, 1, 8), (96, 128, 2, 8, 2, 8)])
def test_exact_results_do_not_depend_on_the_split(shape, dtype, exact):
    weight = random_weight(shape)
    x = torch.randn(70, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    y = ops.matmul(x, *weight)
    for rows in (1, 3, 5, 33):
        assert torch.equal(torch.cat([ops.matmul(part, *weight) for part in x.split(rows)]), y)


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_packed_codes_serve_every_op(shape, isa):
    """The same bits as from codes laid out as on disk: many rows, decoding, gradients."""
    weight = random_weight(shape)
    assert weight[0].is_contiguous() and not ops.pack(weight[0]).is_contiguous()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(37, shape[1], generator=generator)
    grad_y, grad_rows = torch.randn(37, shape[0], generator=generator), torch.randn(shape[:2], generator=generator)
    for to in (torch.float32, torch.bfloat16):
        calls = [
            lambda w, to=to: ops.matmul(x.to(to), *w),
            lambda w, to=to: torch.ops.aqlm_c.matmul_backward(grad_y.to(to), *w),
            lambda w, to=to: torch.ops.aqlm_c.matmul_backward(grad_y[:1].to(to), *w),
            lambda w: ops.decode_rows(*w),
            lambda w, to=to: torch.cat(
                [g.flatten() for g in torch.ops.aqlm_c.decode_rows_backward(grad_rows.to(to), *w, True, True)]
            ),
        ]
        for call in calls:
            assert torch.equal(call(packed(weight)), call(weight))
