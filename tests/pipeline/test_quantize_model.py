"""Config, calibration and quantize_model on tiny random models."""

import numpy as np
import pytest
import torch
from tiny import random_model, random_tokens, tiny_llama
from transformers import Gemma3TextConfig, GPTNeoXConfig, LlamaConfig, MistralConfig, OlmoConfig

from aqlm_c.calibrate import sources
from aqlm_c.calibrate.activations import capture
from aqlm_c.calibrate.hessians import HessianSums
from aqlm_c.core.hessian import Hessian
from aqlm_c.format import Format
from aqlm_c.methods.aqlm import METHOD
from aqlm_c.model.blocks import find_blocks, quantizable_linears
from aqlm_c.nn.linear import QuantizedLinear
from aqlm_c.pipeline.progress import Progress
from aqlm_c.quantize import quantize_linear, quantize_model
from aqlm_c.recipe import AqlmConfig

pytestmark = pytest.mark.hf

CONFIG = AqlmConfig.from_scheme("2x4g8", max_sweeps=2, ldl_passes=2)
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


# ---- config ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "values"),
    [("2x8g8", (2, 8, 8, 1)), ("1x16", (1, 16, 8, 1)), ("1x12g16", (1, 12, 16, 1)), ("3x8g32o2", (3, 8, 32, 2))],
)
def test_schemes(scheme, values):
    config = AqlmConfig.from_scheme(scheme, seed=3)
    assert tuple(Format.parse(scheme).to_dict().values()) == values
    assert config.scheme == (scheme if "g" in scheme else scheme + "g8")
    assert AqlmConfig.from_dict(config.to_dict()) == config and config.seed == 3


def test_bits_per_weight_counts_everything():
    bits = Format.parse("2x8g8").bits_per_weight(1536, 576)
    stored = 1536 * 72 * 2 * 8 + 2 * 256 * 8 * 16 + 1536 * 16
    assert bits == pytest.approx(stored / (1536 * 576), rel=1e-12)
    halves = Format.parse("2x8g8o2").bits_per_weight(1536, 576)
    assert halves == pytest.approx((768 * 72 * 2 * 8 + 2 * 256 * 16 * 16 + 768 * 16) / (1536 * 576), rel=1e-12)


@pytest.mark.parametrize("scheme", ["", "2y8", "2x8g", "x8g8", "2x8g8 extra", "-1x8", None, 2])
def test_unknown_scheme(scheme):
    with pytest.raises(ValueError, match=r"scheme: got .*expected .*2x8g8"):
        AqlmConfig.from_scheme(scheme)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_codebooks", 0),
        ("num_codebooks", 9),
        ("nbits_per_codebook", 17),
        ("nbits_per_codebook", 8.0),
        ("in_group_size", 12),
        ("out_group_size", 0),
        ("beam_size", -1),
        ("relative_mse_tolerance", 1.5),
        ("relative_mse_tolerance", float("nan")),
        ("relative_damp", 0),
        ("seed", -1),
        ("seed", True),
    ],
)
def test_config_refuses(field, value):
    with pytest.raises(ValueError, match=rf"{field}: got {value!r}, expected"):
        AqlmConfig.from_dict({field: value})


def test_formats_that_cannot_be_searched_are_named():
    AqlmConfig.from_scheme("2x8g8").check_searchable()
    with pytest.raises(ValueError, match=r"out_group_size: got 2 \(scheme '2x8g8o2'\), expected 1"):
        AqlmConfig.from_scheme("2x8g8o2").check_searchable()


@pytest.mark.parametrize(
    ("out_features", "in_features", "message"),
    [
        (64, 20, "in_group_size: got 8, expected a divisor of in_features=20 of layer up"),
        (64, 0, "in_group_size: got 8, expected a divisor of in_features=0 of layer up"),
        (63, 64, "out_group_size: got 2, expected a divisor of out_features=63 of layer up"),
    ],
)
def test_groups_tile_the_layer(out_features, in_features, message):
    with pytest.raises(ValueError, match=message):
        Format.parse("2x8g8o2").check_layer("up", out_features, in_features)


def test_config_refuses_unknown_options():
    with pytest.raises(ValueError, match="unknown option 'beam'"):
        AqlmConfig.from_scheme("2x8g8", beam=3)


# ---- calibration ----------------------------------------------------------------------------------------------

