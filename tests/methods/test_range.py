"""Weights of any size, rows and inputs of nothing: powers of two move, zeros are exact, and no run stops for them."""

import json
import logging

import numpy as np
import pytest
from layers import random_layer
from tiny import FAST, random_tokens, tiny_llama

from aqlm_c import AqlmConfig, quantize_weight
from aqlm_c.core import grid
from aqlm_c.core.hessian import Hessian

torch = pytest.importorskip("torch")
SOLVERS = ["ldl", "paper", "rtn"]


def config_of(solver, scheme="2x4g8", **options):
    options = {} if solver == "rtn" else {"ldl_passes": 2, "max_sweeps": 2, "adam_steps": 20, **options}
    scheme = "2x8g8" if solver == "rtn" else scheme  # one bit to round to is nothing
    return AqlmConfig.from_scheme(scheme, solver=solver, **options)


def row_errors(W, decoded):
    return np.square(W.astype(np.float64) - decoded).sum(1) / np.square(W.astype(np.float64)).sum(1)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    ("dtype", "exponent"),
    [
        *(("float16", exponent) for exponent in (-30, -24, 20, 25)),
        *(("bfloat16", exponent) for exponent in (-60, 100)),
        *(("float32", exponent) for exponent in (-100, 100, 122)),
    ],
)
def test_a_whole_layer_of_any_size(solver, dtype, exponent):
    """The codes are those of the layer of ordinary size, and the error is nearly."""
    W, H = random_layer(32, 64)
    config = config_of(solver)
    ordinary, other = (quantize_weight(w, H, config, dtype=dtype) for w in (W, np.ldexp(W, exponent)))
    if solver != "paper" and dtype != "float16":  # Adam's rate is absolute; float16's rounding differs
        np.testing.assert_array_equal(other.codes, ordinary.codes)
    rel = {"paper": 0.3, "ldl": 0.02, "rtn": 0.02}[solver]
    assert other.relative_error == pytest.approx(ordinary.relative_error, rel=rel)
    assert other.signal == pytest.approx(np.ldexp(ordinary.signal, 2 * exponent), rel=1e-6)
    decoded = np.ldexp(other.decode().astype(np.float64), -exponent)
    assert np.square(decoded - W).sum() < 1.3 * np.square(ordinary.decode() - W).sum() + 1e-12
    for part in (other.codebooks, other.scales):
        with np.errstate(over="raise"):
            stored = part if dtype != "float16" else part.astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(stored, part)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("low", [-27, -20])
def test_tiny_rows_beside_ordinary_ones(solver, low):
    W, _ = random_layer(48, 64)
    small = slice(0, 48, 6)
    W[small] = np.ldexp(W[small], low)
    for power, dtype in ((1, "float16"), (1e6, "float16"), (1e-6, "bfloat16")):
        V = W * np.float32(power)
        found = quantize_weight(V, np.eye(64, dtype=np.float32), config_of(solver, "2x6g8"), dtype=dtype)
        errors = row_errors(V, found.decode())
        assert errors[small].mean() < (0.5 if solver == "rtn" else 0.3) and errors.max() < 0.7


def test_rows_that_float16_cannot_hold_are_named(caplog):
    W, H = random_layer(16, 64)
    W[3] *= np.float32(1e-14)
    with caplog.at_level(logging.WARNING, "aqlm_c"):
        found = quantize_weight(W, H, config_of("ldl"))
    assert "weight: 1 of 16 rows are too small for float16" in caplog.text
    assert not found.decode()[3].any() and found.relative_error < 0.2
    assert quantize_weight(W, H, config_of("ldl"), dtype="bfloat16").decode()[3].any()


