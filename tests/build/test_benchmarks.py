"""The benchmarks run on a tiny model, and write what they show."""

import argparse
import json
import math
import sys
from pathlib import Path

import pytest
from tiny import BYTES, byte_tokenizer, tiny_llama, write_published

import aqlm_c


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Runs benchmarks/quantize_layer.py on a tiny model; gives the JSON it writes."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import _bench
    import quantize_layer

    monkeypatch.setattr(_bench, "RESULTS", tmp_path / "deep" / "results")
    tiny_llama(vocab_size=BYTES).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")

    def run(*options):
        arguments = ["--model", tmp_path / "model", "--scheme", "2x4g8", "--samples", 4, "--sequence-length", 32]
        arguments += ["--block", 1, "--layers", "mlp.gate_proj", "self_attn.q_proj"]
        monkeypatch.setattr(sys, "argv", ["quantize_layer", *map(str, arguments), *options])
        quantize_layer.main()
        return json.loads((tmp_path / "deep" / "results" / "quantize_layer.json").read_text())

    return run


def test_quantize_layer(bench, capsys):
    written = bench()
    solvers = [(row["start"], row["search"], row["update"]) for row in written["rows"]]
    assert len(solvers) == 2 * 6 == 2 * len(set(solvers))
    assert {("LDL", "exact pairs", "CG"), ("k-means", "exact pairs", "CG")} < set(solvers)
    assert {("k-means", f"beam {b}", "Adam (paper)") for b in (1, 8)} < set(solvers)
    assert all(0 < row["error"] < row["held-out error"] < 1 for row in written["rows"])
    assert written["machine"]["versions"]["aqlm_c"] == aqlm_c.__version__
    stdout = capsys.readouterr().out
    assert "self_attn.q_proj" in stdout and "…" not in stdout


def test_set_replaces_the_table(bench):
    rows = bench("--set", "beam_size=2", "--set", "ldl_passes=1", "--set", "max_sweeps=1")["rows"]
    assert [(row["start"], row["search"]) for row in rows] == [("as set", "beam 2")] * 2
    assert all(row["rounds"] == 2 for row in rows)


def test_too_little_text_is_named(bench, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("abc")
    with pytest.raises(SystemExit):
        bench("--data", str(tmp_path / "short.txt"))
    assert f"--data: got {tmp_path / 'short.txt'}: 3 tokens, expected 256" in capsys.readouterr().err


UPSTREAM_ENGINE = """
import torch
from src.aq import QuantizedWeight, init_aq_kmeans
class AQEngine(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer
    def quantize(self, *, args, verbose):
        assert (args.num_codebooks, args.nbits_per_codebook, args.beam_size, args.out_group_size) == (2, 4, 1, 1)
        assert (args.relative_mse_tolerance, args.init_max_iter, verbose) == (0.01, 100, False)
        assert self.XTX.dtype == torch.float64
        if self.layer.weight.shape[1] == 48: raise ValueError("no")
        found = QuantizedWeight(self.layer.weight)
        self.beam_search_update_codes_(found)
        return found
    def beam_search_update_codes_(self, found): found.beam_search_update_codes_()
"""
UPSTREAM_AQ = """
import src.aq, torch
def init_aq_kmeans(weight): return 0.75 * weight
class QuantizedWeight(torch.nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = src.aq.init_aq_kmeans(weight)
    def beam_search_update_codes_(self): pass
    def forward(self): print("noise"); return self.weight
"""


def test_quantize_synthetic_layers_beside_upstream(bench, tmp_path, capsys):
    """Solvers side by side, the JSON only where it is asked for."""
    (tmp_path / "up" / "src").mkdir(parents=True)
    (tmp_path / "up" / "aq_engine.py").write_text(UPSTREAM_ENGINE)
    (tmp_path / "up" / "src" / "aq.py").write_text(UPSTREAM_AQ)
    options = ["--synthetic", "64x32", "32x48", "--upstream", str(tmp_path / "up"), "--json", str(tmp_path / "q.json")]
    options += ["--solvers", "fast", "paper"]
    with pytest.raises(FileNotFoundError):
        bench(*options)
    written = json.loads((tmp_path / "q.json").read_text())
    found = {(row["layer"], row["solver"]): row for row in written["rows"]}
    assert list(found) == [("64x32", s) for s in ("fast", "paper", "upstream")] + [
        ("32x48", s) for s in ("fast", "paper")
    ]
    assert found["64x32", "upstream"]["error"] == pytest.approx(0.25**2)
    assert found["64x32", "upstream"]["rounds"] == 1
    assert set(found["64x32", "upstream"]["phases"]) == {"kmeans", "search", "codebooks"}
    for row in written["rows"]:
        assert 0 < row["error"] < 1 and row["host GB"] > 0 and row["device GB"] is None
        assert sum(row["phases"].values()) <= 1.001 * row["seconds"]
    assert str(tmp_path) not in json.dumps({**written, "arguments": {**written["arguments"], "model": "", "json": ""}})
    said = capsys.readouterr()
    assert "| layer | scheme | seed | fast | paper | upstream |" in said.out
    assert "upstream: 2x4g8: ValueError: no" in said.err


def test_synthetic_layers_are_those_of_the_recipe(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import quantize_layer

    weight, H = quantize_layer.synthetic((4096, 64), 0, "cpu")
    assert weight.shape == (4096, 64) and H.shape == (64, 64) and torch.equal(H, H.T)
    rows = 64**0.5 * weight.square().mean(1).sqrt() / 8
    assert float(rows.log().std()) == pytest.approx((0.25**2 + 1 / (2 * 64)) ** 0.5, rel=0.1)
    again, _ = quantize_layer.synthetic((4096, 64), 0, "cpu")
    assert torch.equal(weight, again)
    # det(H) = det(C) det(D)^2, whatever the basis; the trace is the mean of D^2 times that of C in expectation
    generator = torch.Generator().manual_seed(0)
    for size in ((4096, 64), (4096, 1), (64, 64)):
        torch.randn(*size, generator=generator)
    D = (0.5 * torch.randn(64, generator=generator)).exp().double()
    eigenvalues = 1 / torch.arange(1, 65, dtype=torch.float64)
    expected = float(eigenvalues.log().sum() + 2 * D.log().sum())
    assert float(torch.logdet(H.double())) == pytest.approx(expected, abs=0.3)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--synthetic", "64"], "--synthetic: got 64, expected OUTxIN"),
        (["--upstream", "/"], "--upstream: got a model's layers, expected --synthetic"),
        (["--synthetic", "64x32", "--upstream", "/"], "no aq_engine.py, expected a checkout"),
        (["--synthetic", "64x32", "--profile"], "--profile: got --device cpu, expected cuda"),
    ],
)
def test_quantize_layer_names_what_is_wrong(bench, capsys, options, named):
    with pytest.raises(SystemExit) as raised:
        bench(*options)
    assert named in f"{raised.value}{capsys.readouterr().err}"


