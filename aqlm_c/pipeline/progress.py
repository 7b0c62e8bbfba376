"""What a run tells while it works, and how long its phases take."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

from ..report.allocation import Allocation
from ..report.layers import BlockReport, LayerReport
from ..report.report import QuantizationReport
from .plan import Plan

PHASES = ("calibrate", "hessian", "quantize", "reference", "finetune", "propagate")


class FinetuneProgress:
    """What `finetune_model` tells while it works; this one says nothing."""

    def on_phase(self, name: str) -> None: ...
    def on_estimate(self, estimate: Any) -> None: ...
    def on_resumed_step(self, step: int) -> None: ...
    def on_step(self, step: int, steps: int) -> None: ...
    def on_look(self, entry: Mapping[str, Any]) -> None: ...


class Progress(FinetuneProgress):
    """What `quantize_model` tells while it works; this one says nothing."""

    def on_allocation(self, allocation: Allocation) -> None: ...
    def on_start(self, n_blocks: int, n_layers: int) -> None: ...
    def on_plan(self, plan: Plan) -> None: ...
    def on_resume(self, n_finished_blocks: int) -> None: ...
    def on_block(self, index: int, name: str) -> None: ...
    def on_layer(self, report: LayerReport) -> None: ...
    def on_block_report(self, report: BlockReport) -> None: ...
    def on_finish(self, report: QuantizationReport) -> None: ...


class Phases:
    """Seconds by phase; used as a context manager: ``with phases("calibrate"): ...``."""

    def __init__(self, progress: Any) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self.progress = progress
        self._shown = ""

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if name not in (self._shown, "reference"):
            self._shown = name
            self.progress.on_phase(name)
        started = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - started

    def move(self, source: str, target: str, seconds: float) -> None:
        """Count seconds of one phase as another's."""
        self.seconds[source] -= seconds
        self.seconds[target] += seconds
