"""vLLM's method of routed experts."""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import (
    ApplyMoEActivationConfig,
    MoEActivation,
    apply_moe_activation,
)

from ..format import Format
from .layers import Experts
from .linear import drop_placeholders, set_placeholders
from .loading import ONE_RANK, PartsLoading, Share, even_places

__all__ = ["AqlmExpertsMethod"]

_GATE, _DOWN, _UP = "w1", "w2", "w3"  # as vLLM calls the linears of an expert


class AqlmExpertsMethod(FusedMoEMethodBase):
    """Experts whose linears are quantized, or dense, one by one; a rank has some experts, or a share of each.

    An instance is of one layer, called `name`. formats: those that config.json knows. Raises ValueError for experts
    that are no gated units without biases.
    """

    def __init__(self, formats: Collection[Format], layer: RoutedExperts, name: str) -> None:
        super().__init__(layer.moe_config)
        self.formats, self.name = formats, name
        self.loading: PartsLoading | None = None
        if self.moe.has_bias or not self.moe.is_act_and_mul:
            raise ValueError(f"{name}: got experts with biases or without gates, expected gated ones without biases")
        if layer.activation == MoEActivation.SWIGLUOAI:
            raise ValueError(f"{name}: got experts whose gates and ups alternate, expected gates before ups")

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        self.num_experts = num_experts
        self.sizes = {_GATE: (intermediate_size_per_partition, hidden_size)}
        self.sizes |= {_UP: self.sizes[_GATE], _DOWN: (hidden_size, intermediate_size_per_partition)}
        self.loading = PartsLoading(self.name, self.formats, torch.empty(0).device, params_dtype)
        for fused in ("w13", "w2"):
            set_placeholders(layer, self.formats, functools.partial(self.load, layer), f"{fused}_")

    def load(
        self,
        layer: RoutedExperts,
        name: str,
        param: nn.Parameter,
        loaded_weight: Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        """Take a tensor of an expert's linear, if the expert is the rank's. With the names that vLLM's loaders give."""
        expert = layer.expert_map_manager.map_global_to_local(expert_id)
        if expert == -1:
            return False if return_success else None
        if self.loading is None:
            raise ValueError(f"{self.name}: got weights for a layer that runs, expected none: start again")
        part = (expert, shard_id)
        tensors = self.loading.add(part, name, loaded_weight)
        if tensors is not None:
            outputs, inputs = self.loading.sizes(tensors)
            n_outputs, n_inputs = self.sizes[shard_id]
            ranks = self.moe.tp_rank, self.moe.tp_size
            splits = (ONE_RANK, ranks) if shard_id == _DOWN else (ranks, ONE_RANK)
            label = self.loading.label(part)
            places = (
                even_places(label, outputs, n_outputs, *splits[0]),
                even_places(label, inputs, n_inputs, *splits[1]),
            )
            self.loading.settle(part, Share(*places))
        return True if return_success else None

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        if self.loading is None:
            return
        wanted = [[(expert, name) for expert in range(self.num_experts)] for name in (_GATE, _UP, _DOWN)]
        gate, up, down = (self.loading.finish(parts) for parts in wanted)
        for fused in ("w13", "w2"):
            drop_placeholders(layer, f"{fused}_")
        self.loading = None
        settings = ApplyMoEActivationConfig(
            clamp_limit=layer.swiglu_limit,
            alpha=1.0 if layer.swiglu_alpha is None else layer.swiglu_alpha,
            beta=layer.swiglu_beta or 0.0,
            activation_situ_beta=self.moe.activation_situ_beta,
            activation_situ_linear_beta=self.moe.activation_situ_linear_beta,
        )

        def activate(gate_up: Tensor) -> Tensor:
            output = gate_up.new_empty(len(gate_up), gate_up.shape[-1] // 2)
            return apply_moe_activation(layer.activation, output, gate_up, activation_config=settings)

        layer.unfused = Experts(gate, up, down, activate)

    def apply(
        self,
        layer: RoutedExperts,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """x [tokens, in], each token's experts and their weights [tokens, k] -> [tokens, in]. Shared experts are vLLM's
        own business.
        """
        if torch.compiler.is_compiling():
            return routed_experts(x, topk_weights, topk_ids, layer.layer_name)
        return _run(layer, x, topk_weights, topk_ids)

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        return None


def _run(layer: RoutedExperts, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
    index = topk_ids.long()
    if layer.expert_map is not None:
        index = torch.where(index < 0, index, layer.expert_map[index.clamp(min=0)].long())
    return layer.unfused(x, topk_weights, index, layer.apply_router_weight_on_input)


@torch.library.custom_op("aqlm_c::routed_experts", mutates_args=())
def routed_experts(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, layer_name: str) -> Tensor:
    """The experts of the layer of this name in the model that runs: as one operator for compilers, since which experts
    there is work for depends on values. (On GPUs vLLM has its own around it.)
    """
    layer = get_forward_context().no_compile_layers[layer_name]
    return _run(layer.routed_experts, x, topk_weights, topk_ids)


@routed_experts.register_fake
def _(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, layer_name: str) -> Tensor:
    return torch.empty_like(x)
