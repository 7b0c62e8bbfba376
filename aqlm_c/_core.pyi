"""The NumPy binding: the C core on NumPy arrays (csrc/python). No torch.

Letters: out, in = out_features, in_features; g, og = in_group_size, out_group_size; J = in / g; K codebooks of
E = 2^B entries. Arrays are C-contiguous float32 unless said otherwise (strided ones are copied). Every function
raises TypeError for a wrong dtype and ValueError for a wrong shape or value, naming the argument; long ones
release the GIL and answer Ctrl-C with KeyboardInterrupt. No result depends on threads or instruction set.
The quantizer's functions know out_group_size 1 alone.
"""

import numpy as np
from numpy.typing import NDArray

_F32 = NDArray[np.float32]
_F64 = NDArray[np.float64]
_Codes = NDArray[np.uint16]  # working codes [out, J, K], 0..E-1

def residual_kmeans(
    weight: _F32,
    scales: _F32,
    num_codebooks: int,
    nbits_per_codebook: int,
    in_group_size: int,
    init_max_iter: int = 100,
    tolerance: float = 1e-3,
    seed: int = 0,
    column_weight: _F32 | None = None,
) -> tuple[_Codes, _F32]:
    """Residual k-means of the groups of weight [out, in] / scales [out] (AQLM, arXiv 2401.06118, section 3.1).

    column_weight [in] weighs each input's squared distance. Empty clusters move to the worst-served groups;
    each codebook stops after init_max_iter rounds or when one gains less than `tolerance` of the error.
    Returns codes [out, J, K] and codebooks [K, E, g].
    """

def accumulate_hessian(sum: _F64, x: _F32) -> None:
    """sum [in, in] += x^T x for x [n, in], in place."""

def accumulate_product(sum: _F64, x: _F32, y: _F32) -> None:
    """sum [in_x, in_y] += x^T y for x [n, in_x] and y [n, in_y], in place."""

def correct_weight(weight: _F32, cross: _F32, H: _F32, alpha: float, relative_damp: float) -> _F32:
    """weight + alpha weight cross (H + relative_damp mean(diag H) I)^-1, [out, in] (QEP, arXiv 2504.09629).

    cross: (X - X^)^T X^ / n [in, in] of the inputs X that the weight was made for and those X^ that it gets, whose H is
    X^^T X^ / n. ValueError if H is not positive definite.
    """

def factor_hessian(H: _F32, in_group_size: int, relative_damp: float) -> tuple[NDArray[np.int32], _F32, _F32]:
    """Block factor of H [in, in] for sequential error feedback (GPTQ and LDLQ with g x g blocks).

    relative_damp * mean(diag H) is added to the diagonal. Returns the order of the groups [J] (largest trace
    first), feedback [in, in] and metric [J, g, g], both in that order. ValueError if H is not positive definite.
    """

def search_sweep(
    codes: _Codes,
    weight: _F32,
    H: _F32,
    codebooks: _F32,
    scales: _F32,
    beam_size: int = 0,
    seed: int = 0,
    pairs: bool = False,
) -> _Codes:
    """One coordinate sweep over the groups in a random order (AQLM, section 3.2); returns new codes.

    pairs (K >= 2, B <= 8): a beam of 1..64 over all codebooks but the last two, and after each of its states the
    exact joint search of those two; K = 2 needs no beam. beam_size 0: that, with a beam of 4. Otherwise a beam of
    1..64 that replaces one codebook's code after another, in a random order for each group.
    """

def search_ldl(
    weight: _F32,
    order: NDArray[np.int32],
    feedback: _F32,
    metric: _F32,
    codebooks: _F32,
    scales: _F32,
    beam_size: int = 0,
    pairs: bool = False,
) -> _Codes:
    """Codes [out, J, K] by one pass of sequential error feedback; order, feedback, metric of factor_hessian."""

def update_codebooks(codebooks: _F32, weight: _F32, H: _F32, codes: _Codes, scales: _F32, cg_steps: int) -> _F32:
    """cg_steps conjugate-gradient steps towards the least-squares codebooks [K, E, g]; the error never rises."""

def update_scales(scales: _F32, weight: _F32, H: _F32, codes: _Codes, codebooks: _F32) -> _F32:
    """The scales [out] that minimise the error, in closed form; rows that decode to zero keep theirs."""

def update_adam(
    codebooks: _F32,
    scales: _F32,
    moments: _F64,
    weight: _F32,
    H: _F32,
    codes: _Codes,
    steps: int,
    learning_rate: float,
    steps_before: int = 0,
) -> tuple[_F32, _F32, _F64]:
    """`steps` steps of Adam on codebooks [K, E, g] and scales [out] for tr(D H D^T) / out (AQLM, section 3.3).

    Betas (0, 0.95), AMSGrad, eps 1e-8. moments [2, K * E * g + out]: second moments, then their largest, of codebooks
    and then scales; zeros at first, later what the last call returned, with the number of steps made so far as
    steps_before. Returns new codebooks, scales and moments.
    """

def buffer_step(
    buffer: _F32,
    gradient: _F32,
    first: _F32 | NDArray[np.int8] | None,
    second: _F32 | NDArray[np.uint8],
    scales: _F32 | None,
    divisor: float,
    learning_rate: float,
    beta1: float,
    beta2: float,
    step: int,
) -> None:
    """Step number `step`, from 1 on, of Adam (eps 1e-12) for buffer [out, in], in place, by gradient / divisor.

    first, second: the moments [out, in], in place; float32 without `scales`. With scales [2, ceil(out in / 256)] int8
    and uint8: of each 256 values in order first = +-(scales[0] byte)^4 and second = (scales[1] byte)^8, the nearest
    roots, but no second moment above 0 becomes 0. first is None for beta1 = 0. All arrays are zeros before step 1.
    """

