"""What a saved model keeps of the directory it came from; models of images and text."""

import json
import logging
import os

import pytest
import torch
import transformers
from loading import load
from safetensors.torch import load_file, save_file
from tiny import BYTES, LINEAR_ATTENTION, byte_tokenizer, random_model, random_tokens, tiny_llama

from aqlm_c.hf.models import auto_class, load_model
from aqlm_c.inspection import check_model, inspect_model
from aqlm_c.io.checkpoint import read_directory, save_quantized
from aqlm_c.io.source import KEPT, source_directory
from aqlm_c.quantize import quantize_model
from aqlm_c.recipe import AqlmConfig, RunConfig
from aqlm_c.run import run

QUICK = {"finetune_epochs": 0, "max_sweeps": 1, "ldl_passes": 1, "init_max_iter": 2}
SIZES = {
    "vocab_size": BYTES,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
BESIDE = {
    "preprocessor_config.json": '{"size": 32}',
    "processor_config.json": "{}",
    "chat_template.json": '{"chat_template": "x"}',
    "additional_chat_templates/rag.jinja": "y",
    "LICENSE": "own",
    "tokenizer.model": "pieces",
}
NOT_KEPT = {
    "modeling_own.py": "raise SystemExit",
    "pytorch_model.bin": "pickle",
    "hf_quant_config.json": "{}",
    "README.md": "theirs",
    "run.yaml": "theirs",
    "report.json": '{"note": "theirs"}',
    "notes.json": "{}",
}


def write_source(directory, model, files=BESIDE):
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    for name, text in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(text)
    return directory


def quantize(source, out):
    """As the command does."""
    data = out.parent / "data.txt"
    data.write_text("the quick brown fox jumps over the lazy dog " * 20)
    fields = {"model": str(source), "out": str(out), "data": [str(data)], "samples": 3, "sequence_length": 16}
    return run(RunConfig.from_fields({**fields, "scheme": "1x4g8", **QUICK}))


def quantized(model):
    quantize_model(model, random_tokens(3, 16), AqlmConfig.from_scheme("1x4g8", **QUICK))
    return model


@pytest.mark.parametrize("tokenizer", [None, byte_tokenizer], ids=["no tokenizer", "tokenizer"])
def test_files_beside_the_weights_are_kept(tmp_path, tokenizer):
    source = write_source(tmp_path / "source", tiny_llama(), {**BESIDE, **NOT_KEPT})
    (source / "vocab.json").write_text("{}")
    (source / "USE_POLICY.md").symlink_to("/etc/hostname")  # outside
    os.mkfifo(source / "video_preprocessor_config.json")
    model = quantized(load(source))
    (source / "adapter_config.json").write_text("{}")  # transformers would load it
    save_quantized(model, tokenizer and tokenizer(), tmp_path / "out")
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    own = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    found.discard("special_tokens_map.json")  # transformers 4 writes it
    assert found == own | set(BESIDE) | ({"vocab.json"} if tokenizer is None else set())
    for name, text in BESIDE.items():
        assert (tmp_path / "out" / name).read_text() == text
        assert (tmp_path / "out" / name).stat().st_mode == (tmp_path / "out" / "config.json").stat().st_mode
    again = load(tmp_path / "out")
    save_quantized(again, None, tmp_path / "again")
    assert {path.name for path in (tmp_path / "again").iterdir()} >= {name.partition("/")[0] for name in BESIDE}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "a.safetensors", "own.py", "x.pt"])
def test_names_that_are_never_kept(name):
    assert not KEPT.fullmatch(name)


def test_where_a_model_came_from(tmp_path):
    assert source_directory(tiny_llama()) is None
    source = write_source(tmp_path / "source", tiny_llama())
    model = load(source)
    assert source_directory(model) == source
    (source / "config.json").write_text('{"model_type": "other"}')
    assert source_directory(model) is None
    (source / "config.json").unlink()
    assert source_directory(model) is None
    model.config._name_or_path = "no/such-model"
    assert source_directory(model) is None


def test_a_source_in_the_cache_of_the_hub(tmp_path, monkeypatch):
    """There a snapshot's files are links to blobs."""
    revision = "0" * 40
    snapshot = tmp_path / "models--some--model" / "snapshots" / revision
    blobs = tmp_path / "models--some--model" / "blobs"
    blobs.mkdir(parents=True)
    write_source(snapshot, tiny_llama(), {})
    for name, text in BESIDE.items():
        if "/" not in name:
            (blobs / name).write_text(text)
            (snapshot / name).symlink_to(f"../../blobs/{name}")
    model = quantized(load(snapshot))
    model.config._name_or_path = "some/model"
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file, revision: str(snapshot / file))
    save_quantized(model, None, tmp_path / "out")
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == BESIDE["preprocessor_config.json"]


def next_model():
    if not hasattr(transformers, "Qwen3NextConfig"):
        pytest.skip("a transformers without Qwen3-Next")
    return random_model(transformers.Qwen3NextConfig(**SIZES, **LINEAR_ATTENTION))


UNREAD = {"mtp.fc.weight": torch.randn(32, 64), "mtp.layers.0.mlp.gate.weight": torch.randn(4, 32).bfloat16()}


