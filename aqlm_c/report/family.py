"""Effective model size: how large an unquantized model of the family would be that is as good."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping
from typing import Any

from ..errors import wrong

_FAR = 2.0  # sizes beyond the family's own by more than this factor are said to be extrapolated


@dataclasses.dataclass(frozen=True)
class EffectiveSize:
    """parameters: of a model of the family with this perplexity. extrapolated: it is beyond those that were fitted."""

    parameters: float
    extrapolated: bool


@dataclasses.dataclass(frozen=True)
class Family:
    """Unquantized models of one family on one text: perplexity by parameters. text: what they were measured on.

    `effective` fits perplexity = a - b ln(parameters) by least squares, as the authors of AQLM and PV-Tuning did
    (arXiv 2405.14852). Raises ValueError for fewer than two sizes and where larger ones are no better.
    """

    name: str
    text: str
    perplexities: Mapping[float, float]

    def __post_init__(self) -> None:
        if len(self.perplexities) < 2:
            raise wrong("family", dict(self.perplexities), "two sizes at least, perplexity by parameters")
        for size, perplexity in self.perplexities.items():
            for value in (size, perplexity):
                if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                    raise wrong("family", value, "parameters and perplexities above 0")
        if self.line[1] <= 0:
            raise wrong("family", dict(self.perplexities), "larger models of lower perplexity")

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Family:
        """Of "name", "text" and "perplexities", a mapping of parameters to perplexities."""
        if set(fields) != {"name", "text", "perplexities"} or not isinstance(fields["perplexities"], Mapping):
            raise wrong("family", dict(fields), "name, text and perplexities, a mapping of parameters to perplexities")
        sizes = {_number(size): _number(value) for size, value in fields["perplexities"].items()}
        return cls(str(fields["name"]), str(fields["text"]), sizes)

    @property
    def line(self) -> tuple[float, float]:
        """(a, b) of perplexity = a - b ln(parameters)."""
        logs = [math.log(size) for size in self.perplexities]
        slope, intercept = statistics.linear_regression(logs, list(self.perplexities.values()))
        return intercept, -slope

    def effective(self, perplexity: float) -> EffectiveSize:
        """The size of an unquantized model of this perplexity."""
        a, b = self.line
        size = math.exp(min((a - perplexity) / b, 700.0))
        return EffectiveSize(size, not min(self.perplexities) / _FAR <= size <= _FAR * max(self.perplexities))


def _number(value: Any) -> Any:
    """YAML takes 7e9 for text."""
    try:
        return float(value) if isinstance(value, (int, str)) and not isinstance(value, bool) else value
    except ValueError:
        return value


# Nominal sizes, fp16, as in the tables of arXiv 2401.06118 and 2405.14852.
LLAMA_2 = Family("Llama-2", "WikiText-2 at 4,096 tokens", {7e9: 5.12, 13e9: 4.57, 70e9: 3.12})
FAMILIES = {"llama-2": LLAMA_2}


def size_text(parameters: float) -> str:
    """Parameters for people: "3.7B", "0.43M"."""
    for unit, name in ((1e9, "B"), (1e6, "M")):
        if parameters >= unit or (unit == 1e6 and parameters >= 1e4):
            return f"{parameters / unit:.3g}{name}"
    return f"{parameters:.3g}"
