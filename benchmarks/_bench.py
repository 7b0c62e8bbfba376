"""What the benchmarks share: the machine in words, tables, JSON."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """CPU, cores, instruction set, versions and commit, for the JSON."""
    from aqlm_c import _core
    from aqlm_c.report import versions

    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].split(":", 1)[1].strip() if models else cpu
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": _core.get_num_threads(),
        "isa": _core.get_isa(),
        "versions": versions(),
        "commit": commit.stdout.strip() or None,
        "date": time.strftime("%Y-%m-%d"),
    }


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows as a table; all have the same keys."""
    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(name, justify="left" if isinstance(rows[0][name], str) else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=max(Console().width, 150)).print(table)  # wide enough for every name, in a pipe too


def save(name: str, rows: list[dict[str, Any]], path: str | None = None, **more: Any) -> Path:
    """Write rows and the machine to results/<name>.json, or to `path`."""
    target = Path(path) if path else RESULTS / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(".tmp")
    temporary.write_text(json.dumps({"benchmark": name, "machine": machine(), **more, "rows": rows}, indent=1) + "\n")
    os.replace(temporary, target)
    return target
