"""Sequences longer than a model has positions: refused, or said, before the work and everywhere."""

import logging

import pytest
import torch
from tiny import BYTES, FAST, byte_tokenizer, random_model, random_tokens, tiny_llama
from transformers import BioGptConfig, GPT2Config, GPTJConfig, MambaConfig, OPTConfig

from aqlm_c import AqlmConfig, quantize_model
from aqlm_c.cli.main import main
from aqlm_c.evaluate import perplexity
from aqlm_c.model.positions import check_length, most_positions, rated_positions

COMMON = {"vocab_size": BYTES, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
GPT = {"vocab_size": BYTES, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 24}
CONFIGS = {
    "opt": OPTConfig(**COMMON, ffn_dim=48, max_position_embeddings=24, word_embed_proj_dim=32),
    "gpt2": GPT2Config(**GPT),
    "gptj": GPTJConfig(**GPT, rotary_dim=8),
    "biogpt": BioGptConfig(**COMMON, intermediate_size=48, max_position_embeddings=24),
}
CONFIG = AqlmConfig.from_scheme("1x4g8", **FAST)


def ids(length):
    return torch.randint(BYTES, (2, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", CONFIGS)
def test_learned_positions(name):
    model = random_model(CONFIGS[name])
    assert most_positions(model) == 24
    model(ids(24))
    with pytest.raises((IndexError, RuntimeError)):
        model(ids(25))
    with pytest.raises(
        ValueError, match=r"^sequences: got 25, expected at most 24, as many positions as the model has"
    ):
        quantize_model(model, ids(25), CONFIG)
    with pytest.raises(ValueError, match=r"^sequence_length: got 25, expected at most 24"):
        perplexity(model, ids(50), 25)
    assert perplexity(model, ids(24), 24)["windows"] == 2


def test_rotary_positions_are_warned_of(caplog):
    model = tiny_llama(vocab_size=BYTES, max_position_embeddings=16)
    with caplog.at_level(logging.WARNING, "aqlm_c"):
        quantize_model(model, ids(16), CONFIG)
        assert not caplog.text
        perplexity(model, ids(24), 24)
    assert "sequence_length: got 24, more than the 16 positions that the model's config says" in caplog.text


@pytest.mark.parametrize(
    ("options", "rated"),
    [
        ({}, 128),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}, 512),
        (
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 2.0,
                    "rope_theta": 1e4,
                    "original_max_position_embeddings": 128,
                }
            },
            256,
        ),
    ],
)
def test_scaled_positions(options, rated):
    model = tiny_llama()
    for name, value in options.items():
        setattr(model.config, name, value)
    assert rated_positions(model) == rated and most_positions(model) is None


def test_a_model_without_positions():
    model = random_model(MambaConfig(vocab_size=BYTES, hidden_size=32, num_hidden_layers=1, state_size=4))
    assert most_positions(model) is None and rated_positions(model) is None
    check_length("sequences", 10**6, model)


def test_the_command_line_and_on_the_fly(tmp_path, capsys):
    import aqlm_c.hf

    model = random_model(CONFIGS["opt"])
    model.save_pretrained(tmp_path / "opt")
    byte_tokenizer().save_pretrained(tmp_path / "opt")
    (tmp_path / "text.txt").write_text("some words of a text " * 50)
    source, data = str(tmp_path / "opt"), str(tmp_path / "text.txt")
    for arguments, message in (
        (
            ["quantize", source, str(tmp_path / "out"), "--data", data, "--sequence-length", "25", "--samples", "2"],
            "25",
        ),
        (
            ["evaluate", source, "--data", data, "--sequence-length", "25"],
            "sequence_length: got 25, expected at most 24",
        ),
        (
            ["generate", source, "a" * 20, "--max-new-tokens", "6"],
            "got 6, expected at most 5 after 20 tokens of PROMPT",
        ),
        (["generate", source, "a" * 25, "--max-new-tokens", "1"], "PROMPT: got 25, expected at most 24"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["generate", source, "a" * 20, "--max-new-tokens", "5"]) == 0
    config = aqlm_c.hf.AqlmConfig(scheme="1x4g8", dataset=random_tokens(2, 25), **FAST)
    from transformers import AutoModelForCausalLM

    with pytest.raises(ValueError, match="sequences: got 25, expected at most 24"):
        AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
