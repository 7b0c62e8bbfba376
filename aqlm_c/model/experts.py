"""Fused experts, which transformers 5 keeps in two 3D parameters, as one module of linears for each expert.

A module is known by its structure, never by the model's name: `gate_up_proj` [E, 2I, H] (each expert's gate over its
up projection), `down_proj` [E, H, I] and no other parameter. Its linears are called as in checkpoints, which is
what the model's own conversion mapping says. Older transformers have a list of experts already: nothing to do there.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.experts import ExpertStacks
from ..nn.linear import QuantizedLinear

try:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, revert_weight_conversion
except ImportError:  # transformers 4: names in files are those in the model
    get_model_conversion_mapping = None

log = logging.getLogger("aqlm_c")

_PARTS = ("gate_up_proj", "down_proj")
_NAMES = ("gate_proj", "up_proj", "down_proj")  # where no mapping has others
_SOURCE = re.compile(r"\.\*\.(\w+)\.weight$")  # of one expert's weight: ".experts.*.w1.weight"


class Experts(nn.ModuleList):
    """Modules "0", "1", ... with the linears of one expert each, in the place of the `fused` ones.

    names: of each expert's gate, up and down projection. Weights are views of the fused ones.
    """

    fused: Any  # of a class of transformers

    def __init__(self, fused: nn.Module, names: tuple[str, str, str]) -> None:
        gate_up, down = (getattr(fused, part).detach() for part in _PARTS)
        weights = zip(*gate_up.chunk(2, dim=1), down, strict=True)
        super().__init__(
            nn.ModuleDict({name: _linear(weight) for name, weight in zip(names, expert, strict=True)})
            for expert in weights
        )
        self.names = names
        self.requires_grad_(fused.get_parameter(_PARTS[1]).requires_grad)
        for part in _PARTS:
            setattr(fused, part, nn.Parameter(getattr(fused, part).detach().to("meta"), requires_grad=False))
        self.__dict__["fused"] = fused  # hidden from state_dict; knows the activation and takes its place again
        self.stacks: ExpertStacks | None = None
        self.train(fused.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [tokens, H]; top_k_index, top_k_weights [tokens, k]: each token's experts -> [tokens, H]."""
        stacks = self._current_stacks(hidden_states)
        if stacks is not None and stacks.are_faster(hidden_states, top_k_index):
            return stacks(hidden_states, top_k_weights, top_k_index, self.fused._apply_gate)
        output = torch.zeros_like(hidden_states)
        for index in top_k_index.unique().tolist():
            if index >= len(self):  # of no expert
                continue
            token, choice = torch.where(top_k_index == index)
            x = hidden_states[token]
            gate, up, down = (self[index][name] for name in self.names)
            y = down(self.fused._apply_gate(torch.cat((gate(x), up(x)), dim=-1)))
            output.index_add_(0, token, (y * top_k_weights[token, choice, None]).to(output.dtype))
        return output

    def _current_stacks(self, x: Tensor) -> ExpertStacks | None:
        """Those for products of all experts together: on a GPU, without gradients, of experts that are alike."""
        if not x.is_cuda or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        if self.stacks is not None and self.stacks.are_current():
            return self.stacks
        self.stacks = None
        if not torch.cuda.is_current_stream_capturing() and all(p.device == x.device for p in self.parameters()):
            experts: list[Any] = list(self)
            gate, up, down = ([expert[name] for expert in experts] for name in self.names)
            self.stacks = ExpertStacks.made(gate, up, down)
            if self.stacks is not None:
                self.stacks.watch((expert, name) for expert in experts for name in self.names)
        return self.stacks

    def _apply(self, fn: Any, recurse: bool = True) -> Experts:
        self.stacks = None  # lest memory that linears leave is kept
        return super()._apply(fn, recurse)

    def fuse(self) -> nn.Module:
        """The fused module with the weights of these experts, all dense."""
        experts: Iterable[Any] = self
        gate, up, down = (torch.stack([expert[name].weight.detach() for expert in experts]) for name in self.names)
        for part, weight in zip(_PARTS, (torch.cat((gate, up), dim=1), down), strict=True):
            setattr(self.fused, part, nn.Parameter(weight))
        return self.fused.train(self.training)


def are_fused() -> bool:
    """Whether this transformers joins experts as it loads them."""
    return get_model_conversion_mapping is not None


def unfuse(model: nn.Module, quantized: Iterable[str] | None = None) -> None:
    """Put `Experts` in the place of every fused module of `model`, on the meta device or with its weights.

    quantized: names, in the model, of a checkpoint's quantized layers; nothing is done if none is an expert's. Experts
    in a layout that is not known stay, with a warning.
    """
    fused = {name: module for name, module in model.named_modules() if _is_fused(module)}
    if quantized is not None:
        part = re.compile(r"\.\d+\.\w+$")
        suffixes = tuple(name.removeprefix(f"{model.base_model_prefix}.") for name in fused)
        if not any(part.split(name)[0].endswith(suffixes) for name in quantized if part.search(name)):
            return
    transforms = _transforms(model)
    for name, module in fused.items():
        model.set_submodule(name, Experts(module, _names(name, transforms)))
    if others := unknown(model):
        log.warning(
            "%s (%s) stays dense, as do all its like: expected experts in gate_up_proj [experts, 2 * width, in] and "
            "down_proj [experts, in, width]",
            others[0],
            type(model.get_submodule(others[0])).__name__,
        )


