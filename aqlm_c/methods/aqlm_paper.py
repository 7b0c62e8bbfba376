"""The reference's recipe (AQLM, arXiv 2401.06118, section 3): beam search, and Adam for codebooks and scales."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import PaperOptions
from ..core import arrays, verbs
from ..core.verbs import Array
from ..format import Format
from .aqlm import alternating_cost, seconds_per_group, sweep_again
from .base import CodesMethod, Cost, LayerProblem, QuantizedWeight
from .state import SolverState, check_searchable

_ROUNDS = 100  # at most; relative_mse_tolerance ends them


class PaperMethod(CodesMethod):
    """The reference's recipe under H itself: scales are the rows' norms, k-means is plain; then `adam_steps` of Adam on
    codebooks and scales and one sweep of beam search alternate, at most 100 times, until a round lowers the error by
    less than `relative_mse_tolerance` of itself. The best state is kept.

    One thing differs for beams wider than 1: each group's search ends with its best code, where the reference carries
    its beam along the row.
    """

    options_type = PaperOptions

    def check(self, format: Format, options: PaperOptions) -> None:
        check_searchable(format)

    def quantize(self, problem: LayerProblem, options: PaperOptions) -> QuantizedWeight:
        state = SolverState(problem, problem.hessian.H)
        W, H = state.weight, state.H
        scales = arrays.root_sum_of_rows(W, mean=False)
        state.start(options, scales, arrays.divided(W, scales), arrays.ones_like(scales), 0.0, None)

        steps, rate = options.adam_steps, options.adam_learning_rate
        small = scales < rate  # a step of Adam, whose size is absolute, is more than the whole scale
        moments = arrays.zeros(W, 2, arrays.size(state.codebooks) + arrays.size(scales))
        for iteration in range(_ROUNDS):
            before, codes = state.error, state.codes
            codebooks, scales, moments = state.timed(
                *("codebooks", verbs.update_adam, (state.codebooks, state.scales, moments), W, H, codes),
                *(steps, rate, iteration * steps),
            )
            if small.any():
                closed = verbs.update_scales(scales, W, H, codes, codebooks)
                scales = arrays.where(small, closed, scales)
            codes = state.timed(
                *("search", verbs.search_sweep, codes, W, H, codebooks, scales),
                *(_beam(problem.format, options), problem.seed + iteration),
            )
            state.keep("sweep", codes, codebooks, scales)
            if before - state.error < options.relative_mse_tolerance * before:
                break
        return state.rounded(cg_steps=0)

    def search_again(self, problem: LayerProblem, quantized: QuantizedWeight, options: PaperOptions) -> Array:
        """Codes after one more sweep, under the damped H."""
        return sweep_again(problem, quantized, options, (_beam(problem.format, options), False))

    def cost(self, format: Format, shape: tuple[int, int], options: PaperOptions) -> Cost:
        return alternating_cost(format, shape, options, steps=options.adam_steps, factors=False)

    def remedies(self, format: Format, options: Mapping[str, Any]) -> list[str]:
        return [*(["a larger beam_size"] if format.num_codebooks > 1 else []), "more Adam steps (adam_steps)"]

    def seconds_per_group(self, format: Format, options: PaperOptions, like: Array | None = None) -> float:
        return seconds_per_group(format, (_beam(format, options), False), like)


def _beam(format: Format, options: PaperOptions) -> int:
    return options.beam_size or 1


METHOD = PaperMethod()