@pytest.fixture
def whole(monkeypatch, tmp_path):
    """Runs benchmarks/quantize_model.py on a tiny model; gives the JSON it writes."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import quantize_model

    tiny_llama(vocab_size=BYTES).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")

    def run(*options):
        arguments = ["--model", tmp_path / "model", "--scheme", "2x4g8", "--samples", 4, "--sequence-length", 32]
        arguments += ["--window", 32, "--windows", 2, "--threads", 1, "--json", tmp_path / "whole.json"]
        monkeypatch.setattr(sys, "argv", ["quantize_model", *map(str, arguments), *options])
        quantize_model.main()
        return json.loads((tmp_path / "whole.json").read_text())

    return run


def test_quantize_model(whole, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("A text of some length, for perplexity. " * 8)
    written = whole("--seeds", "2", "--full", "--text", str(tmp_path / "text.txt"), "--set", "finetune_epochs=0")
    rows, means = written["rows"], written["means"]
    assert [(row["preset"], row["seed"]) for row in rows] == [(p, s) for p in ("fast", "balanced") for s in (0, 1)]
    for row in rows:
        assert row["perplexity"] > 1 and row["full perplexity"] > 1 and row["seconds"] > 0
        assert sum(row["by step"]) <= row["seconds"] and len(row["by step"]) >= 2
        assert row["phases"]["quantize"] > 0 and row["device GB"] is None and row["host GB"] > 0
    assert [mean["seeds"] for mean in means] == [2, 2]
    assert means[0]["perplexity"] == pytest.approx((rows[0]["perplexity"] + rows[1]["perplexity"]) / 2)
    assert means[0]["± perplexity"] == pytest.approx(abs(rows[0]["perplexity"] - rows[1]["perplexity"]) / 2**0.5)
    assert written["original"]["perplexity"] != written["original"]["full perplexity"]
    assert str(tmp_path) not in json.dumps({**written, "arguments": {**written["arguments"], "json": ""}})
    assert "means over seeds; the original" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--seeds", "0"], "--seeds, --windows: got 0, 2, expected at least 1, 0"),
        (["--profile", "4:2"], "--profile: got 4:2, expected FROM:TO"),
        (["--profile", "2:4"], "--profile: got --device cpu, expected cuda"),
    ],
)
def test_quantize_model_names_what_is_wrong(whole, capsys, options, named):
    with pytest.raises(SystemExit):
        whole(*options)
    assert named in capsys.readouterr().err


def test_kernels_are_counted_once(monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import _device

    assert _device.covered([(0, 4, "a"), (1, 2, "b"), (3, 6, "c"), (8, 9, "d")]) == 7
    assert _device.covered([]) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("what", ["layer", "model"])
def test_the_quantizer_on_a_gpu(bench, whole, what, tmp_path, capsys):
    """Where there is none, that is said."""
    import torch

    from aqlm_c.nn import ops

    options = ["--device", "cuda"]
    if what == "layer":
        options += ["--synthetic", "64x64", "--phases", "--profile", "--json", str(tmp_path / "q.json")]
    if not (torch.cuda.is_available() and ops.has_cuda):
        with pytest.raises(SystemExit):
            (bench if what == "layer" else whole)(*options)
        assert "--device: got cuda, expected a GPU" in capsys.readouterr().err
        pytest.skip("needs a GPU that torch can use, and aqlm_c built with _cuda")
    if what == "layer":
        with pytest.raises(FileNotFoundError):
            bench(*options)
        row = json.loads((tmp_path / "q.json").read_text())["rows"][0]
        assert 0 < row["kernels %"] < 100 and row["kernels"] and row["phases"] and row["device GB"] > 0
    else:
        row = whole(*options, "--seeds", "1", "--profile", "0:1")["rows"][0]
        assert row["perplexity"] > 1 and row["device GB"] > 0 and row["profile"]["kernel seconds"] > 0


def test_lora_step(monkeypatch, tmp_path, capsys):
    pytest.importorskip("peft")
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import lora_step

    tiny_llama(vocab_size=BYTES, attention_bias=True).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    arguments = ["--model", tmp_path / "model", "--tokens", 40, "--steps", 2, "--json", tmp_path / "out.json"]
    monkeypatch.setattr(sys, "argv", ["lora_step", *map(str, arguments)])
    lora_step.main()
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["dtype"] for row in rows] == ["float32", "bfloat16"]
    assert all(row["ratio"] > 0 and row["ours s"] > 0 for row in rows)
    assert rows[0]["max error"] <= 1e-5 and rows[1]["max error"] <= 2**-7
    assert "LoRA step" in capsys.readouterr().out


@pytest.fixture
def matmul(monkeypatch, tmp_path):
    """Runs benchmarks/matmul.py on a tiny layer; gives the JSON it writes."""
    torch = pytest.importorskip("torch")
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import matmul

    def run(*options):
        arguments = ["--shapes", "192x64", "--cache", 0.02, "--seconds", 0, "--json", tmp_path / "out.json", *options]
        monkeypatch.setattr(sys, "argv", ["matmul", *map(str, arguments)])
        matmul.main()
        return json.loads((tmp_path / "out.json").read_text())

    threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(threads)


def test_matmul(matmul, tmp_path, capsys):
    written = matmul("--rows", 1, 40, "--schemes", "2x8g8", "1x9g8")
    most = {"float32": 1e-5, "bfloat16": 4e-3}
    assert [(row["scheme"], row["rows"], row["dtype"]) for row in written["rows"]] == [
        (scheme, rows, dtype) for scheme in ("2x8g8", "1x9g8") for rows in (1, 40) for dtype in most
    ]
    assert written["bandwidth"] > 0 and all(written["peak"][dtype] > 0 for dtype in most)
    for row in written["rows"]:
        assert row["error"] <= most[row["dtype"]] and row["x upstream"] is None
        assert row["x fp32"] == row["fp32 ms"] / row["ours ms"] > 0
        assert row["GB/s"] == pytest.approx(row["weight bytes"] / row["ours ms"] * 1e-6)
        assert row["% of read"] == pytest.approx(100 * row["GB/s"] / written["bandwidth"])
        assert set(row["parts ms"]) == {"reading codes"} | (
            {"arithmetic"} if row["rows"] == 40 else {"lookups", "setup"}
        )
        most_of_it = max(row["parts ms"], key=row["parts ms"].get)
        assert row["bound"].startswith(most_of_it) and row["bound"].endswith("%")
    assert (tmp_path / "out.png").stat().st_size > 1000
    assert str(tmp_path) not in json.dumps(written)
    stdout = capsys.readouterr().out
    assert "quantized weight" in stdout and "| 40 | 1x9g8 | bfloat16 | " in stdout and "…" not in stdout


UPSTREAM = """
import torch
class QuantizedLinear(torch.nn.Module):
    def __init__(self, in_features, out, g, og, K, B, bias, device):
        super().__init__()
        assert (in_features, out, g, og, bias, device) == (64, 192, 8, 1, False, "meta")
        self.K = K
    def forward(self, x):
        assert self.K < 3, "no kernel"
        assert self.codes.shape == (192, 8, self.K) and self.codebooks.dtype == self.scales.dtype == torch.float32
        print("compiling")
        return x @ torch.zeros(64, 192)
