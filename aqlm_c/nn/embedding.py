"""Embeddings that keep their rows as AQLM codes."""

from __future__ import annotations

import copy
from typing import Any

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
    takes to be that of a model's first parameter: the embedding's codebooks. An embedding that multiplies its rows by
    `embed_scale`, as Gemma's and Bart's do, still does.
    """

    output_dtype: torch.dtype | None = None  # the model's, where codebooks are float32 to be tuned
    scaled: _Scaled | None = None
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
        embedding = cls(*sizes, format, module.padding_idx, "meta", module.weight.dtype).requires_grad_(False)
        if _multiplies(module):
            embedding.scaled = _Scaled.of(module)
        return embedding

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...], int -> [..., embedding_dim]."""
        flat = ids.reshape(-1)
        rows = ops.decode_rows(self.codes[flat], self.codebooks, self.scales[flat])
        rows = rows.view(*ids.shape, self.embedding_dim).to(self.output_dtype or rows.dtype)
        return rows if self.scaled is None else rows * self.scaled.factor(rows.dtype)

    @property
    def weight_dtype(self) -> torch.dtype:
        return self.output_dtype or self.codebooks.dtype

    @staticmethod
    @torch.no_grad()
    def check(name: str, embedding: nn.Embedding) -> None:
        """Raise ValueError naming the layer `name` for an embedding that does more than looking rows up and multiplying
        them by its `embed_scale`.
        """
        known = embedding.max_norm is None and (_looks_up(embedding) or _multiplies(embedding))
        if known and not embedding.weight.is_meta:
            ids = torch.arange(min(4, embedding.num_embeddings), device=embedding.weight.device)
            rows = nn.functional.embedding(ids, embedding.weight)
            if _multiplies(embedding):
                rows = rows * _Scaled.of(embedding).factor(rows.dtype)
            known = torch.equal(embedding(ids), rows)
        if not known:
            kind = type(embedding).__name__
            raise ValueError(
                f"rules: got {name}, a {kind}, expected a torch.nn.Embedding that looks rows up, to quantize"
            )

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
        weight = nn.Parameter(self.dense_weight(dtype))
        if self.scaled is not None:
            return self.scaled.dense(weight)
        embedding = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta")
        embedding.weight = weight
        return embedding

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, scheme={self.scheme}"


class _Scaled:
    """What an embedding multiplies its rows by, and the module that does it with dense rows.

    value: a number. rounded: a buffer of the module, which gives it the dtype of the rows first.
    """

    def __init__(self, value: float, rounded: bool, module: nn.Embedding) -> None:
        self.value, self.rounded = value, rounded
        self._module = module  # without its rows

    @classmethod
    def of(cls, embedding: Any) -> _Scaled:
        scale = embedding.embed_scale
        rounded = isinstance(scale, Tensor)
        # A model that is made on the meta device, to be loaded, has its buffers there too.
        value = float(embedding.scalar_embed_scale if rounded and scale.is_meta else scale)
        without = copy.copy(embedding)
        without._parameters = {"weight": nn.Parameter(embedding.weight.detach().to("meta"), requires_grad=False)}
        return cls(value, rounded, without)

    def factor(self, dtype: torch.dtype) -> float:
        """For rows of this dtype."""
        return torch.tensor(self.value).to(dtype).item() if self.rounded else self.value

    def dense(self, weight: nn.Parameter) -> nn.Embedding:
        """The module with these rows."""
        module = copy.copy(self._module)
        module._parameters = {"weight": weight}
        if self.rounded:
            module._buffers = {**module._buffers, "embed_scale": torch.tensor(self.value, device=weight.device)}
        return module


def _looks_up(embedding: nn.Embedding) -> bool:
    return type(embedding).forward is nn.Embedding.forward


def _multiplies(embedding: nn.Embedding) -> bool:
    return not _looks_up(embedding) and hasattr(embedding, "embed_scale")


def quantized_class(module: nn.Module) -> type[QuantizedLayer]:
    """The class of the quantized layer for the place of a dense one."""
    return QuantizedEmbedding if isinstance(module, nn.Embedding) else QuantizedLinear
