"""LoRA of the package PEFT on quantized layers, whichever of the two packages is imported first.

PEFT has no way to register a layer class for every LoraConfig. `get_peft_model` finds QuantizedLinear because two of
its functions are wrapped, which happens at the end of its own import: nothing here imports it.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from types import ModuleType
from typing import Any

from ..nn.embedding import QuantizedEmbedding
from ..nn.linear import QuantizedLinear

_LORA = "peft.tuners.lora.model"


def _extend(lora: Any) -> None:
    """Teach the loaded module peft.tuners.lora.model this package's layer."""
    from peft.tuners import tuners_utils
    from peft.tuners.lora import layer

    dispatch, all_linear = lora.dispatch_aqlm, tuners_utils._maybe_include_all_linear_layers

    class Unmerged:
        """The codes cannot take the adapter in; what reads the base layer's weight gets it decoded."""

        def merge(self, *args: Any, **kwargs: Any) -> None:
            raise ValueError(
                "merge: an adapter cannot be merged into AQLM codes. Expected a dense model: call dequantize() on "
                "the loaded one, then load the adapter on it, and merge"
            )

    class LoraQuantizedLinear(Unmerged, layer.Linear):
        """``y = base_layer(x) + scaling * B A dropout(x)``, and all else that PEFT can do with a dense linear."""

    class LoraQuantizedEmbedding(Unmerged, layer.Embedding):
        """The same of rows that are looked up."""

        def _get_in_out_features(self, module: Any) -> tuple[int, int]:
            return module.num_embeddings, module.embedding_dim

    def dispatch_aqlm(target: Any, adapter_name: str, **kwargs: Any) -> Any:
        base = target.get_base_layer() if isinstance(target, tuners_utils.BaseTunerLayer) else target
        if isinstance(base, QuantizedEmbedding):
            return LoraQuantizedEmbedding(target, adapter_name, **kwargs)
        make = LoraQuantizedLinear if isinstance(base, QuantizedLinear) else dispatch
        return make(target, adapter_name, **kwargs)

    def with_quantized_linears(peft_config: Any, model: Any) -> Any:
        asked = getattr(peft_config, "target_modules", None)
        peft_config = all_linear(peft_config, model)
        if peft_config.target_modules is not asked:  # it was "all-linear"
            head = getattr(model, "get_output_embeddings", lambda: None)()
            linears = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear) and m is not head}
            wrapped = {name for name in linears if name.rpartition(".")[2] == "base_layer"}  # by another adapter
            peft_config.target_modules |= linears.keys() - wrapped
        return peft_config

    lora.dispatch_aqlm = dispatch_aqlm
    tuners_utils._maybe_include_all_linear_layers = with_quantized_linears


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds _LORA as the others do, once, so that `_extend` follows its import."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != _LORA:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def execute_and_extend(module: ModuleType) -> None:
                execute(module)
                _extend(module)

            loader.exec_module = execute_and_extend
        return spec


def check_no_adapters(model: Any) -> None:
    """Raise ValueError for a model with adapters: their layers would be quantized as if they were the model's."""
    tuners: Any = sys.modules.get("peft.tuners.tuners_utils")
    wrapped = tuners is not None and any(isinstance(module, tuners.BaseTunerLayer) for module in model.modules())
    if wrapped or hasattr(model, "peft_config"):
        raise ValueError(
            f"model: got {type(model).__name__}, which has adapters of PEFT, expected a model without: merge them "
            "first (merge_and_unload()), or unload() them and load them again on the quantized model"
        )


def extend_peft() -> None:
    """Make LoRA know QuantizedLinear, now if PEFT is imported already, else when it is."""
    if _LORA in sys.modules:
        _extend(sys.modules[_LORA])
    else:
        sys.meta_path.insert(0, _AfterImport())