SMALL = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
FAMILIES = {
    "llama": LlamaConfig(**SMALL, intermediate_size=64, num_key_value_heads=2),
    # windows shorter than the sequences: masks differ from a plain causal one, in Gemma 3 from block to block
    "mistral": MistralConfig(**SMALL, intermediate_size=64, num_key_value_heads=2, sliding_window=4),
    "gemma3": Gemma3TextConfig(
        **SMALL,
        intermediate_size=64,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "gpt_neox": GPTNeoXConfig(**SMALL, intermediate_size=64),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_stream_equals_the_models_own_forward(family):
    model = random_model(FAMILIES[family])
    tokens = random_tokens(5, 12)
    name, blocks = find_blocks(model)
    assert name == ("gpt_neox.layers" if family == "gpt_neox" else "model.layers")

    expected = []
    hook = blocks[-1].register_forward_hook(
        lambda *call: expected.append(call[-1][0] if isinstance(call[-1], tuple) else call[-1])
    )
    with torch.no_grad():
        for batch in tokens.split(2):
            model(batch)
    hook.remove()

    stream = capture(model, blocks, tokens, batch_size=2)
    for index, block in enumerate(blocks):
        stream.advance(index, block)
    assert [len(hidden) for hidden in stream.hidden] == [2, 2, 1]
    for got, want in zip(stream.hidden, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert all("forward" not in vars(block) for block in blocks)  # the recorders are gone


def test_arguments_of_equal_batches_are_held_once():
    model = random_model(FAMILIES["mistral"])
    stream = capture(model, find_blocks(model)[1], random_tokens(6, 12), batch_size=2)
    assert all(batch[0] is stream.arguments[0][0] for batch in stream.arguments)


def test_hessians_are_means_over_tokens_and_shared_by_input():
    model = tiny_llama()
    prefix, blocks = find_blocks(model)
    inputs = {}
    linears = {n: model.get_submodule(n) for n in quantizable_linears(f"{prefix}.0", blocks[0], None, AqlmConfig())}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: inputs.setdefault(name, []).append(args[0]))
        for name, module in linears.items()
    ]
    stream = capture(model, blocks, random_tokens(5, 12), batch_size=2)
    inputs.clear()
    stream.advance(0, blocks[0])
    for hook in hooks:
        hook.remove()

    stream = capture(model, blocks, random_tokens(5, 12), batch_size=2)
    sums = HessianSums(linears)
    sums.gather(stream, 0, blocks[0])
    hessians = sums.hessians()
    for name, hessian in hessians.items():
        x = torch.cat([part.flatten(0, 1) for part in inputs[name]]).double().numpy()
        assert hessian.H.dtype == np.float32 and len(x) == 60
        np.testing.assert_allclose(hessian.H, x.T @ x / 60, rtol=1e-5, atol=1e-6)
    groups = {}
    for name, hessian in hessians.items():
        groups.setdefault(id(hessian), []).append(name.rpartition(".")[2])
    assert list(groups.values()) == [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]
    assert not any(linear._forward_pre_hooks for linear in linears.values())


def test_model_without_blocks():
    with pytest.raises(ValueError, match="model: got Linear, expected one with a list of blocks"):
        find_blocks(torch.nn.Linear(4, 4))


# ---- quantize_linear and quantize_model -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantize_linear(dtype):
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 48, dtype=dtype)
    x = torch.randn(256, 64)
    H = x.T @ x / 256
    layer, solved = quantize_linear(linear, H, CONFIG)
    stored = torch.float16 if dtype == torch.float32 else dtype
    assert layer.codebooks.dtype == layer.scales.dtype == stored and layer.bias.dtype == dtype
    weight = linear.weight.detach().double()
    D = weight - layer.dequantize(torch.float32).weight.double()
    error = torch.trace(D @ H.double() @ D.T) / torch.trace(weight @ H.double() @ weight.T)
    assert solved.relative_error == pytest.approx(error.item(), rel=1e-3)
    assert 0 < solved.relative_error < 0.4
    again, _ = quantize_linear(linear, Hessian(H.numpy()), CONFIG)
    assert torch.equal(layer.codes, again.codes) and torch.equal(layer.codebooks, again.codebooks)
    with pytest.raises(ValueError, match="in_group_size: got 32"):
        quantize_linear(torch.nn.Linear(48, 8), np.eye(48), AqlmConfig.from_scheme("2x8g32"))


