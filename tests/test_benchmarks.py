"""The benchmarks run on a tiny model, and write what they show."""

import json
import sys
from pathlib import Path

import pytest
from tiny import BYTES, byte_tokenizer, tiny_llama

import aqlm_c


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Runs benchmarks/quantize_layer.py on a tiny model; gives the JSON it writes."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
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
    assert f"--data={tmp_path / 'short.txt'}: 3 tokens, expected 256" in capsys.readouterr().err


def test_lora_step(monkeypatch, tmp_path, capsys):
    pytest.importorskip("peft")
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
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


def test_matmul(monkeypatch, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import matmul

    arguments = ["--shapes", "96x64", "--rows", 1, 3, "--schemes", "2x8g8", "1x9g8", "--cache", 0.02]
    arguments += ["--seconds", 0, "--json", tmp_path / "out.json"]
    monkeypatch.setattr(sys, "argv", ["matmul", *map(str, arguments)])
    threads = torch.get_num_threads()
    try:
        matmul.main()
    finally:
        torch.set_num_threads(threads)
    written = json.loads((tmp_path / "out.json").read_text())
    assert [(row["scheme"], row["rows"]) for row in written["rows"]] == [
        ("2x8g8", 1), ("2x8g8", 3), ("1x9g8", 1), ("1x9g8", 3),
    ]  # fmt: skip
    assert all(row["x fp32"] > 0 and row["error"] <= 1e-3 for row in written["rows"])
    assert written["read_bandwidth"] > 0 and "quantized weight" in capsys.readouterr().out
