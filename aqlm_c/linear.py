"""QuantizedLinear: a linear layer that keeps its weight as AQLM codes (arXiv 2401.06118, section 3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from . import ops
from .config import AqlmConfig

if TYPE_CHECKING:
    from .solver import QuantizedWeight

__all__ = ["QuantizedLinear"]


def check_code_range(codes: Tensor, nbits: int, name: str) -> None:
    """Raise ValueError naming the tensor `name` if stored codes do not fit `nbits` bits."""
    if nbits in (8, 16) or codes.is_meta or codes.numel() == 0:
        return
    half = 2 ** (nbits - 1)
    low, high = (int(code) for code in codes.aminmax())
    if low < -half or high >= half:
        raise ValueError(
            f"{name}: got codes from {low} to {high}, expected {-half} to {half - 1} for {nbits} bits per codebook"
        )


class QuantizedLinear(nn.Module):
    """``y = x W^T + bias`` with W in the published AQLM layout, which is also what state_dict holds.

    Group (o, j) of W, og outputs by g inputs, is ``scales[o] * sum_k codebooks[k, codes[o, j, k]]``.

    Attributes:
        codes: int8 (nbits_per_codebook <= 8) or int16 [out / og, in / g, num_codebooks]; the low bits count.
        codebooks: dtype [num_codebooks, 2 ** nbits_per_codebook, og, g].
        scales: dtype [out / og, 1, 1, 1].
        bias: dtype [out], or None.
        scheme: the format as `AqlmConfig.scheme` writes it, such as "2x8g8".

    Raises:
        ValueError: a size is out of range or a group size does not divide its side.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        in_group_size: int,
        out_group_size: int,
        num_codebooks: int,
        nbits_per_codebook: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        config = AqlmConfig(num_codebooks, nbits_per_codebook, in_group_size, out_group_size)
        config.check_layer(type(self).__name__, out_features, in_features)
        self.scheme = config.scheme
        self.in_features, self.out_features = in_features, out_features
        self.in_group_size, self.out_group_size = in_group_size, out_group_size
        self.num_codebooks, self.nbits_per_codebook = num_codebooks, nbits_per_codebook

        rows, groups = out_features // out_group_size, in_features // in_group_size
        stored = torch.int8 if nbits_per_codebook <= 8 else torch.int16

        def empty(*size: int, dtype=dtype) -> Tensor:
            return torch.empty(size, device=device, dtype=dtype)

        self.codes = nn.Parameter(empty(rows, groups, num_codebooks, dtype=stored), requires_grad=False)
        entries = 2**nbits_per_codebook
        self.codebooks = nn.Parameter(empty(num_codebooks, entries, out_group_size, in_group_size))
        self.scales = nn.Parameter(empty(rows, 1, 1, 1))
        self.register_parameter("bias", nn.Parameter(empty(out_features)) if bias else None)

    @classmethod
    def empty(cls, linear: nn.Linear, config: AqlmConfig, dtype: torch.dtype) -> QuantizedLinear:
        """A layer for the place of `linear`: codes, codebooks and scales (of `dtype`) on the meta device, frozen.

        It takes over the bias, in the dtype of the model, which need not be that of the codebooks.
        """
        layer = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            config.in_group_size,
            config.out_group_size,
            config.num_codebooks,
            config.nbits_per_codebook,
            device="meta",
            dtype=dtype,
        )
        if linear.bias is not None:
            layer.bias = linear.bias
        return layer.requires_grad_(False)

    @classmethod
    def from_quantized_weight(cls, qw: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> QuantizedLinear:
        """The layer of a solved weight.

        Args:
            qw: codes [O, J, K], codebooks [K, E, og, g], scales [O, 1, 1, 1]; they are copied.
            bias: [out] or None; copied in its own dtype, which must be that of the layer's input.
            dtype: of codebooks and scales; qw's values lie on its grid, so nothing is rounded.

        Raises:
            ValueError: codes outside the codebooks.
        """
        codes, codebooks, scales = (torch.tensor(a) for a in (qw.codes, qw.codebooks, qw.scales))
        rows, groups, num_codebooks = codes.shape
        _, entries, out_group_size, in_group_size = codebooks.shape
        layer = cls(
            groups * in_group_size,
            rows * out_group_size,
            bias is not None,
            in_group_size,
            out_group_size,
            num_codebooks,
            entries.bit_length() - 1,
            device="meta",
            dtype=dtype,
        )
        layer.codes = nn.Parameter(codes, requires_grad=False)
        layer.codebooks = nn.Parameter(codebooks.to(dtype))
        layer.scales = nn.Parameter(scales.to(dtype).view(rows, 1, 1, 1))
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone())
        layer.check_codes()
        return layer

    def check_codes(self, name: str = "codes") -> None:
        """ValueError, naming the tensor `name`, if a code lies outside its codebook.

        Asked once wherever codes come from outside (load_state_dict asks by itself); 8 and 16 bits fill their
        dtype and cannot be wrong.
        """
        check_code_range(self.codes, self.nbits_per_codebook, name)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        name = prefix + "codes"
        if name in state_dict:
            check_code_range(state_dict[name], self.nbits_per_codebook, name)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features], a new tensor of x's dtype."""
        return ops.matmul(x, self.codes, self.codebooks, self.scales, self.bias)

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """The same layer with a dense weight of `dtype` (that of codebooks if None), rounded once."""
        dtype = dtype or self.codebooks.dtype
        weight = ops.decode_rows(self.codes, self.codebooks.float(), self.scales.float())
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight.to(dtype))
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.to(dtype, copy=True))
        return linear

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{text}, scheme={self.scheme}"
