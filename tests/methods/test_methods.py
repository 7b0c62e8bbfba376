"""Methods beside AQLM's: GPTQ, QuIP, QuIP#, k-means, product and additive quantization, round to nearest in groups."""

import json

import numpy as np
import pytest
from command import main_in_time
from layers import random_layer
from tiny import BYTES, byte_tokenizer, random_model, random_tokens, tiny_llama
from transformers import AutoModelForCausalLM

import aqlm_c.hf
from aqlm_c import AqlmConfig, _core, quantize_model, quantize_weight
from aqlm_c.core import rounding
from aqlm_c.core.hessian import Hessian
from aqlm_c.methods import get_method
from aqlm_c.methods.incoherence import RandomHadamard, RandomOrthogonal, rotated, rotated_back, rotated_hessian
from aqlm_c.recipe import RunConfig
from aqlm_c.run import run

SCHEMES = {
    "rtn": ["2x8g8", "3x8g8", "4x8g8"],
    "gptq": ["2x8g8", "3x8g8", "4x8g8"],
    "quip": ["2x8g8", "3x8g8", "4x8g8"],
    "quip_sharp": ["2x8g8", "3x8g8", "4x8g8"],
    "kmeans": ["1x4g4", "1x6g4", "1x8g4"],
    "product": ["2x4g8", "4x4g8", "2x8g8"],
    "additive": ["2x4g8", "2x6g8", "2x8g8"],
}
OPTIONS = {"rtn": {"group_size": 16}, "gptq": {"group_size": 16}}
DENSE = ["rtn", "gptq", "quip", "quip_sharp"]


def config_of(method, scheme, **options):
    return AqlmConfig.from_scheme(scheme, method=method, **{**OPTIONS.get(method, {}), **options})


def layer_with_outliers(out=128, inp=192):
    """A layer in which a few inputs, and a few weights, are far larger than others."""
    W, H = random_layer(out, inp)
    rng = np.random.default_rng(5)
    W[rng.integers(0, out, 200), rng.integers(0, inp, 200)] *= 8
    sizes = np.ones(inp, np.float32)
    sizes[rng.integers(0, inp, 5)] = 6
    return W, (H * sizes[:, None] * sizes).astype(np.float32)


def relative_error(W, H, decoded):
    D, W, H = (x.astype(np.float64) for x in (W - decoded, W, H))
    return np.trace(D @ H @ D.T) / np.trace(W @ H @ W.T)


@pytest.mark.parametrize("method", SCHEMES)
def test_more_bits_lower_the_error_that_is_reported(method):
    W, H = layer_with_outliers()
    errors = []
    for scheme in SCHEMES[method]:
        config = config_of(method, scheme)
        found = quantize_weight(W, H, config, dtype="bfloat16")
        errors.append(found.relative_error)
        assert found.relative_error == pytest.approx(relative_error(W, H, found.decode()), rel=1e-4)
        np.testing.assert_array_equal(found.decode(), quantize_weight(W, H, config, dtype="bfloat16").decode())
        if method in DENSE:
            low = found.decode().view(np.uint32) & 0xFFFF
            assert not low.any()  # values of bfloat16
    assert errors[0] > 1.5 * errors[1] > 2 * errors[2] > 0


def test_the_order_of_the_papers_on_a_layer_with_outliers():
    """QuIP, table 1; QuIP#, figure 1: at 2 bits, where incoherence counts, and the lattice beats the grid."""
    W, H = layer_with_outliers(256, 256)
    found = {name: quantize_weight(W, H, config_of(name, "2x8g8")) for name in ("rtn", "gptq", "quip", "quip_sharp")}
    errors = [each.relative_error for each in found.values()]
    assert errors == sorted(errors, reverse=True) and errors[0] > 2 * errors[-1]
    bits = [each.bits_per_weight for each in found.values()]
    assert bits[2] < bits[3] < 2.02 < bits[1] == bits[0]  # and with fewer bits