"""


def test_matmul_beside_upstream(matmul, monkeypatch, tmp_path, capsys):
    (tmp_path / "aqlm.py").write_text(UPSTREAM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    written = matmul("--rows", 1, 2, "--schemes", "2x8g8", "3x8g8", "--upstream", sys.executable)
    assert all(row["x upstream"] == row["upstream ms"] / row["ours ms"] for row in written["rows"][:4])
    assert all(row["x upstream"] is None for row in written["rows"][4:])
    assert "upstream: 3x8g8, 192x64: no kernel" in capsys.readouterr().err
    assert sys.executable not in json.dumps(written)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--upstream", sys.executable], "No module named 'aqlm', expected an interpreter that imports"),
        (["--upstream", "/nowhere/python"], "No such file or directory, expected a Python interpreter"),
        (["--upstream", "true"], "ended early, expected an interpreter that imports"),
        (["--shapes", "4096"], "--shapes: got 4096, expected OUTxIN"),
        (["--schemes", "2y8"], "2y8"),
    ],
)
def test_matmul_names_what_is_wrong(matmul, capsys, options, named):
    with pytest.raises(SystemExit) as raised:
        matmul("--rows", 1, *options)
    assert named in f"{raised.value}{capsys.readouterr().err}"


@pytest.mark.gpu
def test_matmul_on_a_gpu(matmul, capsys):
    """Where there is none, that is said."""
    import torch

    from aqlm_c.nn import ops

    options = ["--device", "cuda", "--rows", 1, 40, "--schemes", "2x8g8"]
    if not (torch.cuda.is_available() and ops.has_cuda):
        with pytest.raises(SystemExit):
            matmul(*options)
        assert "--device: got cuda, expected a GPU" in capsys.readouterr().err
        pytest.skip("needs a GPU that torch can use, and aqlm_c built with _cuda")
    written = matmul(*options)
    assert [row["rows"] for row in written["rows"]] == [1, 40] and written["machine"]["gpu"]
    assert all(row["x fp16"] > 0 and row["% of copy"] > 0 for row in written["rows"])
    assert written["decode_rows"][0]["% of copy"] > 0
    assert {(row["call"], row["mode"]) for row in written["eager_calls"]} == {
        (call, mode) for call in ("op", "module") for mode in ("inference", "grad", "grad to x")
    }


@pytest.fixture
def generate(monkeypatch, tmp_path):
    """benchmarks/generate.py as a module, whose main takes its arguments and gives the JSON it writes."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import generate

    def main(*arguments):
        out = tmp_path / "out.json"
        sizes = ["--prompt-tokens", 5, "--new-tokens", 6, "--prefill-tokens", 24, "--repeats", 1, "--threads", 1]
        monkeypatch.setattr(sys, "argv", ["generate", *map(str, [*arguments, *sizes, "--json", out])])
        run_as_script()
        return json.loads(out.read_text())

    run_as_script, generate.main = generate.main, main
    yield generate
    generate.main = run_as_script


