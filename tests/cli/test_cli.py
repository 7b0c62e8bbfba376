"""The command line on a tiny random Llama: the three commands, what they print, and wrong input."""

import hashlib
import json
import logging
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import BYTES, byte_tokenizer, tiny_llama
from transformers import PreTrainedTokenizerFast

from aqlm_c import PRESETS, LayerReport, __version__, demo
from aqlm_c import evaluate as evaluation
from aqlm_c.cli.display import Display
from aqlm_c.cli.main import main
from aqlm_c.hf.models import load_model
from aqlm_c.report.layers import BlockReport

CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<answer>"
SMALL = ["--scheme", "2x4g8", "--samples", "4", "--sequence-length", "32", "--embeddings", "dense"]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer(chat_template=CHAT)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama(torch.bfloat16, hidden_size=40, vocab_size=BYTES).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def quantized_dir(tmp_path_factory, model_dir):
    path = tmp_path_factory.mktemp("quantized") / "tiny"
    assert main(["quantize", str(model_dir), str(path), *SMALL, "--quiet"]) == 0
    return path


@pytest.fixture
def run(capsys):
    """Runs the command line in this process; gives (exit code, stdout, stderr)."""

    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def edited(source, target, edit):
    """A copy of a model directory whose tensors `edit` has changed."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(target / "model.safetensors")
    edit(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_quantize_reports_layers_sizes_and_json(run, model_dir, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("All happy families are alike. " * 50)
    monkeypatch.setattr("aqlm_c.run.peak_memory", lambda: 123)
    out, report = tmp_path / "deep" / "out", tmp_path / "report.json"
    code, stdout, stderr = run(
        "quantize", model_dir, out, *SMALL, "--data", text, "--data", "pydoc_data.topics", "--threads", 1,
        "--beam-size", 2, "--tolerance", 0.05, "--seed", 7, "--json", report,
    )  # fmt: skip
    assert code == 0
    assert "\x1b" not in stdout + stderr  # no terminal: no bars and no colours
    assert "model.layers.1.mlp.down_proj: error 0." in stderr
    assert "model.layers.1 (2 of 2)" in stderr
    for word in ("14 layers", "self_attn.q_proj", "dB code", "original", "quantized", "embeddings", "seconds"):
        assert word in stdout

    written = json.loads(report.read_text())
    assert len(written["layers"]) == 14
    assert all(0 < layer["relative_error"] < 1 for layer in written["layers"])
    assert all(layer["bits_per_weight"] > 1 for layer in written["layers"])
    assert {"load", "calibrate", "hessian", "quantize", "propagate", "save"} <= set(written["phases"])
    assert written["config"] | {"seed": 7, "beam_size": 2, "relative_mse_tolerance": 0.05} == written["config"]
    assert written["tokens"] == 128
    assert written["threads"] == 1
    assert written["peak_memory_bytes"] == 123  # taken again after saving
    assert written["data"]["sources"][str(text)] == hashlib.sha256(text.read_bytes()).hexdigest()
    assert written["sizes"]["quantized_bytes"] == (out / "model.safetensors").stat().st_size
    assert written["sizes"]["original_bytes"] == (model_dir / "model.safetensors").stat().st_size
    assert written["sizes"]["original_embedding_bytes"] == BYTES * 40 * 2


def test_same_command_same_bytes(run, model_dir, quantized_dir, tmp_path):
    assert run("quantize", model_dir, tmp_path / "out", *SMALL, "--quiet") == (0, "", "")
    again, first = (load_file(path / "model.safetensors") for path in (tmp_path / "out", quantized_dir))
    assert again.keys() == first.keys()
    assert all(torch.equal(again[name], first[name]) for name in first)
    assert run("quantize", model_dir, tmp_path / "other", *SMALL, "--quiet", "--shuffle")[0] == 0
    other = load_file(tmp_path / "other" / "model.safetensors")
    assert any(not torch.equal(other[name], first[name]) for name in first)


def test_layers_selects(run, model_dir, tmp_path):
    code, stdout, _ = run("quantize", model_dir, tmp_path / "out", *SMALL, "--layers", r"\.0\.mlp")
    assert code == 0
    assert "3 layers" in stdout
    assert not re.search(r"^[\w.]*q_proj", stdout, re.MULTILINE)  # no row of a table
    assert "left out by layers" in " ".join(stdout.split())


def test_overwrite_replaces(run, model_dir, tmp_path):
    out = tmp_path / "out"
    assert run("quantize", model_dir, out, *SMALL, "--quiet")[0] == 0
    assert run("quantize", model_dir, out, *SMALL, "--quiet", "--overwrite", "--scheme", "1x4g8")[0] == 0
    assert json.loads((out / "config.json").read_text())["quantization_config"]["num_codebooks"] == 1
    assert list(tmp_path.iterdir()) == [out]


def test_evaluate(run, quantized_dir, tmp_path):
    ids = tmp_path / "ids.npy"
    np.save(ids, np.arange(500) % 256)
    arguments = ("evaluate", quantized_dir, "--data", ids, "--sequence-length", 64)
    report = tmp_path / "result.json"
    code, stdout, _ = run(*arguments, "--data", "pydoc_data.topics", "--windows", 3, "--json", report)
    assert code == 0
    results = json.loads(report.read_text())["results"]
    assert [result["data"] for result in results] == [str(ids), "pydoc_data.topics"]
    assert [result["windows"] for result in results] == [3, 3]
    lines = stdout.splitlines()
    assert f"{ids}: perplexity {results[0]['perplexity']:.4f} (3 x 64 tokens" in lines[0]
    assert len(lines) == 2

    code, stdout, stderr = run(*arguments, "--windows", 3, "--quiet")
    assert (code, float(stdout), stderr) == (0, results[0]["perplexity"], "")


def test_generate_streams_and_repeats(run, quantized_dir, tokenizer, monkeypatch):
    prompts = []
    encode = PreTrainedTokenizerFast.__call__
    monkeypatch.setattr(
        PreTrainedTokenizerFast, "__call__", lambda self, text, **kw: prompts.append(text) or encode(self, text, **kw)
    )
    arguments = ("generate", quantized_dir, "hello", "--max-new-tokens", 12)
    code, greedy, _ = run(*arguments)
    assert (code, prompts) == (0, ["<user>hello<answer>"])
    assert run(*arguments, "--chat")[1] == greedy
    assert run(*arguments, "--raw")[0] == 0
    assert prompts[-1] == "hello"

    sampled = [run(*arguments, "--temperature", 2, "--top-p", 0.9, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1]
    assert len({greedy, *sampled}) == 3


def test_evaluate_records_figures_where_the_model_came_with_a_report(run, model_dir, quantized_dir, tmp_path):
    out, ids = tmp_path / "out", tmp_path / "ids.npy"
    shutil.copytree(quantized_dir, out)
    np.save(ids, np.arange(128) % 256)
    code, stdout, _ = run("evaluate", out, "--data", ids, "--sequence-length", 64, "--record", "--quiet")
    assert code == 0
    name, figure = "ids.npy, 2 windows of 64 tokens", float(stdout)
    assert json.loads((out / "report.json").read_text())["perplexity"] == {name: figure}
    assert f"| {name} | - | {figure:.3f} |" in (out / "README.md").read_text()
    line = f"aqlm-c: --record: got {str(model_dir)!r}, expected a directory with the report.json of aqlm-c quantize\n"
    assert run("evaluate", model_dir, "--record") == (2, "", line)


def test_device(run, quantized_dir, tmp_path, monkeypatch):
    ids, report = tmp_path / "ids.npy", tmp_path / "result.json"
    np.save(ids, np.arange(128) % 256)
    arguments = ("evaluate", quantized_dir, "--data", ids, "--sequence-length", 64, "--quiet", "--json", report)
    assert run(*arguments, "--device", "cpu") == run(*arguments)
    assert json.loads(report.read_text())["device"] == "cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert run(*arguments, "--device", "auto") == run(*arguments)
    monkeypatch.setattr("aqlm_c.hf.models.load_model", lambda *_: pytest.fail("the model was loaded"))
    generate = ("generate", quantized_dir, "hello")
    for command in (arguments, generate):
        for name, expected in (
            ("cuda", "--device: got 'cuda', expected cpu or auto, since no CUDA device is visible"),
            ("cuda:x", "--device: got 'cuda:x', expected cpu, cuda, cuda:N or auto"),
            ("gpu", "--device: got 'gpu', expected cpu, cuda, cuda:N or auto"),
        ):
            assert run(*command, "--device", name)[::2] == (2, f"aqlm-c: {expected}\n")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert "--device: got 'cuda:2', expected one of cuda:0 to cuda:1" in run(*generate, "--device", "cuda:2")[2]


def test_a_quantized_model_on_a_gpu_needs_our_kernels(quantized_dir, monkeypatch):
    from aqlm_c.core import extensions

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(extensions, "has_cuda", False)
    with pytest.raises(ValueError, match="device: got 'cuda', expected cpu: aqlm_c was built without its kernels"):
        load_model(quantized_dir, device="cuda")
    assert load_model(quantized_dir, device="auto")[0].device.type == "cpu"


# Each wrong input: the options after MODEL and OUT, and words of the one line it gives.
WRONG_OPTIONS = {
    "unknown scheme": (["--scheme", "2x"], ["scheme: got '2x'", "'2x8g8'"]),
    "group size": (["--scheme", "2x4g16"], ["in_group_size: got 16", "in_features=40", "layers.0"]),
    "group size unknown": (["--scheme", "2x4g5"], ["in_group_size: got 5"]),
    "too little text": (["--samples", "99999"], ["pydoc_data.topics", "99999", "tokens"]),
    "samples": (["--samples", "0"], ["samples: got 0", "expected"]),
    "samples text": (["--samples", "few"], ["--samples", "integer"]),
    "sequence length": (["--sequence-length", "1"], ["sequence_length: got 1", "expected"]),
    "seed": (["--seed", "-1"], ["seed: got -1", "expected"]),
    "threads": (["--threads", "0"], ["--threads: got 0", "expected"]),
    "too many threads": (["--threads", "5000"], ["--threads: got 5000", "1..1024"]),
    "groups of outputs": (["--scheme", "2x4g8o2"], ["out_group_size: got 2", "'2x4g8o2'", "expected 1"]),
    "tolerance": (["--tolerance", "2"], ["relative_mse_tolerance: got 2", "expected"]),
    "beam size": (["--beam-size", "-3"], ["beam_size: got -3", "expected"]),
    "no such data": (["--data", "nosuch.txt"], ["data: got 'nosuch.txt'", "no such file"]),
    "no such data set": (["--data", "nosuch"], ["data: got 'nosuch'", "no data set"]),
    "layers match nothing": (["--layers", "nosuch"], ["layers: got 'nosuch'", "expected"]),
    "layers not a regex": (["--layers", "("], ["layers: got '('", "regular expression"]),
    "json folder": (["--json", "no/such/folder.json"], ["--json: got 'no/such/folder.json'", "expected"]),
    "unknown option": (["--nosuch"], ["--nosuch"]),
    "preset": (["--preset", "slow"], ["preset: got 'slow'", "expected one of fast, balanced, best"]),
    "solver": (["--solver", "magic"], ["solver: got 'magic'", "expected one of"]),
    "memory limit": (["--memory-limit", "8 elephants"], ["memory_limit: got '8 elephants'", "bytes"]),
    "epochs": (["--finetune-epochs", "-1"], ["finetune_epochs: got -1", "expected"]),
    "learning rate": (["--finetune-learning-rate", "2"], ["finetune_learning_rate: got 2", "expected"]),
    "set what": (["--set", "cg_step=3"], ["unknown option 'cg_step'", "did you mean 'cg_steps'?"]),
    "set nothing": (["--set", "cg_steps"], ["--set: got 'cg_steps'", "expected name=value"]),
    "set wrong": (["--set", "cg_steps=x"], ["cg_steps: got 'x'", "expected an integer"]),
    "rule": (["--rule", "up_proj"], ["--rule: got 'up_proj'", "expected regex=scheme"]),
    "rule twice": (["--rule", "up=2x4g8", "--rule", "up=3x4g8"], ["rules: got 'up' twice"]),
    "rule in vain": (["--rule", "norm=2x4g8"], ["rules: 'norm': matches no layer"]),
    "config": (["--config", "nosuch.yaml"], ["config: got 'nosuch.yaml'", "no such file"]),
}


@pytest.mark.parametrize("quiet", [True, False], ids=["quiet", "loud"])
@pytest.mark.parametrize(("options", "words"), WRONG_OPTIONS.values(), ids=WRONG_OPTIONS)
def test_wrong_option_is_one_line(run, model_dir, tmp_path, options, words, quiet):
    result = run("quantize", model_dir, tmp_path / "out", *SMALL, *["--quiet"] * quiet, *options)
    assert_refused(result, words, progress=not quiet)
    assert list(tmp_path.iterdir()) == []


def assert_refused(result, words, progress=False):
    """One line that says what is wrong, the last one if lines of progress may come before it."""
    code, stdout, stderr = result
    assert (code, stdout) == (2, "")
    *before, line = stderr.splitlines()
    assert stderr.endswith("\n") and (progress or not before), stderr
    assert line.startswith("aqlm-c: ") and "aqlm-c: " not in "".join(before)
    for word in words:
        assert word in line


@pytest.mark.parametrize("option", [("--scheme", "2x4g8o2"), ("--threads", "5000"), ("--data", "a.txt")], ids=" ".join)
def test_what_needs_no_model_is_checked_before_it_is_loaded(run, tmp_path, monkeypatch, option):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").mkdir()
    monkeypatch.setattr("aqlm_c.hf.models.load_model", lambda *_: pytest.fail("the model was loaded"))
    assert_refused(run("quantize", "smollm2", "out", *option), [option[1]], progress=True)


def set_value(name, value):
    def edit(tensors):
        tensors[name].view(-1)[3] = value

    return edit


NORM = "model.layers.0.input_layernorm.weight"


@pytest.mark.parametrize(
    ("tensor", "value", "words"),
    [
        ("model.layers.1.mlp.up_proj.weight", float("nan"), ["model.layers.1.mlp.up_proj.weight: got NaN or Inf"]),
        (NORM, float("inf"), [f"{NORM}: got NaN or Inf"]),
        (NORM, 1e38, ["model.layers.0.self_attn.q_proj: got NaN or Inf", "activations"]),
    ],
    ids=["weight", "norm", "activation"],
)
def test_nan_and_inf_are_refused(run, model_dir, tmp_path, tensor, value, words):
    model = edited(model_dir, tmp_path / "model", set_value(tensor, value))
    assert_refused(run("quantize", model, tmp_path / "out", *SMALL, "--quiet"), words)
    assert list(tmp_path.iterdir()) == [model]


def test_existing_out_is_refused(run, model_dir, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("keep me")
    for options in ([], ["--overwrite"]):  # not a model: not even then
        result = run("quantize", model_dir, tmp_path / "out", *SMALL, "--quiet", *options)
        assert_refused(result, ["OUT: got", str(tmp_path / "out"), "expected"])
    assert (tmp_path / "out" / "precious").read_text() == "keep me"
    result = run("quantize", model_dir, tmp_path / "out" / "precious" / "out", *SMALL, "--quiet")
    assert_refused(result, ["OUT: got", str(tmp_path / "out" / "precious"), "directory"])


@pytest.mark.parametrize("name", ["nosuch", "./nosuch", "no/such.gguf", "owner/nosuch"])
@pytest.mark.parametrize("command", ["quantize", "evaluate", "generate"])
def test_no_such_model(run, tmp_path, command, name):
    last = {"quantize": [tmp_path / "out"], "evaluate": ["--quiet"], "generate": ["hello"]}[command]
    code, stdout, stderr = run(command, name, *last)
    assert (code, stdout) == (2, "")
    assert f"model: got '{name}'" in stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["truncated", "corrupt", "codes"])
def test_damaged_checkpoint(run, quantized_dir, tmp_path, damage):
    words = ["model.safetensors"]
    if damage == "codes":
        name = "model.layers.0.mlp.up_proj.codes"
        model = edited(quantized_dir, tmp_path / "model", set_value(name, 8))
        words = [name, "to 8", "expected -8 to 7"]
    else:
        model = edited(quantized_dir, tmp_path / "model", lambda tensors: None)
        file = model / "model.safetensors"
        content = file.read_bytes()
        file.write_bytes(content[:-100] if damage == "truncated" else b"\xff" * 64 + content[64:])
    assert_refused(run("evaluate", model, "--sequence-length", 32, "--windows", 1, "--quiet"), words)


def test_evaluate_and_generate_refuse(run, quantized_dir, model_dir, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("short")
    evaluate, generate = ("evaluate", quantized_dir, "--quiet"), ("generate", quantized_dir, "hello")
    assert_refused(run(*evaluate, "--data", text, "--sequence-length", 64), [f"data: got '{text}'", "5 tokens", "64"])
    assert_refused(run(*evaluate, "--windows", 0), ["--windows: got 0", "expected"])
    assert_refused(run(*evaluate, "--sequence-length", 1), ["--sequence-length: got 1", "expected"])
    assert_refused(run(*generate, "--top-p", 0), ["--top-p: got 0", "expected"])
    for temperature in ("-1", "nan", "inf", "1e-06"):
        assert_refused(run(*generate, "--temperature", temperature), [f"--temperature: got {temperature}", "expected"])
    for seed in (-1, 2**63):
        assert_refused(run(*generate, "--seed", seed), [f"--seed: got {seed}", "expected"])
    assert_refused(run(*generate, "--max-new-tokens", 0), ["--max-new-tokens: got 0", "expected"])

    plain = edited(model_dir, tmp_path / "plain", lambda tensors: None)
    for file in plain.glob("chat_template*"):
        file.unlink()
    code, _, stderr = run("generate", plain, "hello", "--chat")
    assert code == 2
    assert "--chat" in stderr.splitlines()[-1]
    assert "--raw" in stderr.splitlines()[-1]


def test_missing_arguments_and_unknown_commands(run):
    assert_refused(run("quantize", "smollm2"), ["OUT"])
    assert_refused(run("nosuch"), ["nosuch"])


def test_interrupt_leaves_nothing(run, model_dir, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Display, "on_layer", interrupt)
    code, stdout, stderr = run("quantize", model_dir, tmp_path / "out", *SMALL)
    assert (code, stdout) == (130, "") and stderr.endswith(
        "aqlm-c: stopped: nothing is kept; with --work-dir FOLDER finished blocks would be\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_options_come_from_command_line_file_preset_and_set(run, model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("All happy families are alike. " * 50)
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model: {model_dir}\nout: {tmp_path / 'out'}\nscheme: 2x4g8\nsamples: 4\nsequence_length: 16\nseed: 3\n"
        "data: [text.txt, pydoc_data.topics]\n"
    )
    options = ["--preset", "fast", "--seed", 4, "--set", "cg_steps=2", "--set", "relative_damp=1e-2", "--max-sweeps", 1]
    assert_refused(run("quantize", "--config", file, *options), ["--max-sweeps"])
    options[-2:] = ["--shuffle", "--solver", "ldl", "--quiet"]
    assert run("quantize", "--config", file, *options) == (0, "", "")
    used = json.loads((tmp_path / "out" / "report.json").read_text())["config"]
    assert used["data"] == ["text.txt", "pydoc_data.topics"]
    expected = {"preset": "fast", "seed": 4, "cg_steps": 2, "relative_damp": 0.01, "shuffle": True, "samples": 4}
    assert {**used, **expected, **PRESETS["fast"]} == used

    again = run("quantize", "--config", tmp_path / "out" / "run.yaml", model_dir, tmp_path / "again", "--quiet")
    assert again == (0, "", "")
    files = [tmp_path / name / "model.safetensors" for name in ("out", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_help_says_what_presets_set(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    stdout = " ".join(run("quantize", "--help")[1].split())
    for name, options in PRESETS.items():
        fields = (f"{option}={value}" for option, value in options.items() if option != "tune")
        assert f"{name}: {', '.join(fields)}" in stdout
    assert "then --tune pv=True." in stdout


class Estimate:
    def describe(self):
        return "about 3 min, 1.5 GiB of memory, 0.1 GiB on disk"


def show_all(display):
    """Everything that a run may tell."""
    block = BlockReport("model.layers.0", 0.01, 0.004, 0.012, 0.006, epochs=3, seconds=1.5)
    layer = LayerReport("model.layers.0.mlp.up_proj", 8, 8, "2x8g8", 0.02, 2.1)
    display.on_estimate(Estimate())
    display.on_start(2, 1)
    display.on_resume(1)
    display.on_block(0, "model.layers.0")
    display.on_phase("quantize")
    display.on_layer(layer)
    display.on_block_report(block)
    display.on_block_report(BlockReport("model.layers.1", 0.01, 0.004, epochs=2))
    logging.getLogger("aqlm_c").warning("[mind] this")
    logging.getLogger("aqlm_c").info("a detail")
    display.on_finish(None)


def test_display_without_a_terminal(capsys):
    with Display() as display:
        show_all(display)
    assert capsys.readouterr() == (
        "",
        "estimate: about 3 min, 1.5 GiB of memory, 0.1 GiB on disk\n"
        "finished blocks found: 1, going on from there\n"
        "model.layers.0 (1 of 2), 0 s\n"
        "  model.layers.0.mlp.up_proj: error 0.02000, 2.100 bits, 0.0 s\n"
        "  model.layers.0: held-out output error 0.01200 -> 0.00600, 3 epochs, 1.5 s\n"
        "  model.layers.1: training output error 0.01000 -> 0.00400, 2 epochs, 0.0 s\n"
        "warning: [mind] this\n",
    )


def test_display_quiet_and_verbose(capsys):
    level = logging.getLogger("aqlm_c").level
    with Display(quiet=True, verbose=True) as display:
        show_all(display)
    assert capsys.readouterr() == ("", "warning: [mind] this\ninfo: a detail\n")
    with Display(quiet=True) as display:
        show_all(display)
    assert capsys.readouterr().err == "warning: [mind] this\n"
    logging.getLogger("aqlm_c").warning("closed")
    assert capsys.readouterr() == ("", "") and logging.getLogger("aqlm_c").level == level


def test_display_in_a_notebook(capsys, monkeypatch):
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Display() as display:
        show_all(display)
    stdout, stderr = capsys.readouterr()
    assert stdout == "" and "\x1b" not in stderr
    assert len(stderr.splitlines()) == 6 and "up_proj" not in stderr  # no line for each layer


def test_verbose_shows_the_log(run, quantized_dir, monkeypatch):
    evaluate = evaluation.perplexity
    monkeypatch.setattr(evaluation, "perplexity", lambda *a: logging.getLogger("aqlm_c").debug("seen") or evaluate(*a))
    arguments = ("evaluate", quantized_dir, "--sequence-length", 32, "--windows", 1, "--quiet")
    assert "debug: seen\n" in run(*arguments, "--verbose")[2]
    assert run(*arguments)[2] == ""


# ---- Ctrl-C and full disks, in a process of its own ------------------------------------------------------------------

CLI = "import sys; from aqlm_c.__main__ import main; sys.exit(main())"
STUCK = """import hashlib, sys, aqlm_c.hf.models
def stuck(*_):
    print("stuck", file=sys.stderr, flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # as a long call of LAPACK: no Python runs in the main thread
aqlm_c.hf.models.load_model = stuck
"""


def interrupted(arguments, sign, code=CLI):
    """Starts the command line, sends SIGINT once stderr shows `sign`; gives (exit code, seconds, last line, all).

    Of a process that waits for a core on a busy machine, the seconds it ran count.
    """
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", code, *map(str, arguments)],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # the test may run in the background
    )
    seen = ""
    while sign not in seen and (read := process.stderr.readline()):
        seen += read
    assert sign in seen, seen
    started, ran = time.monotonic(), cpu_seconds(process.pid)
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=30)[1]
    seconds = time.monotonic() - started
    if ran is not None:
        now = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = min(seconds, now.ru_utime + now.ru_stime - ended.ru_utime - ended.ru_stime - ran)
    return process.returncode, seconds, (seen + rest).splitlines()[-1], seen + rest


def cpu_seconds(pid):
    """That a process ran so far; None where the system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


LONG = ["--scheme", "4x12g8", "--samples", 64, "--sequence-length", 128, "--preset", "best", "--embeddings", "dense"]


@pytest.mark.parametrize("sign", ["load ...", "model.layers.0 (1 of 2)", "q_proj: error"])
def test_ctrl_c_stops_within_two_seconds(model_dir, tmp_path, sign):
    code, seconds, last, stderr = interrupted(["quantize", model_dir, tmp_path / "out", *LONG], sign)
    assert (code, "Traceback" in stderr) == (130, False), stderr
    assert seconds < 2
    assert last == "aqlm-c: stopped: nothing is kept; with --work-dir FOLDER finished blocks would be"
    assert list(tmp_path.iterdir()) == []


def test_the_same_command_goes_on_after_ctrl_c(run, model_dir, tmp_path):
    command = ["quantize", model_dir, tmp_path / "out", *LONG, "--work-dir", tmp_path / "work"]
    command += ["--finetune-epochs", 1, "--finetune-search", 0]
    code, seconds, last, stderr = interrupted(command, "model.layers.1 (2 of 2)")
    assert (code, "Traceback" in stderr) == (130, False), stderr
    assert seconds < 2 and last.startswith("aqlm-c: stopped: finished blocks are kept in ")
    assert not (tmp_path / "out").exists()
    code, _, stderr = run(*command)
    assert code == 0 and "finished blocks found: 1, going on from there" in stderr
    assert (tmp_path / "out" / "run.yaml").is_file()


def test_ctrl_c_stops_a_call_that_does_not_answer(model_dir, tmp_path):
    arguments = ["quantize", model_dir, tmp_path / "out", "--work-dir", tmp_path / "work"]
    code, seconds, last, stderr = interrupted(arguments, "stuck", STUCK + CLI)
    assert (code, "Traceback" in stderr) == (130, False), stderr
    assert seconds < 2
    kept = f"finished blocks are kept in {tmp_path / 'work'}, the same command goes on from there"
    assert last == f"aqlm-c: stopped: {kept}"


@pytest.mark.parametrize("failing", ["model.safetensors", "report.json"])
def test_a_full_disk_is_one_line(model_dir, tmp_path, failing):
    limit = {"model.safetensors": 20_000, "report.json": None}[failing]
    command = [sys.executable, "-c", CLI, "quantize", model_dir, tmp_path / "out", *SMALL, "--quiet"]
    if limit is None:
        command[2] = (
            "import errno, pathlib; write = pathlib.Path.write_text\n"
            "def full(self, *a, **k):\n"
            "    if self.name == 'report.json': raise OSError(errno.ENOSPC, 'No space left on device', str(self))\n"
            "    return write(self, *a, **k)\n"
            "pathlib.Path.write_text = full\n" + CLI
        )
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        preexec_fn=lambda: limit and resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert done.stderr.startswith("aqlm-c: ")
    assert ("OUT: got" in done.stderr and "File too large" in done.stderr) if limit else "No space left" in done.stderr
    left = list(tmp_path.iterdir())
    if limit:
        assert left == []
    else:  # the model was written
        assert [path.name for path in left] == ["out.finished-1"] and str(left[0]) in done.stderr


def test_bars_in_a_terminal(run, model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    code, _, stderr = run("quantize", model_dir, tmp_path / "out", *SMALL)
    assert code == 0
    assert "\x1b[" in stderr
    for words in ("blocks", "1/2", "model.layers.1", "left", "down_proj: error"):
        assert words in stderr


def test_help_version_and_module(run, capsys):
    code, stdout, _ = run()
    assert code == 0
    assert all(command in stdout for command in ("quantize", "evaluate", "generate", "inspect", "doctor", "smollm2"))
    assert run("--version") == (0, f"aqlm-c {__version__}\n", "")
    done = subprocess.run([sys.executable, "-m", "aqlm_c", "quantize", "x", "y", "--scheme", "z"], capture_output=True)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"aqlm-c: scheme: got 'z'")


def test_missing_package_names_the_cure():
    code = "import sys; sys.modules['typer'] = None; import aqlm_c.cli"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "aqlm-c: typer: got none that is installed here, expected one: pip install 'aqlm-c[hf]'\n"


def test_demo_compares_and_can_fail(model_dir, tmp_path, capsys, monkeypatch):
    arguments = ["--model", str(model_dir), "--out", str(tmp_path / "out"), "--scheme", "2x4g8"]
    arguments += ["--samples", "2", "--sequence-length", "32", "--windows", "2"]
    calls = []
    monkeypatch.setattr(socket.socket, "connect", lambda _, address: calls.append(address) or 1 / 0)
    assert demo.main(arguments) == 0
    assert not calls  # it needs no network
    stdout = capsys.readouterr().out
    assert "✓ the loaded model's logits equal those in memory" in stdout
    assert demo.QUESTION in stdout and "the quantized model answers" not in stdout  # asked of the demo's own model
    monkeypatch.setattr(demo, "LIMIT", 0.1)
    assert demo.main(arguments) == 1  # and OUT of the first run is replaced
    assert "✗ the quantized perplexity" in capsys.readouterr().out

    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    monkeypatch.setattr(demo, "load_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(FileExistsError, match="OUT: got"):
        demo.main([*arguments, "--out", str(tmp_path / "precious")])
