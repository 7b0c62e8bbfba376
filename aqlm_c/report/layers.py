"""What is reported of one layer and of one block."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any


def decibels(error: float | None, reference: float | None) -> float | None:
    """10 log10(error / reference); None where either is missing or zero."""
    return 10 * math.log10(error / reference) if reference and error and error > 0 else None


@dataclasses.dataclass
class LayerReport:
    """One quantized linear layer. Errors are tr(D H D^T) / tr(W H W^T), D = W - Wq (arXiv 2401.06118), before block
    fine-tuning, which gives up some of it for the block's output.

    `gaussian_code_rate` and `gaussian_true_rate` are the relative errors that reverse water-filling gives
    i.i.d. Gaussian weights under this H, at the bits of the codes alone and at all bits stored. They are a
    reference, not a bound for real weights: a negative distance to them is possible.

    `correction` is tr(M H M^T) / tr(W H W^T) of what a weight was moved by, M, to make up for what was quantized before
    it (`error_correction`); W is then what it was moved to.
    """

    name: str
    out_features: int
    in_features: int
    scheme: str
    relative_error: float | None
    bits_per_weight: float
    gaussian_code_rate: float | None = None
    gaussian_true_rate: float | None = None
    seconds: float = 0.0
    embedding: bool = False  # or the output layer
    tokens: int | None = None  # that this layer's H was summed over, if not the whole run's: an expert sees a part
    correction: float | None = None

    @property
    def db_above_code_rate(self) -> float | None:
        """Distance in dB to the Gaussian reference at the code rate."""
        return decibels(self.relative_error, self.gaussian_code_rate)

    @property
    def db_above_true_rate(self) -> float | None:
        """Distance in dB to the Gaussian reference at the true rate (codes, codebooks and scales)."""
        return decibels(self.relative_error, self.gaussian_true_rate)

    def to_dict(self) -> dict[str, Any]:
        """The fields, `correction` where there is one, and both distances in dB."""
        distances = {name: getattr(self, name) for name in ("db_above_code_rate", "db_above_true_rate")}
        fields = dataclasses.asdict(self)
        if self.correction is None:
            del fields["correction"]
        return {**fields, **distances}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> LayerReport:
        """The report that `to_dict` wrote, also after a round trip through JSON."""
        return cls(**_known_fields(cls, fields))


@dataclasses.dataclass
class BlockReport:
    """Fine-tuning of one block (arXiv 2401.06118, section 3.4).

    Errors are ||Y - Yq||^2 / ||Y||^2 of the block's output over tokens, Y the original block's for the same
    activations, those of the model quantized up to it: before and after, on the sequences trained on and on those
    held out. history: (training, held-out) error of what is tuned for, the mean of this and of that after
    `finetune_lookahead` more blocks, at the start and after each epoch. searched: layers whose codes were searched
    again and kept.
    """

    name: str
    training_before: float | None = None
    training_after: float | None = None
    held_out_before: float | None = None
    held_out_after: float | None = None
    epochs: int = 0
    history: list[tuple[float, float]] = dataclasses.field(default_factory=list)
    searched: int = 0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> BlockReport:
        """The report that `to_dict` wrote, also after a round trip through JSON."""
        known = _known_fields(cls, fields)
        return cls(**{**known, "history": [tuple(errors) for errors in known.get("history", [])]})


def _known_fields(cls: Any, fields: Mapping[str, Any]) -> dict[str, Any]:
    return {field.name: fields[field.name] for field in dataclasses.fields(cls) if field.name in fields}
