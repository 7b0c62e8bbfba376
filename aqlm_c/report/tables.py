"""Reports as tables for a rich console, which need not be a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..model.kinds import kind_of
from ..units import megabytes

if TYPE_CHECKING:
    from .report import BlockReport, LayerReport, QuantizationReport


def report_tables(report: QuantizationReport) -> Any:
    """Layers by kind, blocks, sizes on disk, seconds by phase, diagnoses."""
    from rich.console import Group

    parts = [
        _layer_table(report),
        "dB: above the Gaussian reference, at the rate of the codes and at the true rate\n",
        *([_block_table(report.blocks)] if report.blocks else []),
        _size_table(report),
        *([report.note] if report.note else []),
        _summary(report),
        *([_diagnosis_list(report.diagnoses)] if report.diagnoses else []),
    ]
    return Group(*parts)


def db_text(distance: float | None) -> str:
    """A distance for people: "+1.23", or a dash where there is none."""
    return "-" if distance is None else f"{distance:+.2f}"


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
            error_text(before),
            error_text(after),
            f"{after / before - 1:+.0%}" if before and after is not None else "-",
            error_text(block.training_before),
            error_text(block.training_after),
            str(block.epochs),
        )
    return table


def error_text(error: float | None) -> str:
    """An error for people: "0.02600", or a dash where there is none."""
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
