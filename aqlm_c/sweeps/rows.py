"""Rows of a sweep: on disk, and what they say."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import require, wrong
from ..report.tables import make_table
from ..units import duration, megabytes

Row = dict[str, Any]
COMPLETE, FAILED = "complete", "failed"
_LEADING = ("trial", "state", "model", "pareto")
_FIGURES = ("perplexity", "kl", "bits", "effective_bits", "bytes", "seconds")
_SHOWN = 20  # rows of the table


class RowFile:
    """Adds rows to the end of a file, a JSON line each, on disk before `add` returns; one process at a time, from the
    first row on.

    What a killed process began to write after the last whole line is cut off. Raises ValueError where another process
    has the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None

    def open(self) -> BinaryIO:
        """Take the file now."""
        if self._file is not None:
            return self._file
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = file = open(self._path, "a+b")  # noqa: SIM115  (open as long as the worker)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.close()
            raise wrong("out", self._path.name, "rows that no other process writes: another --index") from None
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        return file

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a row; ValueError for NaN, OSError on a full disk, for one."""
        data = json.dumps(row, allow_nan=False).encode() + b"\n"
        file = self.open()
        file.write(data)
        file.flush()
        os.fsync(file.fileno())

    def close(self) -> None:
        """Give the file free."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> RowFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_rows(directory: Path) -> list[Row]:
    """The rows of all files of a directory, of a key the first one; what is no whole line is left out."""
    found: dict[str, Row] = {}
    for path in sorted(directory.glob("*.jsonl")):
        data = path.read_bytes()
        for number, line in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), 1):
            try:
                row = json.loads(line)
                key = row["key"]
            except (ValueError, TypeError, KeyError):
                raise ValueError(f"{path}: line {number}: no row of a sweep, expected another --out") from None
            if key not in found or (found[key]["state"] != COMPLETE and row["state"] == COMPLETE):
                found[key] = row
    return sorted(found.values(), key=lambda row: (row["trial"] is None, row["trial"] or 0, row["key"]))


def failed_row(error: str) -> Row:
    """The part of a row that says why a trial has no result."""
    return {"state": FAILED, "error": error}


def objectives_of(row: Row, names: Sequence[str]) -> list[float]:
    """The row's figures by name; NaN where it has none."""
    return [math.nan if row.get(name) is None else float(row[name]) for name in names]


def averaged(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Over texts: the geometric mean of perplexities, the mean of KL."""
    if not scores:
        return {}
    found = {"perplexity": math.exp(statistics.fmean(math.log(score["perplexity"]) for score in scores.values()))}
    kl = [score["kl"] for score in scores.values() if "kl" in score]
    return {**found, "kl": statistics.fmean(kl)} if kl else found


def mark_pareto(rows: Iterable[Row], names: Sequence[str]) -> list[Row]:
    """The rows, each with "pareto": whether no other complete row is as low in all of `names` and lower in one."""
    rows = [dict(row) for row in rows]
    points = {id(row): objectives_of(row, names) for row in rows if row["state"] == COMPLETE}
    for row in rows:
        own = points.get(id(row))
        row["pareto"] = (
            own is not None
            and not any(math.isnan(value) for value in own)
            and not any(
                other != own and all(a <= b for a, b in zip(other, own, strict=True)) for other in points.values()
            )
        )
    return rows


def best_of(rows: Iterable[Row], names: Sequence[str]) -> Row | None:
    """The complete trial that is lowest in the first of `names`, ties by the next ones; foreign models are none."""
    own = [row for row in rows if row["state"] == COMPLETE and row.get("foreign") is None]
    own = [row for row in own if not math.isnan(objectives_of(row, names)[0])]
    return min(own, key=lambda row: (objectives_of(row, names), row["trial"] or 0), default=None)


def flat(row: Row) -> Row:
    """A row with a column for each option, text and task, for tables."""
    found = {name: row.get(name) for name in _LEADING if name in row}
    found["model"] = row.get("foreign")
    for name, value in (row.get("params") or {}).items():
        found[f"option.{name}"] = value if isinstance(value, (int, float, str, type(None))) else json.dumps(value)
    found |= {name: row.get(name) for name in _FIGURES}
    for text, score in (row.get("scores") or {}).items():
        found |= {f"{text}.{name}": value for name, value in score.items()}
    for task in row.get("tasks") or ():
        found |= {f"{task['task']}.{name}": task[name] for name in ("acc", "acc_norm", "perplexity") if name in task}
    found |= {name: row.get(name) for name in ("error", "worker", "machine", "date", "attempt")}
    return found


def write_tables(rows: Sequence[Row], out: Path) -> list[Path]:
    """trials.csv, and trials.parquet where pyarrow is installed, each complete or as it was."""
    lines = [flat(row) for row in rows]
    columns = list(dict.fromkeys(name for line in lines for name in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    written = [replaced(out / "trials.csv", text.getvalue().encode())]
    try:
        arrow = require("pyarrow")
        parquet = require("pyarrow.parquet")
    except ImportError:
        return written
    values = {name: _of_one_type([line.get(name) for line in lines]) for name in columns}
    buffer = arrow.BufferOutputStream()
    parquet.write_table(arrow.table(values), buffer)
    return [*written, replaced(out / "trials.parquet", buffer.getvalue().to_pybytes())]


def _of_one_type(values: list[Any]) -> list[Any]:
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} and len(kinds) > 1:
        return [None if value is None else float(value) for value in values]
    return values if len(kinds) <= 1 else [None if value is None else str(value) for value in values]


def replaced(path: Path, data: bytes) -> Path:
    """The path of a file that has these bytes now: complete and on the disk, or as it was."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def table(rows: Sequence[Row], objectives: Sequence[str], count: int) -> Any:
    """The best rows for a rich console, by the first objective; those that no other row beats are marked."""
    rows = mark_pareto(rows, objectives)
    done = [row for row in rows if row["state"] == COMPLETE]
    failed = sum(row["state"] == FAILED for row in rows)
    options = list(dict.fromkeys(name for row in done for name in row.get("params") or ()))
    varied = [name for name in options if len({json.dumps((row.get("params") or {}).get(name)) for row in done}) > 1]
    trials = sum(row.get("foreign") is None for row in rows)
    title = f"{trials} of {count} trials" + (f", {failed} failed" if failed else "")
    found = make_table(title, ("trial", "", *varied, "perplexity", "KL", "bits", "bytes", "seconds"))
    done.sort(key=lambda row: [math.inf if math.isnan(value) else value for value in objectives_of(row, objectives)])
    for row in done[:_SHOWN]:
        params = row.get("params") or {}
        cells = ["" if name not in params else _short(params[name]) for name in varied]
        name = str(row["trial"]) if row.get("foreign") is None else Path(row["foreign"]).name
        found.add_row(name, "*" if row["pareto"] and len(objectives) > 1 else "", *cells, *_figures(row))
    return found


def _figures(row: Row) -> list[str]:
    perplexity, kl, bits, size, seconds = (row.get(name) for name in ("perplexity", "kl", "bits", "bytes", "seconds"))
    return [
        "-" if perplexity is None else f"{perplexity:.4f}",
        "-" if kl is None else f"{kl:.5f}",
        "-" if bits is None else f"{bits:.3f}",
        "-" if not size else megabytes(size),
        "-" if seconds is None else duration(seconds),
    ]


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 24 else f"{text[:23]}…"
