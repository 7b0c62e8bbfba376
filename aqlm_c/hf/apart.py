"""Loading a model with its experts apart, to be quantized: each expert's tensors stay where they lie in the files.

transformers 5 joins the experts of a block to two large tensors as it loads them, which would be in memory, all blocks'
at once, before the first is quantized. Those that are stored joined stay so: they lie in the files as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..io import checkpoint
from ..model import experts

_METHOD = "aqlm_c_apart"  # of no checkpoint


class ApartConfig(QuantizationConfigMixin):
    """For `from_pretrained`: nothing is quantized, and fused experts are taken apart (`model.experts`)."""

    def __init__(self, quant_method: str = _METHOD) -> None:
        self.quant_method = quant_method


class ApartQuantizer(HfQuantizer):
    """transformers' hooks around such a load."""

    requires_calibration = False
    _loading: Any = None  # the model

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        self._loading, rename = model, experts.renaming(model)
        names = (rename(name) for name in checkpoint.read_headers(checkpoint_files or ()))
        experts.unfuse(model, [name.removesuffix(".weight") for name in names])  # if that is how they are stored

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self._loading = None
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any) -> list[Any]:
        own = model[0] if model else self._loading
        return super().update_weight_conversions(experts.without_fusion(weight_conversions, own), *model)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def loads_apart(fields: Mapping[str, Any]) -> bool:
    """Whether a model with the config `fields` may have experts that transformers joins."""
    return experts.are_fused() and _names_experts(fields)


def forget(model: Any) -> None:
    """Leave no trace of the load: the model is one that was never quantized, and is saved as any other of its class."""
    conversions = getattr(model, "_weight_conversions", None)
    model.hf_quantizer.remove_quantization_config(model)
    if conversions is not None:
        apart = any(isinstance(module, experts.Experts) for module in model.modules())
        model._weight_conversions = experts.with_fusion(conversions, model) if apart else conversions


def _names_experts(fields: Any) -> bool:
    if isinstance(fields, Mapping):
        return any("expert" in str(name) or _names_experts(value) for name, value in fields.items())
    return False


auto.AUTO_QUANTIZER_MAPPING[_METHOD] = ApartQuantizer
auto.AUTO_QUANTIZATION_CONFIG_MAPPING[_METHOD] = ApartConfig
