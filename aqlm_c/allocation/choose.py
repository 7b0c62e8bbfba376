"""A scheme for each layer, so that the model has a size and predicts what the original does as well as it can."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypedDict

import torch

from ..config import SizeOptions
from ..errors import wrong
from ..format import AUTO, DENSE, Format, Rules
from ..io.checkpoint import quantized_bytes, stored_bytes, tensor_name
from ..io.data import check_sequences
from ..methods import get_method
from ..model import experts
from ..model.embeddings import AUTO_SCHEME, Embeddings, open_to_choice, search_config
from ..model.sizes import stored_size
from ..nn.grouped import TOGETHER
from ..pipeline.placement import Placement
from ..pipeline.plan import Plan, make_plan
from ..recipe import AqlmConfig
from ..report.allocation import Allocation, LayerChoice, UniformSize
from ..units import megabytes
from . import knapsack
from .rates import SchemeRates
from .sensitivity import Sensitivity, measure

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Fits each layer that any format fits.
_ANY = {"num_codebooks": 1, "nbits_per_codebook": 8, "in_group_size": 4, "out_group_size": 1}
_FILE, _SHARD = (
    64,
    10**9,
)  # bytes of a safetensors file beside its tensors and what it says of them; of a file, at least
_NUMBERS = {True: 3, False: 64}  # of blocks in one rule, whether it names experts or not: `re` searches these at once


class Target(TypedDict, total=False):
    """Options of `choose_schemes`: the fields of `SizeOptions`."""

    bits: float | None
    target_size: int | str | None
    candidates: tuple[str, ...]
    samples: int
    together: bool


@dataclasses.dataclass(frozen=True)
class Measured:
    """A model's weights that can be quantized, with what an error in each does: `choose` finds schemes for any size.

    sensitivities: of each weight. dtype sizes: bytes of an element of each dense weight. fixed: schemes that rules give
    some of them. embeddings: those among them that are embeddings or output layers. original_bytes: of the model's
    safetensors files. together: names that are given one scheme, in order.
    """

    config: AqlmConfig
    sensitivities: Mapping[str, Sensitivity]
    item_sizes: Mapping[str, int]
    fixed: Mapping[str, str]
    embeddings: tuple[str, ...]
    prefix: str
    together: tuple[tuple[str, ...], ...]
    original_bytes: int
    parameters: int
    tokens: int
    rates: SchemeRates
    seconds: float = 0.0

    def choose(self, options: SizeOptions) -> Allocation:
        """The schemes of `options.candidates` that are expected to cost least KL within a size.

        Raises ValueError for a size below that of the smallest candidates, or not below the original's, and for a
        candidate that the method cannot quantize to.
        """
        started = time.perf_counter()
        name, given = ("target_size", options.target_size) if options.bits is None else ("bits", options.bits)
        target = int(self.parameters * options.bits / 8) if options.bits is not None else int(options.target_size or 0)
        items = self.together if options.together else tuple((name,) for group in self.together for name in group)
        choices = [self._choices(names, options) for names in items]
        others = self.original_bytes - sum(self._bytes(each, DENSE) for names in items for each in names)
        least = others + sum(min(size for _, size, _ in each) for each in choices)
        if target < least:
            bits = f", {8 * least / self.parameters:.3f} bits per parameter" if name == "bits" else ""
            raise wrong(name, given, f"at least {least:,} bytes ({megabytes(least)}{bits}) with these candidates")
        if target >= self.original_bytes:
            raise wrong(name, given, f"less than the original's {self.original_bytes:,} bytes")
        found = knapsack.choose([[(size, loss) for _, size, loss in each] for each in choices], target - others)
        schemes = {
            name: each[index][0] for names, each, index in zip(items, choices, found, strict=True) for name in names
        }
        return self._allocation(schemes, target, others, options, time.perf_counter() - started)

    def _choices(self, names: tuple[str, ...], options: SizeOptions) -> list[tuple[str, int, float]]:
        """(scheme, bytes, KL) of each scheme that all of `names` can have."""
        fixed = [self.fixed[name] for name in names if name in self.fixed]
        schemes = [scheme for scheme in fixed[:1] or options.candidates if all(self._fits(n, scheme) for n in names)]
        if not schemes:
            schemes = [DENSE]
        return [
            (scheme, sum(self._bytes(n, scheme) for n in names), sum(self._kl(n, scheme) for n in names))
            for scheme in schemes
        ]

    def _fits(self, name: str, scheme: str) -> bool:
        if scheme == DENSE:
            return True
        format, layer = Format.parse(scheme), self.sensitivities[name]
        try:
            format.check_layer(name, layer.out_features, layer.in_features)
        except ValueError:
            return False
        return self._bytes(name, scheme) < self._bytes(name, DENSE)

    def _bytes(self, name: str, scheme: str) -> int:
        layer = self.sensitivities[name]
        shape = (layer.out_features, layer.in_features)
        if scheme == DENSE:
            return stored_bytes({tensor_name(name, "weight"): (shape, self.item_sizes[name])}, self.original_bytes)
        return quantized_bytes(name, Format.parse(scheme), shape, self.original_bytes)

    def _rate(self, name: str, scheme: str) -> float:
        format, layer = Format.parse(scheme), self.sensitivities[name]
        config = search_config(self.config, format) if name in self.embeddings else self.config
        return self.rates.rate(format, (layer.out_features, layer.in_features), config)

    def _kl(self, name: str, scheme: str) -> float:
        return 0.0 if scheme == DENSE else self.sensitivities[name].kl(self._rate(name, scheme))

    def _allocation(
        self, schemes: Mapping[str, str], target: int, others: int, options: SizeOptions, seconds: float
    ) -> Allocation:
        layers = []
        for name, scheme in schemes.items():
            layer, dense = self.sensitivities[name], scheme == DENSE
            layers.append(
                LayerChoice(
                    *(name, layer.out_features, layer.in_features, scheme, self._bytes(name, scheme)),
                    kl=self._kl(name, scheme),
                    relative_error=0.0 if dense else layer.relative_error(self._rate(name, scheme)),
                    kl_per_error=layer.kl_per_error,
                    embedding=name in self.embeddings,
                    fixed=name in self.fixed,
                )
            )
        scheme, rules = self._rules(schemes)
        embeddings = DENSE if self.config.embeddings == AUTO else self.config.embeddings
        return Allocation(
            target_bytes=target,
            total_bytes=others + sum(layer.stored_bytes for layer in layers),
            original_bytes=self.original_bytes,
            parameters=self.parameters,
            scheme=scheme,
            rules=rules,
            embeddings=embeddings,
            candidates=list(options.candidates),
            tokens=self.tokens,
            seconds=self.seconds + seconds,
            layers=layers,
            uniform=[self._uniform(each, others, schemes) for each in options.candidates if each != DENSE],
        )

    def _uniform(self, scheme: str, others: int, names: Iterable[str]) -> UniformSize:
        total, kl = others, 0.0
        for name in names:
            own = self.fixed.get(name) or (AUTO_SCHEME if name in self.embeddings else scheme)
            own = own if self._fits(name, own) else DENSE
            total, kl = total + self._bytes(name, own), kl + self._kl(name, own)
        return UniformSize(scheme, total, kl)

    def _rules(self, schemes: Mapping[str, str]) -> tuple[str, dict[str, str]]:
        """The most common scheme of the blocks' layers, and rules, after those that were given, for the others."""
        inside = {name: scheme for name, scheme in schemes.items() if name not in self.embeddings}
        weights: dict[str, int] = {}
        for name, scheme in inside.items():
            if scheme != DENSE and name not in self.fixed:
                layer = self.sensitivities[name]
                weights[scheme] = weights.get(scheme, 0) + layer.out_features * layer.in_features
        common = max(weights, key=lambda scheme: weights[scheme], default=self.config.scheme)
        rules = self.config.rules.to_dict()
        for name, scheme in schemes.items():
            if name in self.embeddings and name not in self.fixed and scheme != DENSE:
                rules[f"^{re.escape(name)}$"] = scheme
        kinds: dict[tuple[str, str], list[int]] = {}
        for name, scheme in inside.items():
            if scheme != common and name not in self.fixed:
                block, _, part = name.removeprefix(f"{self.prefix}.").partition(".")
                kinds.setdefault((_of_any_expert(part), scheme), []).append(int(block))
        for (part, scheme), blocks in kinds.items():
            numbers = sorted(set(blocks))
            step = _NUMBERS[r"\d+" in part]
            for start in range(0, len(numbers), step):
                some = "|".join(map(str, numbers[start : start + step]))
                some = f"(?:{some})" if "|" in some else some
                rules[rf"^{re.escape(self.prefix)}\.{some}\.{part}$"] = scheme
        return common, Rules(rules).to_dict()