@pytest.fixture
def models(tmp_path):
    """Directories of a quantized tiny model and of the dense one."""
    ours, dense = tmp_path / "ours", tmp_path / "dense"
    write_published(ours, (2, 8, 8, 1), vocab_size=BYTES).save_pretrained(dense)
    for directory in (ours, dense):
        byte_tokenizer().save_pretrained(directory)
    return ours, dense


LLAMA = """
import os
LLAMA_FTYPE_MOSTLY_Q4_1, LLAMA_FTYPE_MOSTLY_Q2_K = 3, 10
class Params: pass
def llama_model_quantize_default_params(): return Params()
def llama_model_quantize(source, target, params):
    assert params.allow_requantize and params.nthread == 1
    open(target, "wb").write(bytes(params.ftype))
    return 0
class Llama:
    def __init__(self, path, n_ctx, n_batch, n_threads, n_threads_batch, verbose):
        assert n_ctx > 24 and n_batch >= 24 and n_threads == n_threads_batch == 1
        self.metadata = {"general.file_type": {100: "3", 10: "10"}[os.path.getsize(path)]}
    def n_vocab(self): return 50
    def reset(self): self.n = 0
    def eval(self, tokens): self.n += len(tokens)
    def generate(self, tokens, temp):
        assert self.n == temp == 0
        self.eval(tokens)
        while self.n < 5 + 6:
            self.n += 1
            yield 1
"""


def test_generate(generate, models, capsys):
    written = generate.main(models[0], "--dense", models[1], "--dtypes", "float32")
    ours, dense = written["rows"]
    assert (ours["contender"], dense["contender"], ours["format"]) == ("ours", "dense", "float32")
    assert dense["x dense"] == 1.0 and ours["x dense"] == ours["tokens/s"] / dense["tokens/s"]
    assert 0 < ours["outside %"] < 100 and dense["outside %"] is None
    sizes = [sum(p.stat().st_size for p in d.glob("*.safetensors")) / 1e6 for d in models]
    assert ours["model MB"] == pytest.approx(sizes[0], rel=0.3) and dense["model MB"] == pytest.approx(
        sizes[1], rel=0.3
    )
    for r in written["rows"]:
        assert r["prefill/s"] > 0 and 0 < r["bare MB"] < r["resident MB"] <= r["peak MB"]
        assert r["x model"] == pytest.approx((r["resident MB"] - r["bare MB"]) / r["model MB"])
    assert written["arguments"]["new_tokens"] == 6 and str(models[0]) not in json.dumps(written)
    stdout = capsys.readouterr().out
    assert "6 new tokens" in stdout and "x the checkpoint" in stdout


def test_generate_beside_llama(generate, monkeypatch, tmp_path, capsys):
    (tmp_path / "llama_cpp.py").write_text(LLAMA)
    (tmp_path / "model.gguf").write_bytes(bytes(100))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    args = argparse.Namespace(llama=sys.executable, llama_formats=["Q2_K", "IQ9"])
    common = {"prompt_tokens": 5, "new_tokens": 6, "prefill_tokens": 24, "repeats": 2, "threads": 1}
    rows = generate.llama_rows(args, common, str(tmp_path / "model.gguf"))
    assert [(r["format"], r["model MB"]) for r in rows] == [("Q4_1", 1e-4), ("Q2_K", 1e-5)]
    assert all(r["tokens/s"] > 0 and r["resident MB"] > 0 for r in rows)
    assert "no IQ9: AttributeError" in capsys.readouterr().err


