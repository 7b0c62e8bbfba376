"""Loading AQLM checkpoints in transformers: which linears are quantized, and that they fit the files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers.quantizers.base import HfQuantizer

from .. import checkpoint
from ..config import AqlmConfig as LayerConfig
from ..linear import QuantizedLinear
from .config import AqlmConfig


class AqlmQuantizer(HfQuantizer):
    """transformers' hooks around the loading, saving and dequantizing of an AQLM model."""

    requires_calibration = True

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        tensors = checkpoint.read_headers(checkpoint_files) if checkpoint_files else None
        config = self.quantization_config
        swap_linears(model, config.layer_config(), config.linear_weights_not_to_quantize, tensors)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, linear in checkpoint.quantized_linears(model):
            if linear.codes.device.type != "meta":  # offloaded to disk
                checkpoint.check_values(name, linear)
        if self.quantization_config.dequantize:
            return self._dequantize(model, dtype=model.config.dtype)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        for name, linear in list(checkpoint.quantized_linears(model)):
            model.set_submodule(name, linear.dequantize(dtype))
        return model

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
    substring or a prefix would keep too much. An output embedding that is tied to the input's stays dense
    always.
    """
    kept = {name.removesuffix(".weight") for name in not_quantized}
    if not kept:
        kept = set(HfQuantizer.get_modules_to_not_convert(model))
    output = model.get_output_embeddings()
    if getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        kept |= {name for name, module in model.named_modules() if module is output}
    return kept


def swap_linears(
    model: Any,
    config: LayerConfig,
    not_quantized: Iterable[str],
    tensors: Mapping[str, checkpoint.StoredTensor] | None,
) -> None:
    """Put an empty QuantizedLinear (on the meta device) in the place of every linear that is not kept dense.

    `tensors`, the headers of the checkpoint to be loaded, are checked against the model first, and each
    layer's codebooks keep the dtype they are stored in; None leaves both out. Raises ValueError naming the
    tensor that does not fit or that no linear takes.
    """
    kept = kept_linears(model, not_quantized)
    unclaimed = {name for name in tensors or () if name.endswith(".codes")}
    for name, linear in list(model.named_modules()):
        if not isinstance(linear, torch.nn.Linear):
            continue
        dtype = linear.weight.dtype
        if tensors is not None:
            stored = _stored_name(name, tensors, model.base_model_prefix)
            if name not in kept:
                dtype = checkpoint.check_stored_linear(stored, tensors, config, linear)
                unclaimed.discard(f"{stored}.codes")
            elif f"{stored}.codes" in tensors:
                raise ValueError(
                    f"{stored}.codes in {tensors[f'{stored}.codes'].file}: unexpected, "
                    "linear_weights_not_to_quantize in config.json names this layer"
                )
        if name not in kept:
            model.set_submodule(name, QuantizedLinear.empty(linear, config, dtype))
    if unclaimed:
        first = min(unclaimed)
        raise ValueError(f"{first} in {tensors[first].file}: unexpected, the model has no such linear layer")


def attach(model: Any, config: LayerConfig) -> None:
    """Make a model whose linears were quantized in memory equal to a loaded one: it can then be saved."""
    hf_config = AqlmConfig.from_layer_config(config, checkpoint.unquantized_parameters(model))
    quantizer = AqlmQuantizer(hf_config)
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = hf_config.quant_method
    quantizer.postprocess_model(model)


def _stored_name(name: str, tensors: Mapping[str, checkpoint.StoredTensor], prefix: str) -> str:
    """The layer's name in the checkpoint: a base model's names lack the prefix that a whole model's have."""
    candidates = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
    return next((candidate for candidate in candidates if f"{candidate}.codes" in tensors), name)
