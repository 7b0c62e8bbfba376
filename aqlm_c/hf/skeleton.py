"""Before the work: would what is to be quantized load again? Tried with empty models, on the meta device."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import one_line
from ..format import Format
from ..io import checkpoint
from ..model import experts
from ..model.embeddings import find_embeddings, tie
from ..nn.embedding import quantized_class
from ..pipeline.block import disk_dtype
from . import names

try:
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.initialization import no_init_weights
except ImportError:  # transformers 4
    from transformers.modeling_utils import no_init_weights

    revert_weight_conversion = None

_FILE = Path("model.safetensors")
_DTYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.int8: "I8", torch.int16: "I16"}


def check_loads(model: Any, formats: Mapping[str, Format], attach: Callable[[Any], None]) -> None:
    """Raise ValueError if `model`, its layers quantized to `formats`, would be saved as what cannot be loaded.

    The names and shapes that `save_pretrained` would write are matched with what `from_pretrained` expects, conversions
    of transformers included. attach: makes a quantized model one that transformers can save. A model of another library
    is asked nothing.
    """
    if not isinstance(model, PreTrainedModel):
        return
    try:
        planned = _planned(model, formats)
        attach(planned)
        stored = _stored(planned)
        loaded = _empty(planned)
        quantizer = type(planned.hf_quantizer)(planned.config.quantization_config)
        if hasattr(quantizer, "_convert_model_for_quantization"):  # as transformers does before
            quantizer._convert_model_for_quantization(loaded)
        quantizer.place(loaded, names.taken(loaded, stored))
    except Exception as error:  # of many types: transformers builds a model
        experts.fuse(model)
        raise ValueError(
            f"model: got {type(model).__name__}, of which a quantized checkpoint would not load again "
            f"({one_line(error)[:300]}), expected rules or layers that leave out what cannot be quantized"
        ) from error


def _planned(model: PreTrainedModel, formats: Mapping[str, Format]) -> Any:
    """The quantized model, on the meta device."""
    planned = _empty(model)
    planned.tie_weights()
    if conversions := getattr(model, "_weight_conversions", None):
        planned._weight_conversions = copy.deepcopy(conversions)
    experts.unfuse(planned)
    _check_parameters(model, planned)
    embeddings = find_embeddings(planned)
    for name, format in formats.items():
        module = planned.get_submodule(name)
        dtype = disk_dtype(module.weight.dtype)
        planned.set_submodule(name, quantized_class(module).empty(module, format, dtype))
        if embeddings.tied and name == embeddings.input:
            tie(planned, embeddings)
    return planned


def _stored(planned: Any) -> dict[str, checkpoint.StoredTensor]:
    """The tensors that `save_pretrained` would write."""
    tensors, seen = {}, set()
    for name, tensor in planned.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:  # of tied ones the first
            tensors[name] = tensor.detach()
        seen.add(id(tensor))
    for name in planned._keys_to_ignore_on_save or ():
        tensors.pop(name, None)
    if revert_weight_conversion is not None:
        tensors = revert_weight_conversion(planned, tensors)
    return {
        name: checkpoint.StoredTensor(_FILE, _DTYPES.get(tensor.dtype, "other"), tuple(tensor.shape))
        for name, tensor in tensors.items()
    }


def _check_parameters(model: torch.nn.Module, planned: torch.nn.Module) -> None:
    """Raise ValueError naming a parameter that the model has and that its config does not describe, or the reverse."""
    own, described = (
        {name: tuple(parameter.shape) for name, parameter in each.named_parameters(remove_duplicate=False)}
        for each in (model, planned)
    )
    for name in own.keys() | described.keys():
        if own.get(name) != described.get(name):
            raise ValueError(
                f"{name}: the model has {_shape(own.get(name))}, but its config describes {_shape(described.get(name))}"
            )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "no such parameter" if shape is None else str(list(shape))


def _empty(model: PreTrainedModel) -> Any:
    """A model of the same class and config on the meta device, as `from_pretrained` builds it."""
    config = copy.copy(model.config)
    quantization = config.__dict__.pop("quantization_config", None)  # it may hold a data set
    config = copy.deepcopy(config)
    if quantization is not None and getattr(quantization, "on_the_fly", None) is None:
        config.quantization_config = quantization
    with _default_dtype(model.dtype), torch.random.fork_rng(devices=[]), torch.device("meta"), no_init_weights():
        return type(model)(config)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
