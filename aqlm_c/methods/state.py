"""The best codes, codebooks and scales yet of one weight: what AQLM's methods share."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from ..config import AqlmOptions, KmeansOptions
from ..core import arrays, grid, verbs
from ..core.verbs import Array
from ..format import Format
from .base import LayerProblem, QuantizedWeight, finished, rounded_scales

T = TypeVar("T")

SWEEPS_MADE = 0.6  # of max_sweeps, before relative_mse_tolerance ends them
_KMEANS = 5.0  # flop per distance and dimension


def kmeans_flop(format: Format, shape: tuple[int, int], init_max_iter: int) -> float:
    """Of `SolverState.start` on a weight [out, in]."""
    return _KMEANS * init_max_iter * format.num_codebooks * format.entries * shape[0] * shape[1]


class SolverState:
    """codes, codebooks and scales are always the best state yet, and error is its relative error under `H`.

    H: what the method works under, [in, in]: the problem's own or a damped one.
    """

    codes: Array
    codebooks: Array
    scales: Array
    error: float

    def __init__(self, problem: LayerProblem, H: Array) -> None:
        self.problem, self.weight, self.H = problem, problem.weight, H
        self.seconds: dict[str, float] = {}
        self.history: list[tuple[str, float]] = []
        self.signal = self.timed("error", verbs.quantization_error, self.weight, H)

    def start(
        self,
        options: AqlmOptions | KmeansOptions,
        scales: Array,
        points: Array,
        sizes: Array,
        tolerance: float,
        column_weight: Array | None,
    ) -> None:
        """Residual k-means of `points` [out, in] / `sizes` [out], whose codes stand for the weight under `scales`."""
        codes, codebooks = self.timed(
            *("kmeans", verbs.residual_kmeans, points, sizes, self.problem.format),
            *(options.init_max_iter, tolerance, self.problem.seed, column_weight),
        )
        self.begin("kmeans", codes, codebooks, scales)

    def begin(self, step: str, codes: Array, codebooks: Array, scales: Array) -> None:
        """Take these three, whatever their error."""
        self.codes, self.codebooks, self.scales = codes, codebooks, scales
        self.error = self._error(codes, codebooks, scales)
        self.history.append((step, self.error))

    def fit(self, step: str, codes: Array, start: Array, cg_steps: int) -> bool:
        """Fit codebooks, from `start`, and scales to `codes`; keep the three if that is the best state yet."""
        W, H = self.weight, self.H
        codebooks = self.timed("codebooks", verbs.update_codebooks, start, W, H, codes, self.scales, cg_steps)
        scales = self.timed("scales", verbs.update_scales, self.scales, W, H, codes, codebooks)
        return self.keep(step, codes, codebooks, scales)

    def keep(self, step: str, codes: Array, codebooks: Array, scales: Array) -> bool:
        """Take these three if they are the best state yet."""
        error = self._error(codes, codebooks, scales)
        self.history.append((step, error))
        if not error < self.error:
            return False
        self.codes, self.codebooks, self.scales, self.error = codes, codebooks, scales, error
        return True

    def rounded(self, cg_steps: int) -> QuantizedWeight:
        """The best state on the grid of the problem's dtype; the codebooks are fitted again under the rounded scales
        in `cg_steps`. The error is measured after rounding: it is that of the values on disk.
        """
        dtype = self.problem.dtype
        moved = grid.share(self.scales, self.codebooks, self.problem.exponent, dtype)
        if dtype != "float32" or any(moved):
            scales, books = rounded_scales(self.problem, self.scales, moved), self.codebooks
            if dtype != "float32":
                fixed = (self.weight, self.H, self.codes, scales, cg_steps)
                books = self.timed("codebooks", verbs.update_codebooks, books, *fixed)
            self.codebooks, self.scales = arrays.round_to(books, dtype, moved.codebooks), scales
            self.error = self._error(self.codes, self.codebooks, self.scales)
        self.history.append(("rounded", self.error))
        state = (self.codes, self.codebooks, self.scales)
        return self.timed("error", finished, self.problem, state, moved, self.seconds, self.history)

    def timed(self, step: str, function: Callable[..., T], *args: object) -> T:
        """The function's result; its seconds are added to those of `step`."""
        started = time.perf_counter()
        result = function(*args)
        self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - started
        return result

    def _error(self, *state: Array) -> float:
        return self.timed("error", verbs.quantization_error, self.weight, self.H, *state) / self.signal


def check_searchable(format: Format) -> None:
    """Raise ValueError for a format that loads and runs but whose codes cannot be searched yet."""
    if format.out_group_size != 1:
        raise ValueError(
            f"out_group_size: got {format.out_group_size} (scheme {format.scheme!r}), expected 1: codes are not "
            "searched for larger ones yet"
        )
