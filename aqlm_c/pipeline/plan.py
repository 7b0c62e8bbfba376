"""What of a model is quantized, to which formats and in which order: decided and checked before any work."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from ..format import Format
from ..model import experts
from ..model.blocks import find_blocks, quantizable_linears
from ..model.embeddings import Embeddings, find_embeddings, search_config, with_rules
from ..nn.embedding import QuantizedEmbedding
from ..nn.linear import QuantizedLinear
from ..recipe import AqlmConfig
from .estimate import Work


@dataclasses.dataclass(frozen=True)
class BlockPlan:
    """One step of the run. index: the block's among the model's; None: the embeddings, which come before the blocks.

    targets: formats of the layers to quantize, by their names in the model.
    """

    name: str
    index: int | None
    targets: Mapping[str, Format]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Steps in their order, up to the last block in which something is quantized; and all blocks of the model.

    config: with a rule for each embedding that is quantized.
    """

    steps: tuple[BlockPlan, ...]
    blocks: torch.nn.ModuleList
    embeddings: Embeddings
    config: AqlmConfig

    @property
    def n_layers(self) -> int:
        """Layers to quantize."""
        return sum(len(step.targets) for step in self.steps)

    def targets(self) -> dict[str, Format]:
        """Formats of all layers to quantize, by name."""
        return {name: format for step in self.steps for name, format in step.targets.items()}


def make_plan(model: Any, config: AqlmConfig, layers: str | None = None) -> Plan:
    """The plan for a transformers model, whose fused experts are taken apart for it (`model.experts`).

    layers: regular expression, only linears of blocks whose name it finds. Raises ValueError for a model that is
    quantized already, a format that does not fit a layer or that the method does not know, a rule or a `layers` that
    matches nothing, and for NaN or Inf in any parameter.
    """
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise ValueError("model: got one that is quantized already, expected an unquantized model")
    experts.unfuse(model)
    prefix, blocks = find_blocks(model)
    steps = [
        BlockPlan(f"{prefix}.{index}", index, quantizable_linears(f"{prefix}.{index}", block, layers, config))
        for index, block in enumerate(blocks)
    ]
    last = max((index for index, step in enumerate(steps) if step.targets), default=-1)
    steps = steps[: last + 1]
    embeddings = find_embeddings(model)
    targets = {name: format for step in steps for name, format in step.targets.items()}
    config, _ = with_rules(config, model, embeddings, targets, partial=layers is not None)
    if of_embeddings := embeddings.quantized(config):
        steps.insert(0, BlockPlan(", ".join(of_embeddings), None, of_embeddings))
    plan = Plan(tuple(steps), blocks, embeddings, config)
    _check(model, plan, config, layers)
    return plan


def _check(model: Any, plan: Plan, config: AqlmConfig, layers: str | None) -> None:
    config.check_searchable()
    _check_rules(model, config, plan.embeddings)
    targets = plan.targets()
    if not targets:
        rules = f" with rules {config.rules!r}" if config.rules else ""
        raise ValueError(
            f"layers: got {layers!r}{rules}, which leave no linear layer, expected names such as 'mlp.up_proj'"
        )
    for name, format in targets.items():
        module = model.get_submodule(name)
        format.check_layer(name, *module.weight.shape)
        if isinstance(module, torch.nn.Embedding):
            QuantizedEmbedding.check(name, module)
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(f"{name}: got NaN or Inf, expected finite values")


def _check_rules(model: torch.nn.Module, config: AqlmConfig, embeddings: Embeddings) -> None:
    """Raise ValueError for a rule that decides nothing: no layer that can be quantized has it as its first."""
    if not config.rules:
        return
    prefix, blocks = find_blocks(model)
    free = config.replace(rules=None)
    names = [
        name
        for index, block in enumerate(blocks)
        for name in quantizable_linears(f"{prefix}.{index}", block, None, free)
    ]
    names += embeddings.names
    fitting = {name: config.rules.fitting(name) for name in names}
    for rule in config.rules:
        found = [name for name in names if rule in fitting[name]]
        first = {fitting[name][0] for name in found}
        if not found:
            raise ValueError(f"rules: {rule!r}: matches no layer, expected a part of names such as {names[0]!r}")
        if rule not in first:
            raise ValueError(f"rules: {rule!r}: expected before {min(first)!r}, which matches all its layers first")


def works_of(model: Any, plan: Plan, config: AqlmConfig, tokens: int, sequence_length: int) -> list[Work]:
    """The work of each step, for estimates."""
    return [_work(model, plan, step, config, tokens, sequence_length) for step in plan.steps]


def _work(model: Any, plan: Plan, step: BlockPlan, config: AqlmConfig, tokens: int, sequence_length: int) -> Work:
    text = model.config.get_text_config()
    fused = getattr(model.config, "_attn_implementation", None) != "eager"
    modules = plan.blocks if step.index is None else [plan.blocks[step.index]]
    linears = (part for module in modules for part in module.modules() if isinstance(part, torch.nn.Linear))
    if step.index is None:
        config = config.replace(finetune_epochs=0)
        config = search_config(config, min(step.targets.values(), key=Format.code_bits_per_weight))
    else:
        left = len(plan.blocks) - 1 - step.index
        config = config.replace(finetune_lookahead=min(config.tuning.finetune_lookahead, left))
    return Work.from_shapes(
        {name: tuple(model.get_submodule(name).weight.shape) for name in step.targets},
        sum(linear.weight.numel() for linear in linears),
        tokens=tokens,
        sequence_length=sequence_length,
        hidden_size=text.hidden_size,
        config=config,
        itemsize=model.dtype.itemsize,
        heads=0 if fused else getattr(text, "num_attention_heads", 0),
        formats=tuple(step.targets.values()),
    )