def test_gptq_is_better_than_its_grids_alone_and_in_order():
    W, H = layer_with_outliers()
    alone = quantize_weight(W, H, config_of("rtn", "3x8g8")).relative_error
    natural, ordered = (
        quantize_weight(W, H, config_of("gptq", "3x8g8", activation_order=order)).relative_error
        for order in (False, True)
    )
    assert ordered < natural < 0.6 * alone


def test_true_bits():
    """Codes, and for each group a scale of 16 bits and a zero point; for all: signs, seeds, tables."""
    cases = {
        ("gptq", "3x8g8"): 3 + (16 + 3) / 16,
        ("rtn", "3x8g8"): 3 + (16 + 3) / 16,
        ("quip", "2x8g8"): 2 + (16 + 64) / (64 * 128),
        ("quip_sharp", "2x8g8"): 2 + (16 + 64 + 128) / (64 * 128),
        ("kmeans", "1x8g4"): 2 + (16 * 256 * 4 + 16 * 64) / (64 * 128),
        ("product", "2x8g8"): 2 + (16 * 256 * 8 + 16 * 64) / (64 * 128),
        ("additive", "2x8g8"): 2 + (2 * 16 * 256 * 8 + 16 * 64) / (64 * 128),
    }
    W, H = random_layer(64, 128)
    for (method, scheme), bits in cases.items():
        config = config_of(method, scheme)
        assert get_method(method).bits_per_weight(config.format, W.shape, config.options) == pytest.approx(bits)
        if method in DENSE:
            assert quantize_weight(W, H, config).bits_per_weight == pytest.approx(bits)
    symmetric = quantize_weight(W, H, config_of("gptq", "3x8g8", symmetric=True, group_size=0))
    assert symmetric.bits_per_weight == pytest.approx(3 + 16 / 128)


def test_a_product_is_an_aqlm_weight_of_separate_parts():
    W, H = random_layer(48, 64)
    for scheme, size in (("2x5g8", 4), ("4x4g8", 2)):
        books = quantize_weight(W, H, config_of("product", scheme)).codebooks
        for k, book in enumerate(books[:, :, 0]):
            own = slice(k * size, (k + 1) * size)
            assert book[:, own].any() and not np.delete(book, np.r_[own], axis=1).any()


def test_methods_without_h_do_not_look_at_it():
    W, H = layer_with_outliers()
    for method in ("kmeans", "product", "additive", "rtn"):
        config = config_of(method, SCHEMES[method][0])
        one, other = (quantize_weight(W, each, config).decode() for each in (H, np.eye(len(H), dtype=np.float32)))
        np.testing.assert_array_equal(one, other, err_msg=method)


@pytest.mark.parametrize("kind", [RandomHadamard, RandomOrthogonal])
def test_rotations_turn_back_and_leave_the_error(kind):
    W, H = layer_with_outliers(96, 120)
    inputs, outputs = kind(120, 3, 0), kind(96, 3, 1)
    turned = rotated(W, inputs, outputs)
    np.testing.assert_allclose(rotated_back(turned, inputs, outputs), W, atol=1e-5)
    hessian = Hessian(H)
    of_inputs = rotated_hessian(hessian, inputs)
    assert rotated_hessian(hessian, kind(120, 3, 0)) is of_inputs is not rotated_hessian(hessian, kind(120, 4, 0))
    signals = [_core.quantization_error(w, h) for w, h in ((W, H), (turned, of_inputs.H))]
    assert signals[1] == pytest.approx(signals[0], rel=1e-4)
    peaks = [np.abs(w).max() / np.sqrt(np.square(w).mean()) for w in (W, turned)]
    assert peaks[1] < 0.6 * peaks[0]  # incoherent


def test_seeds_of_methods():
    W, H = layer_with_outliers()
    for method in ("quip", "quip_sharp", "kmeans"):
        decoded = [quantize_weight(W, H, config_of(method, SCHEMES[method][0], seed=s)).decode() for s in (0, 1)]
        assert (decoded[0] != decoded[1]).any(), method


