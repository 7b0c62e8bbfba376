"""Published checkpoints in transformers: written here by an independent NumPy writer, compared with a dense twin."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from loading import load, prefill_and_decode, quantized_names
from safetensors.numpy import load_file
from tiny import random_tokens, tiny_tokenizer, write_published
from transformers import AutoModelForCausalLM
from transformers.quantizers import auto

import aqlm_c
import aqlm_c.hf
from aqlm_c.nn.linear import QuantizedLinear
from aqlm_c.recipe import AqlmConfig

LINEARS = 14  # of the two blocks


SCHEMES = [
    (1, 16, 8, 1),
    (2, 8, 8, 1),
    (8, 8, 8, 1),
    (1, 8, 8, 1),
    (1, 16, 16, 1),
    (1, 15, 8, 1),
    (3, 12, 4, 1),
    (2, 8, 8, 2),
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: "{}x{}g{}o{}".format(*s))
def test_published_formats(tmp_path, scheme):
    dense = write_published(tmp_path, scheme)
    model = load(tmp_path)
    assert len(quantized_names(model)) == LINEARS
    tokens = random_tokens(2, 12)
    expected, _ = prefill_and_decode(dense, tokens)
    truth = (expected, expected[:, -1])
    for got, want in zip(prefill_and_decode(model, tokens), truth, strict=True):
        assert (got - want).abs().max() <= 1e-5 * expected.abs().max()
    model = load(tmp_path, dtype=torch.bfloat16)
    own = [
        (got - want).abs().max() for got, want in zip(prefill_and_decode(dense.bfloat16(), tokens), truth, strict=True)
    ]
    for got, want, error in zip(prefill_and_decode(model, tokens), truth, own, strict=True):
        assert (got - want).abs().max() <= 2 * error


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_tied_and_untied_embeddings_and_biases(tmp_path, tied, bias):
    dense = write_published(tmp_path, (2, 8, 8, 1), tie_word_embeddings=tied, attention_bias=bias, mlp_bias=bias)
    model = load(tmp_path)
    assert isinstance(model.lm_head, torch.nn.Linear)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    tokens = random_tokens(2, 12)
    expected = dense(tokens).logits
    assert (model(tokens).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert model.generate(tokens[:1], max_new_tokens=3, do_sample=False).shape == (1, 15)


def test_skip_list_is_matched_exactly(tmp_path):
    # layers.1 is a prefix of nothing to skip, and "up_proj" alone is no module's name
    keep = ["model.layers.1.mlp.up_proj"]
    extra = {
        "linear_weights_not_to_quantize": ["model.layers.1.mlp.up_proj.weight", "up_proj", "model.layers.0", "lm_head"]
    }
    write_published(tmp_path, (2, 8, 8, 1), keep, extra)
    model = load(tmp_path)
    assert len(quantized_names(model)) == LINEARS - 1
    assert keep[0] not in quantized_names(model)


@pytest.mark.parametrize("tied", [True, False])
def test_an_empty_skip_list_keeps_the_output_embedding(tmp_path, tied):
    extra = {"linear_weights_not_to_quantize": []}
    write_published(tmp_path, (2, 8, 8, 1), extra=extra, tie_word_embeddings=tied)
    assert len(quantized_names(load(tmp_path))) == LINEARS


def test_codes_that_no_linear_takes_are_named(tmp_path):
    """transformers would only warn, and go on with a model that lacks them."""
    write_published(tmp_path, (2, 8, 8, 1))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.down_proj.codes in .*model.safetensors: unexpected"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_loaded_model_holds_the_disk_layout_and_one_copy_of_it(tmp_path):
    write_published(tmp_path / "a", (2, 8, 8, 1))
    model = load(tmp_path / "a")
    stored = load_file(tmp_path / "a" / "model.safetensors")
    model(random_tokens(2, 12))
    model.generate(random_tokens(1, 4), max_new_tokens=2, do_sample=False)
    for name, tensor in model.state_dict().items():
        if name in stored:  # not the tied lm_head
            np.testing.assert_array_equal(tensor.numpy(), stored[name])
            assert tensor.numpy().dtype == stored[name].dtype
    for _, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            held = [v for v in vars(layer).values() if isinstance(v, torch.Tensor)]
            assert not held and set(layer.state_dict()) <= {"codes", "codebooks", "scales", "bias"}
            assert not list(layer.buffers()) and not list(layer.children())
    model.save_pretrained(tmp_path / "b")
    again = load_file(tmp_path / "b" / "model.safetensors")
    assert again.keys() == stored.keys()
    assert all(again[name].tobytes() == stored[name].tobytes() for name in stored)
    logits = model(random_tokens(2, 12)).logits
    assert torch.equal(load(tmp_path / "b")(random_tokens(2, 12)).logits, logits)


@pytest.mark.parametrize("asked", [torch.bfloat16, torch.float16, torch.float32, "auto", None])
def test_every_dtype_keeps_codebooks_as_stored(tmp_path, asked):
    dense = write_published(tmp_path, (2, 8, 8, 1), attention_bias=True)
    model = load(tmp_path, **({"dtype": asked} if asked else {}))
    stored = load_file(tmp_path / "model.safetensors")
    dtype = asked if isinstance(asked, torch.dtype) else torch.float32  # what config.json says
    for name in quantized_names(model):
        for part in ("codes", "codebooks", "scales"):
            held = model.get_parameter(f"{name}.{part}").detach().numpy()
            assert held.dtype == stored[f"{name}.{part}"].dtype
            np.testing.assert_array_equal(held, stored[f"{name}.{part}"])
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.codebooks.dtype == layer.scales.dtype == torch.float16
    assert layer.bias.dtype == model.lm_head.weight.dtype == dtype
    tokens = random_tokens(2, 12)
    with torch.no_grad():
        expected = dense(tokens).logits
        own = (dense.to(dtype)(tokens).logits.float() - expected).abs().max()  # torch's own error in this dtype
        allowed = max(2 * own, 1e-5 * expected.abs().max())
        assert (model(tokens).logits.float() - expected).abs().max() <= allowed


def test_dequantize(tmp_path):
    dense = write_published(tmp_path, (2, 8, 8, 1), attention_bias=True)
    tokens = random_tokens(2, 12)
    expected = dense(tokens).logits
    models = [load(tmp_path).dequantize()]
    if hasattr(auto, "LOADING_ATTRIBUTES_CONFIG_TYPES"):  # transformers 5
        with pytest.warns(UserWarning, match="dequantize"):
            config = aqlm_c.hf.AqlmConfig(dequantize=True)
            models.append(AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config))
    for model in models:
        assert not quantized_names(model) and not hasattr(model.config, "quantization_config")
        assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.float32
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-5, atol=1e-5)
        model.save_pretrained(tmp_path / "dense")
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
        assert torch.equal(plain(tokens).logits, model(tokens).logits)


PLACES = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu"}
PLACES |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", [(2, 8, 8, 1), (1, 15, 8, 1)], ids=["2x8", "1x15"])
def test_disk_offload_and_saving_from_there(tmp_path, scheme, dtype):
    """Each tensor has other values if it passes through the model's dtype: codes of 15 bits, codebooks in float16."""
    write_published(tmp_path / "model", scheme, attention_bias=True)
    model = load(tmp_path / "model", dtype=dtype, device_map=PLACES, offload_folder=tmp_path / "offload")
    assert model.model.layers[0].mlp.up_proj.codes.device.type == "meta"
    tokens = random_tokens(2, 12)
    with torch.no_grad():
        logits = model(tokens).logits
        assert torch.equal(logits, load(tmp_path / "model", dtype=dtype)(tokens).logits)
    model.save_pretrained(tmp_path / "saved")
    stored, again = (safetensors.torch.load_file(tmp_path / name / "model.safetensors") for name in ("model", "saved"))
    assert stored.keys() == again.keys()
    for name in stored:
        if name.endswith((".codes", ".codebooks", ".scales")):
            assert stored[name].dtype == again[name].dtype and torch.equal(stored[name], again[name]), name
    assert torch.equal(load(tmp_path / "saved", dtype=dtype)(tokens).logits, logits)


