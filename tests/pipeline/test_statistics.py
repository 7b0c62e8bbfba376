"""H in a file: what is in it, that runs take it, and what is refused."""

import json

import numpy as np
import pytest
import torch
from command import main_in_time
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import BYTES, FAST, SCHEME, byte_tokenizer, random_model, random_tokens, tiny_llama
from transformers import MixtralConfig

import aqlm_c
from aqlm_c.calibrate.statistics import Statistics
from aqlm_c.io.checkpoint import quantized_linears
from aqlm_c.quantize import Progress, quantize_model
from aqlm_c.recipe import AqlmConfig, RunConfig
from aqlm_c.run import run

IDS = random_tokens(8, 32)
CONFIG = AqlmConfig.from_scheme(SCHEME, **FAST, embeddings="dense")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("statistics") / "h.safetensors"
    aqlm_c.collect_hessians(tiny_llama(), IDS, path)
    return path


def codes(model):
    return {name: layer.codes.clone() for name, layer in quantized_linears(model)}


def test_the_file_holds_the_mean_of_squares_of_each_input(file):
    model, seen = tiny_llama(), {}
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    for name, linear in linears.items():
        linear.register_forward_pre_hook(
            lambda _, args, name=name: seen.update({name: args[0].reshape(-1, 1).double()})
        )
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    found = Statistics(file)
    assert set(found.facts["layers"]) == set(linears) and (found.tokens, found.sequences) == (256, 8)
    hessians = found.hessians({name: linear.in_features for name, linear in linears.items()}, None)
    for name, linear in linears.items():
        x = seen[name].reshape(-1, linear.in_features)
        expected = (x.T @ x / len(x)).numpy()
        assert np.abs(hessians[name].H - expected).max() <= 1e-5 * np.abs(expected).max()
    assert hessians["model.layers.1.self_attn.q_proj"] is hessians["model.layers.1.self_attn.v_proj"]
    assert len(load_file(file)) == 9  # q, k, v and gate, up share theirs


def test_the_first_block_is_as_calibrated_and_nothing_runs(file):
    calibrated, stored = tiny_llama(), tiny_llama()
    quantize_model(calibrated, IDS, CONFIG)

    class Watching(Progress):
        def on_start(self, n_blocks, n_layers):  # the plan's short pass comes before it
            stored.model.layers[1].register_forward_pre_hook(lambda *_: pytest.fail("the model runs"))

    report = quantize_model(stored, None, CONFIG, statistics=file, progress=Watching())
    one, other = codes(calibrated), codes(stored)
    first = [name for name in one if ".0." in name]
    assert len(first) == 7 and all(torch.equal(one[name], other[name]) for name in first)
    assert not all(torch.equal(one[name], other[name]) for name in one if ".1." in name)
    assert (report.tokens, report.sequences, report.blocks) == (256, 8, [])
    assert report.layers[0].tokens == 256


def test_blocks_are_tuned_with_sequences_alone(file):
    config = CONFIG.replace(finetune_epochs=1)
    tuned, plain = tiny_llama(), tiny_llama()
    assert len(quantize_model(tuned, IDS, config, statistics=file).blocks) == 2
    assert quantize_model(plain, None, config, statistics=file).blocks == []
    assert all(torch.equal(a, b) for a, b in zip(codes(tuned).values(), codes(plain).values(), strict=True))
    books = [[layer.codebooks.detach() for _, layer in quantized_linears(model)] for model in (tuned, plain)]
    assert not all(torch.equal(a, b) for a, b in zip(*books, strict=True))


@pytest.mark.parametrize(
    ("given", "sequences", "options", "said"),
    [
        ({"seed": 1}, None, {}, "another one, whose weights differ"),
        ({"dtype": torch.bfloat16}, None, {}, "in bfloat16: it was in float32"),
        ({}, random_tokens(8, 32, seed=5), {"finetune_epochs": 1}, "it is of others, 8 x 32"),
        ({}, None, {"error_correction": 0.5}, "error_correction: got 0.5, expected none with statistics"),
        ({}, None, {"sequential": True}, "sequential"),
    ],
)
def test_what_does_not_belong_to_it_is_refused(file, given, sequences, options, said):
    with pytest.raises(ValueError, match=said):
        quantize_model(tiny_llama(**given), sequences, CONFIG.replace(**options), statistics=file)


def test_other_files_are_refused_by_name(file, tmp_path):
    other, text, newer = (tmp_path / name for name in ("other.safetensors", "text.safetensors", "newer.safetensors"))
    save_file({"a": torch.zeros(2)}, other)
    text.write_text("no tensors")
    with safe_open(file, "pt") as stored:
        facts = json.loads(stored.metadata()["aqlm_c"])
    save_file(load_file(file), newer, {"aqlm_c": json.dumps({**facts, "schema": 99})})
    for path, said in ((other, "says not"), (text, "text.safet"), (newer, "schema 99"), (tmp_path / "no", "no such")):
        with pytest.raises(ValueError, match=f"statistics: got .*{said}"):
            Statistics(path)


def test_a_file_of_some_layers_says_which_is_missing(tmp_path):
    aqlm_c.collect_hessians(tiny_llama(), IDS, tmp_path / "h", layers="mlp")
    report = quantize_model(tiny_llama(), None, CONFIG, layers="mlp", statistics=tmp_path / "h")
    assert len(report.layers) == 6
    with pytest.raises(ValueError, match=r"expected H of model.layers.0.self_attn.q_proj too"):
        quantize_model(tiny_llama(), None, CONFIG, statistics=tmp_path / "h")


