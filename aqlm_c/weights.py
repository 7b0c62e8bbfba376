"""Quantizes one weight by the method that a config names."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from .core import arrays, grid
from .core.hessian import Hessian
from .errors import wrong
from .format import Format
from .methods import get_method
from .methods.base import DenseWeight, LayerProblem, QuantizedWeight, Result, zero_weight
from .recipe import AqlmConfig

__all__ = ["Hessian", "QuantizedWeight", "layer_problem", "quantize_weight", "solve"]

log = logging.getLogger("aqlm_c")


def quantize_weight(weight: Any, H: Any, config: AqlmConfig | str, *, dtype: str = "float16") -> Result:
    """Find codes, codebooks and scales that minimise tr((W - Wq) H (W - Wq)^T) (AQLM, arXiv 2401.06118, section 3).

    weight: [out, in], an array or tensor of any float dtype; what lies on a GPU is quantized there. H, wherever it
    lies: [in, in] = X^T X / n_tokens over the layer's inputs, or a `Hessian`, which keeps what is derived from it for
    layers that share an input. dtype: the 16-bit float (or "float32") whose values codebooks and scales are restricted
    to. How is said by the method that `config.solver` names (docs/methods.md). config: also the text of a scheme, such
    as "2x8g8". Methods that make no AQLM checkpoint give a `DenseWeight`, of values of `dtype`.

    The result depends on the seed and not on the number of threads or the instruction set.

    A weight of zeros is exact. Under an H that gives a weight no output, such as zero, the identity takes its place,
    and a warning says so. Raises ValueError naming the argument: for a shape that does not fit, for NaN or Inf, for a
    format that the method does not know, for a weight far beyond the range of `dtype`.
    """
    config = AqlmConfig.of(config)
    return solve(layer_problem("weight", weight, H, config.format, config, dtype), config)


def layer_problem(
    name: str, weight: Any, H: Any, format: Format, config: AqlmConfig, dtype: str = "float16"
) -> LayerProblem:
    """The problem of quantizing the weight of the layer `name`, checked as `quantize_weight` says."""
    W = arrays.as_matrix("weight", weight)
    hessian = (H if isinstance(H, Hessian) else Hessian(arrays.as_matrix("H", H))).like(W)
    if dtype not in arrays.GRIDS:
        raise wrong("dtype", dtype, f"one of {arrays.GRIDS}")
    if hessian.H.shape[0] != W.shape[1]:
        raise ValueError(
            f"H: got shape {tuple(hessian.H.shape)}, expected ({W.shape[1]}, {W.shape[1]}) for this weight"
        )
    get_method(config.solver).check(format, config.options)
    get_method(config.solver).check_layer(name, (W.shape[0], W.shape[1]), format, config.options)
    grid.check_range(W, dtype)
    exponent = grid.weight_exponent(W)
    problem = LayerProblem(name, arrays.scaled(W, -exponent), hessian, format, dtype, config.seed, exponent)
    if not problem.signal and arrays.largest(W):
        log.warning("%s: got an H under which this weight has no output; the identity takes its place", name)
        problem = dataclasses.replace(problem, hessian=Hessian.identity(W.shape[1]).like(W))
    return problem


def solve(problem: LayerProblem, config: AqlmConfig) -> Result:
    """The quantized weight, by the method of `config`; one of zeros needs none."""
    method = get_method(config.solver)
    if arrays.largest(problem.weight):
        return method.quantize(problem, config.options)
    if not method.is_dense(config.options):
        return zero_weight(problem)
    bits = method.bits_per_weight(problem.format, problem.shape, config.options)
    return DenseWeight(problem.weight, problem.dtype, bits, 0.0, {}, [("zero", 0.0)])