def test_extreme_sizes_and_zeros():
    W, H = random_layer(16, 64)
    for method in DENSE:
        config = config_of(method, "3x8g8")
        error = quantize_weight(W, H, config, dtype="float32").relative_error
        for size in (2.0**-60, 2.0**40):
            found = quantize_weight(W * np.float32(size), H, config, dtype="float32")
            assert found.relative_error == pytest.approx(error, rel=1e-3), (method, size)
            assert np.abs(found.decode()).max() == pytest.approx(size * np.abs(W).max(), rel=0.3)
        zero = quantize_weight(np.zeros_like(W), H, config)
        assert zero.relative_error == 0 and not zero.decode().any()
        rows = W.copy()
        rows[3] = 0
        if method in ("rtn", "gptq"):
            assert not quantize_weight(rows, H, config).decode()[3].any()


REFUSED = {
    ("gptq", "1x12g8"): "scheme: got '1x12g8', expected of 1 to 8 whole bits per weight",
    ("quip", "2x8g8o2"): "scheme: got '2x8g8o2'",
    ("quip_sharp", "1x8g8"): "scheme: got '1x8g8', expected 2, 3 or 4 bits per weight",
    ("kmeans", "2x8g8"): "scheme: got '2x8g8', expected one codebook",
    ("product", "3x8g8"): "scheme: got '3x8g8', expected as many codebooks as divide a group",
    ("rtn", "1x12g8"): "scheme: got '1x12g8', expected of 1 to 8 whole bits per weight",
}


@pytest.mark.parametrize(("method", "scheme"), REFUSED)
def test_schemes_that_a_method_does_not_have(method, scheme):
    with pytest.raises(ValueError, match=REFUSED[method, scheme]):
        config_of(method, scheme).check_searchable()


def test_refusals():
    W, H = random_layer(20, 60)
    with pytest.raises(ValueError, match="group_size: got 16, expected a divisor of in_features=60 of layer weight"):
        quantize_weight(W, H, config_of("gptq", "2x8g4"))
    with pytest.raises(ValueError, match="in_features: got 60, expected a multiple of 8 of layer weight"):
        quantize_weight(W, H, config_of("quip_sharp", "2x8g4"))
    with pytest.raises(ValueError, match="out_features: got 8209, expected a product of two numbers up to 4096"):
        quantize_weight(np.ones((8209, 8), np.float32), np.eye(8, dtype=np.float32), config_of("quip", "2x8g8"))
    W[3, 4] = np.nan
    for method in ("gptq", "quip", "kmeans"):
        with pytest.raises(ValueError, match="weight: got NaN or Inf"):
            quantize_weight(W, H, config_of(method, "1x8g4"))
    for name, value in (("group_size", -1), ("symmetric", 1), ("gptq_damp", 2)):
        with pytest.raises(ValueError, match=f"{name}: got {value}, expected"):
            config_of("gptq", "2x8g8", **{name: value})
    with pytest.raises(ValueError, match="unknown option 'group_size' with solver='quip'"):
        config_of("quip", "2x8g8", group_size=8)
    with pytest.raises(ValueError, match=r"solver: got 'aqml', expected one of ldl, .*aqlm_paper"):
        AqlmConfig.from_scheme("2x8g8", method="aqml")
    with pytest.raises(ValueError, match="method: got 'rtn', expected no solver beside it"):
        AqlmConfig.from_scheme("2x8g8", method="rtn", solver="gptq")


def test_names():
    assert AqlmConfig.from_scheme("2x8g8", method="aqlm") == AqlmConfig.from_scheme("2x8g8")
    assert AqlmConfig.from_scheme("2x8g8", solver="aqlm_paper").solver == "paper"