def quantization_error(
    weight: _F32, H: _F32, codes: _Codes | None = None, codebooks: _F32 | None = None, scales: _F32 | None = None
) -> float:
    """tr(D H D^T), D = W - Wq; without codes Wq is 0, which gives the signal tr(W H W^T)."""

def gaussian_reference(eigenvalues: _F64, rate: float) -> float:
    """Relative error of ideal coding of Gaussian weights at `rate` bits per weight, under an H of these eigenvalues."""

def factor_columns(H: _F32, sorted: bool, relative_damp: float) -> tuple[NDArray[np.int32], _F32]:
    """Order [in] and feedback [in, in], in it, of single columns (GPTQ, LDLQ); as factor_hessian gives them of groups.

    sorted: largest diagonal first, else as they are.
    """

def round_columns(
    weight: _F32,
    order: NDArray[np.int32],
    feedback: _F32 | None,
    bits: int,
    group_size: int,
    symmetric: bool = False,
    at_start: bool = False,
    scales: _F32 | None = None,
    zeros: _F32 | None = None,
) -> tuple[NDArray[np.uint8], _F32, _F32]:
    """Each column of weight [out, in], in `order`, to the nearest of its grid scale (c - zero), c in 0..2^bits - 1.

    feedback of factor_columns, in which errors reach later columns; None: none do. Grids, one for each row of
    group_size columns, are those of least squared error among such as shrink from the group's extent: symmetric ones,
    or with a zero that is a code. at_start: found from the group's weights with the errors so far, where the group lies
    within 128 columns of an unsorted order. scales, zeros [out, in / group_size]: grids that are given.
    Returns codes [out, in], scales, zeros.
    """

def round_lattice(
    weight: _F32,
    order: NDArray[np.int32],
    feedback: _F32 | None,
    scale: float,
    second: int = 0,
    residual_scale: float = 1.0,
    fitted: bool = False,
) -> tuple[_F32, _Codes]:
    """Groups of 8 columns of weight [out, in], in `order`, to the nearest of scale E8P (QuIP#, arXiv 2402.04396).

    order [in / 8] and feedback of factor_hessian. second: bits per weight of a second codebook, times scale
    residual_scale, for what is left: 2 (E8P), 1 (256 short vectors of E8) or 0. fitted: the first is the fitted E8P.
    Returns the decoded weight and codes [out, in / 8, 1 or 2].
    """

def e8p_decode(codes: NDArray[np.uint16], fitted: bool = False) -> _F32:
    """The vectors [n, 8] of E8P with these codes [n]: patterns of magnitudes, signs, a shift by 1/4.

    fitted: magnitudes and the shift are moved to where they stand best for standard normal numbers.
    """

def e8p_nearest(x: _F32, fitted: bool = False) -> NDArray[np.uint16]:
    """The codes [n] of the vectors of E8P that are nearest to x [n, 8]."""

def e8_short() -> _F32:
    """256 short vectors of E8, [256, 8]: 0, the 240 of norm 2, 15 of norm 4."""

def hadamard_order(n: int, /) -> int:
    """The largest divisor of n of which a Hadamard matrix is known: of a power of two and Paley's of orders 4 m."""

def hadamard(x: _F32, inverse: bool = False) -> _F32:
    """x H^T / sqrt(order) of each run of order = hadamard_order(n) values of the rows of x [rows, n]; inverse: x H."""

def random_orthogonal(n: int, seed: int) -> _F32:
    """A random orthogonal matrix [n, n], n up to 4096, the same on every machine."""

def rotate(x: _F32, left: _F32, right: _F32) -> _F32:
    """left^T X right of each row of x [rows, p q] as X [p, q], for left [p, p] and right [q, q]."""

def decode_rows(codes: NDArray[np.int8 | np.int16], codebooks: _F32, scales: _F32) -> _F32:
    """W [out, in] of a stored weight: codes [out/og, J, K] (int8 for B <= 8, else int16), codebooks [K, E, og, g]."""

def matmul(
    x: _F32, codes: NDArray[np.int8 | np.int16], codebooks: _F32, scales: _F32, bias: _F32 | None = None
) -> _F32:
    """x [n, in] W^T + bias -> [n, out]; W is decoded tile by tile, never whole.

    With n <= 16, B <= 8, og = 1, out >= 64: by products with the codebooks rounded to 23 bits, within 1e-5.
    """

def pack_codes(codes: NDArray[np.uint16], nbits_per_codebook: int) -> NDArray[np.int8 | np.int16]:
    """Working codes to the disk layout: code - 2^B where it is at least 2^(B-1). ValueError out of range."""

def unpack_codes(codes: NDArray[np.int8 | np.int16], nbits_per_codebook: int) -> NDArray[np.uint16]:
    """The inverse of pack_codes."""

def set_num_threads(n: int, /) -> None: ...
def get_num_threads() -> int: ...
def set_isa(name: str, /) -> None:
    """Use this instruction set's kernels; ValueError if this CPU cannot. AQLM_C_ISA does the same at import."""

def get_isa() -> str: ...
def available_isas() -> list[str]:
    """Instruction sets this CPU can run, slowest first."""

def set_exact(exact: bool | None, /) -> None:
    """True: matmul sums products of fp32 in order. None, as at first: few rows by products rounded to 23 bits; False:
    to 16 bits, within 1e-3. The environment variable AQLM_C_EXACT says it too: 1 or 0.
    """

def get_exact() -> bool | None: ...