def test_rows_beyond_float16_are_stored_as_bfloat16():
    from aqlm_c.quantize import quantize_linear

    W, H = random_layer(32, 64)
    for rows, dtype in (([0], torch.float16), ([-27, 20], torch.bfloat16), ([30] * 32, torch.bfloat16)):
        V = W.copy()
        for row, power in enumerate(rows):
            V[row] = np.ldexp(W[row], power)
        linear = torch.nn.Linear(64, 32, bias=False)
        linear.weight.data = torch.from_numpy(V)
        layer, solved = quantize_linear(linear, H, config_of("ldl"))
        assert layer.codebooks.dtype == dtype
        assert row_errors(V, layer.dequantize(torch.float32).weight.detach().numpy()).max() < 0.9
        assert solved.decode().any(1).all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_ordinary_layer_is_left_alone(solver):
    W, H = random_layer(32, 64)
    assert grid.weight_exponent(W) == 0 and Hessian(H).exponent == 0
    found = quantize_weight(W, H, config_of(solver))
    scales, books = found.scales.reshape(-1), found.codebooks[:, :, 0]
    assert grid.share(scales, books, 0, "float16") == (0, 0)
    assert grid.share(scales, books, 3, "float16") == (3, 0)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("exponent", [-90, 90])
def test_inputs_of_any_size(solver, exponent):
    W, H = random_layer(32, 64)
    ordinary, other = (quantize_weight(W, h, config_of(solver)) for h in (H, np.ldexp(H, exponent)))
    if solver == "paper":  # Adam's divisor has an absolute part
        assert other.relative_error == pytest.approx(ordinary.relative_error, rel=0.3)
    else:
        np.testing.assert_array_equal(other.codes, ordinary.codes)
        np.testing.assert_array_equal(other.codebooks, ordinary.codebooks)
        assert other.relative_error == ordinary.relative_error
    assert other.signal == np.ldexp(ordinary.signal, exponent)


@pytest.mark.parametrize(("size", "dtype"), [(1e12, "float16"), (1e-15, "float16")])
def test_what_no_power_of_two_fits_is_refused_before_the_work(size, dtype):
    W, H = random_layer(8, 32)
    with pytest.raises(ValueError, match=r"weight: got .*, expected a largest value of 2.3e-13 to 1.3e8"):
        quantize_weight(W * np.float32(size), H, config_of("ldl"), dtype=dtype)


# ---- zeros ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_weight_of_zeros_is_exact(solver, dtype):
    _, H = random_layer(16, 32)
    found = quantize_weight(np.zeros((16, 32)), H, config_of(solver), dtype=dtype)
    assert not found.decode().any() and not found.scales.any() and not found.codebooks.any()
    assert (found.relative_error, found.signal) == (0.0, 0.0) and found.codes.shape == (16, 4, 2)


@pytest.mark.parametrize("solver", SOLVERS)
def test_rows_of_zeros_are_exact(solver):
    W, H = random_layer(32, 64)
    W[::4] = 0
    found = quantize_weight(W, H, config_of(solver, ldl_passes=0) if solver == "ldl" else config_of(solver))
    assert not found.decode()[::4].any() and (row_errors(W[1::4], found.decode()[1::4]) < 1).all()


def test_rows_of_denormal_numbers_spoil_nothing():
    W, H = random_layer(32, 64)
    truth = quantize_weight(W, H, config_of("ldl"), dtype="float32").relative_error
    W[5] *= np.float32(1e-40)
    for solver in SOLVERS:
        found = quantize_weight(W, H, config_of(solver), dtype="bfloat16")
        assert np.isfinite(found.decode()).all() and (solver != "ldl" or found.relative_error < 1.3 * truth)


@pytest.mark.parametrize("solver", SOLVERS)
def test_inputs_of_zeros(solver, caplog):
    """No input, and inputs that only weights of zero have: the identity, and a warning."""
    W, H = random_layer(32, 64)
    dead = H.copy()
    dead[:32], dead[:, :32] = 0, 0
    assert quantize_weight(W, dead, config_of(solver)).relative_error < 1
    half = W.copy()
    half[:, 32:] = 0
    for weight, given in ((W, np.zeros_like(H)), (half, dead)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "aqlm_c"):
            found = quantize_weight(weight, given, config_of(solver))
        assert "weight: got an H under which this weight has no output; the identity" in caplog.text
        same = quantize_weight(weight, np.eye(64), config_of(solver))
        np.testing.assert_array_equal(found.codes, same.codes)
        assert found.relative_error == same.relative_error


