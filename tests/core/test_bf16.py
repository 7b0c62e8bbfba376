"""Rows of bfloat16 where the CPU multiplies them by itself, and elsewhere: their error, packed codes, the same bits."""

import pytest
import torch
from tolerances import error_budget, max_error
from weights import dense, random_weight

from aqlm_c.nn import ops

# out, in, K, B, og, g: outputs around panels of 16 and tiles of 64, inputs around 512, codes of 1 and 2 bytes.
SHAPES = [
    (1, 8, 1, 16, 1, 8),
    (15, 520, 1, 16, 1, 8),
    (64, 512, 1, 12, 1, 8),
    (65, 1048, 2, 10, 1, 8),
    (129, 504, 1, 9, 1, 8),
    (80, 1024, 1, 8, 1, 8),
    (111, 520, 2, 8, 1, 8),
    (257, 1032, 3, 8, 1, 8),
    (70, 192, 8, 5, 1, 8),
    (96, 256, 2, 8, 2, 8),
    (96, 256, 1, 16, 1, 16),
]
IDS = ["{2}x{3}g{5}-og{4}-{0}x{1}".format(*s) for s in SHAPES]
ROWS = [3, 12, 13, 17, 30, 129]


def inputs(rows, n, seed=1):
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_error(shape, rows, weight_dtype):
    weight, x = random_weight(shape, weight_dtype), inputs(rows, shape[1])
    bias, W = inputs(1, shape[0], 2)[0], dense(*weight)
    for b in (None, bias):
        y = ops.matmul(x, *weight, b)
        truth = x.double() @ W.T + (0 if b is None else b.double())
        plain = torch.nn.functional.linear(x, W.bfloat16(), b)
        assert y.dtype == torch.bfloat16 and max_error(y, truth) <= error_budget(plain, truth)
    if ops.packs(weight[0], shape[4]):
        assert torch.equal(ops.matmul(x, ops.pack(weight[0]), *weight[1:], bias), y)


@pytest.mark.parametrize("shape", [SHAPES[3], SHAPES[7]], ids=[IDS[3], IDS[7]])
def test_same_bits_for_any_threads_and_isa(shape, isa):
    weight, x = random_weight(shape, torch.float16), inputs(30, shape[1])
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            results += [ops.matmul(x, *weight) for _ in range(20)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(y, results[0]) for y in results)


def test_many_rows():
    """More than a tile is used for at once: each row as in a batch of its own."""
    weight, x = random_weight((33, 64, 2, 8, 1, 8), torch.bfloat16), inputs(2100, 64)
    y = ops.matmul(x, *weight)
    assert torch.equal(y[1000:1040], ops.matmul(x[1000:1040], *weight))


def test_nothing_is_read_behind_the_codes():
    """Codes at the end of a page that another one without access follows, in both layouts."""
    import ctypes
    import mmap

    page = mmap.PAGESIZE
    shape = (48, 336, 2, 8, 1, 8)
    codes, *rest = random_weight(shape, torch.bfloat16)
    x = inputs(20, shape[1])
    expected = ops.matmul(x, codes, *rest)
    size = -(-codes.numel() // page) * page
    memory = mmap.mmap(-1, size + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address + size), page, 0) == 0
    try:
        at_end = torch.frombuffer(memory, dtype=torch.int8, count=size)[size - codes.numel() :]
        for layout in ((0, 1, 2), (1, 2, 0)):
            moved = at_end.view([codes.shape[i] for i in layout])
            moved.copy_(codes.permute(layout))
            back = [layout.index(i) for i in range(3)]
            assert torch.equal(ops.matmul(x, moved.permute(back), *rest), expected)
    finally:
        libc.mprotect(ctypes.c_void_p(address + size), page, 3)
