"""Malformed checkpoints: each is refused by from_pretrained, before any forward, in words that name the tensor."""

import json
import os
import pickle
import re
import shutil

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny import random_tokens, tiny_tokenizer, write_published
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForCausalLM

import aqlm_c.hf  # noqa: F401
from aqlm_c.hf.models import load_model
from aqlm_c.io.checkpoint import read_directory

UP = "model.layers.1.mlp.up_proj"
NORM = "model.layers.1.input_layernorm.weight"
UP_OF_BASE = "layers.1.mlp.up_proj.scales"  # in the files of a base model
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """An untied 2x12g4 model with biases in its MLPs; no test changes it."""
    directory = tmp_path_factory.mktemp("published") / "model"
    write_published(directory, (2, 12, 4, 1), mlp_bias=True, tie_word_embeddings=False)
    return directory


@pytest.fixture
def model(published, tmp_path):
    return shutil.copytree(published, tmp_path / "model")


def edit(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, directory / "model.safetensors", {"format": "pt"})


def edit_config(directory, change):
    config = json.loads((directory / "config.json").read_text())
    change(config)
    (directory / "config.json").write_text(json.dumps(config))


def load(directory, offload=False, **options):
    if offload:
        places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
        places |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
        options |= {"device_map": places, "offload_folder": directory.parent / "offload"}
    return AutoModelForCausalLM.from_pretrained(directory, **options)


def change(name, function):
    return lambda tensors: tensors.update({name: function(tensors[name])})


def add(name, *shape, dtype=torch.float16):
    return lambda tensors: tensors.update({name: torch.zeros(shape, dtype=dtype)})


def poison(name, value):
    def edit(tensors):
        tensors[name].view(-1)[5] = value

    return edit


def again(name, other):
    return lambda tensors: tensors.update({other: tensors[name].clone()})


def drop(name):
    return lambda tensors: tensors.pop(name)


TENSORS = {
    "codebooks missing": (drop(f"{UP}.codebooks"), f"{UP}.codebooks: missing"),
    "codebooks flat": (change(f"{UP}.codebooks", lambda x: x[:, :, 0]), f"{UP}.codebooks in .*expected F16"),
    "scales flat": (change(f"{UP}.scales", torch.flatten), rf"{UP}.scales in .*\[64\], expected .*\[64, 1, 1, 1\]"),
    "bias cut": (change(f"{UP}.bias", lambda x: x[:-1]), rf"{UP}.bias in .*\[63\], expected"),
    "codes of 32 bits": (change(f"{UP}.codes", torch.Tensor.int), f"{UP}.codes in .*I32 .*expected I16"),
    "codes of floats": (change(f"{UP}.codes", torch.Tensor.half), f"{UP}.codes in .*F16 .*expected I16"),
    "code above": (poison(f"{UP}.codes", 3000), f"{UP}.codes( in .*)?: .*3000, expected -2048 to 2047"),
    "code below": (poison(f"{UP}.codes", -2049), f"{UP}.codes( in .*)?: .*-2049 .*expected -2048 to 2047"),
    "two dtypes": (change(f"{UP}.codebooks", torch.Tensor.bfloat16), f"{UP}.scales in .*F16, expected BF16"),
    "NaN scale": (poison(f"{UP}.scales", torch.nan), f"{UP}.scales( in .*)?: got NaN or Inf"),
    "Inf in codebooks": (poison(f"{UP}.codebooks", -torch.inf), f"{UP}.codebooks( in .*)?: got NaN or Inf"),
    "codebooks of no layer": (add("model.extra.codebooks", 2), r"model.extra.codebooks in .*unexpected"),
    "scales of no layer": (add("model.norm.scales", 2), r"model.norm.scales in .*unexpected"),
    "another part": (add(f"{UP}.zeros", 2), f"{UP}.zeros in .*unexpected"),
    "a dense weight too": (add(f"{UP}.weight", 64, 32), f"{UP}.weight in .*unexpected"),
    "a bias too many": (add("model.layers.0.self_attn.q_proj.bias", 32), "q_proj.bias in .*unexpected"),
    "codes of a dense layer": (add("lm_head.codes", 96, 4, 1, dtype=torch.int8), "lm_head.codes in .*unexpected"),
    "one layer twice": (again(f"{UP}.scales", UP_OF_BASE), f"{UP_OF_BASE} in .*unexpected|{UP}.scales in .*unexpected"),
    "embedding missing": (drop(EMBEDDING), f"{EMBEDDING}: missing"),
    "norm missing": (drop(NORM), f"{NORM}: missing"),
    "output layer missing": (drop("lm_head.weight"), "lm_head.weight: missing"),
    "norm cut": (change(NORM, lambda x: x[:-1]), rf"{NORM} in .*\[31\], expected \[32\]"),
    "a word lost": (change(EMBEDDING, lambda x: x[1:]), rf"{EMBEDDING} in .*\[95, 32\], expected \[96, 32\]"),
    "output layer turned": (change("lm_head.weight", torch.t), r"lm_head.weight in .*\[32, 96\], expected \[96, 32\]"),
    "norm of integers": (change(NORM, torch.Tensor.int), f"{NORM} in .*I32, expected F16"),
}