def test_generate_compares_alike(generate):
    rows = [
        {"contender": contender, "compiled": compiled, "tokens/s": speed}
        for contender, compiled, speed in [
            ("ours", "no", 3.0), ("dense", "no", 1.0), ("dense", "no", 2.0),
            ("ours", "yes", 12.0), ("dense", "yes", 8.0), ("llama.cpp", "no", 16.0),
        ]
    ]  # fmt: skip
    generate.against_dense(rows)
    assert [row["x dense"] for row in rows] == [1.5, 0.5, 1.0, 1.5, 1.0, 2.0]


def test_generate_names_what_is_wrong(generate, models, monkeypatch):
    with pytest.raises(SystemExit, match="no quantized layer"):
        generate.main(models[1], "--dense", models[0], "--dtypes", "float32")
    monkeypatch.setattr(generate, "torch_rows", lambda *_: ([], str(models[1])))  # as test_generate runs it
    with pytest.raises(SystemExit, match="expected a GGUF file"):
        generate.main(models[0], "--dense", models[1], "--dtypes", "float32", "--llama", "python")


LLAMA_LOSSES = """
import numpy as np
LLAMA_FTYPE_MOSTLY_F16, LLAMA_FTYPE_MOSTLY_Q2_K = 1, 10
class Params: pass
def llama_model_quantize_default_params(): return Params()
def llama_model_quantize(source, target, params):
    open(target, "wb").write(bytes(1000 * params.ftype))
    return 0
class Llama:
    def __init__(self, path, n_ctx, n_batch, n_threads, logits_all, verbose):
        assert n_ctx == n_batch == 32 and logits_all
        self.scores = np.zeros((n_ctx, 257), np.single)
    def reset(self): self.scores[:] = 0
    def eval(self, tokens):
        for place, token in enumerate(tokens[1:]): self.scores[place, token] = 3  # the likeliest is the one that comes
"""