def _of_any_expert(part: str) -> str:
    """The pattern of a layer's name in its block, with any number for numbers in it."""
    return re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(part))


def measure_model(
    model: Any,
    sequences: torch.Tensor,
    config: AqlmConfig | str = "2x8g8",
    *,
    layers: str | None = None,
    device: str | torch.device | None = None,
    samples: int = SizeOptions.samples,
    progress: Any = None,
) -> Measured:
    """What an error in each weight of a transformers model does (`sensitivity.measure`), on token ids [n, length].

    config, layers, device: as in `quantize_model`; layers on which a rule decides keep its scheme. progress: is told
    `on_step`. The model is then as it was. Raises ValueError as `quantize_model` does before its work.
    """
    started = time.perf_counter()
    config = AqlmConfig.of(config)
    sequences = check_sequences(model, sequences, config.tuning)
    place = Placement(device).find(model)
    original, parameters = _file_bytes(model), stored_size(model)[0]
    with _whole_on(model, place):
        plan = make_plan(model, config.replace(**_ANY), layers)
        try:
            names = _names(plan, config, model, layers)
            modules: dict[str, Any] = {name: model.get_submodule(name) for name in names}
            damp = float(getattr(config.options, "relative_damp", 0.0))
            step = None if progress is None else progress.on_step
            found = measure(
                *(model, sequences, modules, plan.embeddings),
                samples=samples,
                damp=damp,
                seed=config.seed,
                on_step=step,
            )
        finally:
            experts.fuse(model)
    embeddings = tuple(name for name in names if name in plan.embeddings.names)
    return Measured(
        config=config,
        sensitivities=found,
        item_sizes={name: module.weight.itemsize for name, module in modules.items()},
        fixed=_fixed(names, config, plan.embeddings),
        embeddings=embeddings,
        prefix=plan.blocks.prefix,
        together=tuple(_together(names, plan, config)),
        original_bytes=original,
        parameters=parameters,
        tokens=sequences.numel(),
        rates=SchemeRates(config),
        seconds=time.perf_counter() - started,
    )