@pytest.mark.parametrize("place", ["auto", "cpu", {"": "cpu"}])
def test_device_maps(tmp_path, place):
    write_published(tmp_path, (2, 8, 8, 1))
    tokens = random_tokens(2, 12)
    model = load(tmp_path, device_map=place)
    logits, expected = model(tokens.to(model.device)).logits.cpu(), load(tmp_path)(tokens).logits
    same = torch.equal if model.device.type == "cpu" else torch.allclose
    assert same(logits, expected)


def test_sharded_files(tmp_path):
    write_published(tmp_path / "a", (2, 8, 8, 1), attention_bias=True)
    model = load(tmp_path / "a")
    model.save_pretrained(tmp_path / "b", max_shard_size="30KB")
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 3
    stored = load_file(tmp_path / "a" / "model.safetensors")
    shards = {
        name: tensor for file in (tmp_path / "b").glob("*.safetensors") for name, tensor in load_file(file).items()
    }
    assert shards.keys() == stored.keys()
    assert all(shards[name].tobytes() == stored[name].tobytes() for name in stored)
    tokens = random_tokens(2, 12)
    assert torch.equal(load(tmp_path / "b")(tokens).logits, model(tokens).logits)
    places = load(tmp_path / "b", device_map=PLACES, offload_folder=tmp_path / "offload")
    assert torch.equal(places(tokens).logits, model(tokens).logits)


def test_base_model_without_the_head(tmp_path):
    dense = write_published(tmp_path, (2, 8, 8, 1))
    body = transformers.AutoModel.from_pretrained(tmp_path)
    tokens = random_tokens(2, 12)
    got, want = body(tokens).last_hidden_state, dense.model(tokens).last_hidden_state
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


# ---- the config -----------------------------------------------------------------------------------------------


