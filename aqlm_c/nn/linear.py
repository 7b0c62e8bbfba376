"""Layers that keep their weight as AQLM codes (arXiv 2401.06118, section 3)."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ..format import FIELDS, Format
from . import ops
from .weight import DecodedWeight

if TYPE_CHECKING:
    from typing_extensions import Self

    from ..methods.base import QuantizedWeight

__all__ = ["InputGroup", "QuantizedLayer", "QuantizedLinear"]


class InputGroup(Protocol):
    """Linears with one input that share a launch, as a linear knows them (`nn.grouped`)."""

    def take(self, place: int, x: Tensor) -> Tensor | None:
        """The product of member `place` with x, or None if it is to make it by itself."""


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


class QuantizedLayer(nn.Module):
    """What quantized linears and embeddings share: W [out, in] in the published AQLM layout, as in state_dict too.

    Group (o, j) of W, og outputs by g inputs, is ``scales[o] * sum_k codebooks[k, codes[o, j, k]]``. What lies in
    memory is what lies on disk, so that a saved and loaded model gives exactly the logits of the one in memory.
    """

    codes: nn.Parameter
    codebooks: nn.Parameter
    scales: nn.Parameter
    scheme: str
    num_codebooks: int
    nbits_per_codebook: int
    in_group_size: int
    out_group_size: int
    is_loading = False  # from files: what a model's initialisation would do to the weight is ignored
    dense_dtype: torch.dtype | None = None  # of the weight that this one stands for; None: of codebooks
    _is_hf_initialized = True  # by this every transformers leaves a module as it is

    def _set_format(
        self,
        out_features: int,
        in_features: int,
        format: Format,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        format.check_layer(type(self).__name__, out_features, in_features)
        self.scheme = format.scheme
        for name in FIELDS:
            setattr(self, name, getattr(format, name))
        stored = torch.int8 if format.code_itemsize == 1 else torch.int16
        shapes = format.shapes(out_features, in_features)
        codes = torch.empty(shapes["codes"], device=device, dtype=stored)
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.codebooks = nn.Parameter(torch.empty(shapes["codebooks"], device=device, dtype=dtype))
        self.scales = nn.Parameter(torch.empty(shapes["scales"], device=device, dtype=dtype))

    @property
    def format(self) -> Format:
        """The format of the weight."""
        return Format(self.num_codebooks, self.nbits_per_codebook, self.in_group_size, self.out_group_size)

    @classmethod
    def empty(cls, module: Any, format: Format, dtype: torch.dtype) -> Self:
        """A layer for the place of the dense `module`: its tensors on the meta device, frozen."""
        raise NotImplementedError

    @classmethod
    def from_quantized_weight(cls, qw: QuantizedWeight, module: nn.Module, dtype: torch.dtype) -> Self:
        """The layer of the solved weight of the dense `module`, a linear or an embedding, for its place.

        Args:
            qw: codes [O, J, K], codebooks [K, E, og, g], scales [O, 1, 1, 1]; they are copied, as the bias is.
            dtype: of codebooks and scales; qw's values lie on its grid, so nothing is rounded.

        Raises:
            ValueError: codes outside the codebooks.
        """
        layer = cls.empty(module, qw.format, dtype)
        codes, codebooks, scales = (
            a.clone() if isinstance(a, Tensor) else torch.tensor(a) for a in (qw.codes, qw.codebooks, qw.scales)
        )
        layer.codes = nn.Parameter(codes, requires_grad=False)
        layer.codebooks = nn.Parameter(codebooks.to(layer.codebooks.dtype))
        layer.scales = nn.Parameter(scales.to(layer.codebooks.dtype).view(-1, 1, 1, 1))
        bias = getattr(module, "bias", None)
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

    @property
    def weight(self) -> Tensor:
        """W [out, in] for whoever reads it: decoded when its values are, in the model's dtype (`DecodedWeight`).

        It is no parameter, has no gradient and cannot be changed: that raises ValueError. `forward` does not use it.
        """
        dtype = self.weight_dtype
        if torch.compiler.is_compiling():
            return self.dense_weight(dtype).detach()
        (rows, groups, _), device = self.codes.shape, self.codes.device
        size = torch.Size((rows * self.out_group_size, groups * self.in_group_size))
        decode = torch.no_grad()(functools.partial(self.dense_weight, dtype))
        return DecodedWeight(decode, size, dtype, device, settled=self.is_loading)

    @weight.setter
    def weight(self, value: Any) -> None:
        self._refuse_weight()

    @property
    def weight_dtype(self) -> torch.dtype:
        """That of `weight`: of the dense weight that this one stands for, where that is known."""
        return self.dense_dtype or self.codebooks.dtype

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight":
            self._refuse_weight()
        super().register_parameter(name, param)

    def _refuse_weight(self) -> None:
        raise ValueError(
            f"weight: got one for a {type(self).__name__}, expected none: it is decoded from codes. Put another layer "
            "in its place, such as that of dequantize()"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self.dense_dtype is not None:
            self.dense_dtype = fn(torch.empty(0, dtype=self.dense_dtype, device=self.codes.device)).dtype
        self.pack()  # for the device it may be on now
        return self

    def pack(self) -> None:
        """Lay codes out for the kernels that run on their device, where these prefer another order in memory.

        Their shape and values stay, only strides change: state_dict has them in the order of the disk layout.
        """

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        name = prefix + "codes"
        if not destination[name].is_contiguous():
            destination[name] = destination[name].detach().contiguous()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        name = prefix + "codes"
        if name in state_dict and not self.codes.is_meta:  # else a loader is at work, which knows the layer's name
            check_code_range(state_dict[name], self.nbits_per_codebook, name)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.pack()

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """W [out, in] in `dtype` (that of codebooks if None), rounded once."""
        weight = ops.decode_rows(self.codes, self.codebooks.float(), self.scales.float())
        return weight.to(dtype or self.codebooks.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The same layer with a dense weight of `dtype` (that of codebooks if None), rounded once."""
        raise NotImplementedError


