"""What the benchmarks share: the machine in words, tables, JSON."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


def machine(device: str = "cpu") -> dict[str, Any]:
    """CPU, cores, instruction set, GPU if it is the device, versions and commit, for the JSON."""
    from aqlm_c import _core
    from aqlm_c.versions import versions

    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].split(":", 1)[1].strip() if models else cpu
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    gpu = {}
    if device == "cuda":
        import torch

        gpu = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return {
        **gpu,
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": _core.get_num_threads(),
        "isa": _core.get_isa(),
        "versions": versions(),
        "commit": os.environ.get("AQLM_C_COMMIT") or commit.stdout.strip() or None,  # of a copy without history
        "date": time.strftime("%Y-%m-%d"),
    }


def text(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def show(title: str, rows: list[dict[str, Any]], hidden: Collection[str] = ()) -> None:
    """Print rows as a table, without the columns `hidden`; all have the same keys."""
    shown = [{name: value for name, value in row.items() if name not in hidden} for row in rows]
    table = Table(title=title, title_justify="left")
    for name in shown[0]:
        table.add_column(name, justify="left" if isinstance(shown[0][name], str) else "right", no_wrap=True)
    for row in shown:
        table.add_row(*map(text, row.values()))
    Console(width=max(Console().width, 170)).print(table)  # wide enough for every name, in a pipe too


def shape(text: str) -> tuple[int, int] | None:
    """(out, in) of "OUTxIN"."""
    sizes = text.split("x")
    return (int(sizes[0]), int(sizes[1])) if len(sizes) == 2 and all(map(str.isdecimal, sizes)) else None


def pivot(rows: list[dict[str, Any]], lines: Sequence[str], column: str, values: Sequence[str]) -> str:
    """A Markdown table, for the README: a line for each value of `lines`, a column for each of `column`."""
    columns = dict.fromkeys(row[column] for row in rows)
    cells: dict[tuple, dict[str, str]] = {}
    for row in rows:
        said = [f"{row[value]:.3g}" for value in values if row[value] is not None]
        cells.setdefault(tuple(row[line] for line in lines), {})[row[column]] = " / ".join(said)
    table = [[*lines, *columns], ["---"] * (len(lines) + len(columns))]
    table += [[*map(str, line), *(found.get(name, "") for name in columns)] for line, found in cells.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in table)


def save(name: str, rows: list[dict[str, Any]], path: str | None = None, device: str = "cpu", **more: Any) -> Path:
    """Write rows and the machine to results/<name>.json, or to `path`."""
    target = Path(path) if path else RESULTS / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(".tmp")
    temporary.write_text(as_lines({"benchmark": name, "machine": machine(device), **more, "rows": rows}))
    os.replace(temporary, target)
    return target


def as_lines(fields: dict[str, Any]) -> str:
    """JSON with a line for each field and, where a field is a list of rows, for each row: files stay short, and a diff
    of two runs shows rows.
    """
    lines = []
    for name, value in fields.items():
        text_of = json.dumps(value)
        if value and isinstance(value, list) and all(isinstance(row, dict) for row in value):
            text_of = "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
        lines.append(f" {json.dumps(name)}: {text_of}")
    return "{\n" + ",\n".join(lines) + "\n}\n"
