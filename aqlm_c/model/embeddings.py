"""The input embedding and the output layer of a model, which may be tied to each other."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, NamedTuple

from ..format import WEIGHT, Format, Rules
from ..nn.embedding import QuantizedEmbedding
from ..recipe import AqlmConfig


class Embeddings(NamedTuple):
    """Names of the input embedding and of the output layer; "" for one that the model does not have."""

    input: str
    output: str
    tied: bool

    @property
    def names(self) -> list[str]:
        """Of those that the model has."""
        return [name for name in dict.fromkeys((self.input, self.output)) if name]

    def quantized(self, config: AqlmConfig) -> dict[str, Format]:
        """Those that the rules quantize, with their formats; of two that are tied the input embedding alone."""
        names = [name for name in self.names if not (self.tied and name == self.output)]
        formats = {name: self.format_for(name, config) for name in names}
        return {name: format for name, format in formats.items() if format is not None}

    def format_for(self, name: str, config: AqlmConfig, full_name: str = "") -> Format | None:
        """The format of the layer `name`, which the rules may call `full_name`: None if it stays dense.

        Only a rule quantizes an embedding or output layer; one for either of two that are tied is for both.
        """
        if name not in (self.input, self.output):
            return config.format_for(full_name or name)
        names = (full_name or name, *((self.output,) if self.tied and name == self.input else ()))
        return next((config.format_for(each) for each in names if config.rules.scheme_for(each)), None)

    def with_rule_for_input(self, config: AqlmConfig) -> AqlmConfig:
        """The same formats by a rule that a model without its output layer understands too."""
        scheme = config.rules.scheme_for(self.output) if self.tied else None
        if scheme is None or config.rules.scheme_for(self.input):
            return config
        rules = Rules({f"^{re.escape(self.input)}$": scheme, **config.rules})
        return dataclasses.replace(config, rules=rules)


def find_embeddings(model: Any) -> Embeddings:
    """Those of a transformers model."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = ("" if module is None else names.get(id(module), "") for module in modules)
    tied = bool(embedding and head) and bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    return Embeddings(embedding, head, tied)


def tie(model: Any, embeddings: Embeddings) -> None:
    """Give the output layer the codes, codebooks and scales of the quantized input embedding, for good.

    Raises ValueError for a transformers that can tie nothing but weights.
    """
    if not hasattr(model, "all_tied_weights_keys"):
        raise ValueError("rules: quantizing tied embeddings needs transformers 5 or newer; leave them out")
    head = model.get_submodule(embeddings.output)
    embedding: QuantizedEmbedding = model.get_submodule(embeddings.input)
    model.set_submodule(embeddings.output, embedding.head(head.bias))
    kept = {to: source for to, source in model.all_tied_weights_keys.items() if to != f"{embeddings.output}.weight"}
    kept |= {f"{embeddings.output}.{part}": f"{embeddings.input}.{part}" for part in WEIGHT}
    model.all_tied_weights_keys = model._tied_weights_keys = kept


def untie(model: Any, embeddings: Embeddings) -> None:
    """Tie the dense weights again, after `tie` and dequantizing."""
    head, embedding = (model.get_submodule(name) for name in (embeddings.output, embeddings.input))
    if "_tied_weights_keys" in vars(model):
        del model._tied_weights_keys
        head.weight = embedding.weight
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def embedding_names(model: Any) -> list[str]:
    """Names of the parameters of the model's input embedding and output layer (a tied one under both names)."""
    modules = [module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None]
    parameters = {id(parameter) for module in modules for parameter in module.parameters()}
    return [name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in parameters]
