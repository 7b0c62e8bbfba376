"""One rule for tolerances: at most twice the error of the plain computation in the same dtype."""

import numpy as np

EPS = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def as_float64(array) -> np.ndarray:
    """A NumPy array of a NumPy array or a torch tensor of any float dtype."""
    return np.asarray(array.detach().double() if hasattr(array, "detach") else array, np.float64)


def error_budget(plain, truth) -> float:
    """The largest absolute error a result may have: twice that of the plain computation in the same dtype,
    plus one rounding of the largest value (plain may be exact by luck).

    Args:
        plain: torch's or NumPy's own result in the dtype under test.
        truth: the same in float64.
    """
    eps = EPS[str(plain.dtype).removeprefix("torch.")]
    truth = as_float64(truth)
    return 2 * np.abs(as_float64(plain) - truth).max() + eps * np.abs(truth).max()


def max_error(result, truth) -> float:
    """Largest absolute difference, in float64; inf if anything is not finite."""
    error = np.abs(as_float64(result) - as_float64(truth)).max()
    return float(error) if np.isfinite(error) else np.inf
