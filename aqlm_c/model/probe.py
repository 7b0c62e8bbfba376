"""What a model does on text: a few token ids run through it once, and what its modules did is looked at.

A class says little of what a module is: a subclass of `nn.Linear` may compute something else, a list of blocks may
belong to a vision tower, run twice or pass more than hidden states on. All that is decided here is seen in a pass.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ..errors import one_line, wrong
from .kinds import kind_of

N_TOKENS = 8  # of the pass
NOT_PLAIN = "computes more than x W^T + b"
NOT_CALLED = "never called on text"

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclasses.dataclass
class Call:
    """One call of a module: what it was given, and what it returned."""

    name: str
    arguments: Arguments
    output: Any = None


@dataclasses.dataclass
class Trace:
    """What one pass shows. counts: calls by the module's name. entries: calls of what stands in lists, in order.

    not_plain: names of linears that did something else than `F.linear`.
    """

    counts: Counter[str]
    entries: list[Call]
    not_plain: set[str]


def trace(model: nn.Module) -> Trace:
    """Run `model` on a few token ids, each module watched.

    Raises ValueError for a model that does not run on token ids alone, and for one that changes weights as it runs.
    """
    rescaled = getattr(getattr(model, "config", None), "rescale_every", 0)
    if rescaled and any(
        hasattr(module, "layers_are_rescaled") for module in model.modules()
    ):  # once, when it first runs
        raise wrong(
            "rescale_every", rescaled, f"0 in the config of {type(model).__name__}, which else divides its weights"
        )
    found = Trace(Counter(), [], set())
    names = {id(module): name for name, module in model.named_modules()}
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    entries = {id(entry) for entries in lists for entry in entries}
    given: dict[int, Arguments] = {}
    open_calls: dict[int, list[Call]] = {}

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.counts[names[id(module)]] += 1
        if isinstance(module, nn.Linear):
            given[id(module)] = args, kwargs
        if id(module) in entries:
            call = Call(names[id(module)], (args, dict(kwargs)))
            found.entries.append(call)
            open_calls.setdefault(id(module), []).append(call)

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if isinstance(module, nn.Linear) and not _is_plain(module, *given.pop(id(module), ((), {})), output):
            found.not_plain.add(names[id(module)])
        if id(module) in entries:
            open_calls[id(module)].pop().output = output

    versions, handles = _versions(model), []
    try:
        for module in model.modules():
            handles.append(module.register_forward_pre_hook(before, prepend=True, with_kwargs=True))
            handles.append(module.register_forward_hook(after, with_kwargs=True))
        forward(model)
    finally:
        for handle in handles:
            handle.remove()
    if changed := [name for name, version in _versions(model).items() if version != versions[name]]:
        raise ValueError(
            f"{changed[0]}.weight: got one that {type(model).__name__} changes as it runs, expected one that stays: "
            "the codes of such a model would not be its own"
        )
    return found


def _versions(model: nn.Module) -> dict[str, int]:
    """How often the weight of each linear was written to."""
    linears = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return {name: 0 if linear.weight.is_inference() else linear.weight._version for name, linear in linears}


def forward(model: nn.Module) -> None:
    """Run the body of `model` on a few token ids: in evaluation mode, without gradients, nothing cached.

    Raises ValueError naming the model's class for a model that does not run on them.
    """
    body = getattr(model, "base_model", model)  # without the output embedding
    with watching(model):
        try:
            body(input_ids=token_ids(model), use_cache=False)
        except Exception as error:  # of the model's code, of any type
            raise ValueError(
                f"model: got {type(model).__name__}, expected a language model that runs on token ids alone; "
                f"it raises {type(error).__name__}: {one_line(error)[:200]}"
            ) from error


@contextlib.contextmanager
def watching(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients; modes and torch's random numbers are afterwards as they were."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield
    finally:
        for module in training:
            module.training = True


def token_ids(model: Any) -> torch.Tensor:
    """Token ids [1, N_TOKENS] for a pass, on the model's device: of words, not of what configs name (images, ends)."""
    embedding: Any = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    size = embedding.weight.shape[0] if hasattr(embedding, "weight") else N_TOKENS
    named = set(_named_tokens(model.config.to_dict())) if hasattr(model, "config") else set()
    free = [token for token in range(min(size, len(named) + 64 * N_TOKENS)) if token not in named] or [0]
    step = max(1, len(free) // N_TOKENS)
    ids = [free[(index * step) % len(free)] for index in range(N_TOKENS)]
    return torch.tensor([ids], device=input_device(model))


def input_device(model: Any) -> torch.device:
    """Where a model takes its token ids."""
    embedding: Any = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    weight = getattr(embedding, "weight", None)
    return weight.device if isinstance(weight, torch.Tensor) else next(model.parameters()).device


def dense_reasons(model: nn.Module, found: Trace, blocks: list[tuple[str, nn.Module]]) -> dict[str, str]:
    """Why linears of `blocks`, (name, module) of what runs, cannot be quantized, by name: what `found` saw of them.

    Those that the pass did not reach, though it reached others of their kind (experts), are called here.
    """
    kinds = {kind_of(name) for name, count in found.counts.items() if count}
    modules = (module for _, module in model.named_modules(remove_duplicate=False))  # each as often as it has names
    shared = Counter(id(p) for module in modules for p in module._parameters.values() if p is not None)
    reasons = {}
    with watching(model):
        for prefix, block in blocks:
            for part, module in block.named_modules():
                name = f"{prefix}.{part}"
                if not isinstance(module, nn.Linear):
                    continue
                if not found.counts[name] and kind_of(name) not in kinds:
                    reasons[name] = NOT_CALLED
                elif name in found.not_plain or (not found.counts[name] and not _calls_plainly(module)):
                    reasons[name] = NOT_PLAIN
                elif shared[id(module.weight)] > 1:
                    reasons[name] = "shares its weight"
    return reasons


def _calls_plainly(linear: nn.Linear) -> bool:
    try:
        x = torch.randn(2, linear.in_features, device=linear.weight.device).to(linear.weight.dtype)
        return _is_plain(linear, (x,), {}, linear(x))
    except Exception:  # it wants something else
        return False


def _is_plain(linear: nn.Linear, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> bool:
    """Whether `output` is what a linear of one input gives, to the last bits."""
    if len(args) != 1 or kwargs or not isinstance(args[0], torch.Tensor) or not isinstance(output, torch.Tensor):
        return False
    try:
        expected = nn.functional.linear(args[0], linear.weight, linear.bias)
    except (RuntimeError, TypeError):
        return False
    if output.dtype != expected.dtype or output.shape != expected.shape:
        return False
    if not output.numel():
        return True
    tolerance = 8 * torch.finfo(expected.dtype).eps * expected.abs().nan_to_num(posinf=0).max().item()
    return torch.allclose(output, expected, rtol=0, atol=tolerance, equal_nan=True)


def _named_tokens(fields: Any, name: str = "") -> Iterator[int]:
    """Token ids that a config names, such as image_token_id, in configs inside it too."""
    if isinstance(fields, dict):
        for key, value in fields.items():
            yield from _named_tokens(value, str(key))
    elif name.endswith(("token_id", "token_index", "token_ids")):
        yield from (
            value for value in (fields if isinstance(fields, (list, tuple)) else [fields]) if type(value) is int
        )


def split_hidden(arguments: Arguments) -> tuple[torch.Tensor, Arguments]:
    """(hidden states, the other arguments) of a call: the first positional argument, or `hidden_states`, or the first
    tensor given by name. `join_hidden` puts them together again.

    Raises ValueError if there are none.
    """
    args, kwargs = arguments
    if args and isinstance(args[0], torch.Tensor) and "hidden_states" not in kwargs:
        return args[0], (args[1:], kwargs)
    by_name = [name for name, value in kwargs.items() if isinstance(value, torch.Tensor)]
    if "hidden_states" in by_name:
        by_name.insert(0, "hidden_states")
    if not by_name:
        raise ValueError("hidden states: got none among the arguments of a block")
    return kwargs[by_name[0]], (args, {**kwargs, by_name[0]: HIDDEN})


class _Hidden:
    """Stands where the hidden states were, in arguments given by name."""


HIDDEN = _Hidden()


def join_hidden(hidden: torch.Tensor, arguments: Arguments) -> Arguments:
    """The arguments of a block for other hidden states; `arguments`: of `split_hidden`."""
    args, kwargs = arguments
    for name, value in kwargs.items():
        if value is HIDDEN:
            return args, {**kwargs, name: hidden}
    return (hidden, *args), kwargs


def hidden_of(output: Any) -> torch.Tensor:
    """The hidden states of what a block returned: a tensor, or the first thing of a tuple or of a ModelOutput."""
    return output if isinstance(output, torch.Tensor) else output[0]


def equal(a: Any, b: Any, depth: int = 8) -> bool:
    """Whether two arguments of a block are the same, tensors by their values, objects by their attributes."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(equal(x, y, depth) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key], depth) for key in a)
    if hasattr(a, "__dict__") and not isinstance(a, (type, nn.Module)) and not callable(a):
        return depth > 0 and equal(vars(a), vars(b), depth - 1)
    return bool(a == b)


@contextlib.contextmanager
def replaced_forward(modules: list[nn.Module], replacement: Callable[[int, nn.Module], Any]) -> Iterator[None]:
    """The modules with `replacement(number, module)` for their `forward`."""
    kept = [vars(module).get("forward") for module in modules]
    try:
        for number, module in enumerate(modules):
            module.forward = replacement(number, module)
        yield
    finally:
        for module, forward_ in zip(modules, kept, strict=True):
            if forward_ is None:
                vars(module).pop("forward", None)
            else:  # accelerate's
                module.forward = forward_
