"""What a quantization run reports: its layers and blocks, phases, sizes and versions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ..errors import require, wrong
from ..versions import versions
from . import tables
from .allocation import Allocation
from .layers import BlockReport, LayerReport

_DISTANCES = "dB: above the Gaussian reference, at the rate of the codes and at the true rate\n"
_PROVENANCE = {"model": str, "config": dict, "data": dict, "sequences": int, "tokens": int, "threads": int, "isa": str}
_PROVENANCE |= {"versions": dict}


@dataclasses.dataclass(repr=False)
class QuantizationReport:
    """One run of `quantize_model`. A notebook shows its tables; `to_frame` gives its rows, `to_dict` all of it.

    parameters, stored_bytes: of the whole model, and of the tensors that are stored for them; 0 where they are not
    known. phases: seconds by name, in order. sizes: bytes on disk as `original_bytes`, `quantized_bytes` and, of
    those, `original_embedding_bytes`, `quantized_embedding_bytes`; the original's may be unknown. data:
    SHA-256 of the sources and of the token ids. note: what a reader of the sizes should know of the original.
    diagnoses: sentences of what may be wrong and what to do (`diagnose`). plan: "quantized" of all "linears" in
    "blocks", names of the "dense" by reason, a "text" of it, and "batch_size", sequences in one forward pass. ranks:
    processes that worked together; resumed_ranks: how many these were when blocks that a work directory had were
    finished, if not as many. device: "cpu" or the name of the GPU that quantized, with the most bytes that were held
    there; both are in `to_dict` for a GPU alone. finetune: `FinetuneReport.to_dict()` where the whole model was tuned.
    allocation: `Allocation.to_dict()` where schemes were chosen for a size.
    """

    layers: list[LayerReport] = dataclasses.field(default_factory=list)
    blocks: list[BlockReport] = dataclasses.field(default_factory=list)
    diagnoses: list[str] = dataclasses.field(default_factory=list)
    phases: dict[str, float] = dataclasses.field(default_factory=dict)
    tokens: int = 0
    sequences: int = 0
    parameters: int = 0
    stored_bytes: int = 0
    peak_memory_bytes: int = 0
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    model: str = ""
    note: str = ""
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)
    threads: int = 0
    isa: str = ""
    device: str = "cpu"
    peak_device_memory_bytes: int = 0
    plan: dict[str, Any] = dataclasses.field(default_factory=dict)
    ranks: int = 1
    resumed_ranks: list[int] = dataclasses.field(default_factory=list)
    versions: dict[str, str] = dataclasses.field(default_factory=versions)
    finetune: dict[str, Any] = dataclasses.field(default_factory=dict)
    allocation: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def bits_per_weight(self) -> float:
        """True bits per weight over the quantized layers: those of the blocks, as the papers count, or else all."""
        layers = [layer for layer in self.layers if not layer.embedding] or self.layers
        weights = [layer.out_features * layer.in_features for layer in layers]
        bits = sum(layer.bits_per_weight * n for layer, n in zip(layers, weights, strict=True))
        return bits / sum(weights) if weights else 0.0

    @property
    def effective_bits(self) -> float | None:
        """Bits that are stored per parameter of the whole model, embeddings and dense layers among them."""
        return 8 * self.stored_bytes / self.parameters if self.parameters else None

    def add_ranks(self, ranks: int) -> None:
        """So many ranks finished a block that was found in the work directory."""
        if ranks not in (self.ranks, *self.resumed_ranks):
            self.resumed_ranks = sorted([*self.resumed_ranks, ranks])

    def to_dict(self) -> dict[str, Any]:
        """All fields, with `bits_per_weight` and `effective_bits`; ready for JSON, where NaN and Inf are null. Numbers
        of ranks only where there was more than one.
        """
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if self.device == "cpu":
            del fields["device"], fields["peak_device_memory_bytes"]
        fields = {name: value for name, value in fields.items() if "ranks" not in name or value not in (1, [])}
        for name in ("finetune", "allocation"):
            if not fields[name]:
                del fields[name]
        return _finite(
            {
                **fields,
                "bits_per_weight": self.bits_per_weight,
                "effective_bits": self.effective_bits,
                "layers": [layer.to_dict() for layer in self.layers],
                "blocks": [block.to_dict() for block in self.blocks],
            }
        )

    def to_frame(self, what: str = "layers") -> Any:
        """A pandas DataFrame, one row for each of "layers" or "blocks" by name, columns as in `to_dict`.

        Raises ValueError for another name, ImportError where pandas is not installed.
        """
        if what not in ("layers", "blocks"):
            raise wrong("what", what, "'layers' or 'blocks'")
        kind: Any = LayerReport if what == "layers" else BlockReport
        rows = [row.to_dict() for row in getattr(self, what)]
        columns = list(rows[0] if rows else (field.name for field in dataclasses.fields(kind)))
        return require("pandas").DataFrame(rows, columns=columns).set_index("name")

    def __repr__(self) -> str:
        schemes = ", ".join(dict.fromkeys(layer.scheme for layer in self.layers)) or "no scheme"
        errors = [layer.relative_error for layer in self.layers if layer.relative_error is not None]
        mean = f", mean relative error {sum(errors) / len(errors):.5f}" if errors else ""
        return (
            f"<QuantizationReport: {len(self.layers)} layers of {schemes}, {self.bits_per_weight:.3f} bits per weight"
            f"{mean}, {self.tokens:,} tokens, {sum(self.phases.values()):.1f} s>"
        )

    def _repr_html_(self) -> str | None:
        return tables.html(self)

    def __rich__(self) -> Any:
        """Tables for a rich console: layers by kind, blocks, sizes on disk, seconds by phase, diagnoses."""
        from rich.console import Group

        parts = [
            tables.layer_table(self.layers, self.bits_per_weight, self.effective_bits, bool(self.blocks)),
            *([_DISTANCES] if tables.has_reference(self.layers) else []),
            *([tables.block_table(self.blocks)] if self.blocks else []),
            *([self.plan["text"]] if self.plan else []),
            *([Allocation.from_dict(self.allocation)] if self.allocation else []),
            tables.size_table(self.sizes),
            *([self.note] if self.note else []),
            self._summary(),
            *([tables.list_of(self.diagnoses)] if self.diagnoses else []),
        ]
        return Group(*parts)

    def _summary(self) -> str:
        phases = " · ".join(f"{name} {seconds:.1f}" for name, seconds in self.phases.items())
        start = f", each beginning with {self.data['bos']}" if self.data.get("bos") else ""
        device = f", {self.peak_device_memory_bytes / 2**30:.2f} GiB on {self.device}" if self.device != "cpu" else ""
        return (
            f"{self.sequences} sequences, {self.tokens:,} tokens{start} · {self._ranks()}{self.threads} threads, "
            f"{self.isa} · peak memory {self.peak_memory_bytes / 2**30:.2f} GiB{device}\n"
            f"seconds: {phases} · total {sum(self.phases.values()):.1f}"
        )

    def _ranks(self) -> str:
        others = " and ".join(map(str, self.resumed_ranks))
        text = f"{self.ranks} ranks{f' (resumed after {others})' if others else ''} of "
        return text if self.ranks > 1 or others else ""


def _finite(value: Any) -> Any:
    """`value` with None for the numbers that JSON does not have: no report keeps a finished run from being saved."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def known_provenance(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What the report.json of a run says of where its result comes from; {} where a field has another type."""
    known = {name: fields[name] for name in _PROVENANCE if name in fields}
    if any(type(value) is not _PROVENANCE[name] for name, value in known.items()):
        return {}
    flat = [known.get("versions", {}), {**known.get("data", {}), "sources": None}]
    flat += [(known.get("data") or {}).get("sources") or {}]
    config = known.get("config", {})
    sources = config.get("data") or []
    if not all(isinstance(each, dict) and all(map(_is_plain, each.values())) for each in flat):
        return {}
    if not isinstance(sources, list) or not all(isinstance(source, str) for source in sources):
        return {}
    return known if all(map(_is_flat, config.values())) else {}


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (str, int, float))


def _is_flat(value: Any) -> bool:
    parts = value if isinstance(value, list) else value.values() if isinstance(value, dict) else [value]
    return all(map(_is_plain, parts))
