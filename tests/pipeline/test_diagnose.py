"""Diagnoses of a report: each by its key words and figures, and none for a healthy run."""

import pytest

from aqlm_c.format import Format
from aqlm_c.report.diagnose import diagnose
from aqlm_c.report.report import BlockReport, LayerReport, QuantizationReport


def layers(scheme="2x8g8", out=1536, in_features=576, n=7, db=2.6, tokens=None):
    bits = Format.parse(scheme).bits_per_weight(out, in_features)
    error = 0.01 * 10 ** (db / 10)
    return [
        LayerReport(f"model.layers.{i}.up", out, in_features, scheme, error, bits, 0.012, 0.01, tokens=tokens)
        for i in range(n)
    ]


def block(history, name="model.layers.4", before=(0.05, 0.06)):
    return BlockReport(
        name, before[0], history[-1][0], before[1], min(h for _, h in history), len(history) - 1, history
    )


FALLING = [(0.03, 0.04), (0.02, 0.03), (0.018, 0.0301)]


def test_a_healthy_report_gives_none():
    small = layers(out=192, db=5.5)  # the smallest layers of SmolLM2 with the default scheme
    report = QuantizationReport(layers=layers() + small[:3], blocks=[block(FALLING)], tokens=65536)
    assert diagnose(report) == []
    assert diagnose(QuantizationReport()) == []


def only(report, *words):
    """The one sentence of `report`, which holds all `words`."""
    (sentence,) = diagnose(report)
    for word in words:
        assert word in sentence
    assert sentence.endswith(".") and "\n" not in sentence
    return sentence


def test_few_calibration_tokens():
    sentence = only(
        QuantizationReport(layers=layers(n=210), tokens=1000),
        "Fewer calibration tokens than twice in_features",
        "210 layers (model.layers.0.up, model.layers.1.up, model.layers.2.up, ...)",
        "1,000 tokens for in_features=576",
        "at least 1,152",
        "1.2 times the tokens",
    )
    assert "layers.3." not in sentence
    assert diagnose(QuantizationReport(layers=layers(), tokens=1152)) == []


def test_an_expert_may_see_too_few_of_many_tokens():
    expert = layers(n=1, tokens=100)
    only(QuantizationReport(layers=layers() + expert, tokens=65536), "1 layer (", "down to 100 tokens")


def test_codebook_larger_than_the_codes():
    only(
        QuantizationReport(layers=layers("1x16g8", 576, 576, n=1), tokens=65536),
        "Codebook larger than the layer's codes",
        "1x16g8",
        "65,536 entries",
        "41,472 groups",
        "27.3 true bits",
        "2x8",
    )


@pytest.mark.parametrize(("out", "expected"), [(1536, True), (24576, False)])
def test_codebooks_take_a_large_share_of_the_bits(out, expected):
    report = QuantizationReport(layers=layers("1x16g8", out, 2048, n=2), tokens=65536)
    if expected:
        only(report, "Codebooks take up to 57% of the true bits", "4.67 per weight", "2 layers")
    else:
        assert diagnose(report) == []


def test_held_out_error_rising_while_training_falls():
    rising = [(0.03, 0.04), (0.02, 0.05)]
    blocks = [block(FALLING), block(rising), block(rising, "model.layers.9")]
    only(
        QuantizationReport(layers=layers(), blocks=blocks, tokens=65536),
        "Held-out error rises while the training error falls",
        "2 blocks (model.layers.4, model.layers.9)",
        "25%",
        "finetune_learning_rate",
    )


def test_held_out_error_that_never_fell_counts_from_before_tuning():
    only(QuantizationReport(blocks=[block([(0.05, 0.06), (0.04, 0.09)])]), "1 block (model.layers.4)", "50%")


def test_both_errors_rising_is_no_overfitting():
    assert diagnose(QuantizationReport(blocks=[block([(0.03, 0.04), (0.07, 0.09)])])) == []
    assert diagnose(QuantizationReport(blocks=[BlockReport("a")])) == []


def test_layers_far_from_the_reference():
    far = layers(db=6.5, n=1)
    far[0].name = "model.layers.0.o_proj"
    only(
        QuantizationReport(layers=layers() + far, tokens=65536),
        "Far from the Gaussian reference",
        "not a bound",
        "1 layer (model.layers.0.o_proj), up to 6.5 dB",
        "median of all layers 2.6 dB",
    )
    only(QuantizationReport(layers=layers(db=12.0), tokens=65536), "7 layers", "12.0 dB")


@pytest.mark.parametrize(
    ("scheme", "config", "said", "unsaid"),
    [
        ("2x8g8", {}, "give such layers more sweeps (max_sweeps), a scheme", "beam_size"),
        ("2x8g8", {"beam_size": 16}, "give such layers beam_size=0, which is exact for two codebooks, more", "larger"),
        ("1x16g8", {}, "give such layers more sweeps", "beam_size"),
        ("2x12g8", {}, "give such layers a larger beam_size, more sweeps", "beam_size=0"),
        ("4x8g8", {}, "give such layers a larger beam_size, more sweeps", "beam_size=0"),
        ("2x8g8", {"solver": "paper"}, "a larger beam_size, more Adam steps (adam_steps)", "sweeps"),
        ("1x8g8", {"solver": "paper"}, "give such layers more Adam steps", "beam_size"),
        ("2x8g8", {"solver": "rtn"}, "give such layers another solver", "beam_size"),
    ],
)
def test_advice_is_what_helps_this_format(scheme, config, said, unsaid):
    far = layers(scheme, out=2**20, in_features=4096, db=12.0)
    sentence = only(QuantizationReport(layers=far, tokens=65536, config=config), said, "or leave them out by --layers")
    assert unsaid not in sentence


def test_layers_that_no_token_reached():
    silent = layers(n=2, tokens=0)
    only(QuantizationReport(layers=layers() + silent, tokens=65536), "No calibration token reached 2 layers", "white")
    assert diagnose(QuantizationReport(layers=layers(tokens=0))) == []  # without data
