"""Linear layers and embeddings that keep their weight as AQLM codes (arXiv 2401.06118, section 3)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import ops
from .config import FORMAT, AqlmConfig

if TYPE_CHECKING:
    from typing_extensions import Self

    from .joined import Joined
    from .solver import QuantizedWeight

__all__ = ["QuantizedEmbedding", "QuantizedLayer", "QuantizedLinear"]

WEIGHT = ("codes", "codebooks", "scales")  # the tensors of a quantized weight


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

    Group (o, j) of W, og outputs by g inputs, is ``scales[o] * sum_k codebooks[k, codes[o, j, k]]``.
    """

    def _set_format(
        self,
        out_features: int,
        in_features: int,
        config: AqlmConfig,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        config.check_layer(type(self).__name__, out_features, in_features)
        self.scheme = config.scheme
        for name in FORMAT:
            setattr(self, name, getattr(config, name))
        rows, groups = out_features // config.out_group_size, in_features // config.in_group_size
        stored = torch.int8 if config.nbits_per_codebook <= 8 else torch.int16

        def empty(*size: int, dtype=dtype) -> Tensor:
            return torch.empty(size, device=device, dtype=dtype)

        self.codes = nn.Parameter(empty(rows, groups, config.num_codebooks, dtype=stored), requires_grad=False)
        entries = 2**config.nbits_per_codebook
        self.codebooks = nn.Parameter(empty(config.num_codebooks, entries, config.out_group_size, config.in_group_size))
        self.scales = nn.Parameter(empty(rows, 1, 1, 1))

    @classmethod
    def from_quantized_weight(cls, qw: QuantizedWeight, module: nn.Module, dtype: torch.dtype) -> Self:
        """The layer of the solved weight of the dense `module`, a linear or an embedding, for its place.

        Args:
            qw: codes [O, J, K], codebooks [K, E, og, g], scales [O, 1, 1, 1]; they are copied, as the bias is.
            dtype: of codebooks and scales; qw's values lie on its grid, so nothing is rounded.

        Raises:
            ValueError: codes outside the codebooks.
        """
        num_codebooks, entries, out_group_size, in_group_size = qw.codebooks.shape
        config = AqlmConfig(num_codebooks, entries.bit_length() - 1, in_group_size, out_group_size)
        layer = cls.empty(module, config, dtype)
        codes, codebooks, scales = (torch.tensor(a) for a in (qw.codes, qw.codebooks, qw.scales))
        layer.codes = nn.Parameter(codes, requires_grad=False)
        layer.codebooks = nn.Parameter(codebooks.to(layer.codebooks.dtype))
        layer.scales = nn.Parameter(scales.to(layer.codebooks.dtype).view(-1, 1, 1, 1))
        if getattr(module, "bias", None) is not None:
            layer.bias = nn.Parameter(module.bias.detach().clone())
        layer.check_codes()
        return layer

    def check_codes(self, name: str = "codes") -> None:
        """ValueError, naming the tensor `name`, if a code lies outside its codebook.

        Asked once wherever codes come from outside (load_state_dict asks by itself); 8 and 16 bits fill their
        dtype and cannot be wrong.
        """
        check_code_range(self.codes, self.nbits_per_codebook, name)

    def pack(self) -> None:
        """Lay codes out for the kernels that run on their device, where these prefer another order in memory.

        Their shape and values stay, only strides change: state_dict has them in the order of the disk layout.
        """

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        name = prefix + "codes"
        if not destination[name].is_contiguous():
            destination[name] = destination[name].detach().contiguous()

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        name = prefix + "codes"
        if name in state_dict and not self.codes.is_meta:  # else a loader is at work, which knows the layer's name
            check_code_range(state_dict[name], self.nbits_per_codebook, name)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """W [out, in] in `dtype` (that of codebooks if None), rounded once."""
        weight = ops.decode_rows(self.codes, self.codebooks.float(), self.scales.float())
        return weight.to(dtype or self.codebooks.dtype)


class QuantizedLinear(QuantizedLayer):
    """``y = x W^T + bias`` with W as codes (`QuantizedLayer`).

    Attributes:
        codes: int8 (nbits_per_codebook <= 8) or int16 [out / og, in / g, num_codebooks]; the low bits count.
        codebooks: dtype [num_codebooks, 2 ** nbits_per_codebook, og, g].
        scales: dtype [out / og, 1, 1, 1].
        bias: dtype [out], or None.
        scheme: the format as `AqlmConfig.scheme` writes it, such as "2x8g8".

    Raises:
        ValueError: a size is out of range or a group size does not divide its side.
    """

    tied = False  # to an embedding, which looks up rows of codes
    joined: tuple[Joined, int] | None = None  # a group of linears with one input, and this one's place

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
        self._set_format(out_features, in_features, config, device, dtype)
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )

    @classmethod
    def empty(cls, linear: nn.Linear, config: AqlmConfig, dtype: torch.dtype) -> QuantizedLinear:
        """A layer for the place of `linear`: codes, codebooks and scales (of `dtype`) on the meta device, frozen.

        It takes over the bias, in the dtype of the model, which need not be that of the codebooks.
        """
        layer = cls._like(linear.in_features, linear.out_features, linear.bias is not None, config, dtype)
        if linear.bias is not None:
            layer.bias = linear.bias
        return layer.requires_grad_(False)

    @classmethod
    def _like(
        cls, in_features: int, out_features: int, bias: bool, config: AqlmConfig, dtype: torch.dtype
    ) -> QuantizedLinear:
        sizes = {name: getattr(config, name) for name in FORMAT}
        return cls(in_features, out_features, bias, **sizes, device="meta", dtype=dtype)

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
        return {name: value for name, value in super().__getstate__().items() if name != "joined"}  # the original's

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.pack()  # for the device it may be on now
        return self

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features], a new tensor of x's dtype."""
        if self.joined is not None:
            group, place = self.joined
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


