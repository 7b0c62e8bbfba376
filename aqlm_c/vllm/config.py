"""What vLLM asks of a quantization: by which method each layer is loaded and run."""

from __future__ import annotations

import re
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.custom_op import PluggableLayer, op_registry_oot
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.utils import WeightsMapper

from ..errors import wrong
from ..format import Format, Rules
from .experts import AqlmExpertsMethod
from .linear import AqlmEmbeddingMethod, AqlmLinearMethod

_DEFAULTS = {"num_codebooks": 1, "nbits_per_codebook": 16, "in_group_size": 8, "out_group_size": 1}  # transformers'
_EXPERT = re.compile(r"\.\d+\.(\w+)$")


class AqlmConfig(QuantizationConfig):
    """`quantization_config` of an "aqlm" or "aqlm_c" checkpoint (docs/checkpoint.md), as vLLM wants to know it.

    What is quantized, and to what, is settled by the tensors themselves, whose names vLLM maps to its layers; rules
    are patterns for the names that transformers has, which vLLM's need not be. Here they say what formats are allowed
    and whether an embedding may be quantized.

    Raises ValueError naming the field whose value no AQLM checkpoint can have.
    """

    def __init__(self, method: str, format: Format, rules: Rules, dense: list[str]) -> None:
        super().__init__()
        self.method, self.rules = method, rules
        self.formats = {format, *rules.formats()}
        if not isinstance(dense, list) or not all(isinstance(name, str) for name in dense):
            raise wrong("linear_weights_not_to_quantize", dense, "a list of names")
        self.dense = {name.removesuffix(".weight") for name in dense}
        if rules:
            _pass_config_to_embeddings()

    def __setstate__(self, state: dict[str, Any]) -> None:  # in a worker process
        self.__dict__.update(state)
        if self.rules:
            _pass_config_to_embeddings()

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> AqlmConfig:
        format = Format(**{name: config.get(name, default) for name, default in _DEFAULTS.items()})
        dense = config.get("linear_weights_not_to_quantize") or []
        return cls(config["quant_method"], format, Rules(config.get("rules")), dense)

    def get_name(self) -> str:
        return self.method

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        self.dense = set(hf_to_vllm_mapper.apply_list(sorted(self.dense)))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """None: that of dense layers. A layer that may be dense or not is the method's own business."""
        if isinstance(layer, RoutedExperts):
            return None if self._has_dense_experts(prefix) else AqlmExpertsMethod(self.formats, layer, prefix)
        if isinstance(layer, VocabParallelEmbedding):
            head = isinstance(layer, ParallelLMHead)
            if prefix in self.dense or not (self.rules or (head and self.dense)):
                return UnquantizedEmbeddingMethod()
            return AqlmEmbeddingMethod(self.formats, prefix or ("lm_head" if head else "embed_tokens"))
        if isinstance(layer, LinearBase):
            return UnquantizedLinearMethod() if self._is_dense(prefix) else AqlmLinearMethod(self.formats, prefix)
        return None

    def _is_dense(self, prefix: str) -> bool:
        """Whether config.json says so of a linear, or of all that vLLM joins in it."""
        parent, _, last = prefix.rpartition(".")
        names = self.packed_modules_mapping.get(last, [last])
        return all(f"{parent}.{name}".lstrip(".") in self.dense for name in names)

    def _has_dense_experts(self, prefix: str) -> bool:
        """Whether it says so of all experts of a layer."""
        inside = [name for name in self.dense if name.startswith(f"{prefix}.")]
        experts = {_EXPERT.sub("", name) for name in inside if _EXPERT.search(name)}
        return len(inside) > 0 and (not experts or len(inside) == len(experts) * 3)


class AqlmVocabParallelEmbedding(VocabParallelEmbedding):
    """vLLM's embedding, for models that do not tell it how they are quantized."""

    def __init__(self, *args: Any, quant_config: QuantizationConfig | None = None, **kwargs: Any) -> None:
        if quant_config is None and len(args) < 6:
            current = get_current_vllm_config().quant_config
            quant_config = current if isinstance(current, AqlmConfig) else None
        super().__init__(*args, **({} if len(args) >= 6 else {"quant_config": quant_config}), **kwargs)


def _pass_config_to_embeddings() -> None:
    """By vLLM's own way to replace a layer's class, where nobody else has; done for models with rules alone."""
    name = VocabParallelEmbedding.__name__
    if name not in op_registry_oot:
        PluggableLayer.register_oot(AqlmVocabParallelEmbedding, name=name)