def test_an_H_that_rounding_left_indefinite(caplog):
    W, H = random_layer(16, 64)
    H -= (np.linalg.eigvalsh(H)[0] + np.float32(0.02) * H.diagonal().mean()) * np.eye(64, dtype=np.float32)
    assert np.linalg.eigvalsh(H)[0] < 0
    with caplog.at_level(logging.WARNING, "aqlm_c"):
        found = quantize_weight(W, H, config_of("ldl", relative_damp=1e-3))
    assert "H is not positive definite after damping" in caplog.text and np.isfinite(found.decode()).all()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("data", [True, False])
def test_a_model_with_dead_parts(solver, data, caplog, tmp_path):
    from aqlm_c import quantize_model, save_quantized

    model = tiny_llama(tie_word_embeddings=False)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
        model.model.layers[0].post_attention_layernorm.weight.zero_()
        model.model.layers[0].self_attn.q_proj.weight[4:8] = 0
    config = config_of(solver, "1x4g8").replace(finetune_epochs=int(data and solver == "ldl"), finetune_lookahead=0)
    with caplog.at_level(logging.WARNING, "aqlm_c"):
        report = quantize_model(
            model, random_tokens(8, 24) if data else None, config, work_dir=tmp_path if data else None
        )
    layers = {layer.name: layer for layer in report.layers}
    zero = layers["model.layers.1.mlp.down_proj"]
    assert zero.relative_error == 0 and zero.gaussian_true_rate is None and zero.db_above_true_rate is None
    named = [record.getMessage() for record in caplog.records if "identity taken as H" in record.getMessage()]
    assert len(named) == (1 if data else 0)
    assert not data or ("mlp.gate_proj" in named[0] and "mlp.down_proj" in named[0] and "2 layers" not in named[0])
    assert not model.model.layers[1].mlp.down_proj.dense_weight().any()
    assert not model.model.layers[0].self_attn.q_proj.dense_weight()[4:8].any()
    assert model(random_tokens(1, 8)).logits.isfinite().all()
    json.dumps(report.to_dict(), allow_nan=False)
    from rich.console import Console

    with open(tmp_path / "shown.txt", "w") as shown:
        Console(file=shown, width=140).print(report)
    assert "nan" not in (tmp_path / "shown.txt").read_text()
    save_quantized(model, None, tmp_path / "out")


def test_experts_that_no_token_reaches(caplog, monkeypatch):
    from tiny import VOCABULARY, random_model
    from transformers import MixtralConfig

    from aqlm_c import quantize_model
    from aqlm_c.model.experts import Experts

    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 1}
    model = random_model(MixtralConfig(**sizes))
    forward = Experts.forward

    def reached_by_few(self, hidden, *rest):  # as the probe's eight tokens are
        return forward(self, hidden, *rest) if len(hidden) <= 8 else torch.zeros_like(hidden)

    monkeypatch.setattr(Experts, "forward", reached_by_few)
    with caplog.at_level(logging.WARNING, "aqlm_c"):
        report = quantize_model(model, random_tokens(4, 16), AqlmConfig.from_scheme("1x4g8", **FAST))
    assert "no calibration token reaches" in caplog.text and "experts.3" in caplog.text
    experts = [layer for layer in report.layers if "experts" in layer.name]
    assert len(experts) == 12 and all(layer.tokens == 0 for layer in experts)
    assert any("No calibration token reached" in sentence for sentence in report.diagnoses)


def test_linears_that_share_their_input_in_some_batches_only():
    from aqlm_c.calibrate.hessians import HessianSums

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(8, 4), torch.nn.Linear(8, 4)

        def forward(self, x):
            y = x if x[0, 0] < 0 else x + 1
            return self.a(x) + self.b(input=y)

    block, batches = Block(), [torch.randn(5, 8) for _ in range(4)]
    for batch, sign in zip(batches, (-1, 1, -1, 1), strict=True):
        batch[0, 0] = sign
    sums = HessianSums({"a": block.a, "b": block.b})
    sums._gather([lambda x=x: block(x) for x in batches])
    found = sums.hessians()
    seen = {"a": torch.cat(batches), "b": torch.cat([x if x[0, 0] < 0 else x + 1 for x in batches])}
    for name, x in seen.items():
        np.testing.assert_allclose(found[name].H, (x.mT @ x / len(x)).numpy(), rtol=1e-5, atol=1e-5)
        assert sums.tokens_of(name) == 20
