"""The torch operators of aqlm_c (`aqlm_c::matmul`, `aqlm_c::decode_rows`) and their gradients.

The only module that touches ``torch.ops``. The kernels are C (csrc/core, made ops by csrc/torch); this file adds
what the stable ABI cannot: fake kernels, for ``torch.compile``, and autograd.

Letters: out, in = features; g, og = in_group_size, out_group_size; J = in / g, O = out / og; K = num_codebooks;
E = 2 ** nbits_per_codebook.
"""

from __future__ import annotations

try:
    import torch

    from . import _torch
except ImportError as error:
    raise ImportError(
        f"aqlm_c.ops needs aqlm_c._torch, which does not load here ({error}). Install torch >= 2.11, then build "
        "aqlm_c where torch can be seen: AQLM_C_REQUIRE=torch pip install --no-build-isolation <aqlm_c's folder>"
    ) from error

from torch import Tensor

__all__ = ["decode_rows", "get_isa", "matmul", "set_isa"]

get_isa, set_isa = _torch.get_isa, _torch.set_isa


def matmul(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """Product with a quantized weight: ``y = x W^T + bias``, W decoded tile by tile (arXiv 2401.06118, section 3).

    Args:
        x: [..., in], float32, float16 or bfloat16; sums are float32 inside.
        codes: [O, J, K] as stored: int8 for up to 8 bits per codebook, else int16.
        codebooks: [K, E, og, g], float32, float16 or bfloat16, whatever x is.
        scales: [O, 1, 1, 1], dtype of codebooks.
        bias: [out], dtype of x.

    Returns:
        [..., out], dtype of x; a new tensor, free to be modified in place.

    Raises:
        RuntimeError: a shape or dtype is not as above; the message names the argument.
    """
    return torch.ops.aqlm_c.matmul(x, codes, codebooks, scales, bias)


def decode_rows(codes: Tensor, codebooks: Tensor, scales: Tensor) -> Tensor:
    """The weight itself: W [out, in] in the dtype of codebooks. Arguments and errors as in `matmul`."""
    return torch.ops.aqlm_c.decode_rows(codes, codebooks, scales)


@torch.library.register_fake("aqlm_c::matmul")
def _(x, codes, codebooks, scales, bias):
    return x.new_empty((*x.shape[:-1], codes.shape[0] * codebooks.shape[2]))


@torch.library.register_fake("aqlm_c::decode_rows")
def _(codes, codebooks, scales):
    return codebooks.new_empty((codes.shape[0] * codebooks.shape[2], codes.shape[1] * codebooks.shape[3]))


def _weight_gradients(grad_rows, codes, codebooks, scales, need_codebooks, need_scales):
    """Gradients to codebooks and scales (None if not needed) from that to W, grad_rows [out, in]."""
    K, E, og, g = codebooks.shape
    O, J, _ = codes.shape

    def groups(rows):  # [out, in] -> [O, J, og, g]
        return rows.float().view(O, og, J, g).transpose(1, 2)

    grad_codebooks = grad_scales = None
    if need_codebooks:
        entries = (groups(grad_rows) * scales.float().view(O, 1, 1, 1)).reshape(O * J, og * g)
        index = (codes.long() & (E - 1)).view(O * J, K)
        sums = [entries.new_zeros(E, og * g).index_add(0, index[:, k], entries) for k in range(K)]
        grad_codebooks = torch.stack(sums).view_as(codebooks).to(codebooks.dtype)
    if need_scales:
        unscaled = decode_rows(codes, codebooks, torch.ones_like(scales))
        grad_scales = (groups(grad_rows) * groups(unscaled)).sum((1, 2, 3)).view_as(scales).to(scales.dtype)
    return grad_codebooks, grad_scales


def _save_matmul(ctx, inputs, output):
    x, codes, codebooks, scales, _ = inputs
    trains_weight = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
    ctx.save_for_backward(x if trains_weight else None, codes, codebooks, scales)


def _matmul_backward(ctx, grad_y):
    x, codes, codebooks, scales = ctx.saved_tensors
    need_x, _, need_codebooks, need_scales, need_bias = ctx.needs_input_grad
    grad_x = grad_codebooks = grad_scales = grad_bias = None
    flat = grad_y.reshape(-1, grad_y.shape[-1])
    if need_x:
        grad_x = grad_y @ decode_rows(codes, codebooks, scales).to(grad_y.dtype)
    if need_codebooks or need_scales:
        grad_rows = flat.T @ x.reshape(-1, x.shape[-1])
        grad_codebooks, grad_scales = _weight_gradients(
            grad_rows, codes, codebooks, scales, need_codebooks, need_scales
        )
    if need_bias:
        grad_bias = flat.sum(0)
    return grad_x, None, grad_codebooks, grad_scales, grad_bias


def _save_decode_rows(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _decode_rows_backward(ctx, grad_rows):
    return None, *_weight_gradients(grad_rows, *ctx.saved_tensors, *ctx.needs_input_grad[1:])


torch.library.register_autograd("aqlm_c::matmul", _matmul_backward, setup_context=_save_matmul)
torch.library.register_autograd("aqlm_c::decode_rows", _decode_rows_backward, setup_context=_save_decode_rows)