def choose_schemes(
    model: Any,
    sequences: torch.Tensor,
    config: AqlmConfig | str = "2x8g8",
    *,
    layers: str | None = None,
    device: str | torch.device | None = None,
    progress: Any = None,
    **target: Unpack[Target],
) -> Allocation:
    """Choose a scheme for each linear, for the input embedding and the output layer, so that the quantized model has a
    size and is expected to be as close to the original as it can be: least KL, by a knapsack.

    `bits`: stored per parameter of the whole model; or `target_size`: bytes of its safetensors files, or text such as
    "60MB". Other options of the target: see `SizeOptions`. `config`: the method and its options; its rules keep their
    say, its scheme has none. `layers`, `device`, `sequences` [n, length]: as in `quantize_model`, which then takes
    `AqlmConfig.from_scheme(**allocation.options)`. `progress`: is told `on_step`.

    Raises ValueError as `quantize_model` does before its work, for a size that is too small (it says the smallest) or
    not below the original's, and for a candidate that is no scheme or that the method cannot quantize to.
    """
    options = SizeOptions(**target)
    config = AqlmConfig.of(config)
    check_candidates(options, config)
    measured = measure_model(
        *(model, sequences, config),
        layers=layers,
        device=device,
        samples=options.samples,
        progress=progress,
    )
    return measured.choose(options)


