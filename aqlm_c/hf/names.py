"""What becomes of a checkpoint's tensors: transformers only warns of missing and left-over ones, and goes on with
random weights. For a quantized checkpoint that is an error, found here from headers before anything is loaded.

Older transformers are told by what they lack, not by their version. 4.56 names no files to its quantizers and rounds
codebooks to the model's dtype: `files_being_loaded` finds the files, and `read_again` reads those tensors again.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from types import FrameType
from typing import Any

import torch
from safetensors import safe_open

from ..format import WEIGHT
from ..io import checkpoint
from ..model.embeddings import find_embeddings
from ..nn.embedding import QuantizedEmbedding
from ..nn.linear import QuantizedLayer


def taken(model: Any, tensors: Mapping[str, checkpoint.StoredTensor]) -> dict[str, checkpoint.StoredTensor]:
    """`tensors` less those that the model's class ignores and those of a head that it does not have."""
    prefix = f"{model.base_model_prefix}."
    foreign = model.get_output_embeddings() is None and any(name.startswith(prefix) for name in tensors)
    own = (prefix, *(f"{name}." for name, _ in model.named_children()))
    ignored = _pattern(model._keys_to_ignore_on_load_unexpected)
    return {
        name: tensor
        for name, tensor in tensors.items()
        if not (foreign and not name.startswith(own)) and not ignored(name)
    }


def check_names(
    model: Any, tensors: Mapping[str, checkpoint.StoredTensor], quantizer: Any
) -> dict[str, tuple[str, checkpoint.StoredTensor]]:
    """Check that `tensors`, headers of all files, are what `model` (quantized layers in place) lacks.

    Returns the name and place in the checkpoint of each of the model's tensors. Raises ValueError naming a tensor: a
    parameter without one (the head of another task apart: it is new), two for the same parameter, a dense one
    with another shape or no float, one that a quantized layer has no place for.
    """
    expected, found = model.state_dict(), {}
    modules = dict(model.named_modules())
    for name, (target, converted) in _targets(model, tensors, quantizer).items():
        tensor = tensors[name]
        for one in converted or (target,):
            parent = one.rpartition(".")[0]
            if one not in expected:
                if isinstance(modules.get(parent), QuantizedLayer) or checkpoint.is_quantized_part(one):
                    raise ValueError(f"{name} in {tensor.file}: unexpected, the model has no place for it")
            elif converted:
                found[one] = name, tensor
            elif one in found:
                raise ValueError(
                    f"{name} in {tensor.file}: unexpected, {found[one][0]} is the same tensor of the model"
                )
            else:
                found[one] = name, tensor
                if not isinstance(modules[parent], QuantizedLayer):
                    _check_dense(name, tensor, expected[one])
    missing = _required(model) - set(found)
    for first in sorted(missing - _tied_to(model, found)):
        raise ValueError(f"{first}: missing from the checkpoint")
    return found


def new_linears(model: Any, names: Iterable[str]) -> list[str]:
    """Names of linears that a task adds to the base model and the output layer, and that the files `names` lack."""
    base, head, names = getattr(model, model.base_model_prefix, model), model.get_output_embeddings(), set(names)
    known = set(base.modules()) | {head}
    linears = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m not in known]
    return [name for name in linears if not names & {checkpoint.tensor_name(name, "codes"), f"{name}.weight"}]


def _check_dense(name: str, tensor: checkpoint.StoredTensor, parameter: Any) -> None:
    if parameter.is_floating_point():
        checkpoint.check_dense_dtype(name, tensor)
    if tensor.shape != tuple(parameter.shape):
        raise ValueError(
            f"{name} in {tensor.file}: got {tensor.dtype} {list(tensor.shape)}, expected {list(parameter.shape)}"
        )


def _required(model: Any) -> set[str]:
    """Names of the parameters that a checkpoint must have: those of the base model and of the output embedding."""
    base, head = getattr(model, model.base_model_prefix, model), model.get_output_embeddings()
    inside = {id(p) for module in (base, head) if module is not None for p in module.parameters()}
    ignored = _pattern(model._keys_to_ignore_on_load_missing)
    names = (name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in inside)
    return {name for name in names if not ignored(name)}


