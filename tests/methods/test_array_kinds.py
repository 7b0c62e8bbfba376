"""Every method gives the same bits for NumPy arrays, which go to `_core`, as for tensors, which go to the torch ops."""

import dataclasses

import numpy as np
import pytest
import torch
from layers import random_layer

from aqlm_c import AqlmConfig
from aqlm_c.core.hessian import Hessian
from aqlm_c.methods import METHODS, get_method
from aqlm_c.methods.base import LayerProblem, gaussian_references

OPTIONS = {"ldl_passes": 2, "max_sweeps": 2, "adam_steps": 5}
SCHEMES = {  # of methods that have not all of them
    **{name: ["2x8g8", "3x8g8", "4x8g8"] for name in ("gptq", "quip", "quip_sharp")},
    "kmeans": ["1x6g8", "1x8g4"],
    "product": ["2x5g8", "4x3g8"],
}
CASES = [(solver, scheme) for solver in METHODS for scheme in SCHEMES.get(solver, ["2x5g8", "3x3g8", "1x6g8"])]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(("solver", "scheme"), CASES)
def test_tensors_and_arrays(solver, scheme, dtype):
    W, H = random_layer(40, 64)
    known = {field.name for field in dataclasses.fields(get_method(solver).options_type)}
    few = {name: value for name, value in OPTIONS.items() if name in known}
    config = AqlmConfig.from_scheme(scheme, solver=solver, **few)
    method, results = get_method(solver), []
    for convert in (np.asarray, torch.from_numpy):
        problem = LayerProblem("layer", convert(W), Hessian(convert(H)), config.format, dtype, seed=3)
        results.append((problem, method.quantize(problem, config.options)))
    (problem, array), (other, tensor) = results
    assert all(isinstance(part, torch.Tensor) for part in tensor.tensors().values())
    for name, part in array.tensors().items():
        np.testing.assert_array_equal(part, tensor.tensors()[name].numpy(), err_msg=name)
    assert tensor.relative_error == array.relative_error and tensor.history == array.history
    np.testing.assert_array_equal(array.decode(), tensor.decode().numpy())
    again = method.search_again(problem, array, config.options)
    if again is not None:
        np.testing.assert_array_equal(again, method.search_again(other, tensor, config.options).numpy())
    references = gaussian_references(problem)
    assert gaussian_references(other) == pytest.approx(references, rel=1e-5)