@pytest.mark.parametrize("shards", [1, 3])
def test_tensors_that_the_class_does_not_read_are_kept(tmp_path, caplog, shards):
    model = next_model()
    source = tmp_path / "source"
    model.save_pretrained(source)
    byte_tokenizer().save_pretrained(source)
    tensors = load_file(source / "model.safetensors")
    save_file({**tensors, **UNREAD}, source / "model.safetensors", metadata={"format": "pt"})
    model = quantized(load(source))
    if shards > 1:
        plain, size = model.save_pretrained, max(p.nbytes for p in model.parameters()) + 1
        model.save_pretrained = lambda directory: plain(directory, max_shard_size=size)
    with caplog.at_level(logging.WARNING, "aqlm_c"):
        save_quantized(model, None, tmp_path / "out")
    assert "2 tensors of the original that the model's class does not read, such as mtp.fc.weight" in caplog.text
    found = read_directory(tmp_path / "out")
    files = {tensor.file.name for tensor in found.values()}
    assert len(files) > shards and files == {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert all(name.endswith(f"-of-{len(files):05}.safetensors") for name in files)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: tensor.file.name for name, tensor in found.items()}
    for name, tensor in UNREAD.items():
        assert torch.equal(load_file(found[name].file)[name], tensor)
    vars(model).pop("save_pretrained", None)
    loaded = load(tmp_path / "out")
    tokens = random_tokens(2, 8)
    with torch.no_grad():
        assert torch.equal(loaded(tokens, use_cache=False).logits, model(tokens, use_cache=False).logits)
    assert check_model(tmp_path / "out") == len(found)
    save_quantized(loaded, None, tmp_path / "again")  # and once more
    assert read_directory(tmp_path / "again").keys() == found.keys()


def test_the_report_names_what_is_not_read(tmp_path):
    model = next_model()
    source = write_source(tmp_path / "source", model, {})
    tensors = load_file(source / "model.safetensors")
    save_file({**tensors, **UNREAD}, source / "model.safetensors", metadata={"format": "pt"})
    report = quantize(source, tmp_path / "out")
    assert report.note.startswith("2 tensors of the original that the model's class does not read")
    assert report.note in (tmp_path / "out" / "README.md").read_text()
    assert report.sizes["quantized_bytes"] == inspect_model(tmp_path / "out").total_bytes


def test_what_a_module_computes_for_itself_is_not_kept(tmp_path):
    config = transformers.GPTNeoXConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"})
    source = write_source(tmp_path / "source", random_model(config), {})
    tensors = load_file(source / "model.safetensors")
    mask = {"gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 8, 8)}
    save_file({**tensors, **mask}, source / "model.safetensors", metadata={"format": "pt"})
    save_quantized(quantized(load(source)), None, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file() and not mask.keys() & read_directory(
        tmp_path / "out"
    ).keys()


def llava():
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=transformers.LlamaConfig(**SIZES), image_token_index=5
    )
    return transformers.LlavaForConditionalGeneration(config)


def gemma3():
    vision = transformers.SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16
    )
    tokens = {"mm_tokens_per_image": 4, "image_token_index": 5, "boi_token_index": 6, "eoi_token_index": 7}
    config = transformers.Gemma3Config(vision_config=vision.to_dict(), text_config={**SIZES, "head_dim": 8}, **tokens)
    return transformers.Gemma3ForConditionalGeneration(config)


@pytest.mark.parametrize("make", [llava, gemma3])
def test_models_of_images_and_text(tmp_path, make):
    torch.manual_seed(0)
    source = write_source(tmp_path / "source", make().eval())
    report = quantize(source, tmp_path / "out")
    assert len(report.layers) == 14 and all("vision" not in layer.name for layer in report.layers)
    assert set(BESIDE) <= {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*")}
    model, _, found = load_model(str(tmp_path / "out"))
    assert type(model).__name__ == type(make()).__name__ and found.quantized
    tokens = random_tokens(1, 8) + 8  # no image
    with torch.no_grad():
        assert torch.isfinite(model(tokens).logits).all()
    assert check_model(tmp_path / "out") == len(read_directory(tmp_path / "out"))
    if make is llava:
        assert auto_class(tmp_path / "out") is transformers.AutoModelForImageTextToText
        card = (tmp_path / "out" / "README.md").read_text()
        assert "AutoModelForImageTextToText.from_pretrained" in card and "pipeline_tag: image-text-to-text" in card


def test_from_the_hub_the_files_of_processors_come_too(monkeypatch):
    asked = []
    monkeypatch.setattr("aqlm_c.hf.models._hub_reachable", lambda: False)
    monkeypatch.setattr("aqlm_c.hf.models._from_pretrained", lambda *_, **__: (tiny_llama(), None))
    monkeypatch.setattr("aqlm_c.hf.models.PretrainedConfig.get_config_dict", lambda *_, **__: ({}, {}))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: asked.append((name, options)))
    load_model("some/model")
    ((name, options),) = asked
    assert name == "some/model" and options["local_files_only"] and "*_config.json" in options["allow_patterns"]
    assert not any(pattern.startswith("*.") for pattern in options["allow_patterns"])


def test_a_language_model_that_its_config_does_not_lead_to(tmp_path):
    """`AutoModelForCausalLM` knows the config of the whole Emu3, not that of its text part."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.emu3 import Emu3ForCausalLM, Emu3TextConfig

    if "emu3_text_model" not in CONFIG_MAPPING_NAMES:
        pytest.skip("transformers 4.56 cannot read the config of Emu3's text part")
    torch.manual_seed(0)
    source = write_source(tmp_path / "source", Emu3ForCausalLM(Emu3TextConfig(**SIZES, pad_token_id=0)).eval(), {})
    assert auto_class(source) is Emu3ForCausalLM
    quantize(source, tmp_path / "out")
    model, _, _ = load_model(str(tmp_path / "out"))
    assert type(model) is Emu3ForCausalLM and check_model(tmp_path / "out")
