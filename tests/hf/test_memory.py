"""What a loaded model takes: its checkpoint once, of whatever dtype and however it was mapped."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import quantization_config
from transformers import LlamaConfig
from transformers.quantizers.base import HfQuantizer

import aqlm_c
from aqlm_c.io import mapped

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc/self/smaps")

SIZES = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "vocab_size": 12_000}
LAYERS = 12

# Bytes in memory without a model and after its first forward, and the most there ever were. What malloc keeps of freed
# memory is given back first: a model would move into it unseen, and how much is left of its workspaces is luck.
SCRIPT = """
import sys, torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
import aqlm_c.hf
from aqlm_c.io.mapped import give_back

def memory(field):
    give_back()
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

dtype = getattr(torch, sys.argv[2])
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 1}
tokens = torch.arange(4)[None]
torch.set_num_threads(2)
with torch.inference_mode():
    LlamaForCausalLM(LlamaConfig(vocab_size=512, **sizes)).to(dtype)(tokens)  # starts torch's libraries
    bare = memory("VmRSS")
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=dtype)
    model(tokens)
print(bare, memory("VmRSS"), memory("VmHWM"))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A directory of random codes, 2x8g8, with an embedding in float16, and the size of its file."""
    directory = tmp_path_factory.mktemp("model")
    config = LlamaConfig(**SIZES, num_hidden_layers=LAYERS, tie_word_embeddings=True)
    rng, hidden, wide = np.random.default_rng(0), SIZES["hidden_size"], SIZES["intermediate_size"]
    shapes = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden), "mlp.down_proj": (hidden, wide)}
    tensors = {"model.embed_tokens.weight": torch.randn(SIZES["vocab_size"], hidden).half(), "model.norm.weight": None}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        tensors |= dict.fromkeys((f"{prefix}.input_layernorm.weight", f"{prefix}.post_attention_layernorm.weight"))
        for name, (rows, width) in shapes.items():
            codes = rng.integers(-128, 128, (rows, width // 8, 2), dtype=np.int8)
            tensors[f"{prefix}.{name}.codes"] = torch.from_numpy(codes)
            tensors[f"{prefix}.{name}.codebooks"] = torch.randn(2, 256, 1, 8).mul(0.02).half()
            tensors[f"{prefix}.{name}.scales"] = torch.ones(rows, 1, 1, 1).half()
    tensors = {name: torch.ones(hidden).half() if value is None else value for name, value in tensors.items()}
    dense = [name for name in tensors if name.endswith(".weight")] + ["lm_head.weight"]
    fields = config.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "float16"}
    fields["quantization_config"] = quantization_config((2, 8, 8, 1), dense)
    (directory / "config.json").write_text(json.dumps(fields))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory, (directory / "model.safetensors").stat().st_size


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_loaded_model_takes_its_checkpoint_once(checkpoint, dtype):
    """Codes are packed out of the mapped file, and with bfloat16 all else is cast: neither is in memory twice."""
    directory, size = checkpoint
    assert size > 70e6
    paths = os.pathsep.join([str(Path(aqlm_c.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, directory, dtype],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stderr
    bare, resident, peak = map(int, done.stdout.split())
    assert 0.9 * size < resident - bare <= 1.15 * size
    if dtype == "float16" or hasattr(HfQuantizer, "get_new_dtype"):  # older ones cast all before they use any
        assert peak - bare <= 1.3 * size


def resident_bytes(path):
    """Of all mappings of a file."""
    counts, found = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            found = line.endswith(str(path))
        elif found and line.startswith("Rss:"):
            counts += int(line.split()[1]) * 1024
    return counts


def test_pages_are_given_back_unless_they_were_written_to(tmp_path):
    written, read = tmp_path / "written a.safetensors", tmp_path / "read.safetensors"
    values = torch.arange(1 << 20, dtype=torch.int32)
    for path in (written, read):
        save_file({"x": values}, path)
    changed, same = load_file(written)["x"], load_file(read)["x"]
    changed[5] = -1
    assert torch.equal(same, values) and resident_bytes(read) >= values.nbytes
    before = resident_bytes(written)
    mapped.give_back([written, read])
    assert resident_bytes(read) == 0 and resident_bytes(written) == before > 0
    assert torch.equal(same, values) and changed[5] == -1
    changed[5] = 5
    assert torch.equal(changed, values)


def test_a_cast_in_parts_is_a_cast(tmp_path, monkeypatch):
    monkeypatch.setattr(mapped, "_LEAST", 100)
    path, values = (
        tmp_path / "x.safetensors",
        {"x": torch.randn(67, 5), "zero": torch.tensor(2.0), "none": torch.zeros(0, 3)},
    )
    save_file(values, path)
    files = mapped.MappedFiles([path])
    for name, tensor in load_file(path).items():
        assert torch.equal(files.cast(tensor, torch.bfloat16), values[name].bfloat16())
    wide = torch.randn(3, 400)  # a row is more than may be in memory twice
    assert torch.equal(files.cast(wide, torch.float64), wide.double())
