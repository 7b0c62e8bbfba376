"""With the code of the upstream package: it reads what we save, we read what it makes; the same weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import random_tokens, tiny_llama
from transformers import AutoModelForCausalLM

import aqlm_c.hf  # noqa: F401
from aqlm_c.format import Format
from aqlm_c.io.checkpoint import quantized_linears, save_quantized
from aqlm_c.quantize import quantize_model
from aqlm_c.recipe import AqlmConfig

UPSTREAM = "aqlm==1.1.7"
FAST = {"max_sweeps": 1, "ldl_passes": 1, "init_max_iter": 1, "finetune_epochs": 0}
OURS = {
    "2x8g8": torch.float16,
    "2x8g16": torch.bfloat16,
    "1x16g8": torch.float16,
    "3x8g8": torch.float16,
    "1x12g8": torch.float32,  # of the model: its codebooks are float16
}
THEIRS = ["2x8g8", "1x16g8", "3x8g8", "1x12g16", "2x8g8o2"]


pytestmark = pytest.mark.network  # installs upstream's package


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The interpreter of a throw-away environment with upstream's package; torch is that of the tests."""
    home = tmp_path_factory.mktemp("upstream")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    interpreter = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    query = [interpreter, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    where = subprocess.run(query, check=True, capture_output=True, text=True).stdout.strip()
    Path(where, "host.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    pip = [sys.executable, "-m", "pip", "install", "-q", "--retries", "1", "--no-deps", "--target", where, UPSTREAM]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{UPSTREAM} cannot be fetched: {' '.join(done.stderr.split())[-200:]}")
    return interpreter


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory, python):
    """Where upstream has read models, ours-SCHEME, and made models, theirs-SCHEME; and our models by scheme."""
    home, models = tmp_path_factory.mktemp("exchanged"), {}
    for scheme, dtype in OURS.items():
        model = models[scheme] = tiny_llama(dtype, attention_bias=True, num_hidden_layers=1)
        quantize_model(model, random_tokens(4, 16), AqlmConfig.from_scheme(scheme, **FAST))
        save_quantized(model, None, home / f"ours-{scheme}")
    for scheme in THEIRS:
        dense = home / f"theirs-{scheme}" / "dense"
        tiny_llama(mlp_bias=True, num_hidden_layers=1).save_pretrained(dense)
        request = {"quant_method": "aqlm", **Format.parse(scheme).to_dict()}
        request["linear_weights_not_to_quantize"] = ["model.embed_tokens.weight", "lm_head.weight"]
        (dense.parent / "request.json").write_text(json.dumps(request))
    script = Path(__file__).parents[1] / "support" / "upstream_check.py"
    done = subprocess.run([python, script, *sorted(home.iterdir())], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return home, models


def assert_same_weights(model, directory):
    """Equal bits in float32; in the codebooks' own dtype ours is that weight, rounded once."""
    weights, layers = load_file(directory / "weights.safetensors"), dict(quantized_linears(model))
    assert layers.keys() == weights.keys() and len(layers) == 7
    for name, layer in layers.items():
        assert torch.equal(layer.dequantize(torch.float32).weight, weights[name]), name
        assert torch.equal(layer.dequantize().weight, weights[name].to(layer.codebooks.dtype)), name


@pytest.mark.parametrize("scheme", OURS)
def test_upstream_reads_what_we_save(exchanged, scheme):
    home, models = exchanged
    assert_same_weights(models[scheme], home / f"ours-{scheme}")


@pytest.mark.parametrize("scheme", THEIRS)
def test_we_read_what_upstream_makes(exchanged, scheme):
    directory = exchanged[0] / f"theirs-{scheme}"
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    assert_same_weights(model, directory)
    assert model.model.layers[0].mlp.up_proj.bias is not None


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_with_upstream_loads_what_we_save(tmp_path, python, tied):
    """No aqlm_c: the output layer is the dense one, whichever names transformers compares."""
    model, tokens = tiny_llama(tie_word_embeddings=tied), random_tokens(1, 16)
    quantize_model(model, None, AqlmConfig.from_scheme("2x4g8", **FAST))
    save_quantized(model, None, tmp_path / "out")
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM; from safetensors.torch import save_file;"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]);"
        f"save_file({{'logits': model(torch.tensor({tokens.tolist()})).logits}}, sys.argv[2]);"
        "assert 'aqlm_c' not in sys.modules"
    )
    done = subprocess.run([python, "-c", code, tmp_path / "out", tmp_path / "theirs"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = model(tokens).logits
    torch.testing.assert_close(load_file(tmp_path / "theirs")["logits"], expected, rtol=1e-3, atol=1e-3)