@pytest.fixture
def llama_files(monkeypatch, tmp_path, models):
    """Runs benchmarks/llama_files.py, for which a GGUF file is the dense model; gives the rows that it writes."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import llama_files

    from aqlm_c.hf import models as loading

    (tmp_path / "llama_cpp.py").write_text(LLAMA_LOSSES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for name in ("load_model", "load_tokenizer"):
        load = getattr(loading, name)
        there = lambda model, *more, load=load: load(models[1] if str(model).endswith(".gguf") else model, *more)  # noqa: E731
        monkeypatch.setattr(loading, name, there)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["llama_files", *map(str, arguments), "--llama", sys.executable])
        llama_files.main()
        path = tmp_path / "rows.json"
        return json.loads(path.read_text())["rows"] if path.exists() else None

    return run


def test_files_of_llama_beside_ours(llama_files, models, monkeypatch, tmp_path, capsys):
    """GGUF files are evaluated as ours are; what has rows is not evaluated again."""
    (tmp_path / "tiny-Q2_K.gguf").write_bytes(bytes(5000))
    (tmp_path / "text.txt").write_text("Every model is evaluated as ours are. " * 20)
    arguments = ["--against", models[1], "--data", tmp_path / "text.txt", "--windows", 3, "--sequence-length", 32]
    arguments += ["--json", tmp_path / "rows.json", "--plot", tmp_path / "plot.png"]
    (gguf,) = llama_files(tmp_path / "tiny-Q2_K.gguf", *arguments)
    assert (gguf["by"], gguf["MB"], gguf["windows"]) == ("llama.cpp", 0.005, 3)
    assert gguf["KL"] == pytest.approx(0, abs=1e-6) and gguf["perplexity"] == gguf["original"]
    assert gguf["by itself"] == pytest.approx((256 + math.exp(3)) / math.exp(3))
    assert gguf["by us"] == pytest.approx(gguf["perplexity"], rel=0.5) and gguf["by us"] != gguf["perplexity"]
    evaluate = aqlm_c.evaluate_models
    monkeypatch.setattr(
        aqlm_c, "evaluate_models", lambda names, *more, **options: evaluate(list(map(refuse, names)), *more, **options)
    )
    again, ours = llama_files(tmp_path / "tiny-Q2_K.gguf", models[0], *arguments)
    assert again == gguf and ours["by"] == "ours" and ours["by itself"] is None
    assert ours["MB"] == sum(path.stat().st_size for path in models[0].glob("*.safetensors")) / 1e6
    assert ours["KL"] == pytest.approx(0, abs=1e-4)  # the dense model has the same weights
    assert (tmp_path / "plot.png").stat().st_size > 5000 and "tiny-Q2_K.gguf" in capsys.readouterr().out


def refuse(name):
    assert not str(name).endswith(".gguf"), "it has a row"
    return name


def test_files_of_llama_are_made(llama_files, monkeypatch, tmp_path, capsys):
    from aqlm_c.hf import models as loading

    (tmp_path / "source.gguf").write_bytes(bytes(10))
    load = lambda _: (None, None, argparse.Namespace(path=str(tmp_path / "source.gguf")))  # noqa: E731
    monkeypatch.setattr(loading, "load_model", load)
    llama_files("--make", tmp_path / "made", "--against", "tiny", "--formats", "Q2_K", "IQ9")
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "made").iterdir()}
    assert sizes == {"tiny-F16.gguf": 1000, "tiny-Q2_K.gguf": 10_000}
    assert "no IQ9: AttributeError" in capsys.readouterr().err


@pytest.mark.gpu
def test_generate_on_a_gpu(generate, capsys):
    """Where there is none, that is said."""
    import torch

    from aqlm_c.nn import ops

    options = ["--device", "cuda", "--shape", "tiny", "--compile"]
    if not (torch.cuda.is_available() and ops.has_cuda):
        with pytest.raises(SystemExit):
            generate.main(*options)
        assert "--device: got cuda, expected a GPU" in capsys.readouterr().err
        pytest.skip("needs a GPU that torch can use, and aqlm_c built with _cuda")
    rows = generate.main(*options)["rows"]
    assert [(row["format"], row["compiled"]) for row in rows] == [
        (name, compiled) for name in ("2x8g8", "1x16g8", "float16") for compiled in ("no", "yes")
    ]
    for row in rows:
        assert row["tokens/s"] > 0 and row["peak GiB"] > 0 and row["context"] == 11
        assert row["x dense"] > 0 and 0 < row["outside %"] < 100
        assert any(kernel["launches"] >= 1 for kernel in row["kernels"])


@pytest.mark.parametrize("scheme", ["2x8g8", None])
def test_generate_decodes_as_transformers_does(generate, scheme):
    """The loop around the layers of Llama, which is that of the GPU, without a graph."""
    import _llama
    import torch

    torch.manual_seed(0)
    model = _llama.build("tiny", scheme, torch.float32, "cpu")
    prompt = torch.randint(model.config.vocab_size, (1, 5))
    expected = model.generate(prompt, min_new_tokens=6, max_new_tokens=6, do_sample=False, pad_token_id=0)
    decoder = _llama.Decoder(model, 11)
    with torch.inference_mode():
        decoder.prefill(prompt)
        tokens = [int(decoder.token)]
        for _ in range(5):
            decoder.step()
            tokens.append(int(decoder.token))
    assert tokens == expected[0, 5:].tolist() and len(set(tokens)) > 1


def test_generate_times_a_shape(generate):
    import _llama

    job = {"device": "cpu", "shape": "tiny", "dtype": "float32", "prompt_tokens": 5, "new_tokens": 6, "repeats": 1}
    ours, dense = (_llama.worker({**job, "scheme": s, "compile": False})[0] for s in ("2x8g8", None))
    generate.against_dense([ours, dense])
    assert (ours["contender"], dense["contender"], ours["context"]) == ("ours", "dense", 11)
    assert ours["x dense"] == ours["tokens/s"] / dense["tokens/s"] and dense["x dense"] == 1
    assert ours["outside %"] < 100 and 0 < ours["model GB"] < dense["model GB"]


def test_random_checkpoint(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import random_checkpoint
    import torch

    from aqlm_c.hf.models import load_model

    states = []
    for name in ("one", "two"):
        arguments = [tmp_path / name, "--shape", "tiny", "--layers", 3, "--tokens", 512, "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["random_checkpoint", *map(str, arguments)])
        random_checkpoint.main()
        model, tokenizer, source = load_model(tmp_path / name)
        assert len(model.model.layers) == 3 and len(tokenizer) == model.config.vocab_size
        states.append(model.state_dict())
    assert len(list((tmp_path / "one").glob("*.safetensors"))) == 5 and source.total_bytes
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    weight = states[0]["model.layers.0.mlp.down_proj.weight"].float()
    rows = weight.square().mean(1).sqrt() * weight.shape[1] ** 0.5
    columns = weight.square().mean(0).sqrt()
    assert 0.15 < rows.log().std() < 0.6 and columns.max() > 4 * columns.median()


def test_tuning_a_shape(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import finetune_model

    arguments = ["--shape", "tiny", "--blocks", 2, "--steps", 4, "--batch-size", 4, "--sequence-length", 16, "--pv"]
    arguments += ["--set", "pv_states=8bit", "--set", "pv_learning_rate=0.3", "--json", tmp_path / "found.json"]
    monkeypatch.setattr(sys, "argv", ["finetune_model", *map(str, arguments)])
    finetune_model.main()
    written = json.loads((tmp_path / "found.json").read_text())
    (row,) = written["rows"]
    assert (row["blocks"], row["ranks"], row["moments"], row["tokens a step"]) == (2, 1, "8bit", 64)
    assert len(written["seconds"]) == 4 and row["tokens/s"] == pytest.approx(64 / row["seconds a step"])
    assert 0 < row["KL"] < row["KL before"] and written["history"][-1]["changed"] > 0 and row["device GB"] is None
    assert "step 4: " in capsys.readouterr().out and str(tmp_path) not in (tmp_path / "found.json").read_text()


def test_buffer_step(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import buffer_step
    import torch

    arguments = ["--shape", "48x64", "--cache", "1e5", "--least", "0.01", "--json", tmp_path / "found.json"]
    monkeypatch.setattr(sys, "argv", ["buffer_step", *map(str, arguments), "--threads", str(torch.get_num_threads())])
    buffer_step.main()
    rows = {row["contender"]: row for row in json.loads((tmp_path / "found.json").read_text())["rows"]}
    assert list(rows) == ["ours, float32", "ours, 8 bits", "torch, foreach", "torch, fused"]
    assert [row["bytes a weight"] for row in rows.values()] == [26, 14.0625, 28, 28]
    assert all(row["ms"] > 0 and row["% of read"] > 0 for row in rows.values())
    assert 0 < rows["ours, float32"]["error"] < 1e-4 < rows["ours, 8 bits"]["error"] < 0.05
    monkeypatch.setattr(buffer_step.Ours, "step", lambda self, number=2: self.buffer.add_(1))
    with pytest.raises(SystemExit, match=r"ours, float32: got an error of .* expected less: not timed"):
        buffer_step.main()


TUNING = [f"--set-tuning={option}" for option in ("batch_size=2", "pv_fraction=0.5", "pv_learning_rate=0.3")]
ABLATIONS = {
    "samples": ["--points", "2", "4"],
    "domain": ["--text", "prose=prose.txt", "--text", "code=code.txt"],
    "beam": ["--points", "0", "2"],
    "tokens": ["--points", "0.0001", "0.0001+pv", "--tuning", "code.txt", *TUNING],
    "format": ["--points", "2x4g8", "1x8g8"],
}


@pytest.fixture
def ablation(monkeypatch, tmp_path):
    """Runs a study of benchmarks/ablation.py on a tiny model, of two points and two seeds; gives its JSON."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import ablation

    tiny_llama(vocab_size=BYTES, num_hidden_layers=1).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "prose.txt").write_text("A text of some length, to calibrate and to evaluate on. " * 30)
    (tmp_path / "code.txt").write_text("def f(x):\n    return x + 1\n\n" * 60)

    def run(study, *options, out="out"):
        arguments = [study, "--model", tmp_path / "model", "--data-dir", tmp_path, "--out", tmp_path / out]
        arguments += ["--sequence-length", 16, "--samples", 3, "--window", 16, "--windows", 4, "--seeds", 0, 1]
        arguments += ["--threads", 1, *ABLATIONS[study]]
        if study != "domain":
            arguments += ["--calibration", "prose.txt", "--evaluate", "prose=prose.txt", "--evaluate", "code=code.txt"]
        for option in ("ldl_passes=1", "max_sweeps=1", "init_max_iter=2", "finetune_epochs=0"):
            arguments += ["--set", option]
        if study != "format":
            arguments += ["--scheme", "2x4g8"]
        monkeypatch.setattr(sys, "argv", ["ablation", *map(str, [*arguments, *options])])
        ablation.main()
        return json.loads((tmp_path / out / f"{study}.json").read_text())

    run.module = ablation
    return run


