"""Plots of a study's rows: for ablation.py."""

from __future__ import annotations

import statistics
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import _study

COLOURS = ["#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b"]
NAMES = {"perplexity": "perplexity", "kl": "KL to the original, nats"}
X = {"samples": "calibration sequences", "beam": "width of the beam", "tokens": "tuning tokens, millions (2^20)"}
Series = tuple[str, Sequence[tuple[Any, _study.Spread]]]  # label; x, y


def metric(text: str, name: str) -> Callable[[_study.Row], float]:
    return lambda row: row["scores"][text][name]


def spreads(rows: list[_study.Row], value: Callable[[_study.Row], float]) -> dict[str, _study.Spread]:
    """By point."""
    return {point: _study.Spread.of(found.values()) for point, found in _study.values(rows, value).items()}


def draw(axes: Any, series: Sequence[Series], dashed: bool = False, alone: Any = None) -> None:
    """Means with error bars, joined by lines but for the point at x = alone."""
    for place, (label, points) in enumerate(series):
        style = {"marker": "s" if dashed else "o", "ms": 4, "capsize": 3, "color": COLOURS[place % len(COLOURS)]}
        for apart in (False, True):
            chosen = [(x, found) for x, found in points if (alone is not None and x == alone) == apart]
            x, y = [x for x, _ in chosen], [found.mean for _, found in chosen]
            bars = [found.deviation or 0.0 for _, found in chosen]
            line = {"ls": "none"} if apart else {"ls": "--" if dashed else "-", "lw": 1.3, "label": label}
            if chosen:
                axes.errorbar(x, y, bars, **style, **line)


def originals(rows: list[_study.Row]) -> str:
    said = [f"{text} {score['original_perplexity']:.4g}" for text, score in rows[0]["scores"].items()]
    return f"original: {', '.join(said)}"


def of_sizes(figure: Any, study: str, rows: list[_study.Row]) -> None:
    """Perplexity and KL over a size: of samples, tokens, the beam, which has its time too."""
    texts = list(rows[0]["scores"])
    panels = figure.subplots(1, 3 if study == "beam" else 2)
    sizes = sorted({_study.size(row["point"]) for row in rows})
    alone = 0 if study == "beam" and not sizes[0] else None  # exact pairs are no width
    place = {size: number for number, size in enumerate(sizes)}  # steps are doublings, and 0 has no logarithm
    for panel, (name, label) in zip(panels, NAMES.items(), strict=False):
        for codes in ("", "+pv"):
            chosen = [row for row in rows if row["point"].endswith("+pv") == bool(codes)]
            found = [(text, spreads(chosen, metric(text, name))) for text in texts] if chosen else []
            said = f", {'codes too' if codes else 'without codes'}" if study == "tokens" else ""
            lines = [(f"{text}{said}", [(place[_study.size(p)], y) for p, y in by.items()]) for text, by in found]
            draw(panel, lines, bool(codes), alone)
        panel.set(ylabel=label, title=originals(rows) if name == "perplexity" else None)
        panel.title.set_fontsize(9)
    if study == "beam":
        taken = [(place[_study.size(p)], y) for p, y in spreads(rows, lambda row: row["seconds"]).items()]
        draw(panels[2], [("to quantize", taken)], alone=alone)
        panels[2].set(ylabel="seconds to quantize", ylim=(0, None))
    names = ["exact\npairs" if study == "beam" and not size else f"{size:g}" for size in sizes]
    for panel in panels:
        panel.set_xticks(range(len(sizes)), names)
        panel.set(xlabel=X[study])
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)


