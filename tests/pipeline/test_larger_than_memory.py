"""A model is never in memory as a whole while it is quantized: its blocks are read from its files one after another."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from tiny import random_model, random_tokens, tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig
from zoo import tiny_config

import aqlm_c
from aqlm_c.hf.models import load_model
from aqlm_c.io.mapped import mapped_bytes
from aqlm_c.io.source import weight_files
from aqlm_c.model import experts

SIZES = {"hidden_size": 768, "intermediate_size": 1536, "num_attention_heads": 8, "vocab_size": 96}
LAYERS = 12

# Bytes in memory when the model is loaded, the most from there on, and those of the model.
SCRIPT = """
import sys, torch
import aqlm_c
from aqlm_c.hf.models import load_model
from aqlm_c.io.mapped import give_back

def memory(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

torch.set_num_threads(2)
model, _, _ = load_model(sys.argv[1], apart=True)
size = sum(parameter.nbytes for parameter in model.parameters())
give_back()
start = memory("VmRSS")
config = aqlm_c.AqlmConfig.from_scheme("1x4g16", solver="rtn", finetune_epochs=0, gaussian_reference=False)
tokens = torch.randint(96, (4, 16), generator=torch.Generator().manual_seed(0))
open("/proc/self/clear_refs", "w").write("5")  # the most so far is forgotten
aqlm_c.quantize_model(model, tokens, config, layers="v_proj|up_proj", work_dir=sys.argv[2])  # the others take long
print(start, memory("VmHWM"), size)
"""


def write_model(directory, config, n_files=4):
    """A checkpoint of uniform weights, in several files."""
    with torch.device("meta"):
        names = {name: parameter.shape for name, parameter in LlamaForCausalLM(config).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.empty(shape).uniform_(-0.1, 0.1, generator=generator) for name, shape in names.items()}
    places = {name: f"model-{index * n_files // len(tensors):05}.safetensors" for index, name in enumerate(tensors)}
    directory.mkdir()
    for file in set(places.values()):
        save_file({name: tensors[name] for name in tensors if places[name] == file}, directory / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    fields = config.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    (directory / "config.json").write_text(json.dumps(fields))
    tiny_tokenizer().save_pretrained(directory)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc/self/status")
def test_a_model_is_never_in_memory_as_a_whole(tmp_path):
    write_model(tmp_path / "model", LlamaConfig(**SIZES, num_hidden_layers=LAYERS, tie_word_embeddings=False))
    paths = [str(tmp_path / name) for name in ("model", "work")]
    result = subprocess.run([sys.executable, "-c", SCRIPT, *paths], stdout=subprocess.PIPE, text=True)
    assert result.returncode == 0
    start, most, size = map(int, result.stdout.split())
    assert size > 280e6 and most - start < 0.5 * size, f"{(most - start) / 1e6:.0f} of {size / 1e6:.0f} MB"


FUSED = pytest.mark.skipif(not experts.are_fused(), reason="this transformers joins no experts")


@FUSED
def test_experts_stay_in_their_files(tmp_path):
    config = MixtralConfig(
        **{**SIZES, "hidden_size": 64, "intermediate_size": 64}, num_hidden_layers=2, num_local_experts=4
    )
    random_model(config).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    models = [load_model(tmp_path / "model", apart=apart)[0] for apart in (False, True)]
    size = sum(parameter.nbytes for parameter in models[1].parameters())
    found = [
        mapped_bytes((parameter.data for parameter in model.parameters()), weight_files(model)) for model in models
    ]
    assert found[1] == size > 2 * found[0]
    options = {"finetune_epochs": 0, "ldl_passes": 1, "max_sweeps": 1}
    states = []
    for model in models:
        assert not hasattr(model, "hf_quantizer") and not getattr(model.config, "quantization_config", None)
        aqlm_c.quantize_model(model, random_tokens(16, 16), aqlm_c.AqlmConfig.from_scheme("2x4g8", **options))
        aqlm_c.save_quantized(model, None, tmp_path / f"out{len(states)}")
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0].keys() | states[1].keys())
    files = [sorted(path.name for path in (tmp_path / f"out{number}").iterdir()) for number in range(2)]
    assert files[0] == files[1]
    saved = [(tmp_path / f"out{number}" / "model.safetensors").read_bytes() for number in range(2)]
    assert saved[0] == saved[1]


@FUSED
def test_a_model_taken_apart_is_made_whole_again(tmp_path):
    config = MixtralConfig(
        **{**SIZES, "hidden_size": 64, "intermediate_size": 64}, num_hidden_layers=2, num_local_experts=4
    )
    random_model(config).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    plain, apart = (load_model(tmp_path / "model", apart=apart)[0] for apart in (False, True))
    config = aqlm_c.AqlmConfig.from_scheme("2x4g8", rules={"experts": "dense"}, finetune_epochs=0, ldl_passes=1)
    aqlm_c.quantize_model(apart, random_tokens(4, 8), config)
    assert type(apart.model.layers[0].mlp.experts) is type(plain.model.layers[0].mlp.experts)


@FUSED
def test_experts_that_are_stored_joined_are_loaded_so(tmp_path):
    model = random_model(tiny_config("granitemoe"))
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    state = load_model(tmp_path / "model", apart=True)[0].state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_what_is_trained_leaves_its_file_to_be_given_back(tmp_path):
    config = LlamaConfig(**{**SIZES, "hidden_size": 128}, num_hidden_layers=2, num_key_value_heads=8)
    write_model(tmp_path / "model", config, n_files=1)
    model, _, _ = load_model(str(tmp_path / "model"))
    block, before = model.model.layers[0], mapped_bytes(model.parameters(), weight_files(model))
    norms = [block.input_layernorm.weight, block.post_attention_layernorm.weight]
    gone = block.self_attn.v_proj.weight.nbytes + sum(norm.nbytes for norm in norms)
    starts = [norm.detach().clone() for norm in norms]
    options = {"finetune_epochs": 1, "finetune_lookahead": 0, "embeddings": "dense", "gaussian_reference": False}
    quantization = aqlm_c.AqlmConfig.from_scheme("1x4g16", solver="rtn", **options)
    files = weight_files(model)
    aqlm_c.quantize_model(model, random_tokens(8, 16) % 96, quantization, layers=r"layers\.0\..*v_proj")
    assert not all(torch.equal(start, norm) for start, norm in zip(starts, norms, strict=True))
    assert mapped_bytes(model.parameters(), files) == before - gone > 0