def test_config_keeps_unknown_keys_and_leaves_out_run_time_options(tmp_path):
    write_published(tmp_path, (2, 8, 8, 1), extra={"provenance": {"data": "some text"}})
    config = load(tmp_path).config.quantization_config
    assert type(config) is aqlm_c.hf.AqlmConfig and isinstance(config, transformers.AqlmConfig)
    fields = config.to_dict()
    assert fields["provenance"] == {"data": "some text"} and fields["quant_method"] == "aqlm"
    assert "dequantize" not in fields
    assert json.loads(json.dumps(fields)) == fields
    assert type(config).from_dict(fields).to_dict() == fields
    assert config.layer_config() == AqlmConfig()


@pytest.mark.parametrize("theirs", [transformers.AqlmConfig, aqlm_c.hf.AqlmConfig])
def test_a_config_passed_along_does_not_replace_the_checkpoints(tmp_path, theirs):
    write_published(tmp_path, (2, 8, 8, 1))
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        model = load(tmp_path, quantization_config=theirs(num_codebooks=5))
    assert model.config.quantization_config.num_codebooks == 2


@pytest.mark.parametrize(("field", "value"), [("num_codebooks", 9), ("in_group_size", 7), ("nbits_per_codebook", 17)])
def test_config_refuses_what_no_checkpoint_has(field, value):
    with pytest.raises(ValueError, match=f"{field}: got {value}, expected"):
        aqlm_c.hf.AqlmConfig(**{field: value})


def test_own_name_is_registered_too():
    for method in ("aqlm", "aqlm_c"):
        assert auto.AUTO_QUANTIZER_MAPPING[method] is aqlm_c.hf.AqlmQuantizer
        config = auto.AutoQuantizationConfig.from_dict(
            {"quant_method": method, "num_codebooks": 2, "nbits_per_codebook": 8}
        )
        assert config.quant_method == method and config.to_dict()["quant_method"] == method


def test_flags():
    quantizer = aqlm_c.hf.AqlmQuantizer(aqlm_c.hf.AqlmConfig())
    assert quantizer.is_serializable() and quantizer.is_trainable
    assert quantizer.is_qat_trainable and quantizer.is_compileable


def test_a_fresh_process_needs_no_aqlm_package_no_network_and_no_remote_code(tmp_path):
    """Every verb on local directories, while a look-up of any name and any connection raise, and the hub is not
    said to be offline."""
    dense = write_published(tmp_path / "quantized", (2, 8, 8, 1))
    dense.save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text(" ".join(f"w{i}" for i in range(64)))
    script = """
import os, socket, sys
def refuse(*args, **kwargs):
    os.write(2, b"network call")
    os._exit(9)
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.gethostbyname = refuse
sys.modules["aqlm"] = None
import torch, transformers.dynamic_module_utils
transformers.dynamic_module_utils.get_class_from_dynamic_module = refuse
import aqlm_c.hf
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("quantized")
torch.save(model(torch.arange(8)[None]).logits, "logits.pt")
model.generate(torch.arange(8)[None], max_new_tokens=2, do_sample=False)
config = aqlm_c.hf.AqlmConfig(
    scheme="1x4g8", dataset="text.txt", samples=2, sequence_length=16, preset="fast", layers="q_proj"
)
model = AutoModelForCausalLM.from_pretrained("dense", quantization_config=config)
aqlm_c.save_quantized(model, None, "saved")
model, tokenizer, _ = aqlm_c.load_model("dense")
tokens = aqlm_c.load_sequences(["text.txt"], tokenizer, 2, 16)
aqlm_c.quantize_model(model, tokens, aqlm_c.AqlmConfig.from_scheme("1x4g8", finetune_epochs=0), layers="q_proj")
aqlm_c.save_quantized(model, tokenizer, "saved2")
aqlm_c.load_model("saved2")
"""
    online = {name: value for name, value in os.environ.items() if "OFFLINE" not in name}
    online["PYTHONPATH"] = os.pathsep.join([str(Path(aqlm_c.__file__).parents[1]), online.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=600, cwd=tmp_path, env=online
    )
    assert done.returncode == 0, done.stderr
    logits = torch.load(tmp_path / "logits.pt", weights_only=True)
    torch.testing.assert_close(logits, dense(torch.arange(8)[None]).logits, rtol=1e-5, atol=1e-5)
    assert (tmp_path / "saved" / "config.json").is_file() and (tmp_path / "saved2" / "config.json").is_file()


def test_loaded_codes_are_packed_and_saved_as_on_disk(tmp_path):
    """In memory in the order the CPU reads fastest; as on disk for everybody else."""
    write_published(tmp_path, (2, 8, 8, 1))
    model = load(tmp_path)
    layers = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear) and layer.codes.shape[0] >= 64]
    assert layers and all(layer.codes.stride(0) == 1 for layer in layers)
    stored = load_file(tmp_path / "model.safetensors")
    for name, codes in model.state_dict().items():
        if name.endswith(".codes"):
            assert codes.is_contiguous() and np.array_equal(codes.numpy(), stored[name])
    model.to("meta")
    assert model.to_empty(device="cpu") is model
    assert all(layer.codes.stride(0) == 1 for layer in layers)
