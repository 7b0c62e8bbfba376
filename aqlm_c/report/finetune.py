"""What is reported of tuning a whole model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass
class FinetuneReport:
    """Losses are KL(original || quantized) of the next token in nats, mean over positions; held-out ones are of the
    values that are saved.

    history: at the start and at each look "step", "held_out", "training" (mean since the last look; None at the start)
    and "seconds" so far; where codes are trained "changed", the mean share of all groups that a step gave other codes,
    and "undone", whether those since the last look were undone. best_step: the step whose state was kept. changed:
    groups whose codes differ from the start's. tokens: that were trained on. data, config: as in `QuantizationReport`.
    """

    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    sequences: int = 0
    sequence_length: int = 0
    held_out: int = 0
    micro_batch_size: int = 0
    gradient_checkpointing: bool = False
    steps: int = 0
    best_step: int = 0
    tokens: int = 0
    held_out_before: float = math.nan
    held_out_after: float = math.nan
    changed: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    peak_device_memory_bytes: int = 0
    device: str = "cpu"
    ranks: int = 1
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    original: str = ""
    versions: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        """Tokens that were trained on in a second, looks at the held-out text included."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON, where NaN and Inf are null."""
        fields = {**dataclasses.asdict(self), "tokens_per_second": self.tokens_per_second}
        return {name: _finite(value) for name, value in fields.items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> FinetuneReport:
        """The report that `to_dict` wrote, also after a round trip through JSON."""
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in fields.items() if name in known})

    def __rich__(self) -> Any:
        """What came of it, and the looks at the held-out text."""
        from rich.console import Group
        from rich.table import Table

        table = Table("step", "training KL", "held-out KL", title="tuning of the whole model")
        for entry in self.history:
            codes = f", {entry['changed']:.2%} of groups a step" if entry.get("changed") else ""
            undone = ", codes undone" if entry.get("undone") else ""
            training = "" if entry["training"] is None else f"{entry['training']:.5f}"
            table.add_row(str(entry["step"]), training, f"{entry['held_out']:.5f}{codes}{undone}")
        return Group(
            table,
            f"held-out KL {self.held_out_before:.5f} -> {self.held_out_after:.5f} at step {self.best_step} of "
            f"{self.steps}; {self.tokens:,} tokens, {self.tokens_per_second:,.0f} a second, {self.seconds:.1f} s",
        )


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value