@pytest.mark.parametrize("offload", [False, True], ids=["memory", "disk"])
@pytest.mark.parametrize(("damage", "message"), TENSORS.values(), ids=TENSORS)
def test_a_tensor_is_refused_by_name(model, offload, damage, message):
    edit(model, damage)
    with pytest.raises(ValueError, match=message):
        load(model, offload)


def test_the_undamaged_model_loads(model):
    logits = load(model)(random_tokens(1, 8)).logits
    assert torch.equal(load(model, offload=True)(random_tokens(1, 8)).logits, logits)


def test_a_tied_model_without_its_embedding(tmp_path):
    write_published(tmp_path / "model", (2, 8, 8, 1))
    load(tmp_path / "model")
    edit(tmp_path / "model", drop(EMBEDDING))
    with pytest.raises(ValueError, match=f"{EMBEDDING}: missing|lm_head.weight: missing"):
        load(tmp_path / "model")


# ---- what published checkpoints may have besides -------------------------------------------------------------------


def test_harmless_tensors_are_no_error(model, monkeypatch):
    expected = load(model)(random_tokens(1, 8)).logits
    edit(model, add("model.layers.0.self_attn.rotary_emb.inv_freq", 4, dtype=torch.float32))
    edit(model, add("model.layers.0.self_attn.masked_bias", 1))
    for part in ("codes", "weight"):
        edit(model, add(f"model.draft.0.proj.{part}", 2, 2, 1, dtype=torch.int16))
    with pytest.raises(ValueError, match=r"model.draft.0.proj.codes in .*unexpected"):
        load(model)
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"^model\.draft\."])
    assert torch.equal(load(model)(random_tokens(1, 8)).logits, expected)


def test_a_new_head_and_a_base_model_are_no_error(model):
    new = AutoModelForSequenceClassification.from_pretrained(model, num_labels=3)
    assert isinstance(new.score, torch.nn.Linear)
    assert torch.equal(new.model.layers[1].mlp.up_proj.codes, load(model).model.layers[1].mlp.up_proj.codes)
    body = AutoModel.from_pretrained(model)
    edit(model, drop("lm_head.weight"))
    tensors = load_file(model / "model.safetensors")
    save_file({name.removeprefix("model."): t for name, t in tensors.items()}, model / "model.safetensors")
    again = AutoModel.from_pretrained(model)  # from a base model's own file
    tokens = random_tokens(1, 8)
    assert torch.equal(again(tokens).last_hidden_state, body(tokens).last_hidden_state)
    with pytest.raises(ValueError, match=r"lm_head.weight: missing"):
        load(model)


# ---- config.json ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lies", "message"),
    [
        ({"num_codebooks": 1}, r"\.codes in .*\[32, 8, 2\], expected I16 \[32, 8, 1\]"),
        ({"nbits_per_codebook": 16}, r"\.codebooks in .*expected .*\[2, 65536, 1, 4\]"),
        ({"nbits_per_codebook": 13}, r"\.codebooks in .*expected .*\[2, 8192, 1, 4\]"),
        ({"out_group_size": 2}, r"\.codes in .*expected I16 \[16, 8, 2\]"),
        ({"in_group_size": 8, "num_codebooks": 4}, r"\.codes in .*expected I16 \[32, 4, 4\]"),  # as many bytes
        ({"in_group_size": 8, "nbits_per_codebook": 11}, r"\.codes in .*expected I16 \[32, 4, 2\]"),
        ({"in_group_size": 32, "out_group_size": 3}, "out_group_size: got 3, expected a divisor"),
    ],
)
def test_a_config_that_lies(model, lies, message):
    edit_config(model, lambda config: config["quantization_config"].update(lies))
    with pytest.raises(ValueError, match=message):
        load(model)


@pytest.mark.parametrize("field", ["num_codebooks", "nbits_per_codebook", "in_group_size", "out_group_size"])
@pytest.mark.parametrize("kind", [str, float, bool, type(None), list], ids=lambda kind: kind.__name__)
def test_a_field_of_another_type(model, field, kind):
    def wrong(config):
        value = config["quantization_config"][field]
        config["quantization_config"][field] = None if kind is type(None) else [value] if kind is list else kind(value)

    edit_config(model, wrong)
    with pytest.raises((ValueError, TypeError), match=field):
        load(model)


@pytest.mark.parametrize("value", ["lm_head", [1], [None], {"lm_head": 1}], ids=str)
def test_a_list_of_dense_layers_that_is_none(model, value):
    edit_config(model, lambda config: config["quantization_config"].update(linear_weights_not_to_quantize=value))
    with pytest.raises((ValueError, TypeError), match="linear_weights_not_to_quantize"):
        load(model)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "quant_method"),
        ({"quant_method": None}, "quant_method"),
        ({"quant_method": "aqlm"}, r"\.codes in .*expected"),  # of transformers' defaults, 1x16g8
        ({"quant_method": "aqlm", "num_codebooks": 2}, r"\.codes in .*expected"),
    ],
)
def test_a_config_that_says_too_little(model, value, message):
    edit_config(model, lambda config: config.update(quantization_config=value))
    with pytest.raises(ValueError, match=message):
        load(model)


