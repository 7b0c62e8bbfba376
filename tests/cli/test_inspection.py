"""`aqlm-c inspect`: what it shows, and that --check names whatever is wrong."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import BYTES, byte_tokenizer, random_model, tiny_llama, write_published
from transformers import MixtralConfig

from aqlm_c import Format, RunConfig
from aqlm_c.cli.main import main
from aqlm_c.inspection import check_model, inspect_model
from aqlm_c.run import run as quantize_run

UP = "model.layers.0.mlp.up_proj"
NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture
def published(tmp_path):
    write_published(tmp_path / "model", (2, 4, 8, 1), keep=("model.layers.1.mlp.up_proj",))
    return tmp_path / "model"


@pytest.fixture
def inspect(capsys):
    """Runs `aqlm-c inspect`; gives (exit code, stdout, stderr)."""

    def inspect(*arguments):
        capsys.readouterr()  # the bars of what made the model
        code = main(["inspect", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return inspect


def test_what_a_quantized_model_holds(published):
    inspection = inspect_model(published)
    layers = {layer.name: layer for layer in inspection.layers}
    assert len(layers) == 14 and [matrix.name for matrix in inspection.embeddings] == ["model.embed_tokens"]
    up, dense = layers[UP], layers["model.layers.1.mlp.up_proj"]
    assert (up.out_features, up.in_features, up.scheme) == (64, 32, "2x4g8")
    assert up.bits_per_weight == Format.parse("2x4g8").bits_per_weight(64, 32)
    assert up.bytes == 64 * 4 * 2 + 2 * 2 * 16 * 8 + 2 * 64  # codes in a byte each, codebooks, scales
    assert (dense.scheme, dense.bits_per_weight, dense.bytes) == ("F32", 32, 4 * 64 * 32)
    sizes = inspection.sizes
    assert sizes["total"] == (published / "model.safetensors").stat().st_size == sum(sizes.values()) - sizes["total"]
    assert sizes["embeddings"] == 4 * 96 * 32 and sizes["dense layers"] == dense.bytes
    assert sizes["quantized layers"] == sum(layer.bytes for layer in inspection.layers) - dense.bytes
    mine = [layer for layer in inspection.layers if layer is not dense]
    bits = sum(layer.bits_per_weight * layer.out_features * layer.in_features for layer in mine)
    assert inspection.bits_per_weight == bits / sum(layer.out_features * layer.in_features for layer in mine)
    assert len(repr(inspection)) < 200 + len(str(published)) and "14 layers" in repr(inspection)
    assert "mlp.up_proj" in inspection._repr_html_()


def test_only_headers_are_read(published, inspect):
    assert "2x4g8: 13 of 14 layers, " in inspect(published)[1]
    file = published / "model.safetensors"
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    file.write_bytes(content[:header] + b"\xff" * (len(content) - header))
    assert len(inspect_model(published).layers) == 14
    with pytest.raises(ValueError, match="got NaN or Inf"):
        check_model(published)


def test_dense_models_shards_and_experts(tmp_path):
    tiny_llama(torch.bfloat16, tie_word_embeddings=False).save_pretrained(tmp_path / "dense", max_shard_size="8KB")
    inspection = inspect_model(tmp_path / "dense")
    assert (inspection.scheme, inspection.bits_per_weight, len(inspection.layers)) == (None, 16, 14)
    assert sorted(matrix.name for matrix in inspection.embeddings) == ["lm_head", "model.embed_tokens"]
    assert inspection.total_bytes == sum(file.stat().st_size for file in (tmp_path / "dense").glob("*.safetensors"))
    assert check_model(tmp_path / "dense") == 21
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    random_model(MixtralConfig(vocab_size=96, num_hidden_layers=1, num_local_experts=4, **sizes)).save_pretrained(
        tmp_path / "experts"
    )  # whose names on disk are not those in memory
    assert check_model(tmp_path / "experts") > 16


def test_the_command_shows_layers_sizes_and_origin(inspect, tmp_path):
    tiny_llama(torch.bfloat16, vocab_size=BYTES).save_pretrained(tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    options = {"scheme": "2x4g8", "preset": "fast", "samples": 3, "sequence_length": 16, "seed": 5}
    report = quantize_run(RunConfig(tmp_path / "dense", tmp_path / "out", **options))
    code, stdout, stderr = inspect(tmp_path / "out", "--check", "--json", tmp_path / "x.json")
    assert (code, stderr) == (0, "")
    text = " ".join(stdout.split())
    for words in (
        "2x4g8: 14 layers", "mlp.up_proj", "64x32", "embeddings 0.0 MB", "total 0.", f"from {tmp_path}/dense",
        "preset fast", "seed 5", "3 sequences of 16 tokens from pydoc_data.topics", "tensors checked",
        report.data["input_ids"][:12], f"torch {torch.__version__.partition('+')[0]}",
    ):  # fmt: skip
        assert words in text
    written = json.loads((tmp_path / "x.json").read_text())
    assert written["provenance"]["config"]["seed"] == 5 and written["provenance"]["data"] == report.data
    assert written["bits_per_weight"] == pytest.approx(report.bits_per_weight)
    assert written["checked"] == len(load_file(tmp_path / "out" / "model.safetensors"))

    for foreign in ('{"config": "x"}', '{"versions": [2], "config": {"seed": 1}}'):
        (tmp_path / "out" / "report.json").write_text(foreign)
        assert "not recorded" in inspect(tmp_path / "out")[1]
    (tmp_path / "out" / "report.json").unlink()
    assert inspect_model(tmp_path / "out").provenance["config"]["seed"] == 5  # from run.yaml
    (tmp_path / "out" / "run.yaml").unlink()
    assert "not recorded" in inspect(tmp_path / "out")[1]


def replace(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


def poison(name, value):
    def edit(tensors):
        tensors[name].view(-1)[1] = value

    return edit


WRONG_TENSORS = {
    "code": (poison(f"{UP}.codes", 8), [f"{UP}.codes in", "to 8", "expected -8 to 7"]),
    "codebook": (poison(f"{UP}.codebooks", float("nan")), [f"{UP}.codebooks in", "got NaN or Inf"]),
    "scale": (poison(f"{UP}.scales", float("inf")), [f"{UP}.scales in", "got NaN or Inf"]),
    "norm": (poison(NORM, float("nan")), [f"{NORM} in", "got NaN or Inf"]),
    "codes shape": (
        replace(f"{UP}.codes", torch.zeros(64, 4, 3, dtype=torch.int8)),
        [f"{UP}.codes in", "[64, 4, 3], expected I8 [64, 4, 2]"],
    ),
    "codes dtype": (
        replace(f"{UP}.codes", torch.zeros(64, 4, 2, dtype=torch.int16)),
        [f"{UP}.codes in", "I16", "expected I8"],
    ),
    "dense shape": (replace(NORM, torch.zeros(31)), [f"{NORM} in", "[31], expected [32]"]),
    "dense dtype": (replace(NORM, torch.zeros(32, dtype=torch.int32)), [f"{NORM} in", "I32, expected F16"]),
    "missing scales": (lambda tensors: tensors.pop(f"{UP}.scales"), [f"{UP}.scales: missing"]),
    "missing norm": (lambda tensors: tensors.pop(NORM), [f"{NORM}: missing"]),
    "unexpected": (replace("model.extra", torch.zeros(2)), ["model.extra in", "unexpected"]),
    "unexpected codes": (
        replace("model.extra.codes", torch.zeros(2, 2, 2, dtype=torch.int8)),
        ["model.extra.codes in", "unexpected"],
    ),
}


@pytest.mark.parametrize(("edit", "words"), WRONG_TENSORS.values(), ids=WRONG_TENSORS)
def test_check_names_the_tensor(published, inspect, edit, words):
    assert inspect(published, "--check")[0] == 0
    tensors = load_file(published / "model.safetensors")
    edit(tensors)
    save_file(tensors, published / "model.safetensors", metadata={"format": "pt"})
    code, stdout, stderr = inspect(published, "--check")
    assert (code, stdout, stderr.count("\n")) == (2, "", 1) and stderr.startswith("aqlm-c: ")
    for word in words:
        assert word in stderr


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("config.json", "{", "config.json: not JSON"),
        ("config.json", "[]", "config.json: got list, expected a JSON object"),
        ("config.json", '{"quantization_config": [1]}', "quantization_config: got [1], expected an object"),
        ("config.json", '{"quantization_config": {"quant_method": "aqlm"}}', "config.json: num_codebooks: got None"),
        ("model.safetensors", "x", "model.safetensors: expected a complete safetensors file"),
        ("report.json", "{", "report.json: not JSON"),
        ("run.yaml", "nosuch: 1", "run.yaml': unknown option 'nosuch'"),
    ],
    ids=str,
)
def test_damaged_files_are_named(published, inspect, file, text, words):
    (published / file).write_text(text)
    code, stdout, stderr = inspect(published)
    assert (code, stdout, stderr.count("\n")) == (2, "", 1)
    assert words in stderr


def test_what_is_no_model(published, inspect, tmp_path):
    assert "expected a directory with config.json" in inspect(tmp_path)[2]
    assert "expected a directory with config.json" in inspect(tmp_path / "nosuch")[2]
    (published / "model.safetensors").unlink()
    assert "no tensors in that directory" in inspect(published)[2]
    (published / "config.json").write_text('{"model_type": "nosuch"}')
    save_file({"x": torch.zeros(1)}, published / "model.safetensors")
    code, _, stderr = inspect(published, "--check")
    assert (code, stderr.count("\n")) == (2, 1) and "nosuch" in stderr
