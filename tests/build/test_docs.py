"""The code in docs/ runs, and does what the text around it says."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import random_tokens, tiny_llama, write_published

from aqlm_c import AqlmConfig, quantize_model
from aqlm_c.hf import AqlmConfig as HfConfig
from aqlm_c.io.checkpoint import quantized_linears

CHECKPOINT = Path(__file__).parents[2] / "docs" / "checkpoint.md"
FAST = {"ldl_passes": 1, "max_sweeps": 1, "init_max_iter": 1, "finetune_epochs": 0}


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", CHECKPOINT.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def reader():
    """The NumPy reader of docs/checkpoint.md, as a namespace."""
    (code,) = (block for block in blocks("python") if "def decode" in block)
    names = {}
    exec(compile(code, str(CHECKPOINT), "exec"), names)
    assert len([line for line in code.splitlines() if line.strip()]) <= 25
    return names


def test_the_worked_example(reader):
    (example,) = (block for block in blocks("python") if "def decode" not in block)
    exec(compile(example, str(CHECKPOINT), "exec"), dict(reader))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shards", [False, True])
def test_the_reader_decodes_what_we_save(reader, tmp_path, dtype, shards):
    model = tiny_llama(dtype, tie_word_embeddings=False)
    rules = {"lm_head": "3x5g4", "down_proj": "1x9g16"}
    quantize_model(model, random_tokens(4, 16), AqlmConfig.from_scheme("2x4g8", rules=rules, **FAST))
    model.save_pretrained(tmp_path, max_shard_size="10KB" if shards else "5GB")
    assert (tmp_path / "model.safetensors").exists() != shards
    layers = dict(quantized_linears(model))
    assert {layer.scheme for layer in layers.values()} == {"2x4g8", "3x5g4", "1x9g16"}
    for name, layer in layers.items():
        weight = layer.dequantize(torch.float32).weight.detach().numpy()
        np.testing.assert_array_equal(reader["decode"](tmp_path, name), weight)


@pytest.mark.parametrize("scheme", [(1, 16, 8, 1), (2, 8, 8, 2), (3, 3, 4, 1)])
def test_the_reader_decodes_published_checkpoints(reader, tmp_path, scheme):
    dense = write_published(tmp_path, scheme)
    for part in ("self_attn.k_proj", "mlp.down_proj"):
        name = f"model.layers.1.{part}"
        weight = dense.get_submodule(name).weight.detach().numpy()
        np.testing.assert_allclose(reader["decode"](tmp_path, name), weight, rtol=1e-6, atol=1e-7)


def test_the_config_is_one():
    (fields,) = map(json.loads, blocks("json"))
    config = HfConfig(**fields)
    assert config.to_dict() == fields and config.layer_config().rules == dict(fields["rules"])