def fuse(model: Any) -> None:
    """Undo `unfuse`, unless an expert of `model` is quantized: the model is then as transformers made it."""
    experts = dict(_experts(model))
    if any(isinstance(module, QuantizedLinear) for unfused in experts.values() for module in unfused.modules()):
        return
    for name, unfused in experts.items():
        model.set_submodule(name, unfused.fuse())
    if experts and getattr(model, "_weight_conversions", None) is not None:
        model._weight_conversions = with_fusion(model._weight_conversions, model)


def with_fusion(transforms: list[Any], model: nn.Module) -> list[Any]:
    """The conversions that `model` was loaded with, `without_fusion`, as if its experts had been joined."""
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    return renamings + [transform for transform in _transforms(model) if isinstance(transform, WeightConverter)]


def without_fusion(transforms: list[Any], model: nn.Module) -> list[Any]:
    """`transforms`, the conversion of a checkpoint's tensors to the model's, less what fuses swapped experts."""
    parts = tuple(f"{name}.{part}" for name, _ in _experts(model) for part in _PARTS)
    return [
        transform
        for transform in transforms
        if not isinstance(transform, WeightConverter)
        or not any(part.endswith(tuple(transform.target_patterns)) for part in parts)
    ]


def renaming(model: nn.Module) -> Callable[[str], str]:
    """A function from a tensor's name in checkpoints to its name in the model, where it is loaded as it is."""
    if get_model_conversion_mapping is None:
        return functools.partial(_replace, getattr(model, "_checkpoint_conversion_mapping", None) or {})
    renamings = [transform for transform in _transforms(model) if isinstance(transform, WeightRenaming)]

    def rename(name: str) -> str:
        for transform in renamings:
            name, _ = transform.rename_source_key(name)
        return name

    return rename


def stored_names(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The names that `save_pretrained` gives to the parameters `names` of `model`."""
    if get_model_conversion_mapping is None:
        return list(stored_tensors(model, dict.fromkeys(names)))
    return list(stored_tensors(model, {name: model.get_parameter(name).to("meta") for name in names}))


def stored_tensors(model: nn.Module, tensors: dict[str, Any]) -> dict[str, Any]:
    """The tensors that `save_pretrained` makes of those of `model`, by their names on disk."""
    if get_model_conversion_mapping is not None:
        return revert_weight_conversion(model, tensors)
    mapping = getattr(model, "_checkpoint_conversion_mapping", None) or {}
    back = {new: re.sub(r"\(.*\)", "", old.lstrip("^")) for old, new in mapping.items()}  # as transformers 4 does
    return {_replace(back, name): tensor for name, tensor in tensors.items()}


def _replace(mapping: dict[str, str], name: str) -> str:
    """By the first pattern of `mapping` that is found in `name`."""
    for pattern, replacement in mapping.items():
        name, found = re.subn(pattern, replacement, name)
        if found:
            break
    return name


def fused_counts(block: nn.Module) -> set[int]:
    """How many experts are in each of the fused modules of `block` that stay as they are."""
    modules = [module for module in block.modules() if _is_fused(module) or _is_unknown(module)]
    sides = (parameter.squeeze().shape for module in modules for parameter in module.parameters(recurse=False))
    return {shape[0] for shape in sides if len(shape) == 3}


def unknown(model: nn.Module) -> list[str]:
    """Names of the modules of fused experts in a layout that is not known: they stay dense."""
    return [name for name, module in model.named_modules() if _is_unknown(module)]


def _experts(model: nn.Module) -> Iterator[tuple[str, Experts]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Experts))


def _transforms(model: nn.Module) -> list[Any]:
    return [] if get_model_conversion_mapping is None else get_model_conversion_mapping(model)


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight)
    return linear


def _is_fused(module: nn.Module) -> bool:
    parameters = dict(module.named_parameters())
    if parameters.keys() != set(_PARTS) or any(parameter.ndim != 3 for parameter in parameters.values()):
        return False
    experts, inputs, width = parameters["down_proj"].shape
    gate_over_up = hasattr(module, "_apply_gate") and getattr(module, "is_concatenated", True)
    return gate_over_up and parameters["gate_up_proj"].shape == (experts, 2 * width, inputs)


def _is_unknown(module: nn.Module) -> bool:
    """Matrices of several experts in a parameter: three sides, and no convolution."""
    sides = (parameter.squeeze().ndim for parameter in module.parameters(recurse=False))
    return 3 in sides and not isinstance(module, (nn.modules.conv._ConvNd, QuantizedLinear))


def _names(name: str, transforms: list[Any]) -> tuple[str, str, str]:
    """The names of an expert's linears in a checkpoint; `name` is that of the fused module."""
    names: list[str] = []
    for part in _PARTS:
        for transform in transforms:
            if isinstance(transform, WeightConverter) and f"{name}.{part}".endswith(tuple(transform.target_patterns)):
                names += [match[1] for match in map(_SOURCE.search, transform.source_patterns) if match]
    if len(names) != len(_NAMES):
        return _NAMES
    gate, up, down = names
    return gate, up, down