def _tied_to(model: Any, found: Iterable[str]) -> set[str]:
    """Names of the parameters that will be those called `found`, without being in the files themselves."""
    by_name = dict(model.named_parameters(remove_duplicate=False))
    shared = {id(by_name[name]) for name in found if name in by_name}
    tied = {name for name, parameter in by_name.items() if id(parameter) in shared}
    pairs = list(getattr(model, "all_tied_weights_keys", {}).items())
    embeddings = find_embeddings(model)
    if embeddings.tied:  # transformers 4 has no such attribute
        pairs.append((f"{embeddings.input}.weight", f"{embeddings.output}.weight"))
    found = set(found)
    return tied | {name for pair in pairs if found & set(pair) for name in pair}


def _targets(model: Any, names: Iterable[str], quantizer: Any) -> dict[str, tuple[str, list[str]]]:
    """Where transformers puts each tensor: (its name in the model, the parameters it is converted to a part of)."""
    prefix, names = model.base_model_prefix, list(names)
    if hasattr(model, "_get_key_renaming_mapping"):  # transformers 4
        whole = bool(prefix) and any(name.startswith(prefix) for name in names)
        has_base = not prefix or hasattr(model, prefix)
        mapping = model._get_key_renaming_mapping(
            names,
            getattr(model, "_checkpoint_conversion_mapping", None),
            loading_base_model_from_task_state_dict=whole and not has_base,
            loading_task_model_from_base_state_dict=bool(prefix) and not whole and has_base,
        )
        return {name: (target, []) for name, target in mapping.items()}
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    conversions, expected = get_model_conversion_mapping(model, None, quantizer), model.state_dict()
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    by_source = {source: converter for converter in converters for source in converter.source_patterns}
    targets = {}
    for name in names:
        target, source = rename_source_key(name, renamings, converters, prefix, expected)
        if target not in expected and name in expected:
            target, source = name, None
        patterns = by_source[source].target_patterns if source is not None else []
        targets[name] = (target, [target.replace(patterns[0], pattern) for pattern in patterns])
    return targets


def _pattern(patterns: Iterable[str] | None) -> Any:
    """A function that says whether one of the regular expressions occurs in a name."""
    return re.compile("|".join(f"(?:{pattern})" for pattern in patterns or ()) or r"(?!)").search


def files_being_loaded() -> list[str] | None:
    """The files that the calling `from_pretrained` is about to load: transformers 4 does not pass them on."""
    return (locals_of("from_pretrained", "checkpoint_files") or {}).get("checkpoint_files")


def locals_of(function: str, name: str) -> dict[str, Any] | None:
    """The variables of the nearest caller called `function` that has one called `name`."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == function and name in frame.f_locals:
            return dict(frame.f_locals)
        frame = frame.f_back
    return None


def read_again(model: Any, stored: Mapping[str, tuple[str, checkpoint.StoredTensor]]) -> None:
    """Give codebooks and scales the values and dtype of the files: transformers 4 rounds them to the model's dtype.

    stored: name and place in the files by name in the model. What is offloaded is read from them at each use, codes
    too: accelerate is told to leave its dtype. Those of an embedding stay in the model's dtype, which is that of its
    output. Floats become trainable, as transformers 5 makes all that it loads.
    """
    for name, layer in checkpoint.quantized_linears(model):
        for part in WEIGHT:
            label, parameter = checkpoint.tensor_name(name, part), getattr(layer, part)
            if part != "codes" and isinstance(layer, QuantizedEmbedding):
                continue
            if parameter.is_meta and not hasattr(layer, "_hf_hook"):  # the whole model is, for its shapes alone
                continue
            if parameter.is_meta:
                hook: Any = layer._hf_hook  # accelerate's
                index = hook.weights_map.dataset.index
                if "safetensors_file" in index.get(label, ()):
                    index[label].pop("dtype", None)
            elif label in stored and part != "codes":
                key, tensor = stored[label]
                with safe_open(tensor.file, framework="pt") as file:
                    parameter.data = file.get_tensor(key).clone()  # else each would keep a mapping of the file
        for parameter in layer.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
