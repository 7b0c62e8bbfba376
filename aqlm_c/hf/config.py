"""The quantization config of a checkpoint, as transformers reads and writes it."""

from __future__ import annotations

from typing import Any

import transformers

from ..config import FORMAT
from ..config import AqlmConfig as _CoreConfig

_RUN_TIME = ("dequantize",)


class AqlmConfig(transformers.AqlmConfig):
    """transformers' `AqlmConfig`, checked, and keeping the keys it does not know.

    It must have that class name: transformers merges configs only where the names are equal.
    `dequantize=True`, passed to `from_pretrained`, turns the quantized layers into dense ones after
    loading; it is not saved. Raises ValueError naming the field whose value no AQLM checkpoint can have.
    """

    def __init__(self, *args: Any, quant_method: str = "aqlm", dequantize: bool = False, **fields: Any) -> None:
        super().__init__(*args, **fields)
        known = set(vars(self))
        self.__dict__.update({name: value for name, value in fields.items() if name not in known})
        self.quant_method = getattr(quant_method, "value", quant_method)
        self.dequantize = dequantize
        self.layer_config()

    @classmethod
    def from_layer_config(cls, config: _CoreConfig, not_quantized: list[str]) -> AqlmConfig:
        """The config of a model whose parameters except `not_quantized` are quantized by `config`."""
        fields = {name: getattr(config, name) for name in FORMAT}
        return cls(**fields, linear_weights_not_to_quantize=not_quantized)

    def layer_config(self) -> _CoreConfig:
        """The format of every quantized layer."""
        return _CoreConfig(**{name: getattr(self, name) for name in FORMAT})

    def get_loading_attributes(self) -> dict[str, Any]:
        """What a config passed to `from_pretrained` may change of the checkpoint's own."""
        return {name: getattr(self, name) for name in _RUN_TIME}

    def to_dict(self) -> dict[str, Any]:
        """All fields but those of one run."""
        return {name: value for name, value in super().to_dict().items() if name not in _RUN_TIME}
