"""Loading AQLM checkpoints in transformers: which linears are quantized, and that they fit the files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from transformers.quantizers.base import HfQuantizer

from ..format import Format
from ..io import checkpoint, mapped
from ..model import experts
from ..model.conversions import keep_names, without_quantized
from ..model.embeddings import Embeddings, find_embeddings, tie, untie
from ..nn.embedding import quantized_class
from ..nn.grouped import join_linears
from ..recipe import AqlmConfig as LayerConfig
from . import names, provenance, skeleton
from .config import AqlmConfig
from .onthefly import check_device_map


class AqlmQuantizer(HfQuantizer):
    """transformers' hooks around the loading, saving and dequantizing of an AQLM model."""

    requires_calibration = False  # nor is it, with AqlmConfig(scheme=...)
    _stored: dict[str, tuple[str, checkpoint.StoredTensor]] | None = None  # while loading: `check_names`
    _rounded = False  # while loading: transformers 4 gives codebooks the model's dtype
    _sequences: torch.Tensor | None = None  # while loading: to quantize with
    _loading: Any = None  # the model, while loading
    _files: Sequence[str] | None = None  # while loading
    _dtypes: dict[str, torch.dtype] | None = None  # while loading: of tensors that are cast afterwards
    _provenance: Mapping[str, bytes] = MappingProxyType({})  # files of the run that made the checkpoint

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(AqlmConfig.of(quantization_config), **kwargs)
        quantization_config = self.quantization_config
        if not self.pre_quantized and getattr(quantization_config, "on_the_fly", None) is None:
            raise ValueError(
                "scheme: got None, expected AqlmConfig(scheme='2x8g8') or another, since the model is not quantized yet"
            )

    def validate_environment(
        self, *args: Any, weights_only: bool = True, device_map: Any = None, **kwargs: Any
    ) -> None:
        if not weights_only:
            raise ValueError("weights_only: got False, expected True, no pickle is loaded")
        if not self.pre_quantized:
            check_device_map(device_map)

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, device_map: Any = None, **kwargs: Any
    ) -> None:
        places = device_map.values() if isinstance(device_map, dict) else [device_map or "cpu"]
        self._dtypes = {} if set(map(str, places)) == {"cpu"} else None
        files = checkpoint_files or names.files_being_loaded()
        self._files, self._rounded = files, files is not checkpoint_files
        if self.pre_quantized:
            self._provenance = provenance.read(files or ())
        tensors = names.taken(model, checkpoint.read_headers(files)) if files else None
        self.place(model, tensors)
        if not self.pre_quantized:
            self._sequences = self.quantization_config.on_the_fly.sequences(model)

    def place(self, model: Any, tensors: Mapping[str, checkpoint.StoredTensor] | None) -> None:
        """Put empty quantized layers into a quantized model's places, and check that `tensors` are what it lacks.

        tensors: the headers of the checkpoint that the model takes; None: not known. Raises ValueError naming a tensor.
        """
        self._loading = model
        config = self.quantization_config
        if self.pre_quantized:
            dense = config.linear_weights_not_to_quantize and [
                *config.linear_weights_not_to_quantize,
                *names.new_linears(model, tensors or ()),
            ]
            swap_linears(model, config.layer_config(), dense, tensors)
            for _, layer in checkpoint.quantized_linears(model):
                layer.is_loading = True
        if tensors is not None:
            self._stored = names.check_names(model, tensors, self)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if not self.pre_quantized:
            on_the_fly = self.quantization_config.on_the_fly
            report, layer_config = on_the_fly.quantize(model, self._sequences, check_loads)
            attach(model, layer_config)
            model.hf_quantizer.report = report
        if self._rounded and self._stored:
            names.read_again(model, self._stored)
        mapped.give_back(self._files or ())  # what was read ahead, and what was freed since the process began
        self._copy(model, mapped.MappedFiles(self._files or ()))
        mapped.give_back(self._files or ())
        self._stored = self._sequences = self._loading = self._files = self._dtypes = None
        model.quantization_method = "aqlm"  # by this name PEFT knows that codebooks are not to be cast
        if self.quantization_config.dequantize:
            return self.dequantize(model)
        join_linears(model)
        return model

    def _copy(self, model: Any, files: mapped.MappedFiles) -> None:
        """Cast and pack what was loaded, little by little, since it lies in mapped files."""
        for name, dtype in (self._dtypes or {}).items():
            module, _, part = name.rpartition(".")
            tensor = getattr(model.get_submodule(module), part)
            if tensor.dtype != dtype:
                tensor.data = files.cast(tensor.data, dtype)
        for name, linear in checkpoint.quantized_linears(model):
            checkpoint.check_values(name, linear, self._stored)
            linear.pack()
            linear.is_loading = False
            files.copied(linear.codes.nbytes)

    def dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """The model with dense layers of `dtype` (its own if None), in place; it is then as never quantized."""
        self._dequantize(model, dtype or model.config.dtype or model.dtype)  # the config may not say it
        self.remove_quantization_config(model)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        if isinstance(dtype, str):  # save_pretrained leaves it so in the config
            dtype = getattr(torch, dtype)
        for name, linear in list(checkpoint.quantized_linears(model)):
            model.set_submodule(name, linear.dequantize(dtype))
        untie(model, find_embeddings(model))
        experts.fuse(model)
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any) -> list[Any]:
        own = model[0] if model else self._loading  # transformers 5.17 does not pass it, 5.23 does
        kept = without_quantized(experts.without_fusion(weight_conversions, own), own)
        return super().update_weight_conversions(kept, *model)

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """The dtype that transformers 5.24 gives a tensor as it loads it; None for that of the file.

        It loads all of them before it uses the first, so what is cast would be in memory twice.
        """
        dtype = super().get_new_dtype(converter, param, dtype)
        if dtype is None or self._dtypes is None or hasattr(converter, "operations"):
            return dtype
        self._dtypes |= dict.fromkeys(converter.target_patterns, dtype)
        return None

    def get_state_dict_and_metadata(self, model: Any) -> Any:  # of transformers 5, when it has made the directory
        provenance.write(self._provenance)
        return super().get_state_dict_and_metadata(model)

    def get_state_dict(self, model: Any) -> Any:  # of transformers 4
        provenance.write(self._provenance)
        return super().get_state_dict(model)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters on top: the op has a gradient to its input

    @property
    def is_qat_trainable(self) -> bool:
        return True  # and one to codebooks and scales

    @property
    def is_compileable(self) -> bool:
        return True


