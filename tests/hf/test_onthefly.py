"""Quantizing a dense model while `from_pretrained` loads it."""

import json

import numpy as np
import pytest
import torch
from loading import load, quantized_names
from safetensors.torch import load_file
from tiny import FAST, SCHEME, byte_tokenizer, random_tokens, tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

import aqlm_c
import aqlm_c.hf
from aqlm_c.recipe import AqlmConfig

TOKENS = random_tokens(4, 16)


def config(**options):
    return aqlm_c.hf.AqlmConfig(**{"scheme": SCHEME, **FAST, **options})


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Directory of a dense model and a tokenizer."""
    directory = tmp_path_factory.mktemp("dense")
    tiny_llama(attention_bias=True).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def from_pretrained(directory, quantization_config, **options):
    return AutoModelForCausalLM.from_pretrained(directory, quantization_config=quantization_config, **options)


def check_as_loaded(model, directory):
    """`model` is what loading its save gives: config, quantizer, tensors, logits, dequantized weights."""
    model.save_pretrained(directory)
    again = load(directory, dtype="auto")
    assert type(again.hf_quantizer) is type(model.hf_quantizer) and model.hf_quantizer.pre_quantized
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in again.parameters()]
    assert model.is_quantized and model.quantization_method == again.quantization_method
    assert model.config.quantization_config.to_dict() == again.config.quantization_config.to_dict()
    assert torch.equal(model(TOKENS).logits, again(TOKENS).logits)
    again.save_pretrained(directory / "again")
    names = ("model.safetensors", "config.json")
    assert [(directory / name).read_bytes() for name in names] == [
        (directory / "again" / name).read_bytes() for name in names
    ]
    first, second = (m.dequantize() for m in (model, again))
    assert not quantized_names(first) and not hasattr(first.config, "quantization_config")
    assert torch.equal(first(TOKENS).logits, second(TOKENS).logits)


def quantized(model):
    return [model.get_submodule(name) for name in quantized_names(model)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device_map", [None, "cpu"])
def test_with_data_it_is_quantize_model(dense, tmp_path, dtype, device_map):
    options = {"device_map": device_map} if device_map else {}
    model = from_pretrained(dense, config(dataset=TOKENS), dtype=dtype, **options)
    assert len(quantized(model)) == 14 and model.dtype == dtype
    expected = AutoModelForCausalLM.from_pretrained(dense, dtype=dtype)
    report = aqlm_c.quantize_model(expected, TOKENS, AqlmConfig.from_scheme(SCHEME, **FAST))
    assert torch.equal(model(TOKENS).logits, expected(TOKENS).logits)
    errors = [layer.relative_error for layer in model.hf_quantizer.report.layers]
    assert errors == [layer.relative_error for layer in report.layers]
    check_as_loaded(model, tmp_path)


def test_without_data_each_layer_is_nearest_to_its_weight(dense, tmp_path):
    model = from_pretrained(dense, config())
    original = AutoModelForCausalLM.from_pretrained(dense)
    errors = {layer.name: layer.relative_error for layer in model.hf_quantizer.report.layers}
    assert list(errors) == quantized_names(model) and len(errors) == 14
    for name, layer in zip(errors, quantized(model), strict=True):
        weight = original.get_submodule(name).weight
        got = layer.dequantize(torch.float32).weight
        assert ((got - weight).square().sum() / weight.square().sum()).item() == pytest.approx(errors[name], rel=1e-3)
    again = from_pretrained(dense, config())
    assert torch.equal(model(TOKENS).logits, again(TOKENS).logits)
    check_as_loaded(model, tmp_path)


def test_sources_are_read_with_the_models_own_tokenizer(dense, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i % 90}" for i in range(200)))
    sizes = {"samples": 4, "sequence_length": 16, "layers": "q_proj"}
    by_name, by_object, by_list = (
        from_pretrained(dense, config(dataset=source, tokenizer=tokenizer, **sizes))
        for source, tokenizer in ((str(text), None), (text, tiny_tokenizer()), ([str(text)], None))
    )
    assert len(quantized(by_name)) == 2
    assert torch.equal(by_name(TOKENS).logits, by_object(TOKENS).logits)
    assert torch.equal(by_name(TOKENS).logits, by_list(TOKENS).logits)
    report = by_name.hf_quantizer.report
    assert list(report.data["sources"]) == [str(text)] and (report.sequences, report.tokens) == (4, 64)


def test_fine_tuning_and_a_work_dir(dense, tmp_path):
    options = {"dataset": TOKENS, "finetune_epochs": 1, "work_dir": tmp_path / "work", "memory_limit": "4GiB"}
    model = from_pretrained(dense, config(**options))
    assert len(model.hf_quantizer.report.blocks) == 2 and any((tmp_path / "work").iterdir())
    check_as_loaded(model, tmp_path / "saved")


def test_presets():
    fast = config(preset="fast").on_the_fly.config
    assert (fast.options.ldl_passes, fast.options.max_sweeps, fast.options.relative_mse_tolerance) == (1, 1, 0.005)


def test_nothing_of_the_run_is_saved(dense, tmp_path):
    given = config(dataset=TOKENS.numpy(), tokenizer=tiny_tokenizer(), samples=3)
    assert given.to_dict().keys() == aqlm_c.hf.AqlmConfig().to_dict().keys()
    assert json.loads(given.to_json_string(use_diff=False))["nbits_per_codebook"] == 4
    model = from_pretrained(dense, given)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert saved.keys() == given.to_dict().keys() and saved["quant_method"] == "aqlm"
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["model.layers.0.mlp.up_proj.codes"].dtype == torch.int8
    assert not any(name.startswith("model.layers.0.mlp.up_proj.weight") for name in tensors)


def test_rules_are_saved_under_the_other_method(dense, tmp_path):
    rules = {"k_proj": "1x3g8", "v_proj": "dense"}
    model = from_pretrained(dense, config(rules=rules))
    assert model.model.layers[0].self_attn.k_proj.scheme == "1x3g8"
    assert len(quantized(model)) == 12
    check_as_loaded(model, tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert saved["rules"] == [list(rule) for rule in rules.items()] and saved["quant_method"] == "aqlm_c"


@pytest.mark.skipif(
    not hasattr(PreTrainedModel, "get_expanded_tied_weights_keys"), reason="transformers 4 ties weights"
)
def test_embeddings_without_data(dense, tmp_path):
    model = from_pretrained(dense, config(rules={"embed_tokens": "1x5g8"}), dtype=torch.bfloat16)
    assert model.model.embed_tokens.scheme == model.lm_head.scheme == "1x5g8"
    check_as_loaded(model, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "2 bits"}, "scheme: got '2 bits', expected"),
        ({"scheme": "2x8g8o2"}, "out_group_size: got 2"),
        ({"sample": 3}, "unknown option 'sample': did you mean 'samples'"),
        ({"finetune_epoch": 3}, "unknown option 'finetune_epoch': did you mean 'finetune_epochs'"),
        ({"num_codebooks": 3}, "unknown option 'num_codebooks'"),
        ({"preset": "slow"}, "preset: got 'slow', expected one of"),
        ({"max_sweeps": -1}, "max_sweeps: got -1, expected"),
        ({"dataset": "/no/such/file.txt"}, "no such file"),
        ({"dataset": []}, r"dataset: got \[\], expected a source"),
        ({"dataset": 5}, "dataset: got 5, expected a source"),
        ({"dataset": [[1, 2]]}, r"dataset: got \[\[1, 2\]\], expected a source"),
        ({"samples": 3}, "samples: got 3, expected a dataset"),
        ({"rules": {"(": "1x8g8"}}, "regular expression"),
    ],
)
def test_a_wrong_config_is_refused_when_it_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


def text_file(directory, n):
    (directory / "short.txt").write_text(" ".join(["w1"] * n))
    return str(directory / "short.txt")


@pytest.mark.parametrize(
    ("options", "load_options", "message"),
    [
        ({"dataset": TOKENS + 90}, {}, "token id"),
        ({"dataset": TOKENS.float()}, {}, "expected token ids"),
        ({"dataset": TOKENS[0]}, {}, "expected token ids"),
        ({"dataset": TOKENS[:1], "finetune_epochs": 1}, {}, "at least 2"),
        ({"dataset": 20, "samples": 2, "sequence_length": 16}, {}, "20 tokens hold 1 sequences of 16, expected 2"),
        ({}, {"dtype": torch.float64}, "dtype: got torch.float64, expected one of torch.float32"),
        ({}, {"device_map": {"": "meta"}}, "device_map: got meta, expected cpu"),
        ({}, {"device_map": {"model": "cpu", "lm_head": "disk"}}, "device_map: got disk, expected cpu"),
    ],
)
def test_wrong_data_is_refused_before_any_work(dense, tmp_path, monkeypatch, options, load_options, message):
    monkeypatch.setattr("aqlm_c.quantize.quantize_linear", None)
    monkeypatch.setattr("transformers.modeling_utils.PreTrainedModel._load_pretrained_model", None)
    if isinstance(options.get("dataset"), int):
        options = options | {"dataset": text_file(tmp_path, options["dataset"])}
    with pytest.raises(ValueError, match=message):
        from_pretrained(dense, config(**options), **load_options)


def test_a_tokenizer_that_is_not_there_is_named(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tokenizer: got None, expected one, since none could be loaded"):
        from_pretrained(tmp_path, config(dataset=text_file(tmp_path, 99), samples=1, sequence_length=16))


def test_a_tokenizer_of_another_model_is_refused(dense, tmp_path):
    with pytest.raises(ValueError, match="token id"):
        sizes = {"samples": 1, "sequence_length": 16}
        from_pretrained(dense, config(dataset=text_file(tmp_path, 99), tokenizer=byte_tokenizer(), **sizes))


@pytest.mark.parametrize("no_scheme", [aqlm_c.hf.AqlmConfig(), None])
def test_a_dense_model_needs_a_scheme(dense, no_scheme):
    import transformers

    with pytest.raises(ValueError, match="scheme: got None, expected"):
        from_pretrained(dense, no_scheme or transformers.AqlmConfig())


def test_rules_in_a_published_config_are_refused():
    fields = {"quant_method": "aqlm", "num_codebooks": 2, "nbits_per_codebook": 8}
    with pytest.raises(ValueError, match="quant_method: got 'aqlm' with rules"):
        aqlm_c.hf.AqlmConfig.from_dict({**fields, "rules": {"lm_head": "4x8g8"}})
    rules = {"lm_head": "4x8g8"}
    own = aqlm_c.hf.AqlmConfig.from_dict({**fields, "quant_method": "aqlm_c", "rules": rules})
    assert own.to_dict()["rules"] == [["lm_head", "4x8g8"]] and own.layer_config() == AqlmConfig.from_scheme(
        "2x8g8", rules=rules
    )
    assert (
        aqlm_c.hf.AqlmConfig.from_layer_config(AqlmConfig.from_scheme("2x8g8", rules=rules), []).quant_method
        == "aqlm_c"
    )
    assert "rules" not in aqlm_c.hf.AqlmConfig.from_layer_config(AqlmConfig(), []).to_dict()


def test_numpy_token_ids(dense):
    ids = TOKENS.numpy().astype(np.int32)
    model = from_pretrained(dense, config(dataset=ids, layers="0.self_attn.q_proj"))
    assert quantized_names(model) == ["model.layers.0.self_attn.q_proj"]
