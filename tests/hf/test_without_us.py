"""A model of ours where nothing imports aqlm_c.hf: transformers raises, whatever its version; it is never random."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from loading import load
from tiny import FAST, SCHEME, random_tokens, tiny_llama
from transformers import BitsAndBytesConfig

import aqlm_c
from aqlm_c import hf
from aqlm_c.hf.config import GUARD
from aqlm_c.inspection import inspect_model
from aqlm_c.io.checkpoint import save_quantized

# Prints what from_pretrained of transformers alone does with each directory.
ALONE = """
import sys
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM
for directory in sys.argv[1:]:
    for kind in (AutoModel, AutoModelForCausalLM, LlamaForCausalLM):
        try:
            kind.from_pretrained(directory)
        except Exception as error:
            print(type(error).__name__, " ".join(str(error).split()))
        else:
            print("loaded")
assert not any(name.startswith("aqlm") for name in sys.modules)
"""


def quantized(rules=None, **options):
    model = tiny_llama(**options)
    aqlm_c.quantize_model(model, None, aqlm_c.AqlmConfig.from_scheme(SCHEME, rules=rules, **FAST))
    return model


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What transformers alone said of each directory, three lines each."""
    home = tmp_path_factory.mktemp("models")
    rules = {"dense": {"down_proj": "dense"}, "embedding": {"embed_tokens": "2x4g8"}, "head": {"lm_head": "2x4g8"}}
    for name, rule in {**rules, "one-scheme": None}.items():
        save_quantized(quantized(rule, tie_word_embeddings=name not in ("embedding", "head")), None, home / name)
    load(home / "dense").save_pretrained(home / "saved-again")
    load(home / "dense").dequantize().save_pretrained(home / "dequantized")
    directories = sorted(home.iterdir())
    done = subprocess.run([sys.executable, "-c", ALONE, *directories], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3 * len(directories)
    return home, {path.name: lines[3 * i : 3 * i + 3] for i, path in enumerate(directories)}


@pytest.mark.parametrize("name", ["dense", "embedding", "head", "saved-again"])
def test_transformers_alone_raises_and_says_the_cure(outcomes, name):
    for line in outcomes[1][name]:
        assert line.startswith("AttributeError") and "import aqlm_c.hf (pip install aqlm-c)" in line


def test_of_one_scheme_it_wants_the_package_of_upstream(outcomes):
    home, lines = outcomes
    fields = json.loads((home / "one-scheme" / "config.json").read_text())["quantization_config"]
    assert {"lm_head", "lm_head.weight"} <= set(fields["linear_weights_not_to_quantize"])  # 5 reads one, 4 the other
    if importlib.util.find_spec("aqlm") is None:  # with it: tests/hf/test_upstream.py
        assert all(line.startswith("ImportError") and "pip install aqlm" in line for line in lines["one-scheme"])


def test_a_dequantized_model_needs_nothing(outcomes):
    home, lines = outcomes
    assert "quantization_config" not in json.loads((home / "dequantized" / "config.json").read_text())
    assert lines["dequantized"] == ["loaded"] * 3


def test_with_us_it_loads_and_the_guard_is_no_field(tmp_path):
    model, tokens = quantized({"down_proj": "dense"}), random_tokens(1, 8)
    save_quantized(model, None, tmp_path / "out")
    config = tmp_path / "out" / "config.json"
    fields = json.loads(config.read_text())["quantization_config"]
    assert fields | GUARD == fields and fields["quant_method"] == "aqlm_c"
    loaded = load(tmp_path / "out")
    assert not set(GUARD) & set(vars(loaded.config.quantization_config))
    assert inspect_model(tmp_path / "out").scheme == SCHEME

    whole = json.loads(config.read_text())  # as written before there was a guard
    whole["quantization_config"] = {name: value for name, value in fields.items() if name not in GUARD}
    config.write_text(json.dumps(whole))
    with torch.no_grad():
        expected = model(tokens).logits
        assert torch.equal(load(tmp_path / "out")(tokens).logits, expected)
        assert torch.equal(loaded(tokens).logits, expected)


def test_the_configs_of_others_are_theirs():
    from transformers.quantizers.auto import AutoQuantizationConfig

    theirs = AutoQuantizationConfig.from_dict({"quant_method": "bitsandbytes", "load_in_8bit": True})
    assert isinstance(theirs, BitsAndBytesConfig)
    assert isinstance(AutoQuantizationConfig.from_dict({"quant_method": "aqlm"}), hf.AqlmConfig)
    with pytest.raises(ValueError, match="quant_method"):
        AutoQuantizationConfig.from_dict({})