def check_candidates(options: SizeOptions, config: AqlmConfig) -> None:
    """Raise ValueError for a candidate that the method of `config` cannot quantize to."""
    for scheme in options.candidates:
        if scheme != DENSE:
            try:
                get_method(config.solver).check(Format.parse(scheme), config.options)
            except ValueError as error:
                raise ValueError(f"candidates: {scheme!r}: {error}") from None


def _names(plan: Plan, config: AqlmConfig, model: Any, layers: str | None) -> list[str]:
    """Of the weights that schemes are chosen for or that rules quantize, embeddings first."""
    chosen = open_to_choice(config, model, plan.embeddings) if layers is None else []
    inside = [name for step in plan.steps if step.index is not None for name in step.targets]
    return list(dict.fromkeys([*chosen, *(name for name in plan.targets() if name not in inside), *inside]))


def _fixed(names: Iterable[str], config: AqlmConfig, embeddings: Embeddings) -> dict[str, str]:
    """Schemes of the layers on which rules decide."""
    found = {}
    for name in names:
        if name in embeddings.names:
            format = embeddings.format_for(name, config)
            if format is not None:
                found[name] = format.scheme
            elif config.embeddings not in (AUTO, DENSE):
                found[name] = config.embeddings
        elif scheme := config.rules.scheme_for(name):
            found[name] = scheme
    return found


def _together(names: Iterable[str], plan: Plan, config: AqlmConfig) -> Iterator[tuple[str, ...]]:
    """`names`, those together that products of one launch (`nn.grouped`) or the experts of a block ask for."""
    names, prefix = list(names), plan.blocks.prefix
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        if not name.startswith(f"{prefix}.") or config.rules.scheme_for(name):
            groups[(name,)] = [name]
            continue
        block, _, part = name.removeprefix(f"{prefix}.").partition(".")
        parent, _, leaf = part.rpartition(".")
        siblings = next((each for each in TOGETHER if leaf in each), (leaf,))
        stem = f"{prefix}.{block}.{parent}".rstrip(".")
        if not all(f"{stem}.{each}" in names for each in siblings):
            siblings = (leaf,)
        generic = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", f".{parent}")
        groups.setdefault((block, generic, *siblings), []).append(name)
    return map(tuple, groups.values())


def _file_bytes(model: Any) -> int:
    """Of the model's safetensors files as it is, at most; what shares memory once."""
    tensors, seen = {}, set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            tensors[name] = (tuple(tensor.shape), tensor.itemsize)
        seen.add(id(tensor))
    for name in getattr(model, "_keys_to_ignore_on_save", None) or ():
        tensors.pop(name, None)
    total = sum(size * math.prod(shape) for shape, size in tensors.values())
    return stored_bytes(tensors, total) + _FILE * (1 + total // _SHARD)


@contextlib.contextmanager
def _whole_on(model: Any, device: torch.device) -> Iterator[None]:
    """All of the model on a device; afterwards its tensors are the very ones that they were."""
    tensors = [*model.parameters(), *model.buffers()]
    if all(tensor.device == device for tensor in tensors):
        yield
        return
    home = [(tensor, tensor.data) for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to(device)
        yield
    finally:
        for tensor, data in home:
            tensor.data = data