def test_dead_inputs():
    """H of inputs that were never seen: damping keeps what is finite."""
    W, H = random_layer(16, 64)
    H[:8] = H[:, :8] = 0
    for method in ("gptq", "quip", "quip_sharp"):
        assert quantize_weight(W, H, config_of(method, "2x8g8")).relative_error < 0.3


# ---- models


def saved_tiny(path, **options):
    tiny_llama(vocab_size=BYTES, **options).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


FEW = {"samples": 8, "sequence_length": 16, "finetune_epochs": 1}


@pytest.mark.parametrize("method", DENSE)
def test_a_model_is_saved_dense_with_its_report_and_loads_anywhere(method, tmp_path):
    """By Python, by YAML and by the command line: the same bytes."""
    model = saved_tiny(tmp_path / "model")
    options = {**OPTIONS.get(method, {}), "scheme": "3x8g8", "embeddings": "4x8g8"}
    report = run(
        RunConfig.from_fields({"model": model, "out": tmp_path / "python", "method": method, **options, **FEW})
    )
    lines = [f"{name}: {value}" for name, value in {**options, **FEW, "method": method}.items()]
    (tmp_path / "run.yaml").write_text("\n".join(lines), encoding="utf-8")
    run(RunConfig.from_file(tmp_path / "run.yaml", model=str(model), out=str(tmp_path / "yaml")))
    sets = [text for name, value in OPTIONS.get(method, {}).items() for text in ("--set", f"{name}={value}")]
    arguments = ("--scheme", "3x8g8", "--embeddings", "4x8g8", "--samples", 8, "--sequence-length", 16, "--quiet")
    command = ("quantize", model, tmp_path / "command", "--method", method, *arguments, *sets)
    assert main_in_time(*command, "--json", tmp_path / "command.json", seconds=300) == 0
    files = [tmp_path / name / "model.safetensors" for name in ("python", "yaml", "command")]
    assert files[0].read_bytes() == files[1].read_bytes() == files[2].read_bytes()

    config = json.loads((tmp_path / "python" / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in config
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "python")
    dense = AutoModelForCausalLM.from_pretrained(model)
    changed = [name for name, p in dense.named_parameters() if (p != loaded.get_parameter(name)).any()]
    assert len(changed) == 15 and {p.dtype for p in loaded.parameters()} == {p.dtype for p in dense.parameters()}
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight  # tied as before
    written = json.loads((tmp_path / "python" / "report.json").read_text(encoding="utf-8"))
    assert written["config"]["solver"] == method and written["config"]["finetune_epochs"] == 0
    assert not written["blocks"] and len(written["layers"]) == 15 and "dense weights" in written["note"]
    in_blocks = [layer.bits_per_weight for layer in report.layers if not layer.embedding]
    assert min(in_blocks) <= report.bits_per_weight <= max(in_blocks)
    stored = sum(layer.bits_per_weight * layer.out_features * layer.in_features / 8 for layer in report.layers)
    assert report.stored_bytes - stored == pytest.approx(4 * 5 * 32, abs=15)  # and norms
    card = (tmp_path / "python" / "README.md").read_text(encoding="utf-8")
    assert f"the codes of {method} decode" in card and "aqlm_c.hf" not in card


@pytest.mark.parametrize("method", ["kmeans", "product", "additive"])
def test_what_is_an_aqlm_checkpoint_is_saved_as_one(method, tmp_path):
    model = tiny_llama(tie_word_embeddings=False)
    config = config_of(method, SCHEMES[method][0], finetune_epochs=3)
    report = quantize_model(model, random_tokens(8, 16), config)
    assert len(report.layers) == 14 and not report.blocks  # none is tuned
    aqlm_c.save_quantized(model, None, tmp_path / "out")
    loaded, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), random_tokens(1, 8)
    np.testing.assert_array_equal(loaded(ids).logits.detach(), model(ids).logits.detach())


