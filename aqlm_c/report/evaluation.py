"""What an evaluation found: a row for each model and text, a row for each model and task."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import require, wrong
from . import tables

Row = dict[str, Any]

_SHARES = ("acc", "acc_norm")  # metrics of tasks that are shown in percent


@dataclasses.dataclass(repr=False)
class Evaluation:
    """What `evaluate_models` returns. A notebook shows its tables; `to_frame` gives rows, `to_dict` all of it.

    results: of each model and text, the figures that `perplexity` or, with an original, `divergence` gives, with
    "model", "data" (the source), its "sha256" and "bos", the token that each window begins with, None where windows are
    cut out of the stream. tasks: of each model, the original among them, and task: "model", "task", "items", "shots",
    "bos" and the harness's metrics ("acc", "acc_norm", "perplexity"), each with its "..._stderr". against: the
    original, if there was one. bos: what was asked for.
    """

    models: list[str]
    against: str | None = None
    device: str = "cpu"
    dtype: str = "auto"
    bos: str = "auto"
    results: list[Row] = dataclasses.field(default_factory=list)
    tasks: list[Row] = dataclasses.field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON; "model" is the first of "models"."""
        return {"model": self.models[0], **dataclasses.asdict(self)}

    def to_frame(self, what: str = "results") -> Any:
        """A pandas DataFrame, one row for each of "results" or "tasks".

        Raises ValueError for another name, ImportError where pandas is not installed.
        """
        if what not in ("results", "tasks"):
            raise wrong("what", what, "'results' or 'tasks'")
        return require("pandas").DataFrame(getattr(self, what))

    @property
    def is_plain(self) -> bool:
        """Whether there is one perplexity for each text and nothing else: a line says it."""
        return len(self.models) == 1 and self.against is None and not self.tasks

    def figures(self) -> list[str]:
        """A line for each row: perplexity, with an original also KL, its 99th percentile and top-1; or accuracy."""
        names = ("perplexity", "kl", "kl_p99", "top1") if self.against else ("perplexity",)
        lines = [" ".join(str(row[name]) for name in names) for row in self.results]
        return lines + [str(row["acc"]) for row in self.tasks]

    def lines(self) -> list[str]:
        """A line for each text."""
        found = []
        for row in self.results:
            counts = f"{row['windows']} x {row['sequence_length']} tokens, {self.start_text(row)}"
            error = (
                "" if row["perplexity_stderr"] is None else f", standard error {figure_text(row['perplexity_stderr'])}"
            )
            figure = f"perplexity {figure_text(row['perplexity'])}"
            found.append(f"{row['data']}: {figure} ({counts}{error}, {row['seconds']:.1f} s)")
        return found

    def start_text(self, row: Mapping[str, Any]) -> str:
        """How the windows of a row of `results` begin."""
        return f"each beginning with {row['bos']}" if row["bos"] else "cut without a BOS token"

    def __repr__(self) -> str:
        against = f" against {self.against}" if self.against else ""
        figures = ", ".join(figure_text(row["perplexity"]) for row in self.results)
        perplexities = f", perplexity {figures}" if figures else ""
        return f"<Evaluation: {', '.join(self.models)}{against}{perplexities}, {len(self.tasks)} rows of tasks>"

    def _repr_html_(self) -> str | None:
        return tables.html(self)

    def __rich__(self) -> Any:
        """Tables for a rich console, and what their figures mean."""
        from rich.console import Group
        from rich.text import Text

        parts: list[Any] = []
        for source in dict.fromkeys(row["data"] for row in self.results):
            rows = [row for row in self.results if row["data"] == source]
            parts += [self._text_table(source, rows), Text(self._notes(rows[0]) + "\n")]
        if self.tasks:
            parts += [_task_table(self.tasks)]
        return Group(*parts)

    def _text_table(self, source: str, rows: Sequence[Row]) -> Any:
        from rich.markup import escape

        columns = ("KL", "99%", "top-1", "over original's") if self.against else ()
        first = rows[0]
        title = f"{source}: {first['windows']} windows of {first['sequence_length']} tokens, {self.start_text(first)}"
        table = _table(title, ("model", "perplexity", "±", *columns))
        if self.against:
            figures = (first["original_perplexity"], first["original_perplexity_stderr"])
            table.add_row(escape(f"original {self.against}"), *map(figure_text, figures), *["-"] * len(columns))
        for row in rows:
            cells = [figure_text(row["perplexity"]), figure_text(row["perplexity_stderr"])]
            if self.against:
                cells += [f"{row['kl']:.5f}", f"{row['kl_p99']:.4f}", f"{row['top1']:.2%}"]
                cells += [with_error(row["perplexity_ratio"], row["perplexity_ratio_stderr"])]
            table.add_row(escape(row["model"]), *cells)
        return table

    def _notes(self, row: Row) -> str:
        notes = "±: standard error over windows." if row["windows"] > 1 else "One window has no standard error."
        if self.against:
            notes += (
                " KL: KL(original || model) per token in nats, its mean and 99th percentile. top-1: how often both "
            )
            notes += "say the same next token."
        return notes


def figure_text(value: float | None) -> str:
    """A figure for people: "1.0800", from a million on "2.5000e+07", or a dash where there is none."""
    return "-" if value is None else f"{value:.4f}" if abs(value) < 1e6 else f"{value:.4e}"


def with_error(value: float | None, stderr: float | None) -> str:
    """A figure with its standard error, if it has one: "1.0800 ± 0.0012"."""
    return figure_text(value) + ("" if stderr is None else f" ± {figure_text(stderr)}")


def _table(title: str, headers: tuple[str, ...]) -> Any:
    from rich.markup import escape

    table = tables.make_table(escape(title), headers)
    names = table.columns[headers.index("model")]
    names.no_wrap, names.overflow = False, "fold"  # paths may be long, and figures are not to be cut for them
    return table


def _task_table(rows: Sequence[Row]) -> Any:
    """A line for each task and model, those of a task together."""
    from rich.markup import escape

    metrics = [name for name in (*_SHARES, "perplexity") if any(name in row for row in rows)]
    table = _table("Tasks: accuracy in percent, ± standard error", ("task", "model", "items", *metrics))
    names = list(dict.fromkeys(row["task"] for row in rows))
    for row in sorted(rows, key=lambda row: names.index(row["task"])):
        name = f"{row['task']}, {row['shots']} shots" if row["shots"] else row["task"]
        table.add_row(name, escape(row["model"]), str(row["items"]), *(_metric_text(row, metric) for metric in metrics))
    return table


def _metric_text(row: Row, metric: str) -> str:
    if metric not in row:
        return "-"
    value, stderr = row[metric], row[f"{metric}_stderr"]
    if metric in _SHARES:
        return f"{100 * value:.2f}" + ("" if stderr is None else f" ± {100 * stderr:.2f}")
    return with_error(value, stderr)
