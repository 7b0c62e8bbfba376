"""What the command line shows: progress on stderr and results on stdout, so that a pipe gets results alone."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment

from ..errors import int_between, printable
from ..report.allocation import Allocation
from ..report.layers import BlockReport, LayerReport
from ..report.report import QuantizationReport
from ..report.tables import db_text, error_text

_LINES = 10  # of an evaluation of a text, where there is no bar


class Display:
    """What a command shows on stderr while it works: bars with ETA in a terminal, plain lines elsewhere.

    A context manager. Its methods are the `progress` of `quantize_model`, of `finetune_model` and, `on_window`, of
    `perplexity`.
    While it is open, warnings of the logger "aqlm_c" appear as lines, with `verbose` all it has to say. silent: nothing
    is shown at all, since another rank shows it.
    """

    def __init__(self, quiet: bool = False, verbose: bool = False, silent: bool = False) -> None:
        quiet = quiet or silent
        self._notebook = Console().is_jupyter
        plain: dict[str, Any] = {"force_jupyter": False, "force_terminal": False} if self._notebook else {}
        self._console = Console(stderr=True, highlight=False, soft_wrap=True, **plain)
        self._quiet = quiet
        self._log = LogLines.attached(self._console, verbose, silent)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=quiet or not self._console.is_terminal,
            speed_estimate_period=3600,  # a block may take minutes
        )
        self._all: TaskID | None = None
        self._current: TaskID | None = None
        self._block = self._phase = ""
        self._n_blocks = 0
        self._started = 0.0

    def __enter__(self) -> Display:
        self._log.__enter__()
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()
        self._log.__exit__()

    def on_estimate(self, estimate: Any) -> None:
        self._print(f"estimate: {escape(estimate.describe())}")

    def on_resume(self, n_finished_blocks: int) -> None:
        self._print(f"finished blocks found: {n_finished_blocks}, going on from there")

    def on_plan(self, plan: Any) -> None:
        for line in plan.describe().split("; "):
            self._print(f"plan: {escape(line)}")

    def on_allocation(self, allocation: Allocation) -> None:
        self._print(f"schemes: {escape(allocation.describe())}")

    def on_start(self, n_blocks: int, n_layers: int) -> None:
        self._n_blocks, self._started = n_blocks, time.monotonic()
        self._clear()
        self._all = self._bars.add_task("blocks", total=n_blocks)
        self._current = self._bars.add_task("", total=n_layers / n_blocks)

    def on_block(self, index: int, name: str) -> None:
        assert self._all is not None and self._current is not None, "on_start comes first"
        self._block = escape(printable(name))
        self._bars.update(self._all, completed=index)
        self._bars.reset(self._current, description=self._block)
        if not self._console.is_terminal:
            elapsed = time.monotonic() - self._started
            self._print(f"{self._block} ({index + 1} of {self._n_blocks}), {elapsed:.0f} s")

    def on_layer(self, report: LayerReport) -> None:
        assert self._current is not None, "on_start comes first"
        self._bars.advance(self._current)
        distance = "" if report.gaussian_true_rate is None else f"{db_text(report.db_above_true_rate)} dB, "
        if not self._notebook:  # where hundreds of lines would stay in the file
            self._print(
                f"  {escape(report.name)}: error {error_text(report.relative_error)}, {distance}"
                f"{report.bits_per_weight:.3f} bits, {report.seconds:.1f} s"
            )

    def on_block_report(self, report: BlockReport) -> None:
        which, before, after = "held-out", report.held_out_before, report.held_out_after
        if after is None:
            which, before, after = "training", report.training_before, report.training_after
        self._print(
            f"  {escape(report.name)}: {which} output error {error_text(before)} -> {error_text(after)}, "
            f"{report.epochs} epochs, {report.seconds:.1f} s"
        )

    def on_phase(self, name: str) -> None:
        if self._all is not None and self._current is not None:
            self._bars.update(self._current, description=f"{self._block} {name}".lstrip())
            return
        self._clear()
        self._phase = escape(printable(name))
        self._current = self._bars.add_task(self._phase, total=None)
        if not self._console.is_terminal:
            self._print(f"{escape(name)} ...")

    def on_window(self, done: int, total: int, perplexity: float) -> None:
        """A window of an evaluation is done; perplexity: up to it, NaN where it is not known yet."""
        assert self._current is not None, "on_phase comes first"
        known = "" if math.isnan(perplexity) else f"perplexity {perplexity:.4g}"
        self._bars.update(self._current, completed=done, total=total, description=f"{self._phase} {known}".rstrip())
        step = -(-total // _LINES)  # of windows between lines
        if not self._console.is_terminal and (done % step == 0 or done == total) and total > 1:
            self._print(f"  window {done} of {total}{known and ', '}{known}")

    def on_resumed_step(self, step: int) -> None:
        self._print(f"state found: going on after step {step}")

    def on_step(self, step: int, steps: int) -> None:
        assert self._current is not None, "on_phase comes first"
        self._bars.update(self._current, completed=step, total=steps)

    def on_look(self, entry: Mapping[str, Any]) -> None:
        training = "" if entry["training"] is None else f"training KL {entry['training']:.5f}, "
        codes = f", {entry['changed']:.2%} of groups a step" if entry.get("changed") else ""
        undone = ", codes undone" if entry.get("undone") else ""
        self._print(f"  step {entry['step']}: {training}held-out KL {entry['held_out']:.5f}{codes}{undone}")

    def on_finish(self, report: QuantizationReport) -> None:
        self._clear()
        self._all = self._current = None

    def _clear(self) -> None:
        for task in self._bars.task_ids:
            self._bars.remove_task(task)

    def _print(self, line: str) -> None:
        if not self._quiet:
            self._console.print(printable(line))


class LogLines(logging.Handler):
    """Log records of "aqlm_c" as lines of a console, above its bars, while it is open: a context manager."""

    @classmethod
    def attached(cls, console: Console, verbose: bool, silent: bool = False) -> LogLines:
        """Of warnings; verbose: of all; silent: of none."""
        level = logging.DEBUG if verbose else logging.WARNING
        return cls(console, logging.CRITICAL if silent else level)

    def __init__(self, console: Console, level: int) -> None:
        super().__init__(level)
        self._console = console

    def __enter__(self) -> LogLines:
        logger = logging.getLogger("aqlm_c")
        self._before = logger.level
        logger.setLevel(min(self.level, self._before or logging.WARNING))
        logger.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logger = logging.getLogger("aqlm_c")
        logger.removeHandler(self)
        logger.setLevel(self._before)

    def emit(self, record: logging.LogRecord) -> None:
        self._console.print(escape(printable(f"{record.levelname.lower()}: {self.format(record)}")))


def prepare(threads: int | None) -> None:
    """Set the threads of torch and of the C core, and keep transformers to errors."""
    check_threads(threads)

    from transformers.utils import logging as transformers_logging

    from ..core.runtime import set_threads

    set_threads(threads)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def show(result: Any) -> None:
    """Print something rich to stdout, which need not be a terminal."""
    width = None if sys.stdout.isatty() else 120  # a file has no width of its own
    Console(highlight=False, width=width).print(_Printable(result))


class _Printable:
    """Something rich, without what in its texts would command a terminal."""

    def __init__(self, result: Any) -> None:
        self.result = result

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self.result, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def check_threads(threads: int | None) -> None:
    """Raise ValueError for a number of threads that no machine has."""
    if threads is not None:
        int_between("--threads", threads, 1, 1024)