def of_domains(figure: Any, study: str, rows: list[_study.Row]) -> None:
    """A heat map each of perplexity and KL: a line for what was calibrated on, a column for what is evaluated."""
    texts, names = list(rows[0]["scores"]), list(dict.fromkeys(row["point"] for row in rows))
    for panel, (name, label) in zip(figure.subplots(1, 2), NAMES.items(), strict=True):
        columns = [spreads(rows, metric(text, name)) for text in texts]
        best = [min(column[row].mean for row in names) for column in columns]
        over = [[100 * (c[row].mean / b - 1) for c, b in zip(columns, best, strict=True)] for row in names]
        most = max(map(max, over)) or 1.0
        image = panel.imshow(over, cmap="viridis_r", vmin=0, vmax=most, aspect="auto")
        for y, row in enumerate(names):
            for x, column in enumerate(columns):
                found = column[row]
                said = f"{found.mean:.4g}" + ("" if found.deviation is None else f"\n± {found.deviation:.2g}")
                dark = over[y][x] > 0.55 * most
                weight = "bold" if over[y][x] == 0 else "normal"
                panel.text(x, y, said, ha="center", va="center", fontsize=8, weight=weight, color="w" if dark else "k")
        panel.set_xticks(range(len(texts)), texts, rotation=25, ha="right")
        panel.set_yticks(range(len(names)), names)
        panel.set(xlabel="evaluated", ylabel="calibrated on", title=label)
        panel.figure.colorbar(image, ax=panel, label="% over the best of the column")


def of_formats(figure: Any, study: str, rows: list[_study.Row]) -> None:
    """Perplexity and KL over true bits a weight, a line for codebooks of one kind; means over the texts."""
    from matplotlib.ticker import LogLocator, NullFormatter

    groups: dict[str, list[_study.Row]] = {}
    for row in rows:
        groups.setdefault(row["point"].partition("g")[0], []).append(row)
    nominal = {row["point"]: row["nominal bits"] for row in rows}
    bits = spreads(rows, lambda row: row["bits"])
    texts = list(rows[0]["scores"])
    values: dict[str, Callable[[_study.Row], float]] = {
        "perplexity": lambda row: statistics.geometric_mean(s["perplexity"] for s in row["scores"].values()),
        "kl": lambda row: statistics.fmean(s["kl"] for s in row["scores"].values()),
    }
    for panel, (name, label) in zip(figure.subplots(1, 2), NAMES.items(), strict=True):
        lines, labelled = [], dict.fromkeys(nominal.values(), 0)
        for place, (kind, group) in enumerate(groups.items()):
            found = sorted((bits[point].mean, y, point) for point, y in spreads(group, values[name]).items())
            lines.append((kind, [(x, y) for x, y, _ in found]))
            for x, y, point in found:
                above = labelled[nominal[point]] % 2 == 0  # such points lie close to each other
                labelled[nominal[point]] += 1
                where: dict[str, Any] = {"xytext": (4, 4) if above else (-4, -4), "ha": "left" if above else "right"}
                where |= {"va": "bottom" if above else "top", "textcoords": "offset points", "fontsize": 7}
                panel.annotate(point, (x, y.mean), color=COLOURS[place % len(COLOURS)], **where)
        draw(panel, lines)
        panel.set(xlabel="bits per weight, codebooks and scales included", yscale="log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.set(ylabel=f"{label} (mean of {', '.join(texts)})")
        panel.grid(alpha=0.3, which="both")
        panel.legend(fontsize=8, title="codebooks x bits")


def plot(study: str, rows: list[_study.Row], said: str, out: Path) -> list[Path]:
    """Writes OUT/NAME.png and .svg, with the conclusion below; none, with a line on stderr, without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed", file=sys.stderr)
        return []
    wide = 13 if study in ("domain", "beam") else 11
    figure = Figure(figsize=(wide, 5.2), layout="constrained")
    {"domain": of_domains, "format": of_formats}.get(study, of_sizes)(figure, study, rows)
    seeds = len({row["seed"] for row in rows})
    figure.suptitle(f"{study}: mean and standard deviation of {seeds} seed{'s' * (seeds > 1)}", fontsize=11)
    figure.supxlabel("\n".join(textwrap.wrap(said, 12 * wide)), fontsize=9)
    targets = [out / f"{study}.png", out / f"{study}.svg"]
    figure.savefig(targets[0], dpi=120)
    figure.savefig(targets[1], metadata={"Date": None})
    return targets