def test_an_embedding_that_is_quantized_takes_the_output_layers(file):
    config = CONFIG.replace(embeddings=SCHEME)
    calibrated, stored = tiny_llama(), tiny_llama()
    quantize_model(calibrated, IDS, config)
    quantize_model(stored, None, config, statistics=file)
    name = "model.embed_tokens"
    assert torch.equal(codes(calibrated)[name], codes(stored)[name])


def test_experts_have_theirs(tmp_path):
    sizes = dict(vocab_size=96, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4)
    config = MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1)
    found = aqlm_c.collect_hessians(random_model(config), IDS, tmp_path / "h")
    experts = [name for name in found.facts["layers"] if "experts" in name]
    assert len(experts) == 6 and len({found.tensor_of(name) for name in experts}) == 4
    stored, calibrated = random_model(config), random_model(config)
    quantize_model(stored, None, CONFIG, statistics=tmp_path / "h")
    quantize_model(calibrated, IDS, CONFIG)
    assert all(torch.equal(a, b) for a, b in zip(codes(stored).values(), codes(calibrated).values(), strict=True))


def test_layers_that_do_not_change_are_taken_from_the_store(file, tmp_path, caplog):
    statistics, found = Statistics(file, tmp_path / "layers"), []
    for rules in (None, {"down_proj": "2x4g8"}, None):
        model = tiny_llama()
        report = quantize_model(model, None, CONFIG.replace(rules=rules), statistics=statistics)
        fresh = tiny_llama()
        assert [layer.to_dict() | {"seconds": 0} for layer in report.layers] == [
            layer.to_dict() | {"seconds": 0}
            for layer in quantize_model(fresh, None, CONFIG.replace(rules=rules), statistics=file).layers
        ]
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))
        found.append(len(list((tmp_path / "layers").iterdir())))
    assert found == [14, 16, 16]
    for other in ({"seed": 1}, {"ldl_passes": 2}):
        quantize_model(tiny_llama(), None, CONFIG.replace(**other), statistics=statistics)
    assert len(list((tmp_path / "layers").iterdir())) == 44
    for path in (tmp_path / "layers").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    assert len(quantize_model(tiny_llama(), None, CONFIG, statistics=statistics).layers) == 14
    assert caplog.text.count("damaged") == 14


def test_dense_weights_of_other_methods_are_taken_from_the_store(file, tmp_path):
    statistics = Statistics(file, tmp_path / "layers")
    config = AqlmConfig.from_scheme("2x4g4", method="gptq", group_size=0, embeddings="dense")
    models = [tiny_llama() for _ in range(3)]
    reports = [quantize_model(model, None, config, statistics=statistics) for model in models[:2]]
    quantize_model(models[2], None, config, statistics=file)
    assert len(list((tmp_path / "layers").iterdir())) == 14
    assert [layer.to_dict() for layer in reports[0].layers] == [layer.to_dict() for layer in reports[1].layers]
    for found in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_nothing_is_left_of_a_file_that_could_not_be_finished(tmp_path):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(3e38)  # the next block's inputs overflow
    with pytest.raises(ValueError, match=r"model.layers.1.* NaN or Inf in H"):
        aqlm_c.collect_hessians(model, IDS, tmp_path / "h")
    assert not list(tmp_path.iterdir())


def test_the_command_line_goes_from_model_to_file_to_model(tmp_path, capsys):
    tiny_llama(torch.bfloat16, vocab_size=BYTES).save_pretrained(tmp_path / "m")
    byte_tokenizer().save_pretrained(tmp_path / "m")
    drawn = ["--sequence-length", 32, "--samples", 4]
    assert main_in_time("hessians", tmp_path / "m", tmp_path / "h.safetensors", *drawn) == 0
    assert "H of 15 linears, 9 tensors" in capsys.readouterr().out
    assert main_in_time("hessians", tmp_path / "m", tmp_path / "h.safetensors", *drawn) == 2
    assert "--overwrite" in capsys.readouterr().err
    options = ["--scheme", "2x4g8", "--preset", "fast", "--overwrite", "--quiet"]
    base = ["quantize", tmp_path / "m", tmp_path / "q", *options, "--statistics", tmp_path / "h.safetensors"]
    assert main_in_time(*base) == 0
    report = json.loads((tmp_path / "q" / "report.json").read_text())
    assert report["blocks"] == [] and report["tokens"] == 128 and report["data"]["input_ids"]
    replayed = RunConfig.from_file(tmp_path / "q" / "run.yaml", out=str(tmp_path / "r"))
    assert replayed.statistics == str(tmp_path / "h.safetensors") and replayed.finetune_epochs == 0
    run(replayed)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in "qr")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    bundled = ["--data", "pydoc_data.topics"]
    assert main_in_time(*base, *bundled, *drawn, "--finetune-epochs", 1) == 0
    assert len(json.loads((tmp_path / "q" / "report.json").read_text())["blocks"]) == 2
    assert main_in_time(*base, *bundled, *drawn[:3], 5) == 2
    assert "expected H of these calibration tokens" in capsys.readouterr().err
