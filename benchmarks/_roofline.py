"""The roofline plot of a JSON that matmul.py wrote.

python benchmarks/_roofline.py benchmarks/results/matmul.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

COLOURS = ["#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b"]
DENSE = {"float32": ("fp32", 4), "float16": ("fp16", 2), "bfloat16": ("bf16", 2)}  # the peer, its bytes a weight


def plot(source: Path) -> Path | None:
    """Writes it beside the JSON, as PNG. None, with a line on stderr, where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed", file=sys.stderr)
        return None
    result = json.loads(source.read_text())
    rows = result["rows"]
    bandwidth, peak = result["bandwidth"] * 1e9, {name: tera * 1e12 for name, tera in result["peak"].items()}
    name = rows[0]["dtype"]
    rows = [row for row in rows if row["dtype"] == name]
    axes = Figure(figsize=(8, 5), layout="constrained").subplots()
    left, right = 0.4, 4e4
    roof = [left, peak[name] / bandwidth, right]
    axes.plot(roof, [min(x * bandwidth, peak[name]) for x in roof], color="black", lw=1)
    for colour, scheme in zip(COLOURS * 3, dict.fromkeys(row["scheme"] for row in rows), strict=False):
        points = [
            (operations(row) / row["weight bytes"], operations(row) / row["ours ms"] * 1e3)
            for row in rows
            if row["scheme"] == scheme
        ]
        axes.scatter(*zip(*points, strict=True), s=14, color=colour, alpha=0.8, lw=0, label=scheme)
    peer, size = DENSE[name]
    dense = {(row["shape"], row["rows"]): row for row in rows}.values()
    points = [(2 * row["rows"] / size, operations(row) / row[f"{peer} ms"] * 1e3) for row in dense]
    axes.scatter(*zip(*points, strict=True), s=14, color="gray", marker="x", lw=0.8, label=f"torch {peer}")
    device = result["machine"].get("gpu") or f"{result['machine']['cpu']}, {result['arguments']['threads']} threads"
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="operations of the dense product by byte of the weight as stored",
        ylabel="operations by second",
        title=f"{device}: {bandwidth * 1e-9:.4g} GB/s, {peak[name] * 1e-12:.3g} TFLOP/s ({name})",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    target = source.with_suffix(".png")
    axes.figure.savefig(target, dpi=110)
    return target


def operations(row: dict) -> float:
    out, in_features = map(int, row["shape"].split("x"))
    return 2 * row["rows"] * out * in_features


if __name__ == "__main__":
    print(plot(Path(sys.argv[1])))
