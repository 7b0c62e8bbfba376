"""`aqlm-c finetune`, and tuning as a stage of `aqlm-c quantize`."""

import json

import pytest
import torch
import yaml
from tiny import BYTES, byte_tokenizer, tiny_llama

from aqlm_c import RunConfig, load_model, perplexity, token_stream
from aqlm_c.cli.main import main
from aqlm_c.io.data import BUNDLED

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = ["--sequence-length", "32"]
TUNE = ["--steps", "8", "--batch-size", "4", "--evaluation-interval", "4", "--samples", "40", *SIZES]
FAST = ["--scheme", "2x4g8", "--samples", "4", "--preset", "fast", *SIZES, "--quiet"]


@pytest.fixture(scope="module")
def models(tmp_path_factory, one_thread):
    folder = tmp_path_factory.mktemp("models")
    tiny_llama(torch.bfloat16, vocab_size=BYTES).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    assert main(["quantize", str(folder / "model"), str(folder / "quantized"), *FAST]) == 0
    return folder


def run(*arguments):
    return main(list(map(str, arguments)))


def test_what_is_written(models, tmp_path, capsys):
    given = [models / "quantized", models / "model", tmp_path / "out", *TUNE, "--set", "learning_rate=0.02"]
    assert (
        run(
            "finetune",
            *given,
            "--pv",
            "--pv-states",
            "8bit",
            "--work-dir",
            tmp_path / "work",
            "--json",
            tmp_path / "report.json",
        )
        == 0
    )
    shown = capsys.readouterr()
    assert "estimate: about" in shown.err and "step 8: training KL" in shown.err and "held-out KL" in shown.out
    report, before = (
        json.loads((folder / "report.json").read_text()) for folder in (tmp_path / "out", models / "quantized")
    )
    tuned = report.pop("finetune")
    assert json.loads((tmp_path / "report.json").read_text()) == tuned
    assert tuned["held_out_after"] < tuned["held_out_before"] and tuned["options"]["pv"] is True
    assert tuned["options"]["pv_states"] == "8bit" and "moments of 8 bits" in shown.err
    assert tuned["original"] == str(models / "model") and tuned["tokens"] == 8 * 4 * 32 and tuned["data"]["input_ids"]
    assert {**report, "sizes": None} == {**before, "sizes": None}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "whole model tuned on 1,024 tokens" in card and f"{tuned['held_out_after']:.5f}" in card
    assert (tmp_path / "out" / "run.yaml").read_bytes() == (models / "quantized" / "run.yaml").read_bytes()
    model, tokenizer, source = load_model(tmp_path / "out")
    assert source.quantized and perplexity(model, token_stream(BUNDLED, tokenizer, 320), 32)["perplexity"] < 1000
    assert run("finetune", *given, "--pv", "--work-dir", tmp_path / "work") == 2  # OUT exists
    assert "OUT: got" in capsys.readouterr().err


def test_text_of_the_originals_own(models, tmp_path):
    own = [
        models / "quantized",
        models / "model",
        tmp_path / "out",
        *TUNE[:6],
        *SIZES,
        "--data",
        "self:1000",
        "--quiet",
    ]
    assert run("finetune", *own) == 0
    tuned = json.loads((tmp_path / "out" / "report.json").read_text())["finetune"]
    assert tuned["sequences"] == 32 and tuned["data"]["sources"] == {"self:1000": None}
    assert run("finetune", *own, "--overwrite") == 0
    again = json.loads((tmp_path / "out" / "report.json").read_text())["finetune"]
    assert again["data"] == tuned["data"] and again["held_out_after"] == tuned["held_out_after"]


def test_a_stage_of_quantize(models, tmp_path):
    given = [
        "--tune",
        "steps=8",
        "--tune",
        "evaluation_interval=4",
        "--tune",
        "pv=true",
        "--work-dir",
        tmp_path / "work",
    ]
    assert run("quantize", models / "model", tmp_path / "out", *FAST, *given) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["finetune"]["held_out_after"] < report["finetune"]["held_out_before"] and report["phases"]["tune"] > 0
    options = {"steps": 8, "evaluation_interval": 4, "pv": True}
    assert yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())["tune"] == options
    assert RunConfig.from_file(tmp_path / "out" / "run.yaml").tune == options
    assert report["finetune"]["options"].items() >= options.items()
    assert run("quantize", "--config", tmp_path / "out" / "run.yaml", "--overwrite", "--quiet") == 0  # from its state
    again = json.loads((tmp_path / "out" / "report.json").read_text())
    assert again["finetune"]["held_out_after"] == report["finetune"]["held_out_after"]


@pytest.mark.parametrize(
    ("options", "words"),
    {
        ("--steps", "0"): "steps: got 0, expected an integer >= 1",
        ("--set", "steps"): "--set: got 'steps', expected name=value",
        ("--set", "step=3"): "unknown option 'step': did you mean 'steps'?",
        ("--set", "pv=maybe"): "pv: got 'maybe', expected true or false",
        ("--data", "self:many"): "data: got 'self:many', expected self:N",
        ("--data", "no.txt"): "data: got 'no.txt': no such file",
        ("--samples", "1"): "samples: got 1, expected an integer >= 2",
        ("--device", "tpu"): "device: got 'tpu', expected cpu, cuda, cuda:N or auto",
    }.items(),
)
def test_refusals(models, tmp_path, capsys, options, words):
    assert run("finetune", models / "quantized", models / "model", tmp_path / "out", *options) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_models_that_are_not_those(models, tmp_path, capsys):
    for quantized, words in (("model", "expected a model with AQLM layers"), ("none", "no such model directory")):
        assert run("finetune", models / quantized, models / "model", tmp_path / "out", *TUNE) == 2
        assert words in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"tune.*steps|steps: got 0"):
        RunConfig("m", "o", tune={"steps": 0})
