"""vLLM's methods of linear layers, of input embeddings and of output layers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from ..format import WEIGHT, Format
from ..nn.embedding import QuantizedEmbedding
from .layers import JoinedLinears
from .loading import DENSE_PART, PADDING, PartsLoading, Share

__all__ = ["AqlmEmbeddingMethod", "AqlmLinearMethod", "drop_placeholders", "set_placeholders"]


def set_placeholders(layer: Any, formats: Collection[Format], load: Callable[..., Any], prefix: str = "") -> None:
    """Empty parameters by which vLLM finds who loads the tensors of a layer: `load`, which is told a name first."""
    narrow = all(format.code_itemsize == 1 for format in formats)
    for name in (*WEIGHT, DENSE_PART):
        dtype = None if name != "codes" else torch.int8 if narrow else torch.int16  # vLLM warns of another
        parameter = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
        parameter.weight_loader = functools.partial(load, name)  # type: ignore[attr-defined]
        layer.register_parameter(prefix + name, parameter)


def drop_placeholders(layer: Any, prefix: str = "") -> None:
    """But for that of a dense weight, which vLLM asks for the device."""
    for name in WEIGHT:
        delattr(layer, prefix + name)


class AqlmLinearMethod(LinearMethodBase):
    """A linear layer whose parts are quantized, or dense; if all are dense, vLLM's own method takes it over.

    Which outputs and inputs of a part are the rank's is asked of the layer's own loader, with places for weights. An
    instance is of one layer, called `name`. formats: those that config.json knows.
    """

    is_embedding = False

    def __init__(self, formats: Collection[Format], name: str) -> None:
        self.formats, self.name = formats, name
        self.loading: PartsLoading | None = None
        self.starts: dict[Hashable, int] = {}  # of each part's outputs among the layer's

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        self.sizes = sum(output_partition_sizes), input_size_per_partition
        self.load_places = extra_weight_attrs["weight_loader"]
        device = torch.empty(0).device
        self.loading = PartsLoading(self.name, self.formats, device, params_dtype, self.is_embedding)
        set_placeholders(layer, self.formats, self.load)

    def load(self, name: str, _parameter: nn.Parameter, tensor: Tensor, part: Hashable = None) -> None:
        """Take the tensor `name` of a part, "q" or 0 or, where the checkpoint has them as one, None."""
        if self.loading is None:
            raise ValueError(f"{self.name}: got weights for a layer that runs, expected none: start again")
        tensors = self.loading.add(part, name, tensor)
        if tensors is None:
            return
        outputs, inputs = self.loading.sizes(tensors)
        placed = self._places(part, "output_dim", self.sizes[0], outputs)
        taken = self._places(part, "input_dim", self.sizes[1], inputs)
        start = 0
        if part is not None:
            (found,) = torch.where(placed != PADDING)
            start, stop = (int(found[0]), int(found[-1]) + 1) if len(found) else (0, 0)
            placed = placed[start:stop]
        self.starts[part] = start
        self.loading.settle(part, Share(placed, taken))

    def _places(self, part: Hashable, side: str, size: int, stored: int) -> Tensor:
        """For each of the rank's `size` outputs or inputs its place among the `stored` ones of the part."""
        places = torch.zeros(size, dtype=torch.int64, device="cpu")
        setattr(places, side, 0)
        places.ignore_warning = True  # type: ignore[attr-defined]  # that not all tensors have outputs
        numbered = torch.arange(1, stored + 1, device="cpu")
        try:
            self.load_places(places, numbered, *(() if part is None else (part,)))
        except (AssertionError, RuntimeError, ValueError) as error:
            label, kind = self._label(part), side.removesuffix("_dim")
            raise ValueError(
                f"{label}: got {stored} {kind}s, which its layer cannot take for {size} ({error})"
            ) from None
        return places - 1

    def _label(self, part: Hashable) -> str:
        return self.name if self.loading is None else self.loading.label(part)

    def process_weights_after_loading(self, layer: Any) -> None:
        parts = self._parts()
        if parts is None:
            return
        drop_placeholders(layer)
        if all(isinstance(part, nn.Linear) for part in parts):
            layer.weight.data = torch.cat([part.weight.data for part in parts])
            self._hand_over(layer, UnquantizedLinearMethod())
        else:
            layer.joined = JoinedLinears(parts)

    def _parts(self) -> list[Any] | None:
        """The parts in the order of their outputs; None if that was done before."""
        if self.loading is None:
            return None
        ordered = sorted(self.starts, key=lambda part: self.starts[part])
        parts, end = self.loading.finish(ordered or (None,)), 0
        for name, part in zip(ordered, parts, strict=True):
            if self.starts[name] != end:
                raise ValueError(f"{self.name}: got no tensors for outputs {end} to {self.starts[name] - 1}")
            end += _outputs(part)
        if end != self.sizes[0]:
            raise ValueError(f"{self.name}: got tensors for {end} outputs, expected {self.sizes[0]}")
        self.loading = None
        return parts

    @staticmethod
    def _hand_over(layer: Any, method: QuantizeMethodBase) -> None:
        layer.quant_method = method
        method.process_weights_after_loading(layer)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return layer.joined(x, bias)


class AqlmEmbeddingMethod(AqlmLinearMethod):
    """The same for an input embedding or an output layer, which may be tied: then they share what is loaded."""

    def create_weights(self, layer: Any, *sizes: Any, **attributes: Any) -> None:
        self.is_embedding = not hasattr(layer, "has_bias")  # of output layers alone
        self.tied: Any = None
        super().create_weights(layer, *sizes, **attributes)

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        for name in (*WEIGHT, DENSE_PART):
            delattr(layer, name)
        method: Any = embed_tokens.quant_method
        if not isinstance(method, AqlmEmbeddingMethod):
            layer.quant_method = method
            return method.tie_weights(layer, embed_tokens)
        for name in (*WEIGHT, DENSE_PART):  # the same parameters: vLLM loads them once
            layer.register_parameter(name, getattr(embed_tokens, name))
        self.tied = embed_tokens
        return layer

    def process_weights_after_loading(self, layer: Any) -> None:
        if self.tied is not None:
            self._process_tied(layer, self.tied)
            return
        if not self.is_embedding:
            super().process_weights_after_loading(layer)
            return
        parts = self._parts()
        if parts is None:
            return
        drop_placeholders(layer)
        (embedding,) = parts
        if isinstance(embedding, QuantizedEmbedding):
            layer.looked_up = embedding
        else:
            layer.weight.data = embedding.weight.data
            self._hand_over(layer, UnquantizedEmbeddingMethod())

    def _process_tied(self, layer: Any, embed_tokens: Any) -> None:
        if self.loading is None:
            return
        self.loading = None
        embed_tokens.quant_method.process_weights_after_loading(embed_tokens)  # it may come later
        drop_placeholders(layer)
        if hasattr(embed_tokens, "looked_up"):
            layer.joined = JoinedLinears([embed_tokens.looked_up.head()])
        else:
            self._hand_over(layer, embed_tokens.quant_method)

    def embedding(self, layer: Any, ids: Tensor) -> Tensor:
        return layer.looked_up(ids)


def _outputs(part: Any) -> int:
    return part.num_embeddings if isinstance(part, (QuantizedEmbedding, nn.Embedding)) else part.out_features
