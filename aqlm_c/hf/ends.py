"""The two ends of a model: its input embedding and its output layer, which may be tied to each other."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, NamedTuple

from ..config import AqlmConfig
from ..linear import WEIGHT, QuantizedEmbedding


class Ends(NamedTuple):
    """Names of the input embedding and of the output layer; "" for one that the model does not have."""

    embedding: str
    head: str
    tied: bool

    def quantized(self, config: AqlmConfig) -> list[str]:
        """Names of the ends that the rules quantize; of two that are tied the embedding alone."""
        names = [name for name in dict.fromkeys(self[:2]) if name and not (self.tied and name == self.head)]
        return [name for name in names if self.config(name, config)]

    def config(self, name: str, config: AqlmConfig, full_name: str = "") -> AqlmConfig | None:
        """The config of the layer `name`, which the rules may call `full_name`: None if it stays dense.

        Only a rule quantizes an end; one for either of two tied ends is for both.
        """
        if name not in self[:2]:
            return config.for_layer(full_name or name)
        names = (full_name or name, *((self.head,) if self.tied and name == self.embedding else ()))
        return next((config.for_layer(end) for end in names if config.rule_for(end)), None)

    def with_rule_for_embedding(self, config: AqlmConfig) -> AqlmConfig:
        """The same formats by a rule that a model without its output layer understands too."""
        if not self.tied or config.rule_for(self.embedding) or not config.rule_for(self.head):
            return config
        rule = {f"^{re.escape(self.embedding)}$": config.rule_for(self.head)}
        return dataclasses.replace(config, rules={**rule, **config.rules})


def find_ends(model: Any) -> Ends:
    """The ends of a transformers model."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = ("" if module is None else names.get(id(module), "") for module in modules)
    tied = bool(embedding and head) and bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    return Ends(embedding, head, tied)


def tie(model: Any, ends: Ends) -> None:
    """Give the output layer the codes, codebooks and scales of the quantized input embedding, for good.

    Raises ValueError for a transformers that can tie nothing but weights.
    """
    if not hasattr(model, "all_tied_weights_keys"):
        raise ValueError("rules: quantizing tied embeddings needs transformers 5 or newer; leave them out")
    head = model.get_submodule(ends.head)
    embedding: QuantizedEmbedding = model.get_submodule(ends.embedding)
    model.set_submodule(ends.head, embedding.head(head.bias))
    kept = {to: source for to, source in model.all_tied_weights_keys.items() if to != f"{ends.head}.weight"}
    kept |= {f"{ends.head}.{part}": f"{ends.embedding}.{part}" for part in WEIGHT}
    model.all_tied_weights_keys = model._tied_weights_keys = kept


def untie(model: Any, ends: Ends) -> None:
    """Tie the dense weights again, after `tie` and dequantizing."""
    head, embedding = (model.get_submodule(name) for name in (ends.head, ends.embedding))
    if "_tied_weights_keys" in vars(model):
        del model._tied_weights_keys
        head.weight = embedding.weight
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
