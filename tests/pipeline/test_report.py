"""The report: its figures, its tables and its JSON."""

import io
import json
import math
import re
import sys

import pytest

from aqlm_c.files import write_json
from aqlm_c.report.layers import BlockReport, LayerReport, decibels
from aqlm_c.report.report import QuantizationReport


def layer(name, error=0.02, out=64, bits=2.5):
    return LayerReport(name, out, 32, "2x8g8", error, bits, gaussian_code_rate=0.01, gaussian_true_rate=0.005)


@pytest.fixture
def report():
    names = ("self_attn.q_proj", "mlp.experts.0.w1", "mlp.experts.1.w1")
    layers = [layer(f"model.layers.{block}.{name}", 0.02 * (block + 1)) for block in range(2) for name in names]
    layers.append(layer("model.layers.0.mlp.down_proj", out=192, bits=2.1))
    sizes = {"original_bytes": 90_000_000, "original_embedding_bytes": 30_000_000}
    sizes |= {"quantized_bytes": 70_000_000, "quantized_embedding_bytes": 50_000_000}
    return QuantizationReport(
        layers=layers, phases={"load": 1.0, "quantize": 2.5}, tokens=4096, sequences=4, peak_memory_bytes=3 * 2**29,
        sizes=sizes, threads=2, isa="avx2", note="The original is small.",
    )  # fmt: skip


def render(report, width=80):
    console = pytest.importorskip("rich.console").Console(file=io.StringIO(), width=width)
    console.print(report)
    return console.file.getvalue()


def test_distance_to_the_gaussian_reference():
    assert layer("a").db_above_code_rate == pytest.approx(10 * math.log10(2))
    assert layer("a").db_above_true_rate == pytest.approx(10 * math.log10(4))
    assert layer("a", error=0.005).db_above_code_rate == pytest.approx(-10 * math.log10(2))
    assert decibels(0.1, None) is None
    assert decibels(0.1, 0.0) is None
    assert decibels(0.0, 0.1) is None


def test_bits_per_weight_counts_weights(report):
    assert report.bits_per_weight == pytest.approx((6 * 64 * 2.5 + 192 * 2.1) / (6 * 64 + 192))
    assert QuantizationReport().bits_per_weight == 0


def test_json_holds_every_field_and_the_distances(report):
    read = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert read["layers"][0]["db_above_code_rate"] == pytest.approx(3.0103)
    assert read["layers"][0]["relative_error"] == 0.02
    assert read["bits_per_weight"] == pytest.approx(report.bits_per_weight)
    assert read["sizes"]["quantized_embedding_bytes"] == 50_000_000
    assert read["phases"] == {"load": 1.0, "quantize": 2.5}
    assert read["versions"]["python"]
    assert read["versions"]["numpy"]


def test_tables_fit_80_columns_and_group_layers_by_kind(report):
    text = render(report)
    rows = {words[0]: words[1:] for line in text.splitlines() if (words := line.split())}
    assert rows["self_attn.q_proj"] == ["2", "64x32", "0.03000", "0.04000", "+4.52", "+7.53", "2.50"]
    assert rows["mlp.experts.*.w1"][0] == "4"
    assert rows["mlp.down_proj"] == ["1", "192x32", "0.02000", "0.02000", "+3.01", "+6.02", "2.10"]
    assert rows["original"] == ["90.0", "MB", "30.0", "MB", "60.0", "MB"]
    assert rows["quantized"] == ["70.0", "MB", "50.0", "MB", "20.0", "MB"]
    assert "The original is small." in text
    assert "1.50 GiB" in text
    assert "total 3.5" in text
    assert "…" not in text


@pytest.fixture
def tuned(report):
    history = [(0.03, 0.05), (0.025, 0.04)]
    report.blocks = [
        BlockReport(f"model.layers.{i}", 0.05, 0.025, 0.08, 0.04, 2, history, searched=3) for i in (0, 129)
    ]
    report.blocks.append(BlockReport("model.layers.130", held_out_before=0.1))
    report.diagnoses = ["Fewer calibration tokens than [needed] " + "in many words " * 8 + "at the end."]
    return report


def test_blocks_show_the_output_error_before_and_after_fine_tuning(tuned):
    text = render(tuned)
    rows = {words[0]: words[1:] for line in text.splitlines() if (words := line.split())}
    assert rows["model.layers.129"] == ["0.08000", "0.04000", "-50%", "0.05000", "0.02500", "2"]
    assert rows["model.layers.130"] == ["0.10000", "-", "-", "-", "-", "0"]
    assert "…" not in text


def test_diagnoses_come_last_word_for_word(tuned):
    text = render(tuned)
    assert " ".join(text.split()).endswith("! " + tuned.diagnoses[0])
    assert max(map(len, text.splitlines())) <= 80


def test_layer_and_block_reports_survive_json(tuned):
    read = json.loads(json.dumps(tuned.to_dict(), allow_nan=False))
    assert [LayerReport.from_dict(fields) for fields in read["layers"]] == tuned.layers
    assert [BlockReport.from_dict(fields) for fields in read["blocks"]] == tuned.blocks
    assert read["diagnoses"] == tuned.diagnoses


def test_tables_without_references_or_original(report):
    report.layers[0].gaussian_code_rate = report.layers[3].gaussian_code_rate = None
    del report.sizes["original_bytes"]
    text = render(report)
    assert " - " in text
    assert "original  " not in text
    assert "quantized" in text


def test_a_notebook_shows_the_tables_and_repr_is_one_short_line(tuned, monkeypatch):
    pytest.importorskip("rich")
    assert repr(tuned) == (
        "<QuantizationReport: 7 layers of 2x8g8, 2.367 bits per weight, mean relative error 0.02857, "
        "4,096 tokens, 3.5 s>"
    )
    shown = tuned._repr_html_()
    assert shown.startswith("<pre") and shown.endswith("</pre>") and "<script" not in shown
    for part in ("mlp.experts.*.w1", "model.layers.129", "than [needed] in many", "1.50 GiB"):
        assert part in re.sub(r"<[^>]+>", "", shown)
    assert repr(QuantizationReport()).startswith("<QuantizationReport: 0 layers") and QuantizationReport()._repr_html_()
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert tuned._repr_html_() is None  # and IPython takes repr


def test_frames_have_a_row_for_each_layer_or_block(tuned, monkeypatch):
    with monkeypatch.context() as context:
        context.setitem(sys.modules, "pandas", None)
        with pytest.raises(
            ImportError, match="pandas: got none that is installed here, expected one: pip install pandas"
        ):
            tuned.to_frame()
    with pytest.raises(ValueError, match="what: got 'rows', expected 'layers' or 'blocks'"):
        tuned.to_frame("rows")
    pytest.importorskip("pandas")
    layers, blocks = tuned.to_frame(), tuned.to_frame("blocks")
    assert list(layers.index) == [layer.name for layer in tuned.layers]
    assert list(layers["relative_error"]) == [layer.relative_error for layer in tuned.layers]
    assert layers.loc["model.layers.0.mlp.down_proj", "db_above_code_rate"] == tuned.layers[-1].db_above_code_rate
    assert list(blocks.index) == [block.name for block in tuned.blocks] and blocks["epochs"].sum() == 4
    empty = QuantizationReport().to_frame()
    assert len(empty) == 0 and "relative_error" in empty


def test_json_file_is_never_half_written(tmp_path):
    path = tmp_path / "report.json"
    write_json(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"a": math.nan})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]
