"""What Python callers pass: a scheme's text for a config, one path for several, and what they mix up."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import FAST, SCHEME, random_tokens, tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM

import aqlm_c
from aqlm_c import AqlmConfig, Format, RunConfig, hf
from aqlm_c.recipe import AqlmConfig as LayerConfig

OPTIONS = {**FAST, "seed": 3}


@pytest.fixture(scope="module")
def weight():
    return np.random.default_rng(0).standard_normal((16, 32)).astype(np.float32)


def test_a_config_of_any_kind_is_one():
    config = AqlmConfig.from_scheme(SCHEME, rules={"down": "dense"}, **OPTIONS)
    assert AqlmConfig.of(config) is config
    assert AqlmConfig.of(SCHEME) == AqlmConfig.of(Format.parse(SCHEME)) == AqlmConfig.from_scheme(SCHEME)
    assert AqlmConfig.of(hf.AqlmConfig(scheme=SCHEME, rules={"down": "dense"}, **OPTIONS)) == config
    assert AqlmConfig.of(hf.AqlmConfig(**Format.parse(SCHEME).to_dict())) == AqlmConfig.from_scheme(SCHEME)
    theirs = hf.AqlmConfig.of(config)
    assert theirs.quantization() == config and theirs.quant_method == config.quant_method == "aqlm_c"
    assert hf.AqlmConfig.of(theirs) is theirs and AqlmConfig is LayerConfig
    for wrong in (None, 2, {"scheme": SCHEME}, [SCHEME], object()):
        with pytest.raises(ValueError, match=r"config: got .*, expected a scheme such as '2x8g8' or an AqlmConfig"):
            AqlmConfig.of(wrong)
    with pytest.raises(ValueError, match="scheme: got '2x'"):
        AqlmConfig.of("2x")
    with pytest.raises(ValueError, match="dataset: got 'one', expected none"):
        AqlmConfig.of(hf.AqlmConfig(scheme=SCHEME, dataset=random_tokens(2, 8)))


def test_a_scheme_is_enough(weight):
    H = np.eye(32, dtype=np.float32)
    found = [aqlm_c.quantize_weight(weight, H, each) for each in ("1x4g8", AqlmConfig.from_scheme("1x4g8"))]
    assert np.array_equal(found[0].codes, found[1].codes)
    linear = torch.nn.Linear(32, 16)
    layers = [aqlm_c.quantize_linear(linear, H, each)[0] for each in ("1x4g8", AqlmConfig.from_scheme("1x4g8"))]
    assert torch.equal(layers[0].codes, layers[1].codes)
    models = [tiny_llama(), tiny_llama()]
    for model, config in zip(models, (SCHEME, AqlmConfig.from_scheme(SCHEME)), strict=True):
        aqlm_c.quantize_model(model, None, config)
    with torch.no_grad():
        first, second = (model(random_tokens(1, 8)).logits for model in models)
    assert torch.equal(first, second)


def test_either_config_quantizes_while_loading(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "dense")
    for index, kind in enumerate(
        (AqlmConfig.from_scheme, lambda scheme, **options: hf.AqlmConfig(scheme=scheme, **options))
    ):
        config = kind(SCHEME, rules={"down_proj": "dense"}, **OPTIONS)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
        assert isinstance(model.config.quantization_config, hf.AqlmConfig)
        model.save_pretrained(tmp_path / str(index))
    assert (tmp_path / "0" / "config.json").read_bytes() == (tmp_path / "1" / "config.json").read_bytes()
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "01")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    # one beside a checkpoint that is quantized already is what transformers ignores, with a warning of its own
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "0", quantization_config=AqlmConfig.from_scheme(SCHEME))


def test_one_path_is_a_list_of_one(tmp_path):
    text, tokenizer = tmp_path / "file.txt", tiny_tokenizer()
    text.write_text("w1 w2 w3 w4 " * 20)
    wanted = aqlm_c.load_sequences([str(text)], tokenizer, 2, 8)
    for sources in (str(text), text, [text], (str(text),)):
        assert torch.equal(aqlm_c.load_sequences(sources, tokenizer, 2, 8), wanted)
    assert torch.equal(aqlm_c.token_stream(text, tokenizer)[:16], wanted.reshape(-1))
    for data in (str(text), text, [text], (text,)):
        assert RunConfig(data=data).data == [str(text)]
    for sources in (5, None, torch.zeros(2, 3), {"a": 1}, [[1, 2]], b"file.txt"):
        with pytest.raises(ValueError, match=r"sources: got .*, expected a source or a list of them"):
            aqlm_c.load_sequences(sources, tokenizer, 2, 8)
    with pytest.raises(ValueError, match=r"source: got .*, expected a source"):
        aqlm_c.token_stream([str(text)], tokenizer)


def test_what_is_mixed_up_is_named():
    model, tokens = tiny_llama(), random_tokens(2, 8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for arguments, message in (
        (("smollm2", tokens, SCHEME), "model: got str, expected a transformers model"),
        ((model, SCHEME, tokens), "config: got tensor"),
        ((model, tokens, None), "config: got None, expected a scheme"),
        ((model, "text.txt", SCHEME), r"sequences: got str, expected token ids \[n, length\]"),
        ((model, [[1, 2], [3]], SCHEME), "sequences: got list, expected token ids"),
        ((model, tokens.float(), SCHEME), "sequences: got torch.float32"),
        ((model, tokens[0], SCHEME), r"sequences: got torch.int64 \[8\]"),
    ):
        with pytest.raises(ValueError, match=message):
            aqlm_c.quantize_model(*arguments)
    with pytest.raises(ValueError, match=r"linear: got Parameter, expected a torch\.nn\.Linear"):
        aqlm_c.quantize_linear(model.lm_head.weight, np.eye(32), SCHEME)
    for arguments, message in (
        ((model, "text.txt"), "input_ids: got str, expected token ids"),
        ((model, tokens.float()), "input_ids: got torch.float32"),
        (("smollm2", tokens), "model: got str, expected a transformers model"),
    ):
        with pytest.raises(ValueError, match=message):
            aqlm_c.perplexity(*arguments, sequence_length=4)
    with pytest.raises(ValueError, match="model: got 5, expected the name of one"):
        aqlm_c.load_model(5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
