"""What of a model is quantized, to which formats and in which order: decided and checked before any work."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from ..errors import wrong
from ..format import DENSE, Format
from ..methods import get_method
from ..model import experts
from ..model.blocks import Blocks, find_blocks, quantizable_linears, routers
from ..model.embeddings import Embeddings, find_embeddings, search_config, with_rules
from ..model.kinds import kind_of
from ..model.probe import NOT_CALLED, NOT_PLAIN, Trace, dense_reasons, trace
from ..nn.embedding import QuantizedEmbedding
from ..nn.linear import QuantizedLinear
from ..recipe import AqlmConfig
from .estimate import Work

log = logging.getLogger("aqlm_c")

_SHOWN = 4  # kinds of layers, in a line of text


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

    config: with a rule for each embedding that is quantized. dense: why each linear that stays dense does so, by name;
    fused experts that stay are named here too. n_linears: of the whole model, each expert's counted.
    """

    steps: tuple[BlockPlan, ...]
    blocks: Blocks
    embeddings: Embeddings
    config: AqlmConfig
    dense: Mapping[str, str] = dataclasses.field(default_factory=dict)
    n_linears: int = 0

    @property
    def n_layers(self) -> int:
        """Layers to quantize."""
        return sum(len(step.targets) for step in self.steps)

    def targets(self) -> dict[str, Format]:
        """Formats of all layers to quantize, by name."""
        return {name: format for step in self.steps for name, format in step.targets.items()}

    def describe(self) -> str:
        """In a line, such as "196 of 210 linears in 30 blocks; dense: lm_head (output layer), gate (30, chooses
        experts)".
        """
        blocks = sum(step.index is not None and bool(step.targets) for step in self.steps)
        inside = [name for step in self.steps if step.index is not None for name in step.targets]
        others = [name for step in self.steps if step.index is None for name in step.targets]
        text = f"{len(inside)} of {self.n_linears} linears in {blocks} blocks"
        text += "".join(f", {name}" for name in others)
        if not self.blocks.chained:
            text += "; the model runs from its start for each block"
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.dense.items():
            by_reason.setdefault(reason, []).append(name)
        parts = [
            f"{self._kinds_text(names)} ({f'{len(names)}, ' if len(names) > 1 else ''}{reason})"
            for reason, names in by_reason.items()
        ]
        return f"{text}; dense: {', '.join(parts)}" if parts else text

    def _kinds_text(self, names: Iterable[str]) -> str:
        """Kinds of layers in blocks, the lists of those elsewhere, such as "mlp.up_proj, mlp.gate_proj and 3 more"."""
        inside = f"{self.blocks.prefix}."
        kinds = (kind_of(name) if name.startswith(inside) else re.split(r"\.\d+(?:\.|$)", name)[0] for name in names)
        return few(list(dict.fromkeys(kinds)))

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON: numbers of linears and blocks, names by the reason why they stay dense, and the text."""
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.dense.items():
            by_reason.setdefault(reason, []).append(name)
        return {
            "linears": self.n_linears,
            "quantized": sum(len(step.targets) for step in self.steps if step.index is not None),
            "blocks": len(self.blocks),
            "chained": self.blocks.chained,
            "dense": by_reason,
            "text": self.describe(),
        }


def few(names: list[str]) -> str:
    """All of a few names, of many the first."""
    if len(names) <= _SHOWN:
        return ", ".join(names)
    return f"{', '.join(names[: _SHOWN - 1])} and {len(names) - _SHOWN + 1} more"


def make_plan(
    model: Any, config: AqlmConfig, layers: str | None = None, on_read: Callable[[int], None] | None = None
) -> Plan:
    """The plan for a transformers model, whose fused experts are taken apart for it (`model.experts`).

    A short pass over a few token ids decides what its blocks are and which of their linears can be quantized
    (`model.probe`). layers: regular expression, only linears of blocks whose name it finds. on_read: is told of so many
    bytes of the model that were looked at. Raises ValueError for a
    model that is quantized already or does not run on token ids, a format that does not fit a layer or that the method
    does not know, a rule or a `layers` that matches nothing, and for NaN or Inf in any parameter. The model is then as
    it was.
    """
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise ValueError("model: got one that is quantized already, expected an unquantized model")
    experts.unfuse(model)
    try:
        config.check_searchable()
        for name, parameter in model.named_parameters():
            if not torch.isfinite(parameter).all():
                raise ValueError(f"{name}: got NaN or Inf, expected finite values")
            if on_read is not None:
                on_read(parameter.nbytes)
        return _make_plan(model, config, layers)
    except BaseException:
        experts.fuse(model)
        raise


def _make_plan(model: Any, config: AqlmConfig, layers: str | None) -> Plan:
    found = trace(model)
    _, blocks = find_blocks(model, found)
    reasons = dense_reasons(model, found, blocks.named())
    steps = []
    for index, (name, block) in enumerate(blocks.named()):
        targets = quantizable_linears(name, block, layers, config)
        steps.append(BlockPlan(name, index, {one: format for one, format in targets.items() if one not in reasons}))
    last = max((index for index, step in enumerate(steps) if step.targets), default=-1)
    steps = steps[: last + 1]
    embeddings = find_embeddings(model)
    targets = {name: format for step in steps for name, format in step.targets.items()}
    config, kept = with_rules(config, model, embeddings, targets, partial=layers is not None)
    if of_embeddings := embeddings.quantized(config):
        steps.insert(0, BlockPlan(", ".join(of_embeddings), None, of_embeddings))
    plan = Plan(tuple(steps), blocks, embeddings, config)
    _check(model, plan, config, layers, reasons)
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    dense = _why_dense(model, plan, found, config, reasons)
    dense |= {name: f"output layer: {reason}" for name, reason in kept.items() if name in dense}
    if others := [name for name, reason in dense.items() if reason == NOT_PLAIN]:
        kinds = few(list(dict.fromkeys(map(kind_of, others))))
        log.warning("%s: %d linears stay dense, whose modules do more than a linear layer", kinds, len(others))
    return dataclasses.replace(plan, dense=dense, n_linears=len(linears))


def _why_dense(
    model: torch.nn.Module, plan: Plan, found: Trace, config: AqlmConfig, reasons: Mapping[str, str]
) -> dict[str, str]:
    """Why each linear that is no target of `plan` stays dense."""
    targets, dense = plan.targets(), {}
    body = set(getattr(model, "base_model", model).modules())
    inside = {f"{name}.{part}" for name, block in plan.blocks.named() for part, _ in block.named_modules()}
    choosing = _routers(plan)
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or name in targets:
            continue
        if name == plan.embeddings.output:
            if plan.embeddings.tied and plan.embeddings.input in targets:
                continue
            dense[name] = "output layer"
        elif name not in inside:
            head = module not in body  # which the pass left out
            dense[name] = "outside of the blocks" if found.counts[name] or head else NOT_CALLED
        elif name in choosing:
            dense[name] = "chooses experts"
        elif name in reasons:
            dense[name] = reasons[name]
        else:
            dense[name] = "by rule" if config.rules.scheme_for(name) == DENSE else "left out by layers"
    return dense | dict.fromkeys(experts.unknown(model), "3D weights in a layout that is not known")


def _routers(plan: Plan) -> set[str]:
    """Names, in the model, of the linears of its blocks that choose experts."""
    return {f"{name}.{part}" for name, block in plan.blocks.named() for part in routers(block)}


def _check(model: Any, plan: Plan, config: AqlmConfig, layers: str | None, reasons: Mapping[str, str]) -> None:
    _check_rules(plan, config, reasons)
    targets = plan.targets()
    if not targets:
        rules = f" with rules {config.rules!r}" if config.rules else ""
        raise ValueError(
            f"layers: got {layers!r}{rules}, which leave no linear layer, expected names such as 'mlp.up_proj'"
        )
    _check_shapes(model, targets, config)
    for name in targets:
        module = model.get_submodule(name)
        if isinstance(module, torch.nn.Embedding):
            QuantizedEmbedding.check(name, module)


def _check_shapes(model: Any, targets: Mapping[str, Format], config: AqlmConfig) -> None:
    """Raise ValueError naming every layer that format or method do not fit, and the rule that leaves them dense."""
    unfit: dict[str, ValueError] = {}
    method = get_method(config.solver)
    for name, format in targets.items():
        try:
            method.check_layer(name, tuple(model.get_submodule(name).weight.shape), format, config.options)
        except ValueError as error:
            unfit[name] = error
    if not unfit:
        return
    first, *others = unfit
    text = str(unfit[first])
    if others:
        shapes: dict[tuple[str, int, int], int] = {}
        for name in others:
            out_features, in_features = model.get_submodule(name).weight.shape
            kind = (kind_of(name), out_features, in_features)
            shapes[kind] = shapes.get(kind, 0) + 1
        text += f"; nor does it fit {len(others)} more: " + ", ".join(
            f"{kind} [{out_features}, {in_features}]{f' x {count}' if count > 1 else ''}"
            for (kind, out_features, in_features), count in shapes.items()
        )
    raise ValueError(
        f"{text}; leave them dense with --rule '{rule_for(unfit, targets)}={DENSE}', or take another scheme"
    )


def rule_for(names: Iterable[str], among: Iterable[str]) -> str:
    """A regular expression that is found in `names` and in no other of `among`: by their kinds, if these are enough."""
    names, among = set(names), set(among)
    kinds = dict.fromkeys(re.escape(kind_of(name)).replace(r"\*", r"\d+") for name in sorted(names))
    pattern = f"({'|'.join(kinds)})$" if len(kinds) > 1 else f"{next(iter(kinds))}$"
    if {name for name in among if re.search(pattern, name)} == names:
        return pattern
    return f"^({'|'.join(map(re.escape, sorted(names)))})$"


def _check_rules(plan: Plan, config: AqlmConfig, reasons: Mapping[str, str]) -> None:
    """Raise ValueError for a rule that decides nothing: no layer that can be quantized has it as its first. One that
    leaves dense what stays so anyway is none of them.
    """
    if not config.rules:
        return
    free = config.replace(rules=None)
    within = [name for prefix, block in plan.blocks.named() for name in quantizable_linears(prefix, block, None, free)]
    names = [*(name for name in within if name not in reasons), *plan.embeddings.names]
    kept = sorted({*reasons, *_routers(plan)})
    fitting = {name: config.rules.fitting(name) for name in (*names, *kept)}
    for rule, scheme in config.rules.items():
        found = [name for name in names if rule in fitting[name]]
        first = {fitting[name][0] for name in found}
        anyway = next((name for name in kept if rule in fitting[name]), None)
        if not found and anyway and scheme == DENSE:
            continue
        if not found and anyway:
            why = reasons.get(anyway, "chooses experts")
            raise wrong("rules", rule, f"a layer that can be quantized: {anyway} stays dense ({why})")
        if not found:
            raise ValueError(f"rules: {rule!r}: matches no layer, expected a part of names such as {names[0]!r}")
        if rule not in first:
            raise ValueError(f"rules: {rule!r}: expected before {min(first)!r}, which matches all its layers first")


def works_of(
    model: Any,
    plan: Plan,
    config: AqlmConfig,
    tokens: int,
    sequence_length: int,
    brought: bool = False,
    batch_size: int | None = None,
) -> list[Work]:
    """The work of each step, for estimates. brought: blocks are brought to memory for their steps. batch_size:
    sequences in a pass.
    """
    works = [
        dataclasses.replace(_work(model, plan, step, config, tokens, sequence_length), batch_size=batch_size)
        for step in plan.steps
    ]
    if not brought:
        return works
    inside = [sum(parameter.nbytes for parameter in block.parameters()) for block in plan.blocks]
    outside = sum(parameter.nbytes for parameter in model.parameters()) - sum(inside)
    return [
        dataclasses.replace(
            work,
            block_bytes=outside + max(inside) if step.index is None else inside[step.index],
            ahead_bytes=max(inside),
            start_bytes=outside,
        )
        for work, step in zip(works, plan.steps, strict=True)
    ]


def _work(model: Any, plan: Plan, step: BlockPlan, config: AqlmConfig, tokens: int, sequence_length: int) -> Work:
    text = model.config.get_text_config()
    fused = getattr(model.config, "_attn_implementation", None) != "eager"
    modules = plan.blocks if step.index is None else [plan.blocks[step.index]]
    linears = [dict(_linears(module)) for module in modules]
    if step.index is None:
        config = config.replace(finetune_epochs=0)
        config = search_config(config, min(step.targets.values(), key=Format.code_bits_per_weight))
    else:
        left = len(plan.blocks) - 1 - step.index
        config = config.replace(finetune_lookahead=min(config.tuning.finetune_lookahead, left))
    return Work.from_shapes(
        {name: tuple(model.get_submodule(name).weight.shape) for name in step.targets},
        sum(linear.weight.numel() for of_block in linears for linear in of_block.values()),
        tokens=tokens * (1 if step.index is None else plan.blocks.runs[step.index]),
        sequence_length=sequence_length,
        hidden_size=plan.blocks.width,
        config=config,
        itemsize=model.dtype.itemsize,
        heads=0 if fused else getattr(text, "num_attention_heads", 0),
        formats=tuple(step.targets.values()),
        width=max(_width(of_block, getattr(text, "num_experts_per_tok", None)) for of_block in linears),
        comes_first=step.index is None,
    )


def _linears(block: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Linear]]:
    return ((name, part) for name, part in block.named_modules() if isinstance(part, torch.nn.Linear))


def _width(linears: Mapping[str, torch.nn.Linear], experts_of_token: int | None) -> int:
    """Inputs and outputs of the linears of a block that a token goes to."""
    kinds: dict[str, list[int]] = {}
    for name, linear in linears.items():
        kinds.setdefault(kind_of(f"block.0.{name}"), []).append(linear.in_features + linear.out_features)
    return sum(sum(sorted(sizes)[-(experts_of_token or len(sizes)) :]) for sizes in kinds.values())
