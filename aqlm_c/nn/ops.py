"""The torch operators of aqlm_c: `aqlm_c::matmul`, `aqlm_c::decode_rows` and the gradients of both (`*_backward`).

The kernels are C and CUDA (csrc/core, csrc/cuda, made ops by csrc/torch); this file adds what the stable ABI cannot:
fake kernels, for ``torch.compile``, and autograd. (The quantizer's verbs: `core.verbs`.)

Letters: out, in = features; g, og = in_group_size, out_group_size; J = in / g, O = out / og; K = num_codebooks;
E = 2 ** nbits_per_codebook.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.overrides import has_torch_function

from ..core.extensions import get_exact, get_isa, has_cuda, ops, set_exact, set_isa

__all__ = [
    "decode_rows",
    "decode_rows_backward",
    "divergence",
    "get_exact",
    "get_isa",
    "has_cuda",
    "index_codes",
    "matmul",
    "matmul_experts",
    "matmul_grouped",
    "pack",
    "packs",
    "set_exact",
    "set_isa",
]

Weight = tuple[Tensor, Tensor, Tensor, "Tensor | None"]  # codes, codebooks, scales, bias

_matmul = ops.matmul.default


def matmul(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """Product with a quantized weight: ``y = x W^T + bias``, W decoded tile by tile (arXiv 2401.06118, section 3).

    Sums are float32 inside. Up to 16 rows, with B <= 8, og = 1 and out >= 64, look up products with the codebooks,
    rounded to 23 bits for float32 (an error below 1e-5 of y) and to 16 bits for the others (1e-4; 1e-3 at most).
    Where the CPU has instructions for bfloat16, it multiplies more rows of that by W rounded to bfloat16 (from 3 rows
    on for B > 8, from 12 for K > 2, from 17 for the rest; from 32 if g is not 8 or og not 1). `set_exact(True)`, or
    AQLM_C_EXACT=1 before the import, forbids both: every sum is then one of float32 products in order, the same bits
    however rows are split into calls. `set_exact(False)`, or 0, rounds to 16 bits for float32 too.

    Args:
        x: [..., in], float32, float16 or bfloat16.
        codes: [O, J, K] as stored: int8 for up to 8 bits per codebook, else int16; of any strides, see `pack`.
        codebooks: [K, E, og, g], float32, float16 or bfloat16, whatever x is.
        scales: [O, 1, 1, 1], dtype of codebooks.
        bias: [out], dtype of x.

    Returns:
        [..., out], dtype of x; a new tensor, free to be modified in place. Differentiable, any number of times, in
        x, codebooks, scales and bias; gradients are summed in float32 and have the dtype of their argument.

    Raises:
        RuntimeError: a shape or dtype is not as above; the message names the argument.
    """
    if (
        torch.compiler.is_compiling()
        or torch.is_inference_mode_enabled()
        or is_transformed()
        or has_torch_function((x, codes, codebooks, scales, bias))
    ):
        return _matmul(x, codes, codebooks, scales, bias)
    # what `register_autograd` comes to, in less time: 13 of 24 us a call with gradients, 6 of 9 without
    if torch.is_grad_enabled() and _is_trained(x, codebooks, scales, bias):
        return _Matmul.apply(x, codes, codebooks, scales, bias)
    with torch._C._AutoDispatchBelowAutograd():
        return _matmul(x, codes, codebooks, scales, bias)


def is_transformed() -> bool:
    """Whether a transform or torch.jit's tracer wants to see each op itself."""
    return torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None


def _is_trained(x: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None) -> bool:
    return (
        x.requires_grad or codebooks.requires_grad or scales.requires_grad or (bias is not None and bias.requires_grad)
    )


def matmul_grouped(x: Tensor, weights: Sequence[Weight]) -> list[Tensor]:
    """`matmul` of x with each of `weights`, (codes, codebooks, scales, bias).

    With one row on a GPU, two or three share a launch if they differ in `out` alone, which is at least 16, have at
    most 8 bits per codebook, a multiple of 4 codes in a row and 64M in all, and all a bias or none; results are then
    `matmul`'s but for the order of sums. Else they are one product after the other. Shapes, dtypes, gradients and
    errors are `matmul`'s.
    """
    apart = torch.is_grad_enabled() and any(_is_trained(x, *weight[1:]) for weight in weights)
    if (
        apart
        or len(weights) == 0
        or len({weight[3] is None for weight in weights}) > 1
        or (not torch.compiler.is_compiling() and (is_transformed() or has_torch_function((x,))))
    ):
        return [matmul(x, *weight) for weight in weights]
    codes, codebooks, scales, biases = map(list, zip(*weights, strict=True))
    biases = [] if biases[0] is None else biases
    return ops.matmul_grouped(x, codes, codebooks, scales, biases)


