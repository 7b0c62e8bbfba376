"""Round to nearest: the grid that additive codebooks hold, and the whole way through a run."""

import json

import numpy as np
import pytest
from layers import random_layer
from tiny import BYTES, byte_tokenizer, random_tokens, tiny_llama

from aqlm_c import AqlmConfig, Format, RunConfig, quantize_model, quantize_weight
from aqlm_c.methods import get_method
from aqlm_c.run import run


def rounded(weight, bits):
    """Each weight on the grid of 2^bits values, evenly spaced from minus to plus its row's largest, in float64."""
    largest = np.abs(weight).max(axis=1, keepdims=True).astype(np.float64)
    step = 2 * largest / (2.0**bits - 1)
    return np.rint((weight + largest) / step) * step - largest


@pytest.mark.parametrize(("scheme", "bits"), [("2x8g8", 2), ("1x16g8", 2), ("3x8g8", 3), ("1x8g8", 1), ("4x4g4", 4)])
def test_the_nearest_of_evenly_spaced_values(scheme, bits):
    W, H = random_layer(48, 96)
    found = quantize_weight(W, H, AqlmConfig.from_scheme(scheme, solver="rtn"), dtype="float32")
    truth = rounded(W, bits)
    wrong = np.abs(found.decode() - truth) > 1e-5 * np.abs(W).max()
    assert wrong.mean() < 1e-3  # ties may go either way
    D = W - found.decode().astype(np.float64)
    assert found.relative_error == pytest.approx(np.sum((D @ H) * D) / np.sum((W @ H) * W), rel=1e-4)


@pytest.mark.parametrize("scheme", ["3x3g8", "1x8g16", "2x5g8"])
def test_bits_that_the_group_does_not_divide(scheme):
    """The first weights of a group have one bit more; without a bit a weight is zero."""
    W, H = random_layer(32, 64)
    format = Format.parse(scheme)
    total, g = format.num_codebooks * format.nbits_per_codebook, format.in_group_size
    decoded = quantize_weight(W, H, AqlmConfig(format, solver="rtn"), dtype="float32").decode()
    for i in range(g):
        bits = total // g + (i < total % g)
        values = (decoded / np.abs(W).max(axis=1, keepdims=True))[:, i::g]
        assert len(np.unique(values.round(4))) <= 2**bits and np.abs(values).max() <= 1 + 1e-5
        assert (values == 0).all() == (bits == 0)


def test_a_row_of_zeros_stays_zero():
    W, H = random_layer(8, 32)
    W[3] = 0
    decoded = quantize_weight(W, H, AqlmConfig.from_scheme("2x8g8", solver="rtn")).decode()
    assert not decoded[3].any() and decoded[2].any()


def test_what_it_refuses():
    with pytest.raises(ValueError, match=r"scheme: got '8x16g4', expected at most 16 bits per weight"):
        AqlmConfig.from_scheme("8x16g4", solver="rtn").check_searchable()
    with pytest.raises(ValueError, match="unknown option 'beam_size' with solver='rtn'"):
        RunConfig("m", "o", solver="rtn", beam_size=4).resolve()


def test_presets_and_estimates_leave_out_what_it_does_not_have():
    config = RunConfig("m", "o", solver="rtn", preset="fast").resolve().config
    assert config.tuning.finetune_epochs == 0 and "ldl_passes" not in config.to_dict()
    method = get_method("rtn")
    assert method.seconds_per_group(config.format, config.options) == 0
    assert method.cost(config.format, (64, 64), config.options).group_searches == 0


def test_a_run_its_report_and_its_resumption(tmp_path):
    tiny_llama(vocab_size=BYTES).save_pretrained(tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    options = {"scheme": "2x4g4", "solver": "rtn", "finetune_epochs": 1, "finetune_search": 1}
    options |= {"samples": 4, "sequence_length": 16, "work_dir": str(tmp_path / "work")}
    reports = [run(RunConfig(tmp_path / "dense", tmp_path / name, **options)) for name in ("first", "second")]
    assert [layer.relative_error for layer in reports[0].layers] == [
        layer.relative_error for layer in reports[1].layers
    ]
    written = json.loads((tmp_path / "second" / "report.json").read_text())
    assert written["config"]["solver"] == "rtn" and len(written["layers"]) == 14 and len(written["blocks"]) == 2
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second")]
    assert files[0] == files[1]


def test_without_data():
    model = tiny_llama(tie_word_embeddings=False)
    report = quantize_model(model, None, AqlmConfig.from_scheme("2x8g8", solver="rtn"))
    assert len(report.layers) == 14 and report.tokens == 0 and not report.blocks
    assert model(random_tokens(1, 8)).logits.isfinite().all()