class Recorder(Progress):
    def __init__(self):
        self.calls = []

    def __getattribute__(self, name):
        if not name.startswith("on_"):
            return super().__getattribute__(name)
        return lambda *args: self.calls.append((name, *args))


def quantized(model=None, tokens=None, config=CONFIG, **options):
    model = model or tiny_llama()
    return model, quantize_model(model, random_tokens(6, 16) if tokens is None else tokens, config, **options)


def test_quantize_model_replaces_the_linears_of_every_block():
    progress = Recorder()
    model, report = quantized(progress=progress)
    assert all(isinstance(m, QuantizedLinear) for n, m in model.named_modules() if n.endswith(KINDS))
    assert isinstance(model.lm_head, torch.nn.Linear) and model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.training
    names = [f"model.layers.{block}.{part}" for block in range(2) for part in parts()]
    assert [layer.name for layer in report.layers] == names
    assert (report.tokens, report.sequences) == (96, 6)
    assert set(report.phases) == {"calibrate", "hessian", "quantize", "reference", "finetune", "propagate"}
    assert all(seconds > 0 for seconds in report.phases.values())
    assert report.peak_memory_bytes > 2**20 and report.config == CONFIG.to_dict() and report.isa and report.threads
    for layer in report.layers:
        assert 0 < layer.relative_error < 1 and layer.seconds > 0 and layer.scheme == "2x4g8"
        assert layer.bits_per_weight == CONFIG.format.bits_per_weight(layer.out_features, layer.in_features)
        assert 0 < layer.gaussian_true_rate < layer.gaussian_code_rate < 1
    assert progress.calls[0] == ("on_start", 2, 14)
    assert [call[1:] for call in progress.calls if call[0] == "on_block"] == [
        (0, "model.layers.0"),
        (1, "model.layers.1"),
    ]
    assert [call[1] for call in progress.calls if call[0] == "on_layer"] == report.layers
    assert progress.calls[-1] == ("on_finish", report)


def parts():
    attention = [f"self_attn.{kind}" for kind in KINDS[:4]]
    return attention + [f"mlp.{kind}" for kind in KINDS[4:]]


def test_each_block_sees_the_quantized_blocks_before_it(monkeypatch):
    used, solve = [], METHOD.quantize
    monkeypatch.setattr(
        type(METHOD), "quantize", lambda _, problem, options: used.append(problem.hessian) or solve(problem, options)
    )
    model, report = quantized()
    H = dict(zip([layer.name for layer in report.layers], used, strict=True))["model.layers.1.self_attn.q_proj"].H

    def own_hessian(net):
        inputs = []
        net.model.layers[1].self_attn.q_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        with torch.no_grad():
            net(random_tokens(6, 16))
        x = inputs[0].flatten(0, 1).double().numpy()
        return x.T @ x / 96

    np.testing.assert_allclose(H, own_hessian(model), rtol=1e-3, atol=1e-4)
    assert np.abs(H - own_hessian(tiny_llama())).max() > 0.05 * np.abs(H).max()


def test_quantizing_is_deterministic_and_close():
    tokens = random_tokens(4, 16, seed=9)
    (first, _), (second, _) = quantized(), quantized()
    state = second.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in first.state_dict().items())
    original, fine = tiny_llama(), tiny_llama()
    quantize_model(fine, random_tokens(6, 16), AqlmConfig.from_scheme("4x6g8", max_sweeps=1))
    logits = original(tokens).logits
    errors = [(net(tokens).logits - logits).norm() / logits.norm() for net in (fine, first)]
    assert errors[0] < 0.5 * errors[1]


def test_layers_regex():
    model, report = quantized(layers=r"layers\.1\..*(up|down)_proj$")
    assert [layer.name for layer in report.layers] == ["model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"]
    assert [n for n, m in model.named_modules() if isinstance(m, QuantizedLinear)] == [
        layer.name for layer in report.layers
    ]
    assert "model.layers.1.mlp.gate_proj.weight" in model.config.quantization_config.linear_weights_not_to_quantize


def test_blocks_after_the_last_target_are_not_run():
    progress = Recorder()
    quantized(layers=r"layers\.0\.mlp", progress=progress)
    assert progress.calls[0] == ("on_start", 1, 3)
    assert [call[1:] for call in progress.calls if call[0] == "on_block"] == [(0, "model.layers.0")]


