"""Models beside each other: one table, its plot, and both as a page that needs no other file."""

from __future__ import annotations

import dataclasses
import html
import io
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..errors import printable, require
from ..units import megabytes
from .family import Family, size_text
from .tables import make_table

SCHEMA = 1
Row = dict[str, Any]
_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#7f7f7f")
_LEAST = 1e4  # parameters, below which a far size is not said
_AVERAGED = ("bits", "effective_bits", "bytes", "seconds")
_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
figure { margin: 1rem 0; background: #fff; border-radius: 6px; padding: .5rem; }
figure svg { width: 100%; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #8884; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
tr.front td:first-child { font-weight: 600; }
footer, .note { color: #888; font-size: .9em; }
"""


@dataclasses.dataclass(repr=False)
class Comparison:
    """Rows of models: "name", "method" (what points of one colour have in common), "seeds", "bits" (true ones of the
    quantized weights), "effective_bits" (of the whole model), "bytes", "scores" (by text: perplexity, kl, top1, and
    the standard deviations of several seeds as perplexity_std), "tasks" (accuracy by name), "seconds"; None where
    something is not known. original: its row, if there is one. family: by whose line `complete` adds
    "effective_parameters" and "extrapolated". facts: date, command, versions, how texts were cut.
    """

    rows: list[Row]
    original: Row | None = None
    family: Family | None = None
    title: str = "Comparison"
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)

    def complete(self) -> Comparison:
        """Itself, with effective sizes, and "front": whether no other row has both fewer bytes (bits, where these are
        not all known) and a lower perplexity on the first text.
        """
        points = {id(row): (self.size_of(row), self.perplexity_of(row)) for row in self.rows}
        for row in self.rows:
            size, perplexity = points[id(row)]
            known = size is not None and perplexity is not None
            others = [p for key, p in points.items() if key != id(row) and None not in p] if known else []
            row["front"] = known and not any(p != (size, perplexity) and _below(p, (size, perplexity)) for p in others)
            if self.family is not None and perplexity is not None:
                found = self.family.effective(perplexity)
                row |= {"effective_parameters": found.parameters, "extrapolated": found.extrapolated}
        self.rows.sort(key=lambda row: (points[id(row)][0] or math.inf, points[id(row)][1] or math.inf))
        return self

    @property
    def texts(self) -> list[str]:
        """Names of the texts, in order."""
        return list(dict.fromkeys(text for row in self.rows for text in row["scores"]))

    @property
    def sized_by(self) -> str:
        """What rows are compared by: "bytes", or "bits" where some have none."""
        return "bytes" if all(row.get("bytes") for row in self.rows) else "bits"

    def size_of(self, row: Row) -> float | None:
        """By `sized_by`."""
        value = row.get(self.sized_by)
        return None if value is None else float(value)

    def perplexity_of(self, row: Row, text: str | None = None) -> float | None:
        """On a text, or the first one."""
        score = row["scores"].get(text or next(iter(self.texts), ""))
        return None if score is None else float(score["perplexity"])

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        family = None
        if self.family is not None:
            sizes = {str(size): value for size, value in self.family.perplexities.items()}
            family = {"name": self.family.name, "text": self.family.text, "perplexities": sizes}
        fields = {"schema": SCHEMA, "title": self.title, "facts": self.facts, "family": family}
        return {**fields, "original": self.original, "rows": self.rows}

    def columns(self) -> tuple[list[str], list[list[str]]]:
        """Heads and cells of the table, as text."""
        several = any((row.get("seeds") or 1) > 1 for row in self.rows)
        tasks = list(dict.fromkeys(task for row in self.rows for task in row.get("tasks") or {}))
        heads = ["model", *(["seeds"] if several else []), "bits", "of all", "bytes"]
        for text in self.texts:
            heads += [text, "KL", "top-1"]
        heads += [*tasks, *(["as good as"] if self.family is not None else [])]
        rows = [*([self.original] if self.original else []), *self.rows]
        return heads, [self._cells(row, several, tasks) for row in rows]

    def _cells(self, row: Row, several: bool, tasks: Sequence[str]) -> list[str]:
        seeds = [str(row.get("seeds") or 1)] if several else []
        cells = [f"{row['name']}{' *' if row.get('front') else ''}", *seeds]
        cells += [_text(row.get("bits"), ".3f"), _text(row.get("effective_bits"), ".3f")]
        cells.append("-" if not row.get("bytes") else megabytes(round(row["bytes"])))
        for text in self.texts:
            score = row["scores"].get(text, {})
            deviation = f" ± {score['perplexity_std']:.2g}" if score.get("perplexity_std") is not None else ""
            cells += [_text(score.get("perplexity"), ".4g") + deviation]
            cells += [_text(score.get("kl"), ".4f"), _text(score.get("top1"), ".1%")]
        cells += [_text((row.get("tasks") or {}).get(task), ".1%") for task in tasks]
        if self.family is not None:
            size: float | None = row.get("effective_parameters")
            far = bool(row.get("extrapolated"))
            if size is None or (far and size < _LEAST):
                cells.append("far" if far else "-")
            else:
                cells.append(f"{size_text(size)}{' (far)' if far else ''}")
        return cells

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.markup import escape

        heads, rows = self.columns()
        table = make_table(self.title, tuple(map(escape, heads)))
        table.columns[0].no_wrap, table.columns[0].overflow = False, "fold"
        for cells in rows:
            table.add_row(*map(escape, cells))
        return Group(table, *self.notes())

    def notes(self) -> list[str]:
        """What the table's figures mean."""
        found = [
            f"*: no other row is both smaller, by {self.sized_by}, and better on {next(iter(self.texts), 'a text')}.",
            "bits: of the quantized weights with all that is stored for them; of all: per parameter.",
        ]
        if self.family is not None:
            found.append(
                f"as good as: an unquantized {self.family.name} of so many parameters, by the line of its perplexities "
                f"on {self.family.text}; far: beyond the sizes that this line was fitted to."
            )
        return found

    def figure(self) -> Any:
        """A matplotlib figure: perplexity by true bits, and by bytes, a colour for each method, the front as a line.

        Raises ImportError, with its cure, where matplotlib is not installed.
        """
        figures = require("matplotlib.figure")
        figure = figures.Figure(figsize=(11, 4.6), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        labels = {"bits": "bits per quantized weight", "bytes": "megabytes on disk"}
        for panel, (name, label) in zip(panels, labels.items(), strict=True):
            self._draw(panel, name, 1e6 if name == "bytes" else 1.0)
            panel.set(xlabel=label, yscale="log")
            for axis_formatter in (panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter):
                axis_formatter(lambda value, _: f"{value:.4g}")
            panel.grid(alpha=0.3, which="both")
        panels[0].set_ylabel(f"perplexity, {next(iter(self.texts), '')}")
        panels[1].legend(fontsize=8, loc="upper right")
        figure.suptitle(printable(self.title), fontsize=11)
        return figure

    def _draw(self, panel: Any, name: str, unit: float) -> None:
        for place, method in enumerate(dict.fromkeys(row["method"] for row in self.rows)):
            rows = [row for row in self.rows if row["method"] == method and row.get(name) and self.perplexity_of(row)]
            points = sorted((row[name] / unit, self.perplexity_of(row)) for row in rows)
            if points:
                panel.plot(*zip(*points, strict=True), "o", ms=5, color=_COLOURS[place % len(_COLOURS)], label=method)
        front = sorted((row[name] / unit, self.perplexity_of(row)) for row in self._front(name))
        for row in self._front(name):
            where = (row[name] / unit, self.perplexity_of(row))
            label = printable(str(row.get("scheme") or ""))
            panel.annotate(label, where, (4, 4), textcoords="offset points", fontsize=7, color="#555")
        if len(front) > 1:
            panel.plot(*zip(*front, strict=True), "-", lw=1, color="#555", zorder=0, label="front")
        if self.original is not None and (value := self.perplexity_of(self.original)):
            panel.axhline(value, ls="--", lw=1, color="#555", label="original")

    def _front(self, name: str) -> list[Row]:
        points = [(row, row[name], self.perplexity_of(row)) for row in self.rows if row.get(name)]
        known = [(row, (size, value)) for row, size, value in points if value is not None]
        return [row for row, own in known if not any(other != own and _below(other, own) for _, other in known)]

    def svg(self) -> str:
        """The figure as SVG, whose texts are texts."""
        matplotlib = require("matplotlib")
        buffer = io.StringIO()
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "aqlm_c"}):
            self.figure().savefig(buffer, format="svg", metadata={"Date": None})
        return buffer.getvalue()

    def page(self) -> str:
        """An HTML page with the plot, the table and what they are of; it refers to no other file."""
        heads, rows = self.columns()
        fronts = [False] * (self.original is not None) + [bool(row["front"]) for row in self.rows]
        body = "".join(
            f"<tr{' class=front' if front else ''}>{''.join(f'<td>{_html(cell)}</td>' for cell in cells)}</tr>\n"
            for front, cells in zip(fronts, rows, strict=True)
        )
        drawn = self.svg()
        facts = "".join(f"<br>{_html(name)}: {_html(_fact(value))}" for name, value in self.facts.items())
        return (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n<title>{_html(self.title)}</title>\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>\n'
            f"<body><h1>{_html(self.title)}</h1>\n<figure>{drawn[drawn.index('<svg') :]}</figure>\n"
            f'<div class="wide"><table><thead><tr>{"".join(f"<th>{_html(head)}</th>" for head in heads)}</tr></thead>\n'
            f"<tbody>{body}</tbody></table></div>\n"
            f'<p class="note">{"<br>".join(map(_html, self.notes()))}</p>\n<footer>{facts[4:]}</footer></body></html>\n'
        )


def averaged_rows(rows: Iterable[Row]) -> list[Row]:
    """Rows of the same "name" as one: means, and standard deviations of perplexity where there are several."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["name"], []).append(row)
    return [_averaged(group) for group in groups.values()]


def _averaged(group: Sequence[Row]) -> Row:
    if len(group) == 1:
        return {**group[0], "seeds": 1}
    found: Row = {**group[0], "seeds": len(group), "scores": {}}
    found |= {name: _mean([row.get(name) for row in group]) for name in _AVERAGED}
    for text in group[0]["scores"]:
        scores = [row["scores"][text] for row in group if text in row["scores"]]
        found["scores"][text] = {name: _mean([score.get(name) for score in scores]) for name in scores[0]}
        if len(scores) > 1:
            found["scores"][text]["perplexity_std"] = statistics.stdev(score["perplexity"] for score in scores)
    tasks = [row.get("tasks") or {} for row in group]
    found["tasks"] = {task: _mean([of.get(task) for of in tasks]) for task in tasks[0]}
    return found


def _mean(values: Sequence[Any]) -> float | None:
    known = [value for value in values if isinstance(value, (int, float))]
    return statistics.fmean(known) if len(known) == len(values) and known else None


def _below(one: Sequence[Any], other: Sequence[Any]) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True))


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _fact(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    return value if isinstance(value, str) else json.dumps(value)


def _html(text: str) -> str:
    return html.escape(printable(text))
