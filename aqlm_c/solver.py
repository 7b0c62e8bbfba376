"""Quantizes one weight: start, code search and least-squares updates in turn, all of them in C (`_core`)."""

from __future__ import annotations

import dataclasses
import time
from functools import cached_property
from typing import Any

import numpy as np

from . import _core
from .config import AqlmConfig

_GRIDS = ("float16", "bfloat16", "float32")

# Codes hold the codebooks back: given the codes, a codebook is optimal, and given the codebooks, so are the
# codes, long before the two are. The next search therefore sees codebooks moved beyond the fitted ones by this
# much of the fit's own change (over-relaxation; measured on SmolLM2's layers, benchmarks/quantize_layer.py). Where
# that raises the error, as on layers with few groups for each entry, the solver goes back and on without.
_LDL_BEYOND = 3.0
_SWEEP_BEYOND = 1.0


_PAPER_TURNS = 100  # at most; relative_mse_tolerance ends them


class Hessian:
    """H = X^T X / n_tokens of a layer's inputs, and what is derived from it once for all layers that share it.

    H: float32 [in, in], symmetric. Raises ValueError for another shape, and for NaN or Inf.
    """

    def __init__(self, H: np.ndarray) -> None:
        self.H = np.ascontiguousarray(H, dtype=np.float32)
        if self.H.ndim != 2 or self.H.shape[0] != self.H.shape[1]:
            raise ValueError(f"H: got shape {self.H.shape}, expected a square matrix [in_features, in_features]")
        if not np.isfinite(self.H).all():
            raise ValueError("H: got NaN or Inf, expected finite values")
        self._damped: dict[float, np.ndarray] = {}
        self._factors: dict[tuple[int, float], tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def damped(self, relative_damp: float) -> np.ndarray:
        """H + relative_damp * mean(diag H) * I, float32 [in, in]."""
        if relative_damp not in self._damped:
            mean = self.H.diagonal().mean(dtype=np.float64)
            self._damped[relative_damp] = self.H + np.float32(relative_damp * mean) * np.eye(
                len(self.H), dtype=np.float32
            )
        return self._damped[relative_damp]

    def factor(self, in_group_size: int, relative_damp: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(order int32 [J], feedback float32 [in, in], metric float32 [J, g, g]) of the block LDL of `damped`."""
        key = (in_group_size, relative_damp)
        if key not in self._factors:
            self._factors[key] = _core.factor_hessian(self.damped(relative_damp), in_group_size, 0.0)
        return self._factors[key]

    @cached_property
    def eigenvalues(self) -> np.ndarray:
        """Eigenvalues of H, float64 [in], ascending; none below zero."""
        return np.linalg.eigvalsh(self.H.astype(np.float64)).clip(min=0.0)


@dataclasses.dataclass
class QuantizedWeight:
    """A weight in the AQLM format (arXiv 2401.06118, section 3) and how it came about.

    codes: int8 (nbits_per_codebook <= 8) or int16 [out, in / g, num_codebooks], as on disk. codebooks:
    float32 [num_codebooks, 2^nbits, 1, g]; scales: float32 [out, 1, 1, 1]; both hold only values of `dtype`.
    relative_error: tr(D H D^T) / tr(W H W^T) of these very values, D = W - Wq. seconds: by step. history:
    (step, relative error after it under the damped H), from the start to the end.
    """

    codes: np.ndarray
    codebooks: np.ndarray
    scales: np.ndarray
    dtype: str
    relative_error: float
    seconds: dict[str, float]
    history: list[tuple[str, float]]

    def decode(self) -> np.ndarray:
        """The quantized weight, float32 [out, in]."""
        return _core.decode_rows(self.codes, self.codebooks, self.scales)


def quantize_weight(weight: Any, H: Any, config: AqlmConfig, *, dtype: str = "float16") -> QuantizedWeight:
    """Find codes, codebooks and scales that minimise tr((W - Wq) H (W - Wq)^T).

    weight: [out, in], anything NumPy reads as float32. H: [in, in] = X^T X / n_tokens over the layer's
    inputs, or a `Hessian`, which keeps what is derived from it for layers that share an input. dtype: the
    16-bit float (or "float32") whose values codebooks and scales are restricted to.

    Residual k-means (AQLM, section 3.1), then `ldl_passes` passes of sequential error feedback over groups
    and up to `max_sweeps` coordinate sweeps (section 3.2), each followed by conjugate gradients for the codebooks
    and closed-form scales. Two codebooks of at most 8 bits are searched jointly and exactly (unless `beam_size` asks
    for a beam); of more, the last two are, after each state of a beam of `beam_size` (0: 4) over the others. One
    codebook, and larger ones, are searched by a beam that replaces one code after another. Sweeps end when one lowers
    the error by less than `relative_mse_tolerance` of itself. The best state is kept. This solver works under
    H + relative_damp * mean(diag H) * I, which keeps directions that the calibration hardly saw from being bent;
    measured, that lowers the error under other text and often under H itself.

    With solver="paper" it is the reference's recipe under H itself: scales are the rows' norms, k-means is plain;
    then `adam_steps` of Adam on codebooks and scales and one sweep of beam search take turns, at most 100 times, until
    a turn lowers the error by less than `relative_mse_tolerance` of itself. The best state
    is kept. (One thing differs for beams wider than 1: each group's search ends with its best code, where the
    reference carries its beam along the row.)

    The result depends on the seed and not on the number of threads or the instruction set.

    Raises ValueError naming the argument: for a shape that does not fit, for NaN or Inf, for an H under
    which the weight has no output, for out_group_size other than 1.
    """
    W = _as_matrix("weight", weight)
    hessian = H if isinstance(H, Hessian) else Hessian(_as_matrix("H", H))
    if dtype not in _GRIDS:
        raise ValueError(f"dtype: got {dtype!r}, expected one of {_GRIDS}")
    if hessian.H.shape[0] != W.shape[1]:
        raise ValueError(f"H: got shape {hessian.H.shape}, expected ({W.shape[1]}, {W.shape[1]}) for this weight")
    if config.out_group_size != 1:
        raise ValueError(f"out_group_size: got {config.out_group_size}, expected 1: the solver knows no other yet")
    config.check_layer("weight", *W.shape)
    return _Solver(W, hessian, config).solve(dtype)


class _Solver:
    """codes, codebooks and scales are always the best state yet, and error is its relative error under the damped H."""

    def __init__(self, W: np.ndarray, hessian: Hessian, config: AqlmConfig) -> None:
        self.W, self.hessian, self.config = W, hessian, config
        self.H = hessian.H if config.solver == "paper" else hessian.damped(config.relative_damp)
        self.seconds: dict[str, float] = {}
        self.history: list[tuple[str, float]] = []
        self.signal = self._timed("error", _core.quantization_error, W, self.H)
        self.true_signal = self._timed("error", _core.quantization_error, W, hessian.H)
        if not self.true_signal > 0:
            raise ValueError("H: under it this weight has no output (tr(W H W^T) is 0), expected some signal")

    def solve(self, dtype: str) -> QuantizedWeight:
        if self.config.solver == "paper":
            self._alternate_as_the_paper()
        else:
            self._alternate()
        return self._rounded(dtype)

    def _alternate(self) -> None:
        config, W, H = self.config, self.W, self.H
        beam, pairs = config.search_beam_size, config.search_pairs
        factor = self._timed("factor", self.hessian.factor, config.in_group_size, config.relative_damp)
        # What an error in each input costs once later groups have made up for what they can of it.
        order, _, metric = factor
        column_weight = np.empty((len(order), config.in_group_size), np.float32)
        column_weight[order] = metric.diagonal(axis1=1, axis2=2)
        norms = np.sqrt(np.square(W, dtype=np.float64).mean(axis=1))
        scales = np.where(norms > 0, norms, 1.0).astype(np.float32)
        self._start(scales, W, scales, 1e-3, column_weight.ravel())

        ahead, beyond = self.codebooks, _LDL_BEYOND
        for _ in range(config.ldl_passes):
            codes = self._timed("search", _core.search_ldl, W, *factor, ahead, self.scales, beam, pairs)
            if self._fit("ldl", codes, ahead):
                ahead = self._move_beyond(ahead, beyond)
            elif ahead is self.codebooks:
                break
            else:
                ahead, beyond = self.codebooks, beyond / 2

        ahead, beyond = self.codebooks, _SWEEP_BEYOND
        for sweep in range(config.max_sweeps):
            before, seed = self.error, config.seed + sweep
            codes = self._timed("search", _core.search_sweep, self.codes, W, H, ahead, self.scales, beam, seed, pairs)
            if not self._fit("sweep", codes, ahead) and ahead is not self.codebooks:
                ahead, beyond = self.codebooks, 0.0
            elif before - self.error < config.relative_mse_tolerance * before:
                break
            else:
                ahead = self._move_beyond(ahead, beyond)

    def _alternate_as_the_paper(self) -> None:
        config, W, H = self.config, self.W, self.H
        norms = np.sqrt(np.square(W, dtype=np.float64).sum(axis=1))
        scales = np.where(norms > 0, norms, 1.0).astype(np.float32)
        self._start(scales, W / scales[:, None], np.ones_like(scales), 0.0, None)

        beam, steps, rate = config.search_beam_size, config.adam_steps, config.adam_learning_rate
        moments = np.zeros((2, self.codebooks.size + scales.size))
        for turn in range(_PAPER_TURNS):
            before, codes = self.error, self.codes
            codebooks, scales, moments = self._timed(
                *("codebooks", _core.update_adam, self.codebooks, self.scales, moments, W, H, codes),
                *(steps, rate, turn * steps),
            )
            codes = self._timed("search", _core.search_sweep, codes, W, H, codebooks, scales, beam, config.seed + turn)
            self._keep("sweep", codes, codebooks, scales)
            if before - self.error < config.relative_mse_tolerance * before:
                break

    def _start(
        self,
        scales: np.ndarray,
        points: np.ndarray,
        sizes: np.ndarray,
        tolerance: float,
        column_weight: Any,
    ) -> None:
        """Residual k-means of `points` [out, in] / `sizes` [out], whose codes stand for the weight under `scales`."""
        config, self.scales = self.config, scales
        self.codes, self.codebooks = self._timed(
            *("kmeans", _core.residual_kmeans, points, sizes),
            *(config.num_codebooks, config.nbits_per_codebook, config.in_group_size),
            *(config.init_max_iter, tolerance, config.seed, column_weight),
        )
        self.error = self._error(self.codes, self.codebooks, self.scales)
        self.history.append(("kmeans", self.error))

    def _fit(self, step: str, codes: np.ndarray, start: np.ndarray) -> bool:
        """Fit codebooks, from `start`, and scales to `codes`; keep the three if that is the best state yet."""
        W, H, steps = self.W, self.H, self.config.cg_steps
        codebooks = self._timed("codebooks", _core.update_codebooks, start, W, H, codes, self.scales, steps)
        scales = self._timed("scales", _core.update_scales, self.scales, W, H, codes, codebooks)
        return self._keep(step, codes, codebooks, scales)

    def _keep(self, step: str, codes: np.ndarray, codebooks: np.ndarray, scales: np.ndarray) -> bool:
        """Take these three if they are the best state yet."""
        error = self._error(codes, codebooks, scales)
        self.history.append((step, error))
        if not error < self.error:
            return False
        self.codes, self.codebooks, self.scales, self.error = codes, codebooks, scales, error
        return True

    def _move_beyond(self, start: np.ndarray, beyond: float) -> np.ndarray:
        if not beyond:
            return self.codebooks
        return (self.codebooks + np.float32(beyond) * (self.codebooks - start)).astype(np.float32)

    def _error(self, *state: np.ndarray) -> float:
        return self._timed("error", _core.quantization_error, self.W, self.H, *state) / self.signal

    def _rounded(self, dtype: str) -> QuantizedWeight:
        """The best state on the grid of `dtype`; the codebooks are fitted again under the rounded scales.

        (The paper's are not.)
        """
        if dtype != "float32":
            scales, steps = round_to(self.scales, dtype), 0 if self.config.solver == "paper" else 2
            books = self._timed(
                "codebooks", _core.update_codebooks, self.codebooks, self.W, self.H, self.codes, scales, steps
            )
            self.codebooks, self.scales = round_to(books, dtype), scales
            self.error = self._error(self.codes, self.codebooks, self.scales)
        self.history.append(("rounded", self.error))
        state = (self.codes, self.codebooks, self.scales)
        error = self._timed("error", _core.quantization_error, self.W, self.hessian.H, *state) / self.true_signal
        return QuantizedWeight(
            codes=_core.pack_codes(self.codes, self.config.nbits_per_codebook),
            codebooks=self.codebooks[:, :, None, :],
            scales=self.scales[:, None, None, None],
            dtype=dtype,
            relative_error=max(error, 0.0),  # a sum over a rounded H may fall a little below
            seconds=self.seconds,
            history=self.history,
        )

    def _timed(self, step: str, function: Any, *args: Any) -> Any:
        started = time.perf_counter()
        result = function(*args)
        self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - started
        return result


def round_to(x: np.ndarray, dtype: str) -> np.ndarray:
    """float32 `x` rounded to the nearest values of `dtype` ("float16" or "bfloat16"), as float32.

    Raises ValueError if a value is too large for it.
    """
    if dtype == "float16":
        with np.errstate(over="ignore"):
            rounded = x.astype(np.float16).astype(np.float32)
    else:  # NumPy has no bfloat16: the upper half of a float32, rounded to nearest even
        bits = x.view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    if not np.isfinite(rounded).all():
        raise ValueError(f"codebooks and scales: got values up to {np.abs(x).max():.3g}, too large for {dtype}")
    return rounded


def _as_matrix(name: str, value: Any) -> np.ndarray:
    """A finite float32 C-contiguous matrix of `value` (a NumPy array or a tensor, of any float dtype)."""
    if hasattr(value, "detach"):
        value = value.detach().float().cpu().numpy()
    matrix = np.ascontiguousarray(value, dtype=np.float32)
    if matrix.ndim != 2:
        raise ValueError(f"{name}: got shape {matrix.shape}, expected a matrix")
    if not np.isfinite(matrix).all():
        raise ValueError(f"{name}: got NaN or Inf, expected finite values")
    return matrix
