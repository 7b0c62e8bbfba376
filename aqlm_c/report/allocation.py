"""Where the bits of a model went: which scheme each layer was given for a size, and what it is expected to cost."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import require, wrong
from ..files import hidden_name
from ..model.kinds import kind_of
from ..units import megabytes
from . import tables

_SUFFIXES = (".png", ".svg", ".pdf")


@dataclasses.dataclass
class LayerChoice:
    """One weight that could be quantized. scheme: that it was given, or "dense". stored_bytes: of it on disk. kl: nats
    per token that it is expected to cost alone. relative_error: expected, tr(D H D^T) / tr(W H W^T). kl_per_error: of
    this weight, at 2 bits, whatever it was given. embedding: or the output layer. fixed: its scheme was asked for.
    """

    name: str
    out_features: int
    in_features: int
    scheme: str
    stored_bytes: int
    kl: float
    relative_error: float
    kl_per_error: float
    embedding: bool = False
    fixed: bool = False

    @property
    def bits_per_weight(self) -> float:
        """Stored bits."""
        return 8 * self.stored_bytes / (self.out_features * self.in_features)


@dataclasses.dataclass
class UniformSize:
    """What one scheme for all layers would be, embeddings as `embeddings="auto"` has them: bytes and expected KL."""

    scheme: str
    total_bytes: int
    kl: float


@dataclasses.dataclass(repr=False)
class Allocation:
    """What `choose_schemes` returns; a notebook shows its tables.

    target_bytes: that were asked for. total_bytes: of the model's safetensors files, at most. kl: expected
    KL(original || model) per token in nats, before any tuning: the sum of all layers'. scheme, rules, embeddings: the
    options that quantize so. uniform: what candidates would be for all layers alike.
    """

    target_bytes: int
    total_bytes: int
    original_bytes: int
    parameters: int
    scheme: str
    rules: dict[str, str]
    embeddings: str
    candidates: list[str]
    tokens: int
    seconds: float = 0.0
    layers: list[LayerChoice] = dataclasses.field(default_factory=list)
    uniform: list[UniformSize] = dataclasses.field(default_factory=list)

    @property
    def kl(self) -> float:
        """Nats per token."""
        return sum(layer.kl for layer in self.layers)

    @property
    def effective_bits(self) -> float:
        """Bits that are stored per parameter of the whole model."""
        return 8 * self.total_bytes / self.parameters

    @property
    def options(self) -> dict[str, Any]:
        """Options of `AqlmConfig` and of a run that quantize so."""
        return {"scheme": self.scheme, "rules": dict(self.rules), "embeddings": self.embeddings}

    def to_dict(self) -> dict[str, Any]:
        """All fields, with `kl` and `effective_bits`; ready for JSON."""
        return {**dataclasses.asdict(self), "kl": self.kl, "effective_bits": self.effective_bits}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Allocation:
        """What `to_dict` wrote, also after a round trip through JSON."""
        known = {field.name: fields[field.name] for field in dataclasses.fields(cls)}
        known["layers"] = [LayerChoice(**layer) for layer in known["layers"]]
        known["uniform"] = [UniformSize(**each) for each in known["uniform"]]
        return cls(**known)

    def to_frame(self) -> Any:
        """A pandas DataFrame, one row for each layer; ImportError where pandas is not installed."""
        rows = [{**dataclasses.asdict(layer), "bits_per_weight": layer.bits_per_weight} for layer in self.layers]
        return require("pandas").DataFrame(rows).set_index("name")

    def describe(self) -> str:
        """In a line."""
        schemes: dict[str, int] = {}
        for layer in self.layers:
            schemes[layer.scheme] = schemes.get(layer.scheme, 0) + 1
        counts = ", ".join(f"{n} {scheme}" for scheme, n in sorted(schemes.items()))
        return (
            f"{megabytes(self.total_bytes)} for {megabytes(self.target_bytes)}, {self.effective_bits:.3f} bits per "
            f"parameter, expected KL {self.kl:.4f} before tuning; {counts}"
        )

    def __repr__(self) -> str:
        return f"<Allocation: {self.describe()}>"

    def _repr_html_(self) -> str | None:
        return tables.html(self)

    def __rich__(self) -> Any:
        """Tables for a rich console: schemes by kind of layer, and one scheme for all beside them."""
        from rich.console import Group

        table = tables.make_table(
            f"Bits where they count: {self.describe().partition(';')[0]}",
            ("layer", "n", "out x in", "schemes", "bits", "MB", "expected KL", "KL / error"),
        )
        for (kind, shape), alike in self._kinds().items():
            counts: dict[str, int] = {}
            for layer in alike:
                counts[layer.scheme] = counts.get(layer.scheme, 0) + 1
            schemes = ", ".join(
                f"{scheme} ({n})" if len(counts) > 1 else scheme for scheme, n in sorted(counts.items())
            )
            weights = sum(layer.out_features * layer.in_features for layer in alike)
            stored = sum(layer.stored_bytes for layer in alike)
            table.add_row(
                *(kind, str(len(alike)), shape, schemes, f"{8 * stored / weights:.2f}", f"{stored / 1e6:.2f}"),
                f"{sum(layer.kl for layer in alike):.4f}",
                f"{sum(layer.kl_per_error for layer in alike) / len(alike):.3f}",
            )
        return Group(table, *([self._uniform_table()] if self.uniform else []))

    def _uniform_table(self) -> Any:
        table = tables.make_table("One scheme for all layers, embeddings by default", ("scheme", "MB", "expected KL"))
        for each in self.uniform:
            table.add_row(each.scheme, f"{each.total_bytes / 1e6:.2f}", f"{each.kl:.4f}")
        return table

    def _kinds(self) -> dict[tuple[str, str], list[LayerChoice]]:
        kinds: dict[tuple[str, str], list[LayerChoice]] = {}
        for layer in self.layers:
            kinds.setdefault((kind_of(layer.name), f"{layer.out_features}x{layer.in_features}"), []).append(layer)
        return kinds

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Write where the bits went to a .png, .svg or .pdf file: bits per weight of each kind of layer in each block,
        and megabytes and expected KL of each kind.

        Raises ValueError for another suffix, ImportError where matplotlib is not installed, OSError as writing does.
        """
        check_plot(path)
        figure = _figure(self, list(self._kinds().values()))
        target = Path(path).absolute()
        temporary = target.with_name(hidden_name(target.name, f"{os.getpid()}.tmp"))
        try:
            figure.savefig(temporary, format=target.suffix[1:].lower(), dpi=150, bbox_inches="tight")
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


