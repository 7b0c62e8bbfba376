"""Vector quantization by k-means, whatever H is: what AQLM starts from, with one codebook."""

from __future__ import annotations

from ..config import KmeansOptions
from ..core import arrays
from ..errors import wrong
from ..format import Format
from .base import CodesMethod, Cost, LayerProblem, QuantizedWeight, UntunedMethod
from .state import SolverState, check_searchable, kmeans_flop


class KMeans(UntunedMethod, CodesMethod):
    """Rows are divided by their root mean square, which is their scale, and k-means of all groups gives one codebook,
    by plain distance. It is an AQLM checkpoint. Block fine-tuning is left out: this is the baseline without data.
    """

    options_type = KmeansOptions

    def check(self, format: Format, options: KmeansOptions) -> None:
        check_searchable(format)
        if format.num_codebooks != 1:
            raise wrong("scheme", format.scheme, "one codebook, such as '1x8g4' for 2 bits or '1x12g4' for 3")

    def quantize(self, problem: LayerProblem, options: KmeansOptions) -> QuantizedWeight:
        state = without_hessian(problem)
        scales = arrays.root_sum_of_rows(state.weight, mean=True)
        state.start(options, scales, state.weight, scales, 1e-4, None)
        return state.rounded(cg_steps=0)

    def cost(self, format: Format, shape: tuple[int, int], options: KmeansOptions) -> Cost:
        return Cost(flop=kmeans_flop(format, shape, options.init_max_iter))


def without_hessian(problem: LayerProblem) -> SolverState:
    """The state of a method for which every input counts alike; the result's relative error is under H all the same."""
    return SolverState(problem, arrays.to_kind(arrays.identity(problem.shape[1]), problem.weight))


METHOD = KMeans()
