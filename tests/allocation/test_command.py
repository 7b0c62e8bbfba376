"""`aqlm-c quantize --bits` and `--target-size`."""

import json

import pytest
import torch
from command import main_in_time
from tiny import BYTES, byte_tokenizer, tiny_llama


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", "2.3", "--target-size", "60MB"], "bits: got 2.3, expected none beside target_size"),
        (["--bits", "2.3", "--scheme", "2x8g8"], "--scheme: got '2x8g8', expected none beside --bits"),
        (["--candidates", "2x8g8,dense"], "candidates: got"),
        (["--bits", "2.3", "--candidates", "2x8g8,9x8g8"], "candidates: num_codebooks: got 9"),
        (["--target-size", "60 apples"], "target_size: got '60 apples'"),
        (["--plot", "bits.png"], "plot: got 'bits.png', expected bits or target_size beside it"),
        (["--bits", "2.3", "--statistics", "h"], "statistics: got 'h', expected none beside bits or target_size"),
        (["--bits", "2.3", "--method", "gptq"], "solver: got 'gptq', expected one that makes AQLM checkpoints"),
        (["--bits", "2.3", "--plot", "bits.txt"], "plot: got 'bits.txt', expected a file ending in"),
    ],
)
def test_refusals(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main_in_time("quantize", "smollm2", "out", *options) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
    assert list(tmp_path.iterdir()) == []


def test_a_size_is_kept_and_drawn(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    model, out, plot = tmp_path / "model", tmp_path / "out", tmp_path / "bits.svg"
    tiny_llama(torch.bfloat16, vocab_size=BYTES, hidden_size=64, intermediate_size=128).save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    drawn = ["--samples", 4, "--sequence-length", 32, "--preset", "fast", "--device", "cpu"]
    schemes = ["--bits", 8, "--candidates", "1x4g8,2x4g8", "--candidates", "4x4g8,dense"]
    assert main_in_time("quantize", model, out, *drawn, *schemes, "--plot", plot, seconds=300) == 0
    report = json.loads((out / "report.json").read_text())
    shown = capsys.readouterr()
    assert "Bits where they count" in shown.out and "schemes: " in shown.err
    assert report["effective_bits"] <= report["allocation"]["effective_bits"] <= 8
    assert report["config"]["bits"] is None and report["config"]["rules"] == report["allocation"]["rules"]
    assert plot.read_text().count("<svg") == 1