class QuantizedLinear(QuantizedLayer):
    """``y = x W^T + bias`` with W as codes (`QuantizedLayer`).

    Attributes:
        codes: int8 (nbits_per_codebook <= 8) or int16 [out / og, in / g, num_codebooks]; the low bits count.
        codebooks: dtype [num_codebooks, 2 ** nbits_per_codebook, og, g].
        scales: dtype [out / og, 1, 1, 1].
        bias: dtype [out], or None.
        scheme: the format as `Format.scheme` writes it, such as "2x8g8".

    Raises:
        ValueError: a size is out of range or a group size does not divide its side.
    """

    bias: nn.Parameter | None
    tied = False  # to an embedding, which looks up rows of codes
    grouped: tuple[InputGroup, int] | None = None  # with other linears of one input, and this one's place

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        format: Format,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._set_format(out_features, in_features, format, device, dtype)
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )
        self.pack()  # what is copied into codes stays packed

    @classmethod
    def empty(cls, module: nn.Linear, format: Format, dtype: torch.dtype) -> QuantizedLinear:
        """A layer for the place of a dense one: codes, codebooks and scales (of `dtype`) on the meta device, frozen.

        It takes over the bias, in the dtype of the model, which need not be that of the codebooks.
        """
        layer = cls(module.in_features, module.out_features, module.bias is not None, format, "meta", dtype)
        layer.dense_dtype = module.weight.dtype
        if module.bias is not None:
            layer.bias = module.bias
        return layer.requires_grad_(False)

    @torch.no_grad()
    def pack(self) -> None:
        codes = self.codes.data
        if self.tied or codes.is_meta:
            return
        if not ops.packs(codes, self.out_group_size):
            self.codes.data = codes.contiguous()
        elif codes.is_contiguous():
            self.codes.data = ops.pack(codes)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "grouped"}  # the original's

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features], a new tensor of x's dtype."""
        if self.grouped is not None:
            group, place = self.grouped
            y = group.take(place, x)
            if y is not None:
                return y
        return ops.matmul(x, self.codes, self.codebooks, self.scales, self.bias)

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """The same layer with a dense weight of `dtype` (that of codebooks if None), rounded once."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.dense_weight(dtype))
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.to(linear.weight.dtype, copy=True))
        return linear

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{text}, scheme={self.scheme}"
