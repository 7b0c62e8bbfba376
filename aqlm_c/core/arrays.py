"""What the methods do between the verbs, for NumPy arrays and tensors alike: conversions and sums over rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from .runtime import synchronize
from .verbs import Array

if TYPE_CHECKING:
    import torch

MOST_EIGENVALUES = 4096  # of an H on a GPU
_AT_ONCE = 1 << 23  # values of a weight of a GPU that are in float64 at a time
GRIDS = ("float16", "bfloat16", "float32")  # dtypes to whose values codebooks and scales are restricted


def as_matrix(name: str, value: Any) -> Array:
    """A finite float32 contiguous matrix of `value`, an array or a tensor of any float dtype.

    A tensor of a GPU stays there; all else becomes a NumPy array, without a copy where it is one of float32. Raises
    ValueError naming the argument `name`.
    """
    if hasattr(value, "detach"):
        value = of_tensor(value.float().contiguous())
    if not is_tensor(value):
        value = np.ascontiguousarray(value, dtype=np.float32)
    if value.ndim != 2:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected a matrix")
    if not is_finite(value):
        raise ValueError(f"{name}: got NaN or Inf, expected finite values")
    return value


def of_tensor(tensor: torch.Tensor) -> Array:
    """A tensor as the verbs take it: itself on a GPU, else the NumPy array of the same memory."""
    tensor = tensor.detach()
    return tensor.numpy() if tensor.device.type == "cpu" else tensor


def is_tensor(array: Any) -> TypeGuard[torch.Tensor]:
    """Whether it is a tensor, without importing torch for one that is not."""
    return hasattr(array, "detach")


def is_finite(array: Array) -> bool:
    return bool(np.isfinite(array).all() if isinstance(array, np.ndarray) else array.isfinite().all())


def root_sum_of_rows(weight: Array, mean: bool) -> Array:
    """Root of each row's sum (or mean) of squares, float32 [out]."""
    if isinstance(weight, np.ndarray):
        squares = np.square(weight, dtype=np.float64)
        return np.sqrt(squares.mean(axis=1) if mean else squares.sum(axis=1)).astype(np.float32)
    import torch

    sums = torch.cat([square.sum(1) for square in _squares(weight)])
    return (sums / weight.shape[1] if mean else sums).sqrt().float()