class QuantizedEmbedding(QuantizedLayer):
    """An embedding whose rows are W's (`QuantizedLayer`, out_group_size 1), decoded when they are looked up.

    What it gives has the dtype of its codebooks, which is therefore the model's, or `output_dtype`.
    """

    output_dtype: torch.dtype | None = None  # the model's, where codebooks are float32 to be tuned

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        config: AqlmConfig,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if config.out_group_size != 1:
            raise ValueError(f"out_group_size={config.out_group_size}: expected 1 for an embedding")
        self._set_format(num_embeddings, embedding_dim, config, device, dtype)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx

    @classmethod
    def empty(cls, embedding: nn.Embedding, config: AqlmConfig, dtype: torch.dtype | None = None) -> QuantizedEmbedding:
        """An embedding for the place of a dense one, of its dtype whatever `dtype` is: on the meta device, frozen.

        Raises what `check` does.
        """
        cls.check("embedding", embedding)
        sizes = (embedding.num_embeddings, embedding.embedding_dim)
        return cls(*sizes, config, embedding.padding_idx, "meta", embedding.weight.dtype).requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...], int -> [..., embedding_dim]."""
        flat = ids.reshape(-1)
        rows = ops.decode_rows(self.codes[flat], self.codebooks, self.scales[flat])
        return rows.view(*ids.shape, self.embedding_dim).to(self.output_dtype or rows.dtype)

    @staticmethod
    def check(name: str, embedding: nn.Embedding) -> None:
        """Raise ValueError naming the layer `name` for an embedding that does more than looking rows up."""
        if type(embedding).forward is not nn.Embedding.forward or embedding.max_norm is not None:
            kind = type(embedding).__name__
            raise ValueError(f"rules: {name} is a {kind}, expected a plain torch.nn.Embedding to quantize")

    def head(self, bias: Tensor | None = None) -> QuantizedLinear:
        """The output layer tied to this embedding: it has the same parameters."""
        config = AqlmConfig(**{name: getattr(self, name) for name in FORMAT})
        head = QuantizedLinear._like(
            self.embedding_dim, self.num_embeddings, bias is not None, config, self.codebooks.dtype
        )
        for name in WEIGHT:
            setattr(head, name, getattr(self, name))
        head.tied = True
        if bias is not None:
            head.bias = bias
        return head

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Embedding:
        """The same embedding with a dense weight of `dtype` (that of codebooks if None), rounded once."""
        embedding = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta")
        embedding.weight = nn.Parameter(self.dense_weight(dtype))
        return embedding

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, scheme={self.scheme}"