def test_a_config_without_quantization(model):
    """transformers asks nobody: from_pretrained warns of a random model, load_model refuses it."""
    edit_config(model, lambda config: config.pop("quantization_config"))
    tiny_tokenizer().save_pretrained(model)
    with pytest.raises(ValueError, match=r"14 tensors are missing .*such as model.layers.0"):
        load_model(str(model))


# ---- files --------------------------------------------------------------------------------------------------------


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, sprung):
        self.sprung = sprung

    def __reduce__(self):
        return self.sprung.touch, ()


@pytest.mark.parametrize(
    "options",
    [{}, {"use_safetensors": False}, {"weights_only": False}, {"weights_only": False, "use_safetensors": False}],
    ids=str,
)
@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("with_dtype", [True, False])
def test_a_pickle_is_never_loaded(model, tmp_path, options, beside, with_dtype):
    sprung = tmp_path / "sprung"
    torch.save(load_file(model / "model.safetensors") | {"trap": Trap(sprung)}, model / "pytorch_model.bin")
    if not beside:
        (model / "model.safetensors").unlink()
    if not with_dtype:  # transformers would ask the file
        edit_config(model, lambda config: (config.pop("dtype"), config.pop("torch_dtype", None)))
    if beside and not options:
        load(model)
    elif options.get("weights_only", True) and with_dtype:
        with pytest.raises(ValueError, match=r"pytorch_model.bin: expected a .safetensors file"):
            load(model, **options)
    else:
        with pytest.raises((ValueError, OSError, pickle.UnpicklingError), match=r"pytorch_model.bin|weights_only"):
            load(model, **options)
    assert not sprung.exists()
    torch.load(model / "pytorch_model.bin", weights_only=False)
    assert sprung.exists()  # it would have been seen


def shards(directory, *parts, places=None):
    """Split model.safetensors into shards of the tensors whose names each function of `parts` picks."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    weight_map = {}
    for i, picks in enumerate(parts, 1):
        name = f"model-{i:05}-of-{len(parts):05}.safetensors"
        picked = {key: t + i if key == NORM else t for key, t in tensors.items() if picks(key)}
        save_file(picked, directory / name, {"format": "pt"})
        weight_map |= dict.fromkeys(picked, name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map | (places or {})}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def in_first(key):
    return "layers.0" in key


def in_second(key):
    return "layers.0" not in key


@pytest.mark.parametrize("offload", [False, True], ids=["memory", "disk"])
def test_shards_that_contradict(model, tmp_path, offload):
    whole = load(model)
    for case, parts, places, message in (
        ("whole", (in_first, in_second), {}, None),
        ("twice", (lambda key: in_first(key) or key == NORM, in_second), {}, f"{NORM} in .*00002.*00001.* has it too"),
        ("elsewhere", (in_first, in_second), {NORM: "model-00001-of-00002.safetensors"}, f"{NORM} in .*index.json"),
        ("nowhere", (in_first, in_second), {"x": "model-00001-of-00002.safetensors"}, "x in .*index.json"),
        ("no such file", (in_first, in_second), {NORM: "model-3.safetensors"}, "model-3.safetensors"),
    ):
        directory = shutil.copytree(model, tmp_path / case)
        shards(directory, *parts, places=places)
        if message is None:
            loaded = load(directory, offload)
            assert torch.equal(loaded.model.layers[0].mlp.up_proj.codes, whole.model.layers[0].mlp.up_proj.codes)
            continue
        with pytest.raises((ValueError, OSError), match=message):
            load(directory, offload)
        with pytest.raises(ValueError, match=message):
            read_directory(directory)


def test_an_index_that_lacks_a_tensor(model):
    shards(model, in_first, in_second)
    index = model / "model.safetensors.index.json"
    fields = json.loads(index.read_text())
    del fields["weight_map"][NORM]
    index.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=f"{NORM} in .*index.json: no file, expected model-00002"):
        load(model)


def test_files_of_other_models_beside_are_left_alone(model):
    (model / "consolidated.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    (model / "model.safetensors.index.json").write_text("{")
    assert {tensor.file.name for tensor in read_directory(model).values()} == {"model.safetensors"}
    load(model)


def test_a_file_cut_short(model):
    file = model / "model.safetensors"
    os.truncate(file, file.stat().st_size - 10)
    with pytest.raises((ValueError, SafetensorError), match=r"safetensors|[Ii]ncomplete"):
        load(model)


def test_a_header_with_one_name_twice(model):
    """JSON readers keep one of them: the bytes of the other are then unaccounted for."""
    file = model / "model.safetensors"
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    old, new = (f'"model.layers.{i}.mlp.up_proj.codes":'.encode() for i in (0, 1))
    assert content.count(old) == content.count(new) == 1
    file.write_bytes(content[:header].replace(old, new) + content[header:])
    with pytest.raises((ValueError, SafetensorError), match=re.compile("header|missing|metadata", re.IGNORECASE)):
        load(model)
