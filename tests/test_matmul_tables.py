"""Few rows by tables of products rounded to 16 bits: their error, the same bits everywhere, the exact way."""

import pytest
import torch
from conftest import EPS
from test_ops import dense, random_weight

from aqlm_c import ops

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


@pytest.fixture(autouse=True)
def rounded():
    """Tables for float32 too."""
    before = ops.get_exact()
    ops.set_exact(False)
    yield
    ops.set_exact(before)


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
def test_error(shape, rows, dtype, isa):
    weight = random_weight(shape, dtype)
    x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    bias = torch.randn(shape[0], generator=torch.Generator().manual_seed(2)).to(dtype)
    truth = x.double() @ dense(*weight).T
    rounding = EPS[str(dtype).removeprefix("torch.")] / 2
    assert error_of(ops.matmul(x, *weight), truth) <= 2e-4 + rounding
    assert error_of(ops.matmul(x, *weight, bias), truth + bias.double()) <= 2e-4 + rounding


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
@pytest.mark.parametrize("rows", ROWS)
def test_exact(shape, rows, isa, exact):
    weight, x = random_weight(shape), torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(1))
    assert error_of(ops.matmul(x, *weight), x.double() @ dense(*weight).T) <= 1e-5


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e4, 1e30])
@pytest.mark.parametrize("outliers", [1, 3, 64])
def test_error_with_outliers(size, outliers):
    """A few inputs far larger than the rest, as language models have them."""
    weight = random_weight((300, 2048, 2, 8, 1, 8))
    x = torch.randn(4, 2048, generator=torch.Generator().manual_seed(1)) * size
    for ratio in (1e1, 1e3, 1e5):
        y = x.clone()
        y[:, torch.randperm(2048, generator=torch.Generator().manual_seed(2))[:outliers]] *= ratio
        assert error_of(ops.matmul(y, *weight), y.double() @ dense(*weight).T) <= 1e-3


def test_error_of_unequal_codebooks():
    codes, codebooks, scales = random_weight((300, 1024, 4, 8, 1, 8))
    codebooks *= torch.tensor([100.0, 10.0, 1.0, 0.01]).view(4, 1, 1, 1)
    x = torch.randn(2, 1024, generator=torch.Generator().manual_seed(1))
    y, truth = ops.matmul(x, codes, codebooks, scales), x.double() @ dense(codes, codebooks, scales).T
    assert error_of(y, truth) <= 1e-3


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
                results.append(ops.matmul(x, *weight))
    finally:
        ops.set_isa(isa)
    assert all(torch.equal(y, results[0]) for y in results)
    for rows in (1, 3, 7):  # whatever rows come together
        assert torch.equal(torch.cat([ops.matmul(part, *weight) for part in x.split(rows)]), results[0])


def test_repeated_calls_give_the_same_bits(threads):
    weight, x = random_weight((640, 512, 2, 8, 1, 8)), torch.randn(1, 512)
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
    assert ops.get_exact() is False
    rounded = ops.matmul(x, *weight)
    ops.set_exact(True)
    try:
        assert ops.get_exact() is True
        assert not torch.equal(ops.matmul(x, *weight), rounded)
        exact = ops.matmul(x, *weight), ops.matmul(x.half(), *weight)
        ops.set_exact(None)
        assert ops.get_exact() is None
        assert torch.equal(ops.matmul(x, *weight), exact[0])  # float32 is not rounded unasked
        assert not torch.equal(ops.matmul(x.half(), *weight), exact[1])
    finally:
        ops.set_exact(False)
    assert torch.equal(ops.matmul(x, *weight), rounded)
