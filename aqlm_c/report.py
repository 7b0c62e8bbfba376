"""What a quantization run reports: each layer's error, the run's phases, sizes and versions."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import re
import resource
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from . import __version__


def versions() -> dict[str, str]:
    """Versions of Python and of the packages a result depends on, of those installed."""
    found = {"aqlm_c": __version__, "python": platform.python_version()}
    for name in ("numpy", "torch", "transformers", "safetensors"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def peak_memory() -> int:
    """Most bytes that this process has held in memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def decibels(error: float, reference: float | None) -> float | None:
    """10 log10(error / reference); None where either is missing or zero."""
    return 10 * math.log10(error / reference) if reference and error > 0 else None


@dataclasses.dataclass
class LayerReport:
    """One quantized linear layer. Errors are tr(D H D^T) / tr(W H W^T), D = W - Wq (arXiv 2401.06118), before block
    fine-tuning, which gives up some of it for the block's output.

    `gaussian_code_rate` and `gaussian_true_rate` are the relative errors that reverse water-filling gives
    i.i.d. Gaussian weights under this H, at the bits of the codes alone and at all bits stored. They are a
    reference, not a bound for real weights: a negative distance to them is possible.
    """

    name: str
    out_features: int
    in_features: int
    scheme: str
    relative_error: float
    bits_per_weight: float
    gaussian_code_rate: float | None = None
    gaussian_true_rate: float | None = None
    seconds: float = 0.0
    tokens: int | None = None  # that this layer's H was summed over, if not the whole run's: an expert sees a part

    @property
    def db_above_code_rate(self) -> float | None:
        """Distance in dB to the Gaussian reference at the code rate."""
        return decibels(self.relative_error, self.gaussian_code_rate)

    @property
    def db_above_true_rate(self) -> float | None:
        """Distance in dB to the Gaussian reference at the true rate (codes, codebooks and scales)."""
        return decibels(self.relative_error, self.gaussian_true_rate)

    def to_dict(self) -> dict[str, Any]:
        """The fields and both distances in dB."""
        distances = {name: getattr(self, name) for name in ("db_above_code_rate", "db_above_true_rate")}
        return {**dataclasses.asdict(self), **distances}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> LayerReport:
        """The report that `to_dict` wrote, also after a way through JSON."""
        return cls(**_known_fields(cls, fields))


@dataclasses.dataclass
class BlockReport:
    """Fine-tuning of one block (arXiv 2401.06118, section 3.4).

    Errors are ||Y - Yq||^2 / ||Y||^2 of the block's output over tokens, Y the original block's for the same
    activations, those of the model quantized up to it: before and after, on the sequences trained on and on those
    held out. history: (training, held-out) error of what is tuned for, the mean of this and of that after
    `finetune_lookahead` more blocks, at the start and after each epoch. searched: layers whose codes were searched
    again and kept.
    """

    name: str
    training_before: float | None = None
    training_after: float | None = None
    held_out_before: float | None = None
    held_out_after: float | None = None
    epochs: int = 0
    history: list[tuple[float, float]] = dataclasses.field(default_factory=list)
    searched: int = 0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> BlockReport:
        """The report that `to_dict` wrote, also after a way through JSON."""
        known = _known_fields(cls, fields)
        return cls(**{**known, "history": [tuple(errors) for errors in known.get("history", [])]})


def _known_fields(cls: Any, fields: Mapping[str, Any]) -> dict[str, Any]:
    return {field.name: fields[field.name] for field in dataclasses.fields(cls) if field.name in fields}


