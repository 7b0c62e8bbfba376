"""Reports as tables for a rich console, which need not be a terminal."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from ..model.kinds import kind_of
from ..units import megabytes
from .layers import BlockReport, LayerReport

DISTANCES = ("db_above_code_rate", "db_above_true_rate")  # of a LayerReport


def db_text(distance: float | None) -> str:
    """A distance for people: "+1.23", or a dash where there is none."""
    return "-" if distance is None else f"{distance:+.2f}"


def has_reference(layers: Sequence[LayerReport]) -> bool:
    """Whether any layer was compared with Gaussian weights."""
    return any(layer.gaussian_true_rate is not None for layer in layers)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def make_table(title: str, headers: tuple[str, ...]) -> Any:
    """An empty table in the style of all."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    class Titled(Table):
        """Its title is as wide as the console, not as the table."""

        def __rich_console__(self, console: Any, options: Any) -> Any:
            yield Text.from_markup(title, style="bold")
            yield from super().__rich_console__(console, options)

    table = Titled(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, header in enumerate(headers):
        table.add_column(header, justify="right" if index else "left", no_wrap=True)
    return table


def bits_text(bits_per_weight: float, effective_bits: float | None) -> str:
    """The two figures of a model's size, which say different things."""
    whole = "" if effective_bits is None else f", {effective_bits:.3f} per parameter of the whole model"
    return f"{bits_per_weight:.3f} bits per weight{whole}"


def layer_table(
    layers: Sequence[LayerReport], bits_per_weight: float, effective_bits: float | None, tuned: bool
) -> Any:
    """Errors by kind of layer, of blocks that were `tuned` afterwards or not; `--json` has each layer."""
    embeddings = sum(layer.embedding for layer in layers)
    count = f"{len(layers) - embeddings} layers" + (f" and {embeddings} embeddings" if embeddings else "")
    referenced = has_reference(layers)
    table = make_table(
        f"{count}, {bits_text(bits_per_weight, effective_bits)}; means over blocks"
        + (", before fine-tuning" if tuned else ""),
        ("layer", "n", "out x in", "error", "worst", *(("dB code", "dB true") if referenced else ()), "bits"),
    )
    mixed = len({layer.scheme for layer in layers}) > 1
    groups: dict[tuple[str, str], list[LayerReport]] = {}
    for layer in layers:
        kind = f"{kind_of(layer.name)} {layer.scheme}" if mixed else kind_of(layer.name)
        groups.setdefault((kind, f"{layer.out_features}x{layer.in_features}"), []).append(layer)
    for (kind, shape), alike in groups.items():
        errors = [layer.relative_error for layer in alike if layer.relative_error is not None]
        distances = [db_text(_mean([getattr(layer, name) for layer in alike])) for name in DISTANCES if referenced]
        table.add_row(
            kind,
            str(len(alike)),
            shape,
            error_text(_mean(errors)),
            error_text(max(errors, default=None)),
            *distances,
            f"{alike[0].bits_per_weight:.2f}",
        )
    return table


def block_table(blocks: Sequence[BlockReport]) -> Any:
    """What fine-tuning did to each block."""
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


def html(shown: Any, width: int = 120) -> str | None:
    """Something rich as HTML for a notebook; None, which leaves it to `repr`, where rich is not installed."""
    try:
        from rich.console import Console
    except ModuleNotFoundError:
        return None
    console = Console(file=io.StringIO(), record=True, width=width, highlight=False, force_jupyter=False)
    console.print(shown)
    text = console.export_html(inline_styles=True, code_format="{code}").rstrip()
    return f'<pre style="line-height: 1.2; overflow-x: auto">{text}</pre>'


def list_of(sentences: Sequence[str]) -> Any:
    """One sentence a line, each marked."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 1))
    for sentence in sentences:
        table.add_row("!", Text(sentence))
    return table


def size_table(sizes: Mapping[str, int]) -> Any:
    """Bytes on disk, as `QuantizationReport.sizes` has them."""
    table = make_table("Size on disk", ("", "all", "embeddings", "without embeddings"))
    for which in ("original", "quantized"):
        total = sizes.get(f"{which}_bytes")
        embedding = sizes.get(f"{which}_embedding_bytes", 0)
        if total is not None:
            table.add_row(which, megabytes(total), megabytes(embedding), megabytes(total - embedding))
    return table
