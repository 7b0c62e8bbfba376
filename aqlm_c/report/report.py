"""What a quantization run reports: its layers and blocks, phases, sizes and versions."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..versions import versions
from . import tables
from .layers import BlockReport, LayerReport


@dataclasses.dataclass
class QuantizationReport:
    """One run of `quantize_model`.

    phases: seconds by name, in order. sizes: bytes on disk as `original_bytes`, `quantized_bytes` and, of
    those, `original_embedding_bytes`, `quantized_embedding_bytes`; the original's may be unknown. data:
    SHA-256 of the sources and of the token ids. note: what a reader of the sizes should know of the original.
    diagnoses: sentences of what may be wrong and what to do (`diagnose`). plan: "quantized" of all "linears" in
    "blocks", names of the "dense" by reason, and a "text" of it.
    """

    layers: list[LayerReport] = dataclasses.field(default_factory=list)
    blocks: list[BlockReport] = dataclasses.field(default_factory=list)
    diagnoses: list[str] = dataclasses.field(default_factory=list)
    phases: dict[str, float] = dataclasses.field(default_factory=dict)
    tokens: int = 0
    sequences: int = 0
    peak_memory_bytes: int = 0
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    model: str = ""
    note: str = ""
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)
    threads: int = 0
    isa: str = ""
    plan: dict[str, Any] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=versions)

    @property
    def bits_per_weight(self) -> float:
        """True bits per weight over all quantized layers."""
        weights = [layer.out_features * layer.in_features for layer in self.layers]
        bits = sum(layer.bits_per_weight * n for layer, n in zip(self.layers, weights, strict=True))
        return bits / sum(weights) if weights else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All fields, with `bits_per_weight` of the whole; ready for JSON."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            **fields,
            "bits_per_weight": self.bits_per_weight,
            "layers": [layer.to_dict() for layer in self.layers],
            "blocks": [block.to_dict() for block in self.blocks],
        }

    def __rich__(self) -> Any:
        """Tables for a rich console: layers by kind, blocks, sizes on disk, seconds by phase, diagnoses."""
        from rich.console import Group

        parts = [
            tables.layer_table(self.layers, self.bits_per_weight, bool(self.blocks)),
            "dB: above the Gaussian reference, at the rate of the codes and at the true rate\n",
            *([tables.block_table(self.blocks)] if self.blocks else []),
            *([self.plan["text"]] if self.plan else []),
            tables.size_table(self.sizes),
            *([self.note] if self.note else []),
            self._summary(),
            *([tables.list_of(self.diagnoses)] if self.diagnoses else []),
        ]
        return Group(*parts)

    def _summary(self) -> str:
        phases = " · ".join(f"{name} {seconds:.1f}" for name, seconds in self.phases.items())
        return (
            f"{self.sequences} sequences, {self.tokens:,} tokens · {self.threads} threads, {self.isa} · "
            f"peak memory {self.peak_memory_bytes / 2**30:.2f} GiB\n"
            f"seconds: {phases} · total {sum(self.phases.values()):.1f}"
        )
