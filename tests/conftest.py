"""What every test file may use: fixtures for instruction sets and dtypes, and one rule for tolerances."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports a hub client: tests use no network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest

from aqlm_c import _core

EPS = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


@pytest.fixture(params=_core.available_isas())
def isa(request):
    """Runs the test once per instruction set of this machine, on both doors; gives its name."""
    doors = [_core]
    try:
        from aqlm_c import ops
    except ImportError:  # a build without torch still tests the C core
        pass
    else:
        doors.append(ops)
    before = [door.get_isa() for door in doors]
    for door in doors:
        door.set_isa(request.param)
    yield request.param
    for door, name in zip(doors, before, strict=True):
        door.set_isa(name)


@pytest.fixture
def exact():
    """Runs the test without matmul's rounded tables, on both doors."""
    doors = [_core]
    try:
        from aqlm_c import ops
    except ImportError:
        pass
    else:
        doors.append(ops)
    before = [door.get_exact() for door in doors]
    for door in doors:
        door.set_exact(True)
    yield
    for door, value in zip(doors, before, strict=True):
        door.set_exact(value)


@pytest.fixture
def each_way():
    """Calls a function for every instruction set and 1, 2 and 3 threads; True if all results are the same bits."""

    def run(function):
        isa, threads, results = _core.get_isa(), _core.get_num_threads(), []
        try:
            for name in _core.available_isas():
                _core.set_isa(name)
                for n in (1, 2, 3):
                    _core.set_num_threads(n)
                    result = function()
                    results.append([x.tobytes() for x in (result if isinstance(result, tuple) else (result,))])
        finally:
            _core.set_isa(isa)
            _core.set_num_threads(threads)
        return all(result == results[0] for result in results)

    return run


@pytest.fixture(params=["float32", "float16", "bfloat16"])
def dtype(request):
    """Runs the test once per torch dtype that a model may have."""
    return getattr(pytest.importorskip("torch"), request.param)


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
