"""A sweep at work, as a table that changes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape

from ..errors import int_between, printable, wrong
from ..units import duration
from .display import LogLines

if TYPE_CHECKING:
    from ..sweeps.space import Space
    from ..sweeps.study import SweepResult

_Who = tuple["int | None", "int | None", "int | None", "int | None"]


def run_sweep(space: Space, out: Path, who: _Who, place: dict[str, Any], quiet: bool, verbose: bool) -> SweepResult:
    """`sweep` with a `Board`. who: workers, index, of, worker, as on the command line; place: device and threads."""
    from ..sweeps.study import Worker, sweep

    workers, index, of, number = who
    own = None
    if (index is None) != (of is None):
        raise wrong("--index" if index is None else "--of", None, "both of --index I and --of N, or none")
    if index is not None and of is not None:
        int_between("--of", of, 1, 100_000)
        int_between("--index", index, 0, of - 1)
        if workers is not None:
            raise wrong("--workers", workers, "none with --index: that is one worker")
        own = Worker(f"worker-{index}-of-{of}", (index, of), index == 0, **place)
    elif number is not None:
        own = Worker(f"worker-{number}", None, number == 0, **place)
    if workers is not None:
        int_between("--workers", workers, 1, 1024)
    with Board(space, quiet, verbose) as board:
        return sweep(space, out, workers=workers, worker=own, progress=board, on_rows=board.on_rows, **place)


class Board:
    """What a sweep shows on stderr: in a terminal the best rows and what is done now, elsewhere a line for each row.

    A context manager, and the `progress` of a sweep.
    """

    def __init__(self, space: Space, quiet: bool, verbose: bool) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._space, self._quiet = space, quiet
        self._rows: list[Mapping[str, Any]] = []
        self._phase, self._shown, self._started = "", set[str](), time.monotonic()
        self._live = Live(console=self._console, get_renderable=self._render, refresh_per_second=2, transient=True)
        self._log = LogLines.attached(self._console, verbose)

    def on_phase(self, name: str) -> None:
        """Work of a trial that begins."""
        self._phase = printable(name)

    def on_window(self, done: int, total: int, perplexity: float) -> None:
        """A window of an evaluation is done."""

    def on_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """All rows that there are by now."""
        self._rows = list(rows)
        for row in rows:
            if row["key"] not in self._shown:
                self._shown.add(row["key"])
                if not self._quiet and not self._console.is_terminal:
                    self._console.print(escape(printable(_line(row))))

    def _render(self) -> Any:
        from ..sweeps.rows import table

        spent = duration(time.monotonic() - self._started)
        rows = [dict(row) for row in self._rows]
        return Group(table(rows, self._space.objectives, self._space.count), f"{spent} {escape(self._phase)}")

    def __enter__(self) -> Board:
        self._log.__enter__()
        if not self._quiet and self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live.is_started:
            self._live.stop()
        self._log.__exit__(*exception)


def _line(row: Mapping[str, Any]) -> str:
    name = row.get("foreign") or f"trial {row['trial']}"
    params = ", ".join(f"{option}={value}" for option, value in (row.get("params") or {}).items())
    names = ("perplexity", "kl", "bits", "seconds")
    figures = ", ".join(f"{figure} {row[figure]:.5g}" for figure in names if row.get(figure) is not None)
    return f"{name}{params and f' ({params})'}: {row.get('error') or figures}"