def _squares(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """Squares in float64 of some rows after others: of an output layer's all at once, a GPU would need gigabytes."""
    return (part.double().square() for part in weight.split(max(1, _AT_ONCE // weight.shape[1])))


def largest(array: Array) -> float:
    """The largest absolute value; 0 of nothing."""
    return max(float(array.max()), -float(array.min())) if size(array) else 0.0


def mean_diagonal(H: Array) -> float:
    """In float64."""
    return (
        float(H.diagonal().mean(dtype=np.float64)) if isinstance(H, np.ndarray) else float(H.diagonal().double().mean())
    )


def scaled(array: Array, exponent: int) -> Array:
    """float32 array * 2^exponent, itself for 0: exact unless it leaves the range."""
    if not exponent:
        return array
    if isinstance(array, np.ndarray):
        with np.errstate(over="ignore", under="ignore"):
            return np.ldexp(array, np.int32(exponent))
    return (array.double() * 2.0**exponent).float()


def where(mask: Array, one: Array, other: Array) -> Array:
    """`one` where `mask` is, `other` elsewhere."""
    if isinstance(one, np.ndarray):
        return np.where(mask, one, other)
    assert is_tensor(mask) and is_tensor(other), "all are of one kind"
    return one.where(mask, other)


def divided(weight: Array, sizes: Array) -> Array:
    """weight [out, in] / sizes [out], rows of size 0 left as they are."""
    if isinstance(weight, np.ndarray):
        return weight / np.where(sizes > 0, sizes, np.float32(1))[:, None]
    assert is_tensor(sizes), "both are of one kind"
    return weight / sizes.where(sizes > 0, 1.0)[:, None]


def to_numpy(array: Array) -> np.ndarray:
    """In CPU memory."""
    return array if isinstance(array, np.ndarray) else array.detach().cpu().numpy()


def to_kind(array: Array, like: Array) -> Array:
    """The same values where `like` is."""
    if isinstance(like, np.ndarray):
        return to_numpy(array)
    import torch

    return (torch.from_numpy(array) if isinstance(array, np.ndarray) else array).to(like.device)


def identity(size: int, device: torch.device | None = None) -> Array:
    """float32 [size, size], as the verbs take what is on `device`; None: the CPU."""
    if device is None or device.type == "cpu":
        return np.eye(size, dtype=np.float32)
    import torch

    return torch.eye(size, device=device)


def ones_like(array: Array) -> Array:
    return np.ones_like(array) if isinstance(array, np.ndarray) else array.new_ones(array.shape)


def zeros(like: Array, *shape: int) -> Array:
    """float64 zeros where `like` is."""
    return np.zeros(shape) if isinstance(like, np.ndarray) else zeros_at(like.device, *shape, of_torch=True)


def zeros_at(device: torch.device, *shape: int, of_torch: bool = False) -> Array:
    """float64 zeros, as the verbs take what is on `device`; of_torch: a tensor in any case."""
    if device.type == "cpu" and not of_torch:
        return np.zeros(shape)
    import torch

    return torch.zeros(shape, dtype=torch.float64, device=device)


def wait_for(array: Array) -> None:
    """Until it is computed."""
    if is_tensor(array):
        synchronize(array.device)


def transposed(matrix: Array) -> Array:
    """Contiguous."""
    return np.ascontiguousarray(matrix.T) if isinstance(matrix, np.ndarray) else matrix.T.contiguous()


def to_float(array: Array) -> Array:
    """In float32."""
    return array.astype(np.float32) if isinstance(array, np.ndarray) else array.float()


def copied(array: Array) -> Array:
    return array.copy() if isinstance(array, np.ndarray) else array.clone()


def size(array: Array) -> int:
    return array.size if isinstance(array, np.ndarray) else array.numel()


def column_weights(order: Array, metric: Array) -> Array:
    """Diagonals of metric [J, g, g], which is in `order`, by input: [in]."""
    if isinstance(metric, np.ndarray):
        weights = np.empty(metric.shape[:2], np.float32)
        weights[order] = metric.diagonal(axis1=1, axis2=2)
        return weights.ravel()
    assert is_tensor(order), "both are of one kind"
    columns = metric.new_empty(metric.shape[:2])
    columns[order.long()] = metric.diagonal(dim1=1, dim2=2)
    return columns.flatten()


def extrapolate(start: Array, end: Array, beyond: float) -> Array:
    """end + beyond * (end - start), in float32."""
    if isinstance(end, np.ndarray):
        return (end + np.float32(beyond) * (end - start)).astype(np.float32)
    return end + beyond * (end - start)


def damped(H: Array, relative_damp: float) -> Array:
    """H + relative_damp * mean(diag H) * I, float32 [in, in]."""
    if isinstance(H, np.ndarray):
        mean = H.diagonal().mean(dtype=np.float64)
        return H + np.float32(relative_damp * mean) * np.eye(len(H), dtype=np.float32)
    result = H.clone()
    result.diagonal().add_((relative_damp * H.diagonal().double().mean()).float())
    return result


def eigenvalues(H: Array) -> np.ndarray | None:
    """Eigenvalues of H, float64 [in] in CPU memory, ascending; none below zero. None if they were not found, and on a
    GPU for more than `MOST_EIGENVALUES`: they are a reference alone, and take longer there than the layer's
    quantization.
    """
    if isinstance(H, np.ndarray):
        try:
            return np.linalg.eigvalsh(H.astype(np.float64)).clip(min=0.0)
        except np.linalg.LinAlgError:
            return None
    import torch

    on_gpu = H.device.type == "cuda"  # where float64 takes several times as long
    if on_gpu and H.shape[0] > MOST_EIGENVALUES:
        return None
    try:
        return torch.linalg.eigvalsh(H if on_gpu else H.double()).double().clamp(min=0.0).cpu().numpy()
    except RuntimeError:  # torch.linalg.LinAlgError is one
        return None


def gaussian_signal(weight: Array, H: Array) -> float:
    """What Gaussian weights of this mean square have for tr(W H W^T), in the mean."""
    if isinstance(weight, np.ndarray):
        square = float(np.square(weight, dtype=np.float64).mean())
    else:
        square = sum(float(part.sum()) for part in _squares(weight)) / size(weight)
    return square * weight.shape[0] * float(H.trace())


def round_to(x: Array, dtype: str, exponent: int = 0) -> Array:
    """float32 `x` rounded to the nearest values of `dtype` (of `GRIDS`) times 2^-exponent, as float32.

    Raises ValueError if a value is too large for it.
    """
    rounded: Array
    x = scaled(x, exponent)
    if dtype == "float32":
        rounded, largest = x, np.inf
    elif not isinstance(x, np.ndarray):
        import torch

        rounded = x.to(getattr(torch, dtype)).float()
        largest = x.abs().max().item()
    elif dtype == "float16":
        with np.errstate(over="ignore"):
            rounded = x.astype(np.float16).astype(np.float32)
        largest = np.abs(x).max()
    else:  # NumPy has no bfloat16: the upper half of a float32, rounded to nearest even
        bits = x.view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
        largest = np.abs(x).max()
    if not is_finite(rounded):
        raise ValueError(f"codebooks and scales: got values up to {largest:.3g}, too large for {dtype}")
    return scaled(rounded, -exponent)
