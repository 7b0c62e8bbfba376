"""The weight of a quantized layer, as whoever asks for it gets it: decoded when it is read, and never changed."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from weights import random_weight

from aqlm_c.format import Format
from aqlm_c.nn import ops
from aqlm_c.nn.embedding import QuantizedEmbedding
from aqlm_c.nn.linear import QuantizedLinear

FORMAT = Format.parse("2x8g8")
OUT, IN = 128, 64


def parts(dtype=torch.float32):
    names = ("codes", "codebooks", "scales")
    return dict(zip(names, random_weight((OUT, IN, 2, 8, 1, 8), dtype), strict=True))


def linear(dtype=torch.float32):
    layer = QuantizedLinear(IN, OUT, False, FORMAT, dtype=dtype)
    layer.load_state_dict(parts(dtype))
    return layer


def embedding(dtype=torch.float32):
    layer = QuantizedEmbedding(OUT, IN, FORMAT, dtype=dtype)
    layer.load_state_dict(parts(dtype))
    return layer


LAYERS = pytest.mark.parametrize("make", [linear, embedding])


@LAYERS
def test_what_is_known_without_decoding(make, dtype, monkeypatch):
    layer = make(dtype)
    monkeypatch.setattr(layer, "dense_weight", lambda *_: pytest.fail("decoded"))
    weight = layer.weight
    assert weight.shape == (OUT, IN) and weight.dtype == dtype and weight.device.type == "cpu"
    assert weight.numel() == OUT * IN and weight.ndim == 2 and weight.nbytes == OUT * IN * dtype.itemsize
    assert not weight.requires_grad and weight.is_leaf and weight.grad is None and not weight.is_meta
    assert weight.is_contiguous() and weight.is_floating_point() and len(weight) == OUT
    assert weight.data.shape == weight.detach().shape == (OUT, IN) and "DecodedWeight" in repr(weight)


@LAYERS
def test_its_values_are_the_dense_weight(make):
    layer = make()
    weight, dense = layer.weight, layer.dense_weight().detach()
    x = torch.randn(3, IN, requires_grad=True)
    y = F.linear(x, weight)
    assert type(y) is torch.Tensor and torch.equal(y, F.linear(x, dense))
    y.sum().backward()
    torch.testing.assert_close(x.grad, dense.sum(0).expand(3, -1), rtol=1e-5, atol=1e-5)
    assert torch.equal(weight[3], dense[3]) and torch.equal(weight.t() @ weight, dense.t() @ dense)
    assert torch.equal(F.embedding(torch.tensor([5]), weight)[0], dense[5])
    assert torch.equal(torch.stack(weight.split(8)), torch.stack(dense.split(8)))
    assert np.array_equal(weight.numpy(), dense.numpy()) and np.array_equal(np.asarray(weight), dense.numpy())
    assert weight.tolist() == dense.tolist() and weight.max().item() == dense.max().item()
    copied = torch.empty(OUT, IN)
    assert copied.copy_(weight) is copied and torch.equal(copied, dense)
    buffer = io.BytesIO()
    torch.save(weight, buffer)
    buffer.seek(0)
    for own in (weight.clone(), copy.deepcopy(weight), pickle.loads(pickle.dumps(weight)), torch.load(buffer)):
        assert type(own) is torch.Tensor and torch.equal(own, dense)
        own.zero_()
    assert torch.equal(layer.weight, dense)


CHANGES = {
    "in place": lambda w: w.zero_(),
    "data in place": lambda w: w.data.normal_(),
    "an item": lambda w: w.__setitem__(0, 1.0),
    "a view": lambda w: w.t().mul_(2),
    "a view of a view": lambda w: w.view(-1)[3:5].fill_(1),
    "a part of several": lambda w: w.split(8)[0].add_(1),
    "data": lambda w: setattr(w, "data", torch.ones(OUT, IN)),
    "out": lambda w: torch.mul(torch.ones(OUT, IN), 2, out=w),
    "foreach": lambda w: torch._foreach_mul_([w], 2),
    "copy": lambda w: w.copy_(torch.ones(OUT, IN)),
    "init": lambda w: nn.init.normal_(w),
    "set": lambda w: w.set_(torch.ones(2)),
    "transposed": lambda w: w.t_(),
    "gradient": lambda w: w.requires_grad_(),
    "gradient attribute": lambda w: setattr(w, "requires_grad", True),
    "parameter": nn.Parameter,
}


@pytest.mark.parametrize("change", CHANGES)
@LAYERS
def test_changes_are_refused_and_say_what_to_do(make, change):
    layer = make()
    before = layer.dense_weight()
    with pytest.raises(ValueError, match=r"^weight: got .*expected only reading: .*dequantize"), torch.no_grad():
        CHANGES[change](layer.weight)
    assert torch.equal(layer.weight, before)
    layer.is_loading = True  # a model's initialisation, while the layer is loaded from files
    if change != "parameter":
        with torch.no_grad():
            CHANGES[change](layer.weight)
        assert torch.equal(layer.weight, before)


@LAYERS
def test_another_weight_is_refused(make):
    layer = make()
    for value in (nn.Parameter(torch.ones(OUT, IN)), torch.ones(OUT, IN), None):
        with pytest.raises(ValueError, match=r"^weight: got one for a Quantized"):
            layer.weight = value
    with pytest.raises(ValueError, match=r"^weight: got one"):
        layer.register_parameter("weight", None)


@LAYERS
def test_it_is_no_part_of_the_module(make):
    layer = make()
    names = ["codes", "codebooks", "scales"]
    assert list(layer.state_dict()) == [name for name, _ in layer.named_parameters()] == names
    assert not dict(layer.named_buffers()) and "weight" not in vars(layer)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin.weight, layer.weight)


def test_its_dtype_is_that_of_the_layer_it_stands_for():
    dense = nn.Linear(IN, OUT, dtype=torch.bfloat16, device="meta")
    layer = QuantizedLinear.empty(dense, FORMAT, torch.float16)
    assert layer.weight.is_meta and layer.weight.dtype == torch.bfloat16 and layer.codebooks.dtype == torch.float16
    assert (layer.weight + 1).is_meta
    layer.load_state_dict({**parts(torch.float16), "bias": torch.zeros(OUT)}, assign=True)
    assert torch.equal(layer.weight, layer.dense_weight(torch.bfloat16))
    assert layer.float().weight.dtype == torch.float32 == layer.codebooks.dtype
    assert layer.half().weight.dtype == torch.float16
    rows = embedding(torch.float16)
    rows.output_dtype = torch.float32
    assert rows.weight.dtype == rows(torch.tensor([1])).dtype == torch.float32


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_code_may_read_it(backend):
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = linear()

        def forward(self, x):
            return F.linear(x.to(self.layer.weight.dtype), self.layer.weight) + self.layer(x)

    model, x = Reads(), torch.randn(2, IN)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-6, atol=1e-6)


def is_packed(layer):
    return not layer.codes.is_contiguous()


def test_a_layer_is_packed_however_it_is_filled():
    assert ops.packs(parts()["codes"])
    by_state = linear()
    with torch.device("meta"):
        assigned = QuantizedLinear(IN, OUT, False, FORMAT)
    assigned.load_state_dict(parts(), assign=True)
    by_hand = QuantizedLinear(IN, OUT, False, FORMAT)
    with torch.no_grad():
        for name, value in parts().items():
            getattr(by_hand, name).copy_(value)
    for layer in (by_state, assigned, by_hand, copy.deepcopy(by_hand), pickle.loads(pickle.dumps(by_hand))):
        assert is_packed(layer) and torch.equal(layer.codes, parts()["codes"])
        assert layer.state_dict()["codes"].is_contiguous()
        assert torch.equal(layer(torch.ones(1, IN)), by_state(torch.ones(1, IN)))
