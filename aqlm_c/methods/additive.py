"""Additive quantization, whatever H is: sums of entries of several codebooks (Babenko and Lempitsky, 2014)."""

from __future__ import annotations

from ..config import AdditiveOptions, AqlmOptions
from ..core import arrays, verbs
from ..core.verbs import Array
from ..format import Format
from .aqlm import search_options, seconds_per_group
from .base import CodesMethod, Cost, LayerProblem, QuantizedWeight, UntunedMethod
from .kmeans import without_hessian
from .state import SWEEPS_MADE, check_searchable, kmeans_flop


class Additive(UntunedMethod, CodesMethod):
    """AQLM under H = I: residual k-means, then searches of the codes, exact over pairs or by a beam, each followed by
    least-squares codebooks and scales. Block fine-tuning is left out: this is the baseline without data.
    """

    options_type = AdditiveOptions

    def check(self, format: Format, options: AdditiveOptions) -> None:
        check_searchable(format)

    def quantize(self, problem: LayerProblem, options: AdditiveOptions) -> QuantizedWeight:
        state, search = without_hessian(problem), _search(problem.format, options)
        scales = arrays.root_sum_of_rows(state.weight, mean=True)
        state.start(options, scales, state.weight, scales, 1e-3, None)
        for sweep in range(options.max_sweeps):
            before = state.error
            start = (state.codes, state.weight, state.H, state.codebooks, state.scales)
            codes = state.timed("search", verbs.search_sweep, *start, search[0], problem.seed + sweep, search[1])
            state.fit("sweep", codes, state.codebooks, options.cg_steps)
            if before - state.error < options.relative_mse_tolerance * before:
                break
        return state.rounded(cg_steps=2)

    def cost(self, format: Format, shape: tuple[int, int], options: AdditiveOptions) -> Cost:
        out, n = shape
        kmeans = kmeans_flop(format, shape, options.init_max_iter)
        rounds, products = SWEEPS_MADE * options.max_sweeps, 4 + 2 * options.cg_steps
        return Cost(kmeans + rounds * products * 2.0 * out * n * n, rounds * out * n / format.in_group_size)

    def seconds_per_group(self, format: Format, options: AdditiveOptions, like: Array | None = None) -> float:
        return seconds_per_group(format, _search(format, options), like)


def _search(format: Format, options: AdditiveOptions) -> tuple[int, bool]:
    return search_options(format, AqlmOptions(beam_size=options.beam_size))


METHOD = Additive()
