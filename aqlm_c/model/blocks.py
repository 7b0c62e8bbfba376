"""The blocks of a model, which run one after another, and the linears in them that can be quantized."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

import torch
from torch import nn

from ..format import Format
from ..patterns import pattern_of
from ..recipe import AqlmConfig
from . import experts
from .probe import Arguments, Call, Trace, equal, forward, hidden_of, replaced_forward, split_hidden, trace

OnCall = Callable[[int, torch.Tensor, Arguments], "torch.Tensor | None"]


def is_norm_or_bias(tensor: torch.Tensor) -> bool:
    """Whether it is one of a block's tensors that fine-tuning trains beside codebooks and scales: floats along one side
    at most.
    """
    return tensor.is_floating_point() and tensor.squeeze().ndim <= 1


class Blocks(Sequence[nn.Module]):
    """The blocks of a model in the order in which they run on text.

    prefix: name of the list that they stand in. names: theirs in the model. runs: how often each is called in one
    pass. chained: each runs once, on what the one before it returned, and nothing else of that goes into it: their
    inputs can then be passed on from block to block, else the model runs from its start for each of them. width: of
    hidden states.
    """

    def __init__(self, prefix: str, calls: Sequence[Call], model: nn.Module) -> None:
        self.prefix = prefix
        self.names = list(dict.fromkeys(call.name for call in calls))
        self.modules = [model.get_submodule(name) for name in self.names]
        counts = [call.name for call in calls]
        self.runs = [counts.count(name) for name in self.names]
        self._returned = [calls[counts.index(name)].output for name in self.names]
        self.width = split_hidden(calls[0].arguments)[0].shape[-1]
        self.chained = self._is_chain(model, calls)

    def __len__(self) -> int:
        return len(self.modules)

    @overload
    def __getitem__(self, index: int) -> nn.Module: ...
    @overload
    def __getitem__(self, index: slice) -> list[nn.Module]: ...
    def __getitem__(self, index: Any) -> Any:
        return self.modules[index]

    def named(self) -> list[tuple[str, nn.Module]]:
        """(name in the model, block) of each."""
        return list(zip(self.names, self.modules, strict=True))

    @contextlib.contextmanager
    def recorded(self, on_call: OnCall) -> Iterator[None]:
        """The blocks replaced by recorders that hand their input on, in the shape of what each returns.

        on_call: told the block's number, hidden states and other arguments of each call; what it returns, if anything,
        is handed on in place of the input.
        """

        def recorder(index: int, _module: nn.Module) -> Callable[..., Any]:
            def record(*args: Any, **kwargs: Any) -> Any:
                hidden, others = split_hidden((args, kwargs))
                given = on_call(index, hidden, others)
                return _like(self._returned[index], hidden if given is None else given)

            return record

        with replaced_forward(self.modules, recorder):
            yield

    def check_repeatable(self, model: nn.Module) -> None:
        """Raise ValueError naming a block that gives something else when it is run again on the same inputs: what
        keeps a state in its arguments or draws at random cannot be calibrated.
        """
        failed: list[str] = []

        def twice(index: int, module: nn.Module) -> Callable[..., Any]:
            run = module.forward

            def replay(*args: Any, **kwargs: Any) -> Any:
                first = run(*args, **kwargs)
                try:
                    same = is_close(hidden_of(first), hidden_of(run(*args, **kwargs)))
                except Exception:  # of the model's code, of any type
                    same = False
                if not same:
                    failed.append(self.names[index])
                return first

            return replay

        with replaced_forward(self.modules, twice), contextlib.suppress(ValueError):  # of a state that is wrong by then
            forward(model)
        if failed:
            raise ValueError(
                f"model: got {type(model).__name__}, whose block {failed[0]} gives something else when it runs again "
                "on the same inputs, expected the same: it can be quantized without calibration data only"
            )

    def _is_chain(self, model: nn.Module, calls: Sequence[Call]) -> bool:
        if max(self.runs) > 1:
            return False
        found: list[tuple[int, Arguments]] = []
        try:
            given = [split_hidden(call.arguments) for call in calls]
            passed_on = all(
                equal(hidden_of(call.output), hidden) for call, (hidden, _) in zip(calls, given[1:], strict=False)
            )
            if not passed_on:
                return False
            with self.recorded(lambda index, _, others: found.append((index, others))):
                forward(model)
        except (ValueError, TypeError, IndexError, KeyError):  # the model makes more of what a block returns
            return False
        return equal(found, list(enumerate(others for _, others in given)))


def _like(output: Any, hidden: torch.Tensor) -> Any:
    """What a block returns, of the kind of `output`, with other hidden states and no other tensors."""
    if isinstance(output, torch.Tensor):
        return hidden
    if type(output) not in (tuple, list):
        raise TypeError(f"got a block that returns {type(output).__name__}")
    return type(output)((hidden, *(None if isinstance(value, torch.Tensor) else value for value in output[1:])))


def is_close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether they are the same but for rounding."""
    return a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=1e-3, atol=1e-5, equal_nan=True)