@pytest.mark.parametrize("study", ABLATIONS)
def test_ablation(ablation, study, tmp_path, capsys):
    written = ablation(study)
    rows = written["rows"]
    points = ["prose", "code"] if study == "domain" else ABLATIONS[study][1:3]
    assert [(row["point"], row["seed"]) for row in rows] == [(point, seed) for point in points for seed in (0, 1)]
    for row in rows:
        assert row["seconds"] > 0 and list(row["scores"]) == ["prose", "code"]
        for score in row["scores"].values():
            assert 1 < score["perplexity"] < 1e6 and score["kl"] >= 0 and 0 <= score["top1"] <= 1
    if study == "tokens":
        changed = [row["groups changed"] for row in rows]
        assert changed[:2] == [0, 0] and any(changed[2:])
        assert all(row["tokens"] == row["steps"] * 2 * 16 > 64 for row in rows)
    assert written["conclusion"].endswith(".") and written["conclusion"] in capsys.readouterr().out
    assert (tmp_path / "out" / f"{study}.png").stat().st_size > 10_000
    assert (tmp_path / "out" / f"{study}.svg").read_text().lstrip().startswith("<?xml")
    assert str(tmp_path) not in json.dumps(written)


@pytest.fixture
def unplotted(ablation, monkeypatch):
    """`ablation` without plots, which take longer than tiny trials."""
    import _study_plot

    monkeypatch.setattr(_study_plot, "plot", lambda *_: [])
    return ablation