@dataclasses.dataclass
class QuantizationReport:
    """One run of `quantize_model`.

    phases: seconds by name, in order. sizes: bytes on disk as `original_bytes`, `quantized_bytes` and, of
    those, `original_embedding_bytes`, `quantized_embedding_bytes`; the original's may be unknown. data:
    SHA-256 of the sources and of the token ids. note: what a reader of the sizes should know of the original.
    diagnoses: sentences of what may be wrong and what to do (`diagnose`).
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
            _layer_table(self),
            "dB: above the Gaussian reference, at the rate of the codes and at the true rate\n",
            *([_block_table(self.blocks)] if self.blocks else []),
            _size_table(self),
            *([self.note] if self.note else []),
            _summary(self),
            *([_diagnosis_list(self.diagnoses)] if self.diagnoses else []),
        ]
        return Group(*parts)


def write_json(path: str | os.PathLike[str], fields: Mapping[str, Any]) -> None:
    """Write `fields` as JSON through a temporary file beside `path`, which is never half written."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(fields, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def megabytes(n_bytes: int) -> str:
    """A size for people: decimal megabytes."""
    return f"{n_bytes / 1e6:,.1f} MB"


def db_text(distance: float | None) -> str:
    """A distance for people: "+1.23", or a dash where there is none."""
    return "-" if distance is None else f"{distance:+.2f}"


def kind_of(name: str) -> str:
    """The layer's name inside its block: "model.layers.3.mlp.experts.7.w1" -> "mlp.experts.*.w1"."""
    inside = re.sub(r"^.*?\.\d+\.", "", name)
    return re.sub(r"\.\d+(?=\.)", ".*", inside)


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def make_table(title: str, headers: tuple[str, ...]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, header in enumerate(headers):
        table.add_column(header, justify="right" if index else "left", no_wrap=True)
    return table


def _layer_table(report: QuantizationReport) -> Any:
    table = make_table(
        f"{len(report.layers)} layers at {report.bits_per_weight:.3f} bits per weight, means over blocks"
        + (", before fine-tuning" if report.blocks else ""),
        ("layer", "n", "out x in", "error", "worst", "dB code", "dB true", "bits"),
    )
    mixed = len({layer.scheme for layer in report.layers}) > 1
    groups: dict[tuple[str, str], list[LayerReport]] = {}
    for layer in report.layers:
        kind = f"{kind_of(layer.name)} {layer.scheme}" if mixed else kind_of(layer.name)
        groups.setdefault((kind, f"{layer.out_features}x{layer.in_features}"), []).append(layer)
    for (kind, shape), layers in groups.items():
        errors = [layer.relative_error for layer in layers]
        table.add_row(
            kind,
            str(len(layers)),
            shape,
            f"{_mean(errors):.5f}",
            f"{max(errors):.5f}",
            db_text(_mean([layer.db_above_code_rate for layer in layers])),
            db_text(_mean([layer.db_above_true_rate for layer in layers])),
            f"{layers[0].bits_per_weight:.2f}",
        )
    return table


def _block_table(blocks: list[BlockReport]) -> Any:
    table = make_table(
        "Relative error of each block's output, before and after fine-tuning",
        ("block", "held out", "after", "change", "training", "after", "epochs"),
    )
    for block in blocks:
        before, after = block.held_out_before, block.held_out_after
        table.add_row(
            block.name,
            _error_text(before),
            _error_text(after),
            f"{after / before - 1:+.0%}" if before and after is not None else "-",
            _error_text(block.training_before),
            _error_text(block.training_after),
            str(block.epochs),
        )
    return table


def _error_text(error: float | None) -> str:
    return "-" if error is None else f"{error:.5f}"


def _diagnosis_list(sentences: list[str]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 1))
    for sentence in sentences:
        table.add_row("!", Text(sentence))
    return table


def _size_table(report: QuantizationReport) -> Any:
    table = make_table("Size on disk", ("", "all", "embeddings", "without embeddings"))
    for which in ("original", "quantized"):
        total = report.sizes.get(f"{which}_bytes")
        embedding = report.sizes.get(f"{which}_embedding_bytes", 0)
        if total is not None:
            table.add_row(which, megabytes(total), megabytes(embedding), megabytes(total - embedding))
    return table


def _summary(report: QuantizationReport) -> Any:
    phases = " · ".join(f"{name} {seconds:.1f}" for name, seconds in report.phases.items())
    return (
        f"{report.sequences} sequences, {report.tokens:,} tokens · {report.threads} threads, {report.isa} · "
        f"peak memory {report.peak_memory_bytes / 2**30:.2f} GiB\n"
        f"seconds: {phases} · total {sum(report.phases.values()):.1f}"
    )
