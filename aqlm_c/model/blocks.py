"""The blocks of a model, which run one after another, and the linears in them that can be quantized."""

from __future__ import annotations

import torch

from ..format import Format
from ..patterns import pattern_of
from ..recipe import AqlmConfig


def find_blocks(model: torch.nn.Module) -> tuple[str, torch.nn.ModuleList]:
    """(name, list) of the decoder blocks: the list of like modules with the most linear weights. Found by structure, so
    that no table of model types is needed.

    Raises ValueError if there is none.
    """
    best: tuple[str, torch.nn.ModuleList] | None = None
    most = 0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len({type(block) for block in module}) == 1:
            weights = sum(linear.weight.numel() for linear in module.modules() if isinstance(linear, torch.nn.Linear))
            if weights > most:  # a list inside a block holds less than the blocks
                best, most = (name, module), weights
    if best is None:
        raise ValueError(f"model: got {type(model).__name__}, expected one with a list of blocks with linear layers")
    return best


def routers(block: torch.nn.Module) -> set[str]:
    """Names in `block` of the linears that choose experts: beside a list of n experts, with n outputs or one.

    They are small, and what they choose must not change.
    """
    found = set()
    for name, parent in block.named_modules():
        lists = (child for child in parent.children() if isinstance(child, torch.nn.ModuleList))
        outputs = {len(experts) for experts in lists if any(isinstance(m, torch.nn.Linear) for m in experts.modules())}
        if outputs:
            children = ((f"{name}.{child}".lstrip("."), linear) for child, linear in parent.named_children())
            found |= {
                child
                for child, linear in children
                if isinstance(linear, torch.nn.Linear) and linear.out_features in outputs | {1}
            }
    return found


def quantizable_linears(
    prefix: str, block: torch.nn.Module, layers: str | None, config: AqlmConfig
) -> dict[str, Format]:
    """The linears of the block called `prefix` to quantize, name in the model -> format: all but routers and what is to
    stay dense. layers: regular expression, only linears whose name it finds; ValueError if it is none.
    """
    pattern = pattern_of("layers", layers or "")
    kept = routers(block)
    found = {}
    for part, module in block.named_modules():
        name = f"{prefix}.{part}"
        if part not in kept and isinstance(module, torch.nn.Linear) and pattern.found_in(name):
            format = config.format_for(name)
            if format is not None:
                found[name] = format
    return found