def test_a_killed_ablation_goes_on(unplotted, tmp_path, monkeypatch):
    """Rows stay as they were, byte for byte; what a kill left of a line is gone; other settings are refused."""
    once, made, file = unplotted.module.Bench.row, [], tmp_path / "out" / "samples.jsonl"

    def row(self, point, seed):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append((point, seed))
        return once(self, point, seed)

    monkeypatch.setattr(unplotted.module.Bench, "row", row)
    with pytest.raises(KeyboardInterrupt):
        unplotted("samples")
    before = file.read_bytes()
    assert before.count(b"\n") == 4
    file.write_bytes(before + b'{"point": "4", "se')
    made.clear()
    written = unplotted("samples")
    assert made == [("4", 1)] and file.read_bytes().startswith(before) and len(written["rows"]) == 4
    after = file.read_bytes()
    made.clear()
    assert unplotted("samples", "--plot")["conclusion"] == unplotted("samples")["conclusion"]
    with pytest.raises(SystemExit) as raised:
        unplotted("samples", "--preset", "best")
    assert 'got samples.jsonl of other settings: preset "fast" (here "best"), expected' in str(raised.value)
    assert not made and file.read_bytes() == after


def test_two_processes_share_an_ablation(unplotted, tmp_path, capsys):
    """Which trials are whose does not depend on when each starts; a file is written by one at a time."""
    import _study

    trials = [(str(point), seed) for seed in (0, 1) for point in range(3)]
    rows = [{"point": point, "seed": seed} for point, seed in trials]
    parts = [_study.share(trials, rows[:1], [*rows[:1], *rows[2:3]], index, 2) for index in (0, 1)]
    assert parts == [[trials[1], trials[3], trials[5]], [trials[4]]]
    first = unplotted("beam", "--index", "1", "--of", "2")
    assert [(row["point"], row["seed"]) for row in first["rows"]] == [("2", 0), ("2", 1)]
    assert "2 trials are missing yet" in capsys.readouterr().out
    settings = json.loads((tmp_path / "out" / "beam.1.jsonl").read_text().splitlines()[0])
    writer = _study.Writer(tmp_path / "out" / "beam.0.jsonl", settings)
    with pytest.raises(SystemExit, match="which another run writes, expected --index of --of"):
        unplotted("beam", "--index", "0", "--of", "2")
    writer.close()
    assert len(unplotted("beam", "--index", "0", "--of", "2")["rows"]) == 4


def made_up(point, values):
    scores = {"text": {"kl": 0.0, "top1": 0.0, "original_perplexity": 1.0}}
    return [
        {"point": point, "seed": seed, "seconds": 1.0, "scores": {"text": {**scores["text"], "perplexity": value}}}
        for seed, value in enumerate(values)
    ]


def test_conclusions_are_not_of_noise(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import _study

    rows = [*made_up("8", [20, 22, 24]), *made_up("16", [10.1, 11, 12]), *made_up("32", [10, 11.1, 12])]
    said = _study.conclusion("samples", rows)
    assert said.startswith("From 8 to 32 sequences perplexity falls by 49.8% ± 0.26; no change beyond 16 exceeds")
    noise = _study.conclusion("samples", [*made_up("8", [10, 12, 11]), *made_up("16", [11, 11, 11])])
    assert "falls" not in noise and "rises" not in noise and "no more than twice its spread" in noise
    single = _study.conclusion("samples", [*made_up("8", [20]), *made_up("16", [10])])
    assert "nothing is claimed" in single and "%" not in single


def test_the_end_of_a_text_is_not_calibrated_on(ablation):
    torch = pytest.importorskip("torch")
    args = argparse.Namespace(text={"a": "a.txt"}, window=10, windows=3, sequence_length=8)
    stream = torch.arange(200)
    ablation.module.read, kept = lambda *_: (stream, None), ablation.module.read
    try:
        pool, text = ablation.module.split("a", None, args)
    finally:
        ablation.module.read = kept
    assert text.stream.tolist() == list(range(170, 200)) and text.windows == 3
    assert int(pool.sources["a"].max()) < 170 - 7
    drawn = [pool.draw(count, 3).tolist() for count in (4, 9)]
    assert drawn[1][:4] == drawn[0] and pool.draw(4, 4).tolist() != drawn[0]
    with pytest.raises(ValueError, match="a: got 20 sequences, expected 21"):
        pool.draw(21, 0)


@pytest.mark.parametrize(
    ("study", "options", "named"),
    [
        ("samples", ["--points", "0"], "--points: got 0, expected 1, 2, ..."),
        ("domain", ["--points", "web"], "--points: got web, expected a NAME of --text"),
        ("tokens", ["--points", "x+pv"], "--points: got x+pv, expected N or N+pv"),
        ("beam", ["--points", "65"], "beam_size: got 65"),
        ("format", ["--points", "2y8"], "scheme: got '2y8'"),
        ("samples", ["--text", "prose=prose.txt"], "--text: got 1 of them, expected two or more of domain"),
        ("beam", ["--index", "2", "--of", "2"], "--index: got 2, expected 0 to 1"),
        ("samples", ["--points", "999"], "prose.txt: got 105 sequences, expected 999"),
    ],
)
def test_ablation_names_what_is_wrong(ablation, tmp_path, capsys, study, options, named):
    with pytest.raises(SystemExit) as raised:
        ablation(study, *options)
    assert named in f"{raised.value}{capsys.readouterr().err}"
    assert not (tmp_path / "out").exists()
