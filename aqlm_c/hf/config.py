"""The quantization config of a checkpoint, as transformers reads and writes it."""

from __future__ import annotations

import copy
from typing import Any

import transformers

from ..errors import wrong
from ..format import FIELDS, Format, Rules
from ..recipe import AqlmConfig as LayerConfig
from .onthefly import OnTheFly

_RUN_TIME = ("dequantize", "on_the_fly")

# Written with our own method, which transformers does not know without this package: it would warn, and go on with
# random weights. Before it looks at the method it hands whatever has `load_in_8bit` to bitsandbytes' config, which
# raises for this dtype, before anything is loaded: "module 'torch' has no attribute" and this text.
OWN_METHOD = "aqlm_c"
_CURE = (
    "import aqlm_c.hf (pip install aqlm-c) before from_pretrained: quant_method aqlm_c is not of transformers itself"
)
GUARD = {"load_in_8bit": _CURE, "bnb_4bit_compute_dtype": _CURE}


class AqlmConfig(transformers.AqlmConfig):
    """transformers' `AqlmConfig`, checked, and keeping the keys it does not know.

    It must have that class name: transformers merges configs only where the names are equal.

    rules: regular expression -> scheme or "dense", as in `aqlm_c.AqlmConfig`; the method is then "aqlm_c", since
    "aqlm" has the same format for all layers. dequantize: make the quantized layers dense after loading
    (`from_pretrained` of transformers 5 takes it; before, call `model.dequantize()`).

    With `scheme`, such as "2x8g8", `from_pretrained` quantizes a dense model while it loads it. The other fields are
    then those of `OnTheFly` (dataset, tokenizer) and `RunConfig` (samples, sequence_length, shuffle, preset, layers,
    work_dir, memory_limit and all options of the solver). Neither these nor dequantize are saved.

    Raises ValueError naming the field whose value no AQLM checkpoint can have; with `scheme`, an unknown option too.
    """

    def __init__(
        self,
        *args: Any,
        scheme: str | None = None,
        rules: dict[str, str] | None = None,
        quant_method: str | None = None,
        dequantize: bool = False,
        **fields: Any,
    ) -> None:
        self.on_the_fly = None
        if scheme is not None:
            self.on_the_fly = OnTheFly(scheme, rules=rules, **fields)
            fields = Format.parse(scheme).to_dict()
        fields = {name: value for name, value in fields.items() if name not in GUARD}
        super().__init__(*args, **fields)
        if not all(isinstance(name, str) for name in self.linear_weights_not_to_quantize):
            raise wrong("linear_weights_not_to_quantize", self.linear_weights_not_to_quantize, "a list of names")
        known = set(vars(self))
        self.__dict__.update({name: value for name, value in fields.items() if name not in known})
        self.rules: dict[str, str] = Rules(rules).to_dict()
        self.quant_method = getattr(quant_method, "value", quant_method) or (OWN_METHOD if rules else "aqlm")
        self.dequantize = dequantize
        if rules and self.quant_method == "aqlm":
            raise ValueError("quant_method: got 'aqlm' with rules, expected 'aqlm_c'")
        self.layer_config()

    @classmethod
    def from_layer_config(cls, config: LayerConfig, not_quantized: list[str]) -> AqlmConfig:
        """The config of a model whose parameters except `not_quantized` are quantized by `config`."""
        fields: dict[str, Any] = {**config.format.to_dict(), "rules": config.rules.to_dict()}
        return cls(**fields, linear_weights_not_to_quantize=not_quantized)

    def layer_config(self) -> LayerConfig:
        """The format of every quantized layer."""
        return LayerConfig(Format(**{name: getattr(self, name) for name in FIELDS}), Rules(self.rules))

    def quantization(self) -> LayerConfig:
        """What to quantize to and how, for `quantize_model` and others that are given their data themselves.

        Raises ValueError for a config with a dataset.
        """
        if self.on_the_fly is None:
            return self.layer_config()
        if self.on_the_fly.dataset is not None:
            raise wrong("dataset", "one", "none in a config that is not for from_pretrained: pass the sequences")
        return self.on_the_fly.config

    @classmethod
    def of(cls, config: Any) -> AqlmConfig:
        """The config itself, or the one that quantizes to an `aqlm_c.AqlmConfig` while loading, without data."""
        if not isinstance(config, LayerConfig):
            return config
        options = {name: value for name, value in config.to_dict().items() if name not in FIELDS}
        return cls(scheme=config.scheme, **options)

    def get_loading_attributes(self) -> dict[str, Any]:
        """What a config passed to `from_pretrained` may change of the checkpoint's own."""
        return {"dequantize": self.dequantize}

    def to_dict(self) -> dict[str, Any]:
        """All fields but those of one run; rules as a list of pairs, since config.json sorts the names of a mapping."""
        fields = copy.deepcopy({name: value for name, value in vars(self).items() if name not in (*_RUN_TIME, "rules")})
        if self.quant_method == OWN_METHOD:
            fields |= GUARD
        return {**fields, "rules": [list(rule) for rule in self.rules.items()]} if self.rules else fields
