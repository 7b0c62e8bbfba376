"""`import aqlm_c.hf`, and `from_pretrained` of transformers loads AQLM checkpoints through this package.

It takes over the method "aqlm" (transformers' own needs another package and fails on published names) and
adds "aqlm_c", for what the published layout cannot say.
"""

from transformers.quantizers import auto

from .config import AqlmConfig
from .peft import extend_peft
from .quantizer import AqlmQuantizer
from .resizing import guard_resizing
from .training import prepare_model_for_tuning

__all__ = ["AqlmConfig", "AqlmQuantizer", "prepare_model_for_tuning"]

# Assigned, not registered: the decorators refuse a name that is taken.
auto.AUTO_QUANTIZATION_CONFIG_MAPPING["aqlm"] = AqlmConfig
auto.AUTO_QUANTIZER_MAPPING["aqlm"] = AqlmQuantizer
auto.register_quantization_config("aqlm_c")(AqlmConfig)
auto.register_quantizer("aqlm_c")(AqlmQuantizer)

if hasattr(auto, "LOADING_ATTRIBUTES_CONFIG_TYPES"):  # transformers 5
    auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (AqlmConfig,)

extend_peft()
guard_resizing()
