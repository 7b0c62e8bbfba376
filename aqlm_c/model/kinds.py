"""Layers of one kind: those whose names differ in numbers alone."""

from __future__ import annotations

import re


def kind_of(name: str) -> str:
    """The layer's name inside its block: "model.layers.3.mlp.experts.7.w1" -> "mlp.experts.*.w1"."""
    inside = re.sub(r"^.*?\.\d+\.", "", name)
    return re.sub(r"\.\d+(?=\.)", ".*", inside)
