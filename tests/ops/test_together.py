"""Rows that each have a weight of their own: `matmul_experts` on the CPU, and experts that are called together."""

import copy
import pickle

import pytest
import torch
from weights import SHAPE_IDS, SHAPES, dense, random_weight

from aqlm_c.format import WEIGHT, Format
from aqlm_c.nn import ops
from aqlm_c.nn.experts import ExpertStacks
from aqlm_c.nn.linear import QuantizedLinear

EXPERTS = 4


def stacked(shape, seed=0):
    weights = [random_weight(shape, seed=seed + e) for e in range(EXPERTS)]
    return tuple(torch.stack(tensors) for tensors in zip(*weights, strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
@pytest.mark.parametrize("tokens, k", [(1, 1), (5, 2), (3, 4), (0, 2)])
def test_each_row_by_its_weights(shape, tokens, k):
    stacks = [stacked(shape), stacked((2 * shape[0], *shape[1:]), seed=10)]
    x = torch.randn(tokens, shape[1])
    index = torch.randint(-1, EXPERTS + 1, (tokens, k))
    y = ops.matmul_experts(x, index, stacks)
    assert y.shape == (tokens * k, 3 * shape[0])
    for row, e in enumerate(index.flatten().tolist()):
        if not 0 <= e < EXPERTS:
            assert not y[row].any()
            continue
        W = torch.cat([dense(*(t[e] for t in stack)) for stack in stacks])
        truth = W @ x[row // k].double()
        assert (y[row] - truth).abs().max() <= 2e-5 * truth.abs().max() + 1e-6


def test_compiled():
    stacks = [stacked((24, 64, 2, 8, 1, 8))]
    x, index = torch.randn(6, 64), torch.randint(0, EXPERTS, (6, 2))
    compiled = torch.compile(lambda x: ops.matmul_experts(x, index, stacks) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), ops.matmul_experts(x, index, stacks) * 2)


def test_errors():
    codes, codebooks, scales = stacked((24, 64, 2, 8, 1, 8))
    x, index = torch.randn(6, 64), torch.zeros(6, 2, dtype=torch.int64)
    for message, given in (
        (r"index: got dtype int32, expected int64", (x, index.int(), [(codes, codebooks, scales)])),
        (r"index: got 10 rows, expected a multiple of those of x, 6", (x, index[1:], [(codes, codebooks, scales)])),
        (r"expected 4 experts", (x, index, [(codes, codebooks[1:], scales)])),
        (r"codes: got shape \[24, 8, 2\]", (x, index, [(codes[0], codebooks, scales)])),
        (r"x: got shape \[6, 63\], expected \[rows, 64\]", (x[:, 1:], index, [(codes, codebooks, scales)])),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.matmul_experts(*given)


def linears(out, in_features, seed):
    made = []
    for e in range(EXPERTS):
        layer = QuantizedLinear(in_features, out, False, Format.parse("2x8g8")).requires_grad_(False)
        tensors = random_weight((out, in_features, 2, 8, 1, 8), seed=seed + e)
        for name, tensor in zip(WEIGHT, tensors, strict=True):
            getattr(layer, name).data = tensor
        made.append(layer)
    return made


def experts():
    return linears(24, 32, 0), linears(24, 32, 10), linears(32, 24, 20)


def watched(roles):
    """Stacks of them, and the modules whose children they are."""
    stacks, parents = ExpertStacks.made(*roles), [torch.nn.ModuleList(linears) for linears in roles]
    stacks.watch((parent, str(e)) for parent in parents for e in range(EXPERTS))
    return stacks, parents


def test_linears_are_views_of_stacks():
    roles = experts()
    before = [tensor.clone() for linears in roles for linear in linears for tensor in linear.parameters()]
    stacks, _ = watched(roles)
    after = [tensor for linears in roles for linear in linears for tensor in linear.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    gate = roles[0][2]
    gate.codes.data.zero_()
    assert stacks.are_current() and not stacks.gate.codes[2].any() and stacks.gate.codes[1].any()


@pytest.mark.parametrize("change", ["moved", "assigned", "hook", "forward", "replaced"])
def test_what_no_longer_holds_is_seen(change):
    roles = experts()
    stacks, parents = watched(roles)
    assert stacks.are_current()
    linear = roles[1][3]
    if change == "moved":
        linear.codebooks.data = linear.codebooks.data.clone()
    elif change == "assigned":
        linear.scales = torch.nn.Parameter(linear.scales.data, requires_grad=False)
    elif change == "hook":
        linear.register_forward_hook(lambda *_: None)
    elif change == "forward":
        linear.forward = lambda x: x
    else:
        parents[1][3] = torch.nn.Linear(32, 24, bias=False)
    assert not stacks.are_current()
    assert (ExpertStacks.made(*parents) is None) == (change not in ("moved", "assigned"))


def test_not_of_linears_that_differ():
    gate, up, down = experts()
    assert ExpertStacks.made([*gate[1:], torch.nn.Linear(32, 24, bias=False)], up, down) is None
    assert ExpertStacks.made([*gate[1:], linears(16, 32, 0)[0]], up, down) is None


def test_copies_have_none():
    stacks = ExpertStacks.made(*experts())
    assert copy.deepcopy(stacks) is None and pickle.loads(pickle.dumps(stacks)) is None
