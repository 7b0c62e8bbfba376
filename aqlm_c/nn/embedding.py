"""Embeddings that keep their rows as AQLM codes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import wrong
from ..format import WEIGHT, Format
from . import ops
from .linear import QuantizedLayer, QuantizedLinear

__all__ = ["QuantizedEmbedding", "quantized_class"]


class QuantizedEmbedding(QuantizedLayer):
    """An embedding whose rows are W's (`QuantizedLayer`, out_group_size 1), decoded when they are looked up.

    What it gives has the dtype of its codebooks or `output_dtype`. Codebooks have the model's dtype, which transformers
    takes to be that of a model's first parameter: the embedding's codebooks.
    """

    output_dtype: torch.dtype | None = None  # the model's, where codebooks are float32 to be tuned
    max_norm, norm_type, scale_grad_by_freq, sparse = None, 2.0, False, False  # of nn.Embedding, for who asks for them

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        format: Format,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if format.out_group_size != 1:
            raise wrong("out_group_size", format.out_group_size, "1 for an embedding")
        self._set_format(num_embeddings, embedding_dim, format, device, dtype)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx

    @classmethod
    def empty(cls, module: nn.Embedding, format: Format, dtype: torch.dtype | None = None) -> QuantizedEmbedding:
        """An embedding for the place of a dense one, of its dtype whatever `dtype` is: on the meta device, frozen.

        Raises what `check` does.
        """
        cls.check("embedding", module)
        sizes = (module.num_embeddings, module.embedding_dim)
        return cls(*sizes, format, module.padding_idx, "meta", module.weight.dtype).requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...], int -> [..., embedding_dim]."""
        flat = ids.reshape(-1)
        rows = ops.decode_rows(self.codes[flat], self.codebooks, self.scales[flat])
        return rows.view(*ids.shape, self.embedding_dim).to(self.output_dtype or rows.dtype)

    @property
    def weight_dtype(self) -> torch.dtype:
        return self.output_dtype or self.codebooks.dtype

    @staticmethod
    def check(name: str, embedding: nn.Embedding) -> None:
        """Raise ValueError naming the layer `name` for an embedding that does more than looking rows up."""
        if type(embedding).forward is not nn.Embedding.forward or embedding.max_norm is not None:
            kind = type(embedding).__name__
            raise ValueError(f"rules: got {name}, a {kind}, expected a plain torch.nn.Embedding to quantize")

    def head(self, bias: nn.Parameter | None = None) -> QuantizedLinear:
        """The output layer tied to this embedding: it has the same parameters."""
        sizes = (self.embedding_dim, self.num_embeddings)
        head = QuantizedLinear(*sizes, bias is not None, self.format, "meta", self.codebooks.dtype)
        for name in WEIGHT:
            setattr(head, name, getattr(self, name))
        head.tied, head.dense_dtype = True, self.weight_dtype
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


def quantized_class(module: nn.Module) -> type[QuantizedLayer]:
    """The class of the quantized layer for the place of a dense one."""
    return QuantizedEmbedding if isinstance(module, nn.Embedding) else QuantizedLinear
