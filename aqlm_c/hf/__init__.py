"""`import aqlm_c.hf`, and `from_pretrained` of transformers loads AQLM checkpoints through this package.

It takes over the method "aqlm" (transformers' own needs another package and fails on published names) and
adds "aqlm_c", for what the published layout cannot say.
"""

from typing import Any

from ..errors import missing

try:
    import torch  # noqa: F401  (transformers imports without it, and then has no models)
    from transformers.quantizers import auto
except ModuleNotFoundError as error:
    raise missing(error) from error

from .config import OWN_METHOD, AqlmConfig
from .peft import extend_peft
from .quantizer import AqlmQuantizer
from .resizing import guard_resizing
from .training import prepare_model_for_tuning

__all__ = ["AqlmConfig", "AqlmQuantizer", "prepare_model_for_tuning"]

# Assigned, not registered: the decorators refuse a name that is taken.
auto.AUTO_QUANTIZATION_CONFIG_MAPPING["aqlm"] = AqlmConfig
auto.AUTO_QUANTIZER_MAPPING["aqlm"] = AqlmQuantizer
auto.register_quantization_config(OWN_METHOD)(AqlmConfig)
auto.register_quantizer(OWN_METHOD)(AqlmQuantizer)

_of_transformers = auto.AutoQuantizationConfig.from_dict


def _from_dict(fields: dict[str, Any]) -> Any:
    """Ours first: what keeps transformers without this package from loading it (`config.GUARD`) is for bitsandbytes."""
    return AqlmConfig.from_dict(fields) if fields.get("quant_method") == OWN_METHOD else _of_transformers(fields)


auto.AutoQuantizationConfig.from_dict = staticmethod(_from_dict)

if hasattr(auto, "LOADING_ATTRIBUTES_CONFIG_TYPES"):  # transformers 5
    auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (AqlmConfig,)

extend_peft()
guard_resizing()
