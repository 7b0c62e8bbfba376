"""The input embedding and the output layer of a model, which may be tied to each other."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch

from ..format import AUTO, DENSE, WEIGHT, Format, Rules
from ..nn.embedding import QuantizedEmbedding
from ..recipe import AqlmConfig

# Where "auto" quantizes embeddings: 4 bits per weight in the groups that kernels are fastest with. "2x8g4" is as good
# and found as fast, but its product with 8 rows takes 5 to 15 times as long on a GPU.
AUTO_SCHEME = "4x8g8"
MANY_BITS = 4  # per weight: few passes of search are enough
AUTO_SHARE = 0.1  # of the quantized model's bytes that dense embeddings may be


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

        Only a rule quantizes an embedding or output layer (`with_rules` makes one of `config.embeddings`); one for
        either of two that are tied is for both.
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
        return _ruling(config, [self.input], scheme)


def find_embeddings(model: Any) -> Embeddings:
    """Those of a transformers model."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = ("" if module is None else names.get(id(module), "") for module in modules)
    tied = bool(embedding and head) and bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    if tied and modules[0].weight.shape != modules[1].weight.shape:  # CPM-Ant's head is a part of its embedding
        tied = False
    return Embeddings(embedding, head, tied)


def with_rules(
    config: AqlmConfig, model: Any, embeddings: Embeddings, targets: Mapping[str, Format], partial: bool
) -> tuple[AqlmConfig, dict[str, str]]:
    """`config` with `config.embeddings` as rules, and why an embedding or output layer stays dense, by its name.

    targets: formats of the linears to quantize. partial: only linears of some names are to be quantized; "auto" leaves
    embeddings then. Raises ValueError where a scheme was asked for that an embedding cannot have.
    """
    settled = dataclasses.replace(config, embeddings=DENSE)
    names = _unruled(config, model, embeddings)
    if config.embeddings == DENSE or not names:
        return settled, dict.fromkeys(names, "embeddings='dense'")
    if config.embeddings != AUTO:
        format = Format.parse(config.embeddings)
        for name, module in names.items():
            format.check_layer(name, *module.weight.shape)
        return _ruling(settled, names, format.scheme), {}
    kept = _kept(model, embeddings, names)
    names = {name: module for name, module in names.items() if name not in kept}
    share = _share(model, names.values(), targets)
    if partial or share <= AUTO_SHARE:
        reason = "layers were chosen" if partial else f"{share:.0%} of the quantized model's bytes"
        return settled, kept | dict.fromkeys(names, reason)
    return _ruling(settled, names, AUTO_SCHEME), kept


def open_to_choice(config: AqlmConfig, model: Any, embeddings: Embeddings) -> list[str]:
    """Names of those that may be quantized or not, as no rule decides on them, where `config.embeddings` is "auto"; of
    two that are tied the input embedding.
    """
    names = _unruled(config, model, embeddings) if config.embeddings == AUTO else {}
    kept = _kept(model, embeddings, names)
    return [name for name in names if name not in kept]


def _unruled(config: AqlmConfig, model: Any, embeddings: Embeddings) -> dict[str, Any]:
    """Those on which no rule decides, by name; of two that are tied the input embedding."""
    return {
        name: model.get_submodule(name)
        for name in embeddings.names
        if not (embeddings.tied and name == embeddings.output) and not _ruled(config, embeddings, name)
    }


def _kept(model: Any, embeddings: Embeddings, modules: Mapping[str, Any]) -> dict[str, str]:
    """Why "auto" cannot quantize some of these, by name."""
    impossible = "tied: needs transformers 5" if embeddings.tied and not _ties_parts(model) else ""
    return {name: reason for name, module in modules.items() if (reason := impossible or _unfit(name, module))}


def _ruled(config: AqlmConfig, embeddings: Embeddings, name: str) -> bool:
    """Whether a rule decides on the embedding or output layer `name`."""
    names = (name, embeddings.output) if embeddings.tied else (name,)
    return any(config.rules.scheme_for(each) for each in names)


def _ruling(config: AqlmConfig, names: Iterable[str], scheme: str) -> AqlmConfig:
    """`config` with a rule of this scheme for each of the layers `names`, before its own."""
    own = {f"^{re.escape(name)}$": scheme for name in names}
    return dataclasses.replace(config, rules=Rules({**own, **config.rules}))


def _ties_parts(model: Any) -> bool:
    """Whether its transformers can tie more than weights: 4 cannot."""
    return hasattr(model, "all_tied_weights_keys")


def _unfit(name: str, module: Any) -> str:
    """Why "auto" cannot quantize an embedding or output layer; "" if it can."""
    format = Format.parse(AUTO_SCHEME)
    try:
        format.check_layer(name, *module.weight.shape)
        if isinstance(module, torch.nn.Embedding):
            QuantizedEmbedding.check(name, module)
        elif type(module) is not torch.nn.Linear:
            return f"a {type(module).__name__}"
    except ValueError as error:
        return str(error)
    if 2 * format.stored_bytes(*module.weight.shape) > _dense_bytes(module.weight):
        return "small: codebooks would take the space"
    return ""


def _share(model: Any, modules: Iterable[Any], targets: Mapping[str, Format]) -> float:
    """Of dense embeddings in the bytes of the model with `targets` quantized."""
    weights = {id(parameter): parameter for parameter in model.parameters()}
    total = sum(map(_dense_bytes, weights.values()))
    for name, format in targets.items():
        weight = model.get_submodule(name).weight
        total += format.stored_bytes(*weight.shape) - _dense_bytes(weight)
    return sum(_dense_bytes(module.weight) for module in modules) / max(1, total)


def _dense_bytes(weight: torch.Tensor) -> int:
    """As 16-bit floats."""
    return 2 * weight.numel()


def search_config(config: AqlmConfig, format: Format) -> AqlmConfig:
    """`config` with the options for an embedding or output layer of this format, which are larger than any layer."""
    if format.code_bits_per_weight() < MANY_BITS:
        return config
    return dataclasses.replace(config, options=config.options.few_passes(format))


def tie(model: Any, embeddings: Embeddings, dense: bool = False) -> None:
    """Give the output layer the codes, codebooks and scales of the quantized input embedding, for good; its weight,
    where that is `dense`.

    Raises ValueError for a transformers that can tie nothing but weights.
    """
    if dense:
        model.get_submodule(embeddings.output).weight = model.get_submodule(embeddings.input).weight
        return
    if not _ties_parts(model):
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
