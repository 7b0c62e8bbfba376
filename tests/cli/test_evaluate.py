"""Perplexity against its formula, written out in float64."""

import math

import pytest
import torch
from tiny import VOCABULARY, random_tokens, tiny_llama

from aqlm_c import evaluate
from aqlm_c.evaluate import perplexity


def formula(model, stream, length, windows):
    """exp(sum_i (mean loss of window i's predicted tokens * length) / (windows * length))."""
    total = 0.0
    for i in range(windows):
        ids = stream[i * length : (i + 1) * length]
        with torch.no_grad():
            log_p = model(ids[None]).logits[0].double().log_softmax(-1)
        total += -log_p[torch.arange(length - 1), ids[1:]].mean().item() * length
    return math.exp(total / (windows * length))


@pytest.mark.parametrize("positions", [1, 7, 256])
def test_perplexity_is_the_gptq_protocol(monkeypatch, positions):
    monkeypatch.setattr(evaluate, "_SLICE", positions)
    model, stream = tiny_llama(), random_tokens(1, 105)[0]
    seen = []
    result = perplexity(model, stream[None], 20, progress=lambda *state: seen.append(state))
    assert result["perplexity"] == pytest.approx(formula(model, stream, 20, 5), rel=1e-6)
    assert (result["windows"], result["tokens"], result["sequence_length"]) == (5, 100, 20)
    assert [state[:2] for state in seen] == [(i + 1, 5) for i in range(5)]
    assert seen[-1][2] == pytest.approx(result["perplexity"])
    first = perplexity(model, stream, 20, windows=2)
    assert first["perplexity"] == pytest.approx(formula(model, stream, 20, 2), rel=1e-6)
    assert first["windows"] == 2


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity():
    model = tiny_llama(dtype=torch.bfloat16)
    torch.nn.init.zeros_(model.lm_head.weight)
    assert perplexity(model, random_tokens(1, 64), 32)["perplexity"] == pytest.approx(VOCABULARY, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_length": 65}, r"input_ids: 64 tokens, expected at least 65"),
        ({"sequence_length": 16, "windows": 5}, r"64 tokens, expected at least 80 for windows=5"),
        ({"sequence_length": 16, "windows": 0}, r"windows: got 0, expected at least 1"),
        ({"sequence_length": 1}, r"sequence_length: got 1, expected at least 2"),
    ],
)
def test_wrong_input(options, message):
    with pytest.raises(ValueError, match=message):
        perplexity(tiny_llama(), random_tokens(1, 64), **options)


def test_a_loss_that_is_not_finite_is_an_error():
    model = tiny_llama()
    model.model.norm.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="window 0 is nan"):
        perplexity(model, random_tokens(1, 64), 32)


def test_a_loss_whose_exponential_overflows_is_an_error():
    model = tiny_llama()
    model.model.norm.weight.data *= 1e4
    with pytest.raises(ValueError, match=r"window 0 is \d+\.\d+, expected a number below 700"):
        perplexity(model, random_tokens(1, 64), 32)


@pytest.mark.parametrize("token", [-1, VOCABULARY])
def test_token_ids_of_another_model_are_an_error(token):
    ids = random_tokens(1, 64)
    ids[0, 40] = token
    with pytest.raises(ValueError, match=rf"input_ids: token id {token}, expected 0\.\.{VOCABULARY - 1}"):
        perplexity(tiny_llama(), ids, 32)
    perplexity(tiny_llama(), ids, 32, windows=1)  # it is not reached