def find_blocks(model: nn.Module, found: Trace | None = None) -> tuple[str, Blocks]:
    """(name of their list, blocks) of a model: of the lists of modules that run on text and stand in no other such
    list's entry, the one with the most linear weights. Found by what runs, so that no table of model types is needed,
    and entries that do not run, as those of a vision tower, are none. found: of `probe.trace`, if it was run.

    Raises ValueError if there is none, for a model that does not run on token ids, and for one in which a block stands
    under two names.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    none = wrong_model(model)
    if not lists:
        raise none
    found = trace(model) if found is None else found
    ran = {call.name for call in found.entries}
    best, most = "", 0
    for name, entries in lists.items():
        inside = any(name.startswith(f"{entry}.") for entry in ran)
        names = {f"{name}.{index}" for index in range(len(entries))} & ran
        weights = 0 if inside else sum(map(_linear_weights, (model.get_submodule(entry) for entry in names)))
        if weights > most:
            best, most = name, weights
    if not most:
        raise none
    own = {f"{best}.{index}" for index in range(len(lists[best]))}
    first: dict[int, str] = {}
    for index, block in enumerate(lists[best]):
        if (name := first.setdefault(id(block), f"{best}.{index}")) != f"{best}.{index}":
            raise ValueError(
                f"{best}.{index}: got the same module as {name}, expected one of its own: transformers saves no model "
                "whose blocks stand under two names"
            )
    return best, Blocks(best, [call for call in found.entries if call.name in own], model)


def wrong_model(model: nn.Module) -> ValueError:
    """The error of a model without blocks."""
    return ValueError(
        f"model: got {type(model).__name__}, expected one with a list of blocks with linear layers (nn.Linear) that "
        "run on text"
    )


def _linear_weights(block: nn.Module) -> int:
    """Weights of the linears inside a block; a linear is none itself."""
    if isinstance(block, nn.Linear):
        return 0
    return sum(linear.weight.numel() for linear in block.modules() if isinstance(linear, nn.Linear))


def routers(block: nn.Module) -> set[str]:
    """Names in `block` of the linears that choose experts: with an output for each of the experts that the block has,
    beside their list or in a module without linears of other outputs (that keys and values may have as many is chance);
    or, beside a list of experts, with one output.

    They are small, and what they choose must not change.
    """
    lists = {
        name: module
        for name, module in block.named_modules()
        if isinstance(module, nn.ModuleList) and any(isinstance(part, nn.Linear) for part in module.modules())
    }
    outputs = {len(entries) for entries in lists.values()} | experts.fused_counts(block)
    found = set()
    for name, parent in block.named_modules():
        if any(f"{name}.".startswith(f"{entries}.") for entries in lists):  # of an expert
            continue
        linears = {child: part for child, part in parent.named_children() if isinstance(part, nn.Linear)}
        beside = any(child.rpartition(".")[0] == name for child in lists)
        alone = isinstance(parent, nn.Sequential) or {part.out_features for part in linears.values()} <= outputs
        for child, linear in linears.items():
            if (linear.out_features in outputs and (beside or alone)) or (beside and linear.out_features == 1):
                found.add(f"{name}.{child}".lstrip("."))
    return found


def quantizable_linears(prefix: str, block: nn.Module, layers: str | None, config: AqlmConfig) -> dict[str, Format]:
    """The linears of the block called `prefix` to quantize, name in the model -> format: all but routers and what is to
    stay dense. layers: regular expression, only linears whose name it finds; ValueError if it is none.
    """
    pattern = pattern_of("layers", layers or "")
    kept = routers(block)
    found = {}
    for part, module in block.named_modules():
        name = f"{prefix}.{part}"
        if part not in kept and isinstance(module, nn.Linear) and pattern.found_in(name):
            format = config.format_for(name)
            if format is not None:
                found[name] = format
    return found