def test_a_dense_run_is_resumed(tmp_path):
    options = {"model": saved_tiny(tmp_path / "model"), "method": "gptq", "scheme": "3x8g8", **OPTIONS["gptq"], **FEW}
    work = tmp_path / "work"
    first = run(RunConfig.from_fields({**options, "out": tmp_path / "first", "work_dir": work, "embeddings": "4x8g8"}))
    *kept, last = sorted(work.glob("*.safetensors"))
    times = [file.stat().st_mtime_ns for file in kept]
    last.unlink()
    again = run(RunConfig.from_fields({**options, "out": tmp_path / "again", "work_dir": work, "embeddings": "4x8g8"}))
    assert kept and times == [file.stat().st_mtime_ns for file in kept]
    files = [tmp_path / name / "model.safetensors" for name in ("first", "again")]
    assert files[0].read_bytes() == files[1].read_bytes() and first.stored_bytes == again.stored_bytes


def test_without_data_and_one_linear():
    import torch

    model = tiny_llama(tie_word_embeddings=False)
    report = quantize_model(model, None, config_of("quip_sharp", "2x8g8"))
    assert len(report.layers) == 14 and report.tokens == 0 and model(random_tokens(1, 8)).logits.isfinite().all()
    linear = torch.nn.Linear(64, 24)
    layer, solved = aqlm_c.quantize_linear(linear, np.eye(64, dtype=np.float32), config_of("gptq", "4x8g8"))
    assert type(layer) is torch.nn.Linear and layer.bias is linear.bias and layer.weight is not linear.weight
    np.testing.assert_array_equal(layer.weight.detach(), solved.decode())


def test_experts_are_joined_again(tmp_path):
    from transformers import MixtralConfig

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"vocab_size": 96, "num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    model = random_model(MixtralConfig(**sizes))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = quantize_model(model, random_tokens(8, 16), config_of("gptq", "4x8g8", embeddings="dense"))
    assert len(report.layers) == 2 * (4 + 3 * 4) and list(before) == list(model.state_dict())
    changed = [name for name, tensor in model.state_dict().items() if (tensor != before[name]).any()]
    assert len(changed) == 2 * (4 + 2) and report.effective_bits < 16
    model.save_pretrained(tmp_path)
    ids = random_tokens(1, 8)
    np.testing.assert_array_equal(
        AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits.detach(), model(ids).logits.detach()
    )


def test_not_on_the_fly():
    with pytest.raises(ValueError, match="solver: got 'gptq', expected one that makes AQLM codes"):
        aqlm_c.hf.AqlmConfig(scheme="2x8g8", method="gptq")


def test_a_dense_result_cannot_be_tuned(tmp_path):
    fields = {"model": saved_tiny(tmp_path / "model"), "out": tmp_path / "out", "method": "gptq", **FEW}
    with pytest.raises(ValueError, match=r"tune: got .*, expected none: solver='gptq' makes no AQLM checkpoint"):
        run(RunConfig.from_fields({**fields, **OPTIONS["gptq"], "tune": {"steps": 2}}))


def test_a_layer_that_a_group_does_not_fit_is_named_before_any_work():
    model = tiny_llama()
    with pytest.raises(ValueError, match=r"group_size: got 64, .* in_features=32 .*self_attn.q_proj; nor does it fit"):
        quantize_model(model, random_tokens(4, 8), AqlmConfig.from_scheme("2x8g8", method="gptq"))


def test_lattice_and_grid_share_the_error_feedback():
    """Without feedback, that is under H = I, LDLQ is rounding to the nearest."""
    W = np.random.default_rng(0).standard_normal((12, 64)).astype(np.float32)
    identity = Hessian.identity(64)
    order, feedback, _ = identity.factor(8, 0.01)
    with_feedback, _ = rounding.round_lattice(W, (order, feedback), 1.0)
    alone, _ = rounding.round_lattice(W, None, 1.0)
    np.testing.assert_array_equal(with_feedback, alone)