def check_plot(path: str | os.PathLike[str]) -> None:
    """Raise ValueError or ImportError, before the work, if `Allocation.plot` could not write there."""
    if Path(path).suffix.lower() not in _SUFFIXES:
        raise wrong("plot", str(path), f"a file ending in one of {', '.join(_SUFFIXES)}")
    if not Path(path).absolute().parent.is_dir():
        raise wrong("plot", str(path), "a file in a folder that exists")
    require("matplotlib")


def _figure(allocation: Allocation, kinds: list[list[LayerChoice]]) -> Any:
    figures = require("matplotlib.figure")
    inside = [kind for kind in kinds if len(kind) > 1 or _block_of(kind[0].name) is not None]
    outside = [kind for kind in kinds if kind not in inside]
    blocks = sorted({block for kind in inside for layer in kind if (block := _block_of(layer.name)) is not None})
    rows = max(1, len(kinds))
    figure = figures.Figure(figsize=(12, 1.8 + 0.36 * rows), layout="constrained")
    grid, sizes, losses = figure.subplots(1, 3, width_ratios=(4, 1.2, 1.2), sharey=True)
    ordered = [*outside, *inside]
    labels = [kind_of(kind[0].name) for kind in ordered]
    values = [[_bits_in(kind, block) for block in blocks] for kind in ordered]
    dense = max((bits for row in values for bits in row if bits is not None), default=8.0)
    shown = [[float("nan") if bits is None else bits for bits in row] for row in values]
    places = range(len(ordered))
    if blocks:
        image = grid.imshow(shown, aspect="auto", cmap="viridis", vmin=0, vmax=min(dense, 8.0), interpolation="nearest")
        figure.colorbar(
            image, ax=grid, label="stored bits per weight" + (" (8: or more)" if dense > 8 else ""), pad=0.01
        )
        step = max(1, len(blocks) // 10)
        grid.set_xticks(range(0, len(blocks), step), [str(blocks[place]) for place in range(0, len(blocks), step)])
    for place, kind in enumerate(ordered[: len(outside)]):
        bits = f"{kind[0].bits_per_weight:.2f} bits per weight ({kind[0].scheme})"
        grid.text(max(0, len(blocks) / 2 - 0.5), place, bits, ha="center", va="center", fontsize=9)
    grid.set_xlabel("block")
    grid.set_yticks(list(places), labels)
    sizes.barh(places, [sum(layer.stored_bytes for layer in kind) / 1e6 for kind in ordered], color="tab:blue")
    sizes.set_xlabel("MB")
    losses.barh(places, [sum(layer.kl for layer in kind) for kind in ordered], color="tab:red")
    losses.set_xlabel("expected KL, nats per token")
    figure.suptitle(
        f"{allocation.total_bytes / 1e6:.1f} MB, {allocation.effective_bits:.2f} bits per parameter, "
        f"expected KL {allocation.kl:.3f} before tuning"
    )
    return figure


def _block_of(name: str) -> int | None:
    match = re.search(r"\.(\d+)\.", name)
    return int(match[1]) if match else None


def _bits_in(kind: list[LayerChoice], block: int) -> float | None:
    """Stored bits per weight of a kind's layers, the experts of a block together."""
    layers = [layer for layer in kind if _block_of(layer.name) == block]
    weights = sum(layer.out_features * layer.in_features for layer in layers)
    return 8 * sum(layer.stored_bytes for layer in layers) / weights if weights else None
