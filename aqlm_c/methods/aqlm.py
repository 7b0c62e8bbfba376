"""AQLM by sequential error feedback, exact pair search and least-squares updates, all of them in C."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..config import AqlmOptions
from ..core import arrays, verbs
from ..core.verbs import Array
from ..format import Format
from ..units import fastest
from .base import CodesMethod, Cost, LayerProblem, QuantizedWeight
from .state import SWEEPS_MADE, SolverState, check_searchable, kmeans_flop

# Codes hold the codebooks back: given the codes, a codebook is optimal, and given the codebooks, so are the
# codes, long before the two are. The next search therefore sees codebooks moved beyond the fitted ones by this
# much of the fit's own change (over-relaxation; measured on SmolLM2's layers, benchmarks/quantize_layer.py): four LDL
# passes and four sweeps on gate_proj of block 10 reach 0.0263 instead of 0.0266. Where that raises the error, as on
# layers with few groups for each entry, the solver goes back and on without.
_LDL_BEYOND = 3.0
_SWEEP_BEYOND = 1.0

# With more than two codebooks all but the last LDL passes have half the beam: they are there for the codebooks, and
# what they choose is chosen anew. Six of ten at 3x8g8 and 4x8g8 cost 1.0 and 0.8% of error (384 x 384, three seeds).
_FULL_PASSES = 4

_PAIR_BEAM = 4  # of a search whose beam_size is 0


class AqlmMethod(CodesMethod):
    """Residual k-means (AQLM, section 3.1), then `ldl_passes` passes of sequential error feedback over groups and up to
    `max_sweeps` coordinate sweeps (section 3.2), each followed by conjugate gradients for the codebooks and
    closed-form scales.

    Two codebooks of at most 8 bits are searched jointly and exactly (unless `beam_size` asks for a beam); of more, the
    last two are, after each state of a beam of `beam_size` (0: 4, and 2 in early passes) over the others. One codebook,
    and larger ones, are searched by a beam that replaces one code after another. Sweeps end when one lowers the error
    by less than `relative_mse_tolerance` of itself. The best state is kept. All of it works under H + relative_damp *
    mean(diag H) * I, which keeps directions that the calibration hardly saw from being bent (those that no token took,
    as with rank-one inputs, without bound); measured, that lowers the error under other text and often under H itself.
    """

    options_type = AqlmOptions

    def check(self, format: Format, options: AqlmOptions) -> None:
        check_searchable(format)

    def quantize(self, problem: LayerProblem, options: AqlmOptions) -> QuantizedWeight:
        state = SolverState(problem, problem.hessian.damped(options.relative_damp))
        factor = state.timed("factor", problem.hessian.factor, problem.format.in_group_size, options.relative_damp)
        # What an error in each input costs once later groups have made up for what they can of it.
        order, _, metric = factor
        scales = arrays.root_sum_of_rows(state.weight, mean=True)
        state.start(options, scales, state.weight, scales, 1e-3, arrays.column_weights(order, metric))
        self._ldl(state, factor, options)
        self._sweeps(state, options)
        return state.rounded(cg_steps=2)

    def _ldl(self, state: SolverState, factor: tuple[Array, Array, Array], options: AqlmOptions) -> None:
        beam, pairs = search_options(state.problem.format, options)
        ahead, beyond = state.codebooks, _LDL_BEYOND
        width = beam
        for left in range(options.ldl_passes, 0, -1):
            beam = _PAIR_BEAM // 2 if pairs and not width and left > _FULL_PASSES else width
            codes = state.timed("search", verbs.search_ldl, state.weight, *factor, ahead, state.scales, beam, pairs)
            if state.fit("ldl", codes, ahead, options.cg_steps):
                ahead = _extrapolate(ahead, state.codebooks, beyond)
            elif ahead is state.codebooks:
                break
            else:
                ahead, beyond = state.codebooks, beyond / 2

    def _sweeps(self, state: SolverState, options: AqlmOptions) -> None:
        beam, pairs = search_options(state.problem.format, options)
        ahead, beyond = state.codebooks, _SWEEP_BEYOND
        for sweep in range(options.max_sweeps):
            before, seed = state.error, state.problem.seed + sweep
            codes = state.timed(
                *("search", verbs.search_sweep, state.codes, state.weight, state.H, ahead, state.scales),
                *(beam, seed, pairs),
            )
            if not state.fit("sweep", codes, ahead, options.cg_steps) and ahead is not state.codebooks:
                ahead, beyond = state.codebooks, 0.0
            elif before - state.error < options.relative_mse_tolerance * before:
                break
            else:
                ahead = _extrapolate(ahead, state.codebooks, beyond)

    def search_again(self, problem: LayerProblem, quantized: QuantizedWeight, options: AqlmOptions) -> Array:
        """Codes after one more sweep."""
        return sweep_again(problem, quantized, options, search_options(problem.format, options))

    def cost(self, format: Format, shape: tuple[int, int], options: AqlmOptions) -> Cost:
        return alternating_cost(format, shape, options, steps=options.cg_steps, factors=True)

    def remedies(self, format: Format, options: Mapping[str, Any]) -> list[str]:
        """One codebook is searched exactly by any beam, and two of up to 8 bits by beam_size=0 alone."""
        few = format.nbits_per_codebook <= 8
        if format.num_codebooks == 2 and few and options.get("beam_size", 0):
            return ["beam_size=0, which is exact for two codebooks", "more sweeps (max_sweeps)"]
        wider = ["a larger beam_size"] if format.num_codebooks > (2 if few else 1) else []
        return [*wider, "more sweeps (max_sweeps)"]

    def seconds_per_group(self, format: Format, options: AqlmOptions, like: Array | None = None) -> float:
        return seconds_per_group(format, search_options(format, options), like)


def search_options(format: Format, options: AqlmOptions) -> tuple[int, bool]:
    """What the code search is told: (beam_size, pairs).

    0 is the exact search over pairs, else the width of the beam; pairs: that the beam ends in exact pairs.
    """
    fit = format.nbits_per_codebook <= 8
    beam_size = options.beam_size or (0 if format.num_codebooks >= 2 and fit else 1)
    return beam_size, format.num_codebooks > 2 and fit


def sweep_again(
    problem: LayerProblem, quantized: QuantizedWeight, options: AqlmOptions, search: tuple[int, bool]
) -> Array:
    """Codes, as on disk, after one sweep under the codebooks and scales of `quantized`; `search`: `search_options`."""
    nbits, (beam_size, pairs) = problem.format.nbits_per_codebook, search
    found = verbs.search_sweep(
        verbs.codes_from_disk(quantized.codes, nbits),
        problem.weight,
        problem.hessian.damped(options.relative_damp),
        quantized.codebooks.squeeze(2),
        arrays.scaled(quantized.scales.reshape(-1), -problem.exponent),
        beam_size,
        problem.seed,
        pairs,
    )
    return verbs.codes_to_disk(found, nbits)


def alternating_cost(format: Format, shape: tuple[int, int], options: AqlmOptions, steps: int, factors: bool) -> Cost:
    """Of k-means and of rounds of one search and one update of the codebooks in so many steps."""
    out, n = shape
    rounds = options.ldl_passes + SWEEPS_MADE * options.max_sweeps
    products = 4 + 2 * steps  # with H: of the search and the error, and for each step
    kmeans = kmeans_flop(format, shape, options.init_max_iter)
    of_round, searches = 2.0 * products * out * n * n, float(out * n // format.in_group_size)
    return Cost(kmeans + rounds * of_round, rounds * searches, of_round, searches, factors)


def seconds_per_group(format: Format, search: tuple[int, bool], like: Array | None) -> float:
    """The search of one group, measured on a small sweep; `search`: `search_options`."""
    rng, (beam_size, pairs) = np.random.default_rng(0), search
    K, E, g = format.num_codebooks, format.entries, format.in_group_size
    out, groups = 64 if E <= 1024 else 16, 16
    if like is not None:
        out *= 64  # what a GPU searches at once

    def there(array: np.ndarray) -> Array:
        return array if like is None else arrays.to_kind(array, like)

    state = (
        there(rng.standard_normal((out, groups * g), dtype=np.float32)),
        there(np.eye(groups * g, dtype=np.float32)),
        there(rng.standard_normal((K, E, g), dtype=np.float32) / np.float32(K**0.5)),
        there(np.ones(out, np.float32)),
        beam_size,
        0,
        pairs,
    )
    start = there(rng.integers(0, E, (out, groups, K)).astype(np.uint16))
    codes = verbs.search_sweep(start, *state)  # from good codes on the search is faster
    return fastest(lambda: arrays.wait_for(verbs.search_sweep(codes, *state))) / (out * groups)


def _extrapolate(start: Array, fitted: Array, beyond: float) -> Array:
    return arrays.extrapolate(start, fitted, beyond) if beyond else fitted


METHOD = AqlmMethod()