def kept_linears(model: Any, not_quantized: Iterable[str]) -> set[str]:
    """Names of the modules that stay dense.

    `not_quantized` holds module names or, as published models do, parameter names; matched exactly, since a
    substring or a prefix would keep too much.
    """
    kept = {name.removesuffix(".weight") for name in not_quantized}
    if not kept:
        kept = set(HfQuantizer.get_modules_to_not_convert(model))
    return kept


def swap_linears(
    model: Any,
    config: LayerConfig,
    not_quantized: Iterable[str],
    tensors: Mapping[str, checkpoint.StoredTensor] | None,
) -> None:
    """Put empty quantized layers (on the meta device) in the place of all that is not dense by config and list.

    `tensors`, the headers of the checkpoint to be loaded, are checked against the model first, and each
    layer's codebooks keep the dtype they are stored in; None leaves both out. Raises ValueError naming the
    tensor that does not fit or that no linear takes.
    """
    rename = experts.renaming(model)
    stored_names = {rename(name): name for name in tensors or ()}
    experts.unfuse(model, None if tensors is None else checkpoint.quantized_names(stored_names))
    embeddings = find_embeddings(model)
    kept = kept_linears(model, map(rename, not_quantized))
    unclaimed = set(checkpoint.quantized_names(tensors or ()))
    for name, module in list(model.named_modules()):
        if not isinstance(module, (torch.nn.Linear, torch.nn.Embedding)) or (
            embeddings.tied and name == embeddings.output
        ):
            continue
        full_name, stored = _stored_name(name, stored_names, model.base_model_prefix)
        layer = _format_of(name, full_name, module, config, embeddings, kept)
        if layer is None:
            if tensors is not None and stored in unclaimed:
                codes = checkpoint.tensor_name(stored, "codes")
                raise ValueError(
                    f"{codes} in {tensors[codes].file}: unexpected, "
                    "quantization_config in config.json says that this layer is not quantized"
                )
            continue
        dtype = module.weight.dtype
        if tensors is not None:
            dtype = checkpoint.check_stored_layer(stored, tensors, layer, module)
            unclaimed.discard(stored)
        model.set_submodule(name, quantized_class(module).empty(module, layer, dtype))
        if embeddings.tied and name == embeddings.input:
            tie(model, embeddings)
    if unclaimed and tensors is not None:
        first = checkpoint.tensor_name(min(unclaimed), "codes")
        raise ValueError(f"{first} in {tensors[first].file}: unexpected, the model has no such linear layer")


def attach(model: Any, config: LayerConfig) -> None:
    """Make a model whose linears were quantized in memory equal to a loaded one: it can then be saved."""
    keep_names(model)
    dense = checkpoint.unquantized_parameters(model)
    not_quantized = experts.stored_names(model, dense)
    found = set(map(experts.renaming(model), not_quantized))
    not_quantized += [name for name in dense if name not in found]  # joined with others on disk
    config = find_embeddings(model).with_rule_for_input(config)
    if not config.rules:  # transformers 5 reads it too, with upstream's package, and compares names of modules
        linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        not_quantized += [name for name in linears if f"{name}.weight" in set(not_quantized)]
    hf_config = AqlmConfig.from_layer_config(config, not_quantized)
    quantizer = AqlmQuantizer(hf_config)
    model.config.quantization_config = hf_config
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = hf_config.quant_method
    quantizer.postprocess_model(model)


def check_loads(model: Any, formats: Mapping[str, Format], config: LayerConfig) -> None:
    """Raise ValueError if `model`, its layers quantized to `formats`, would be saved as what cannot be loaded.

    Asked before the work. formats: by the names of the layers, experts taken apart. The message names the tensor that
    has no place, or that nothing fills.
    """
    skeleton.check_loads(model, formats, lambda planned: attach(planned, config))


def _format_of(
    name: str, full_name: str, module: torch.nn.Module, config: LayerConfig, embeddings: Embeddings, kept: set[str]
) -> Format | None:
    """The format of a linear or an embedding, None if it is dense."""
    if name in kept:
        return None
    if isinstance(module, torch.nn.Embedding):
        return embeddings.format_for(name, config, full_name) if name == embeddings.input else None
    return config.format_for(full_name)


def _stored_name(name: str, stored_names: Mapping[str, str], prefix: str) -> tuple[str, str]:
    """The layer's name in the whole model, whose prefix a base model's names lack, and in the checkpoint.

    `stored_names`: a tensor's name in the checkpoint by its name in the whole model.
    """
    for candidate in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
        if codes := stored_names.get(checkpoint.tensor_name(candidate, "codes")):
            return candidate, checkpoint.quantized_names([codes])[0]
    return name, name