def matmul_experts(x: Tensor, index: Tensor, weights: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """`matmul` of rows that each have a weight of their own, such as those of the experts of a mixture.

    On a GPU few launches for all rows, whatever index says: nothing waits for it, and a CUDA graph holds for others.
    Rows are sorted by expert on the device, and up to 8 of one expert read its codes once; up to as many rows as
    experts, with at most 8 bits per codebook, each read them for themselves, which takes less time. A row has the bits
    that the same kernel gives it in `matmul`.

    Args:
        x: [rows, in], float32, float16 or bfloat16.
        index: [rows * k], of any shape, int64: row i of y is of row i // k of x and of expert index[i].
        weights: (codes, codebooks, scales) of `matmul` with a first dimension of E experts, 1..1024; one or more of
            them, on a GPU up to three, which differ in `out` alone.

    Returns:
        [rows * k, out of all weights], dtype of x; zeros where index is no expert's. Without gradients.

    Raises:
        RuntimeError: a shape or dtype is not as above; the message names the argument.
    """
    codes, codebooks, scales = map(list, zip(*weights, strict=True))
    return ops.matmul_experts(x, index, codes, codebooks, scales)


def decode_rows(
    codes: Tensor,
    codebooks: Tensor,
    scales: Tensor,
    dtype: torch.dtype | None = None,
    index: Tensor | None = None,
) -> Tensor:
    """The weight itself: W [out, in] in `dtype`, float32, float16 or bfloat16; None: that of codebooks.

    index: what `index_codes` gives for these codes; gradients take less time with it, and are given once only. Other
    arguments, gradients and errors as in `matmul`.
    """
    if index is not None and torch.is_grad_enabled() and _is_trained(codebooks, codebooks, scales, None):
        return _DecodeRows.apply(codes, codebooks, scales, dtype, index)
    return ops.decode_rows(codes, codebooks, scales, dtype)


def index_codes(codes: Tensor, codebooks: Tensor, scales: Tensor) -> Tensor:
    """For `decode_rows`, while codes stay as they are: int32 [K, E + 1 + O * J], where the groups of each code start
    and then these; [0] on the CPU, and for codebooks so small that it is not needed.
    """
    return ops.index_codes(codes, codebooks, scales)


def decode_rows_backward(
    grad_rows: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, index: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The gradients to codebooks and scales, in their dtype, from that to W, grad_rows [out, in]. index: as in
    `decode_rows`.
    """
    with torch._C._AutoDispatchBelowAutograd():
        return _weight_gradients(grad_rows, codes, codebooks, scales, True, True, index)


def divergence(original: Tensor, logits: Tensor, need_gradient: bool = True) -> tuple[Tensor, Tensor]:
    """KL(softmax(original) || softmax(logits)) of rows [n, words], of one dtype and on one GPU, in nats: float32 [n];
    and its gradient to logits, of their dtype, [n, words], or [0, words] where it is not needed.
    """
    kl, gradient = ops.divergence(original, logits, need_gradient)
    return kl, gradient


def packs(codes: Tensor, out_group_size: int = 1) -> bool:
    """Whether `matmul` of few rows is faster with `pack`ed codes: int8, on the CPU, of 64 outputs or more."""
    return codes.device.type == "cpu" and codes.dtype == torch.int8 and out_group_size == 1 and codes.shape[0] >= 64


def pack(codes: Tensor) -> Tensor:
    """The same codes [O, J, K] laid out as [J, K, O]: other strides, the same values. Every op takes both."""
    return codes.permute(1, 2, 0).contiguous().permute(2, 0, 1)


@torch.library.register_fake("aqlm_c::matmul")
def _(x, codes, codebooks, scales, bias):
    return x.new_empty((*x.shape[:-1], codes.shape[0] * codebooks.shape[2]))


@torch.library.register_fake("aqlm_c::matmul_grouped")
def _(x, codes, codebooks, scales, biases):
    return [x.new_empty((*x.shape[:-1], c.shape[0] * b.shape[2])) for c, b in zip(codes, codebooks, strict=True)]


@torch.library.register_fake("aqlm_c::matmul_experts")
def _(x, index, codes, codebooks, scales):
    return x.new_empty((index.numel(), sum(c.shape[1] * b.shape[3] for c, b in zip(codes, codebooks, strict=True))))


@torch.library.register_fake("aqlm_c::decode_rows")
def _(codes, codebooks, scales, dtype=None):
    shape = codes.shape[0] * codebooks.shape[2], codes.shape[1] * codebooks.shape[3]
    return codebooks.new_empty(shape, dtype=dtype)


@torch.library.register_fake("aqlm_c::matmul_backward")
def _(grad_y, codes, codebooks, scales):
    return grad_y.new_empty((*grad_y.shape[:-1], codes.shape[1] * codebooks.shape[3]))


@torch.library.register_fake("aqlm_c::decode_rows_backward")
def _(grad_rows, codes, codebooks, scales, need_codebooks, need_scales, index=None):
    return tuple(
        t.new_empty(t.shape if needed else (0,)) for t, needed in ((codebooks, need_codebooks), (scales, need_scales))
    )


@torch.library.register_fake("aqlm_c::index_codes")
def _(codes, codebooks, scales):
    if codes.device.type != "cuda":
        return codes.new_empty((0,), dtype=torch.int32)
    raise NotImplementedError("index_codes: its size depends on the GPU")


def _weight_gradients(grad_rows, codes, codebooks, scales, need_codebooks, need_scales, index=None):
    """Gradients to codebooks and scales (None where not needed) from that to W, grad_rows [out, in]."""
    index = None if index is None or index.numel() == 0 else index
    grad_codebooks, grad_scales = ops.decode_rows_backward(
        grad_rows, codes, codebooks, scales, need_codebooks, need_scales, index
    )
    return grad_codebooks if need_codebooks else None, grad_scales if need_scales else None


def _product_gradients(grad_y, x, *weight_and_needs):
    """The same where y = x W^T: grad_rows = grad_y^T x, summed in float32."""
    if not any(weight_and_needs[3:]):
        return None, None
    grad_rows = grad_y.reshape(-1, grad_y.shape[-1]).float().T @ x.reshape(-1, x.shape[-1]).float()
    return _weight_gradients(grad_rows, *weight_and_needs)


def _save_matmul(ctx, inputs, output):
    x, codes, codebooks, scales = inputs[:4]  # of matmul and of matmul_backward, whose x is grad_y
    trains_weight = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
    ctx.save_for_backward(x if trains_weight else None, codes, codebooks, scales)


def _matmul_backward(ctx, grad_y):
    x, *weight = ctx.saved_tensors
    need_x, _, *need_weight, need_bias = ctx.needs_input_grad
    grad_x = ops.matmul_backward(grad_y, *weight) if need_x else None
    grad_bias = grad_y.reshape(-1, grad_y.shape[-1]).sum(0) if need_bias else None
    return grad_x, None, *_product_gradients(grad_y, x, *weight, *need_weight), grad_bias


class _Matmul(torch.autograd.Function):  # eager `matmul`
    @staticmethod
    def forward(ctx, *inputs):
        with torch._C._AutoDispatchBelowAutograd():
            output = _matmul(*inputs)
        _save_matmul(ctx, inputs, output)
        return output

    backward = staticmethod(_matmul_backward)


def _matmul_double_backward(ctx, grad):  # grad [..., in], to grad_x = grad_y W
    grad_y, *weight = ctx.saved_tensors
    need_y, _, *need_weight = ctx.needs_input_grad
    return matmul(grad, *weight) if need_y else None, None, *_product_gradients(grad_y, grad, *weight, *need_weight)


def _save_inputs(ctx, inputs, output):
    ctx.save_for_backward(*[value for value in inputs[:4] if isinstance(value, Tensor)])
    ctx.flags = inputs[4:6]


def _decode_rows_backward(ctx, grad_rows):
    return None, *_weight_gradients(grad_rows, *ctx.saved_tensors, *ctx.needs_input_grad[1:3]), None


class _DecodeRows(torch.autograd.Function):  # eager `decode_rows` with an index
    @staticmethod
    def forward(ctx, codes, codebooks, scales, dtype, index):
        ctx.save_for_backward(codes, codebooks, scales)
        ctx.index = index
        with torch._C._AutoDispatchBelowAutograd():
            return ops.decode_rows(codes, codebooks, scales, dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_rows):
        (codes, codebooks, scales), needs = ctx.saved_tensors, ctx.needs_input_grad
        given = _weight_gradients(grad_rows, codes, codebooks, scales, needs[1], needs[2], ctx.index)
        return None, *given, None, None


def _decode_rows_double_backward(ctx, of_codebooks, of_scales):
    """W is linear in codebooks and in scales, so each gradient depends on grad_rows and on the other one."""
    grad_rows, codes, codebooks, scales = ctx.saved_tensors
    with_codebooks, with_scales = ctx.flags
    need_rows, _, need_codebooks, need_scales = ctx.needs_input_grad[:4]
    to_rows = to_codebooks = to_scales = None
    if need_rows:
        parts = [decode_rows(codes, of_codebooks, scales)] if with_codebooks else []
        parts += [decode_rows(codes, codebooks, of_scales)] if with_scales else []
        to_rows = sum(parts[1:], parts[0]).to(grad_rows.dtype)
    if need_codebooks and with_scales:
        to_codebooks, _ = _weight_gradients(grad_rows, codes, codebooks, of_scales, True, False)
    if need_scales and with_codebooks:
        _, to_scales = _weight_gradients(grad_rows, codes, of_codebooks, scales, False, True)
    return to_rows, None, to_codebooks, to_scales, None, None, None


for _name, _backward, _save in (
    ("matmul", _matmul_backward, _save_matmul),
    ("matmul_backward", _matmul_double_backward, _save_matmul),
    ("decode_rows", _decode_rows_backward, _save_inputs),
    ("decode_rows_backward", _decode_rows_double_backward, _save_inputs),
):
    torch.library.register_autograd(f"aqlm_c::{_name}", _backward, setup_context=_save)