def poison(name, value, model=None):
    model = model or tiny_llama()
    model.get_parameter(name).data.view(-1)[5] = value
    return model


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (
            lambda: poison("model.layers.1.mlp.up_proj.weight", torch.nan),
            {},
            r"layers.1.mlp.up_proj.weight: got NaN or Inf",
        ),
        (lambda: poison("model.layers.0.self_attn.q_proj.weight", torch.inf), {}, r"q_proj.weight: got NaN or Inf"),
        (
            lambda: poison("model.layers.1.input_layernorm.weight", torch.nan),
            {},
            r"1.input_layernorm.weight: got NaN or Inf",
        ),
        (lambda: poison("model.embed_tokens.weight", torch.inf), {}, r"model.embed_tokens.weight: got NaN or Inf"),
        (
            lambda: poison("lm_head.weight", torch.nan, tiny_llama(tie_word_embeddings=False)),
            {"layers": r"\.0\."},
            r"lm_head.weight: got NaN or Inf",
        ),
        (tiny_llama, {"config": AqlmConfig.from_scheme("2x4g8o2")}, r"out_group_size: got 2 .*expected 1"),
        (tiny_llama, {"layers": "w1"}, r"layers: got 'w1', which leave no linear"),
        (tiny_llama, {"layers": "("}, r"layers: got '\(', expected a regular expression"),
        (tiny_llama, {"tokens": torch.zeros(0, 16, dtype=torch.long)}, r"sequences: .*at least one"),
        (tiny_llama, {"tokens": torch.zeros(16, dtype=torch.long)}, r"sequences: "),
        (tiny_llama, {"tokens": torch.zeros(2, 16)}, r"sequences: got torch.float32"),
        (tiny_llama, {"tokens": torch.full((2, 16), 96)}, r"token id 96, expected 0..95"),
        (tiny_llama, {"tokens": torch.full((2, 16), -1)}, r"token id -1"),
        (
            lambda: tiny_llama(intermediate_size=60),
            {},
            r"in_group_size: got 8, expected a divisor of in_features=60 .*down_proj",
        ),
    ],
)
def test_wrong_input_is_named_before_any_work(monkeypatch, model, options, message):
    model = model()
    monkeypatch.setattr(sources, "capture", lambda *_: pytest.fail("calibration started"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        quantized(model, **options)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) or not before[name].isfinite().all() for name in before)


def test_a_layer_the_solver_refuses_is_named(monkeypatch):
    from aqlm_c.pipeline import block

    def solve(problem, config, solve=block.solve):
        if problem.name.endswith("1.mlp.up_proj"):
            raise ValueError("H: got one that no damping helps")
        return solve(problem, config)

    monkeypatch.setattr(block, "solve", solve)
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj: H: got one"):
        quantized(tiny_llama())


def test_a_float32_model_without_norms_and_biases():
    model = random_model(OlmoConfig(**SMALL, intermediate_size=64))
    _, report = quantized(model)
    assert len(report.layers) == 21 and len(report.blocks) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size: got 0, expected an integer >= 1"),
        ({"memory_limit": "8 bits"}, "memory_limit: got '8 bits', expected a number of bytes"),
        ({"memory_limit": "1MiB"}, "memory_limit: got 1048576 .*, expected at least"),
    ],
)
def test_wrong_limits(options, message):
    with pytest.raises(ValueError, match=message):
        quantized(**options)


def test_a_model_elsewhere_is_refused():
    with pytest.raises(ValueError, match="model: got one on meta, expected cpu"):
        quantize_model(tiny_llama().to("meta"), random_tokens(6, 16), CONFIG)


@pytest.mark.parametrize("value", [3e38, 1e25], ids=["overflow", "overflow of the square"])
def test_activations_that_are_not_finite_name_the_layer(value):
    in_h = r"model.layers.1.self_attn.q_proj: got NaN or Inf in H of the layer's input"
    for epochs, message in ((1, r"model.layers.0: got NaN or Inf in the output of .* the 1 after it"), (0, in_h)):
        model = tiny_llama()
        model.model.layers[1].input_layernorm.weight.data.fill_(value)  # finite, unlike what it leads to
        with pytest.raises(ValueError, match=message):
            quantized(model, config=CONFIG.replace(finetune_epochs=epochs))


def test_a_quantized_model_is_refused():
    model, _ = quantized()
    with pytest.raises(ValueError, match="quantized already"):
        quantized(model)
