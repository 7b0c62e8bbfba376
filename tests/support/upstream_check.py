"""Run by test_upstream.py in an environment that has the upstream package `aqlm`; knows nothing of aqlm_c.

The arguments are directories. One with model.safetensors is read: every quantized linear of it is loaded into
upstream's class. One without becomes a quantized model: upstream's class with random values takes the place of each
linear of the dense model in its folder `dense`; request.json there is the `quantization_config`. In both cases the
weights that upstream dequantizes, in float32, go to weights.safetensors by layer name.
"""

import json
import sys
from pathlib import Path

import torch
from aqlm import QuantizedLinear
from aqlm.utils import _dequantize_weight, pack_int_data, unpack_int_data
from safetensors.torch import load_file, save_file

FORMAT = ("in_group_size", "out_group_size", "num_codebooks", "nbits_per_codebook")


def dequantize(layer):
    codes = unpack_int_data(layer.codes, layer.nbits_per_codebook)
    return _dequantize_weight(codes, layer.codebooks.float(), layer.scales.float()).clone()


def read(directory):
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    tensors, weights = load_file(directory / "model.safetensors"), {}
    for name in [key.removesuffix(".codes") for key in tensors if key.endswith(".codes")]:
        state = {key.rpartition(".")[2]: t for key, t in tensors.items() if key.rpartition(".")[0] == name}
        rows, groups, _ = state["codes"].shape
        sizes = groups * config["in_group_size"], rows * config["out_group_size"]
        dtype, bias = state["codebooks"].dtype, "bias" in state
        layer = QuantizedLinear(*sizes, *(config[field] for field in FORMAT), bias=bias, dtype=dtype)
        for part, tensor in layer.state_dict().items():
            assert tensor.dtype == state[part].dtype or part == "bias", f"{name}.{part}"  # would be converted
        layer.load_state_dict(state)  # strict: names and shapes
        weights[name] = dequantize(layer)
    save_file(weights, directory / "weights.safetensors")


def write(directory):
    torch.manual_seed(0)
    config = json.loads((directory / "dense" / "config.json").read_text())
    fields = json.loads((directory / "request.json").read_text())
    tensors, weights = load_file(directory / "dense" / "model.safetensors"), {}
    for name in [key.removesuffix(".weight") for key in tensors if key.endswith("_proj.weight")]:
        out_features, in_features = tensors.pop(f"{name}.weight").shape
        bias = tensors.get(f"{name}.bias")
        sizes = in_features, out_features, *(fields[field] for field in FORMAT)
        layer = QuantizedLinear(*sizes, bias=bias is not None, dtype=torch.float16)
        codes = torch.randint(2**layer.nbits_per_codebook, layer.codes.shape)
        layer.codes.data = pack_int_data(codes, layer.nbits_per_codebook).clone()
        torch.nn.init.normal_(layer.codebooks)
        torch.nn.init.uniform_(layer.scales, 0.5, 1.5)
        if bias is not None:
            layer.bias.data = bias.half()
        weights[name] = dequantize(layer)
        tensors |= {f"{name}.{part}": tensor.contiguous() for part, tensor in layer.state_dict().items()}
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": fields}))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    save_file(weights, directory / "weights.safetensors")


if __name__ == "__main__":
    for argument in map(Path, sys.argv[1:]):
        (read if (argument / "model.safetensors").exists() else write)(argument)
