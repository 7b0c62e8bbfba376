"""GPTQ (arXiv 2210.17323): uniform grids of groups, column after column with the errors so far fed back."""

from __future__ import annotations

import dataclasses
import time

from ..config import MethodOptions
from ..core import arrays, rounding
from ..errors import int_between, share, wrong
from ..format import Format
from .base import Cost, DenseMethod, DenseWeight, LayerProblem, dense_result, whole_bits


@dataclasses.dataclass(frozen=True)
class GptqOptions(MethodOptions):
    """Options of GPTQ.

    group_size: inputs that share a scale in each row; 0: all of a row. activation_order: columns in the order of
    falling diag H (the paper's code: act-order), under grids found from the weight; else as they are, a group's grid
    found when it comes up. symmetric: the grid's middle is 0, and no zero point is stored. gptq_damp: added to H's
    diagonal, in units of its mean.

    Raises ValueError naming the field, its value and what was expected.
    """

    group_size: int = 64
    activation_order: bool = True
    symmetric: bool = False
    gptq_damp: float = 0.01

    def __post_init__(self) -> None:
        int_between("group_size", self.group_size, 0)
        for name in ("activation_order", "symmetric"):
            if not isinstance(getattr(self, name), bool):
                raise wrong(name, getattr(self, name), "true or false")
        share("gptq_damp", self.gptq_damp)


class Gptq(DenseMethod):
    """Each column of a row goes to the nearest of the 2^b values of its group's grid, b being the scheme's bits per
    weight, and its error is made up for by the columns after it. The grid is the one of least squared error among those
    shrunk from the group's extent. On a GPU's layer the columns are rounded in CPU memory.

    Its file has b bits for each weight, and for each group a scale of 16 bits and a zero point of b. The order of the
    columns needs none: groups are of neighbours in any case.
    """

    options_type = GptqOptions

    def check(self, format: Format, options: GptqOptions) -> None:
        whole_bits(format)

    def check_layer(self, name: str, shape: tuple[int, int], format: Format, options: GptqOptions) -> None:
        check_group_size(name, shape, options.group_size)

    def bits_per_weight(self, format: Format, shape: tuple[int, int], options: GptqOptions) -> float:
        bits = whole_bits(format)
        return bits + (16 + (0 if options.symmetric else bits)) / (options.group_size or shape[1])

    def quantize(self, problem: LayerProblem, options: GptqOptions) -> DenseWeight:
        started = time.perf_counter()
        factor = problem.hessian.factor_columns(options.activation_order, options.gptq_damp)
        factored = time.perf_counter()
        found = rounding.round_columns(
            *(problem.weight, factor, whole_bits(problem.format), options.group_size or problem.shape[1]),
            symmetric=options.symmetric,
            at_start=not options.activation_order,
        )
        seconds = {"factor": factored - started, "round": time.perf_counter() - factored}
        bits = self.bits_per_weight(problem.format, problem.shape, options)
        return dense_result(problem, arrays.to_kind(found.decode(), problem.weight), bits, seconds, "rounded")

    def cost(self, format: Format, shape: tuple[int, int], options: GptqOptions) -> Cost:
        out, n = shape
        return Cost(flop=float(out) * n * n + 200.0 * out * n, factors=True)


def check_group_size(name: str, shape: tuple[int, int], group_size: int) -> None:
    """Raise ValueError unless groups of so many inputs tile the rows of a layer [out, in]; 0: whole rows."""
    if group_size and shape[1] % group_size:
        raise wrong("group_size", group_size, f"a divisor of in_features={shape[1]} of layer {name}")


METHOD = Gptq()
