"""Block fine-tuning on tiny random models: what it lowers, what it keeps and what it refuses."""

import numpy as np
import pytest
import torch
from tiny import random_tokens, tiny_llama

from aqlm_c.calibrate.activations import Activations, capture
from aqlm_c.methods.aqlm import AqlmMethod
from aqlm_c.nn.linear import QuantizedLinear
from aqlm_c.quantize import quantize_model
from aqlm_c.recipe import AqlmConfig
from aqlm_c.train import block as block_module
from aqlm_c.train.block import finetune_block, gradient_scale, held_out_batches

CONFIG = AqlmConfig.from_scheme(
    "2x4g8", max_sweeps=1, ldl_passes=1, finetune_epochs=4, finetune_learning_rate=5e-3, finetune_patience=4
)
SEQUENCES = random_tokens(32, 48)


def biased_llama(**options):
    return tiny_llama(num_hidden_layers=3, attention_bias=True, mlp_bias=True, **options)


def tuned(config=CONFIG, model=None, sequences=SEQUENCES, **options):
    model = biased_llama() if model is None else model
    return model, quantize_model(model, sequences, config, **options)


@pytest.mark.parametrize("lookahead", [0, 1, 5])
def test_held_out_error_falls_in_every_block(lookahead):
    _, report = tuned(CONFIG.replace(finetune_lookahead=lookahead))
    assert [block.name for block in report.blocks] == [f"model.layers.{i}" for i in range(3)]
    for block in report.blocks:
        assert block.held_out_after < block.held_out_before
        assert block.training_after < block.training_before
        assert 1 <= block.epochs == len(block.history) - 1 <= 4
    assert report.phases["finetune"] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reported_errors_are_those_of_the_saved_model(dtype):
    original, (model, report) = biased_llama(dtype=dtype), tuned(model=biased_llama(dtype=dtype), batch_size=4)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    batch = SEQUENCES[order].split(4)[4]  # the one that validates: the middle of 8
    assert held_out_batches(8, 0.125) == [4]
    with torch.no_grad():
        dense = tiny_dense(model, dtype)
        y, tuned_y = (m.model(batch, output_hidden_states=True).hidden_states[1].double() for m in (original, dense))
    error = ((y - tuned_y).square().sum() / y.square().sum()).item()
    assert error == pytest.approx(report.blocks[0].held_out_after, rel=1e-4)


def tiny_dense(model, dtype):
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, QuantizedLinear)]:
        model.set_submodule(name, layer.dequantize(dtype))
    return model


def test_everything_continuous_is_trained_and_nothing_else():
    untuned, _ = tuned(CONFIG.replace(finetune_epochs=0))
    model, _ = tuned()
    before, after = untuned.state_dict(), model.state_dict()
    assert before.keys() == after.keys()
    first = {name: tensor for name, tensor in after.items() if name.startswith("model.layers.0.")}
    for name, tensor in first.items():  # later blocks are quantized for other inputs
        same = torch.equal(tensor, before[name])
        assert same == name.endswith(".codes"), name
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(before[name], after[name])
    for parameter in model.parameters():
        assert parameter.grad is None
        assert parameter.requires_grad == parameter.is_floating_point()


def test_gradients_are_accumulated():
    whole = tuned(CONFIG.replace(finetune_batch_size=8), batch_size=8)[0].state_dict()
    parts = tuned(CONFIG.replace(finetune_batch_size=8), batch_size=2)[0].state_dict()
    # Other sequences are held out, but the steps are as many, and alike.
    name = "model.layers.0.input_layernorm.weight"
    start = biased_llama().state_dict()[name]
    moved = [(state[name] - start).abs().mean().item() for state in (whole, parts)]
    assert moved[1] == pytest.approx(moved[0], rel=0.5)


@pytest.mark.parametrize("first", [0, 1])
def test_a_smaller_last_batch_counts_by_its_sequences(monkeypatch, first):
    order = [first, 2, 4, 5, 6, 7, 8, 3]  # 33 sequences in batches of 4: batch 8 has one
    monkeypatch.setattr(torch, "randperm", lambda n, **_: torch.arange(n) if n > 8 else torch.tensor(order[:n]) % n)
    steps = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: steps.append(1) or step(self))
    config = CONFIG.replace(finetune_epochs=1)
    tuned(config, sequences=random_tokens(33, 16), layers="layers.0.mlp")
    assert len(steps) == 8


def test_float16_gradients_do_not_vanish(monkeypatch):
    assert gradient_scale(torch.empty(4, 1024, 4096, dtype=torch.float16, device="meta")) == 2**18
    assert gradient_scale(torch.empty(4, 1024, 4096, dtype=torch.bfloat16, device="meta")) == 1
    small = 2.0**-18  # so many times more values has a large model's batch than a tiny one's
    errors = block_module._Tuner._errors
    monkeypatch.setattr(block_module._Tuner, "_errors", lambda *args: [error * small for error in errors(*args)])
    moved = []
    for dtype, scale in ((torch.float32, 1.0), (torch.float16, 64 / small), (torch.float16, 1.0)):
        monkeypatch.setattr(block_module, "gradient_scale", lambda _, scale=scale: scale)
        model, _ = tuned(model=biased_llama(dtype=dtype), layers="layers.0")
        name = "model.layers.0.post_attention_layernorm.weight"
        moved.append(model.state_dict()[name].float() - biased_llama(dtype=dtype).state_dict()[name].float())
    truth, scaled, unscaled = moved
    assert torch.nn.functional.cosine_similarity(truth, scaled, dim=0) > 0.9
    assert torch.nn.functional.cosine_similarity(truth, unscaled, dim=0) < 0.5


def test_a_rate_that_destroys_keeps_the_start_and_stops_early():
    config = CONFIG.replace(finetune_learning_rate=0.9, finetune_patience=2, finetune_epochs=9)
    model, report = tuned(config, sequences=SEQUENCES[:8], batch_size=1)
    untuned, _ = tuned(config.replace(finetune_epochs=0), sequences=SEQUENCES[:8], batch_size=1)
    block = report.blocks[0]
    assert block.epochs == 2 and block.history[-1][1] > block.history[0][1]
    assert block.held_out_after == block.held_out_before
    kept, start = model.state_dict(), untuned.state_dict()
    assert all(torch.equal(kept[name], start[name]) for name in start if name.startswith("model.layers.0.mlp"))


def test_the_best_epoch_is_kept():
    _, report = tuned(CONFIG.replace(finetune_lookahead=0, finetune_learning_rate=0.05))
    for block in report.blocks:
        errors = [held_out for _, held_out in block.history]
        assert block.held_out_before == errors[0] and block.held_out_after == min(errors)


def test_codes_are_searched_again_where_that_helps(monkeypatch):
    config = CONFIG.replace(finetune_search=1)
    calls = []

    def worse(self, problem, quantized, options):
        assert quantized.codebooks.dtype == quantized.scales.dtype == np.float32 and quantized.codes.dtype == np.int8
        calls.append(quantized.codes)
        return np.zeros_like(quantized.codes)

    monkeypatch.setattr(AqlmMethod, "search_again", worse)
    model, report = tuned(config)
    assert len(calls) == 21 and all(block.searched == 0 for block in report.blocks)
    assert all(layer.codes.unique().numel() > 1 for _, layer in model.named_modules() if hasattr(layer, "codes"))
    monkeypatch.undo()
    model, report = tuned(config)
    assert all(block.held_out_after < block.held_out_before for block in report.blocks)
    assert sum(block.searched for block in report.blocks) > 0
    assert max(block.epochs for block in report.blocks) > 4  # trained before and after


def test_same_seed_same_bits_other_seed_others():
    first, again, other = (
        tuned(CONFIG.replace(seed=seed))[0].state_dict()["model.layers.1.mlp.up_proj.codebooks"] for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_one_sequence_is_too_few():
    with pytest.raises(ValueError, match="sequences: got 1, expected at least 2: fine-tuning"):
        tuned(sequences=SEQUENCES[:1])
    _, report = tuned(CONFIG.replace(finetune_epochs=0), sequences=SEQUENCES[:1])
    assert report.blocks == [] and report.phases["finetune"] == 0


@pytest.mark.parametrize(("n", "share", "expected"), [(16, 0.125, [4, 12]), (2, 0.125, [1]), (3, 0.9, [0, 2])])
def test_held_out_batches_are_spread(n, share, expected):
    assert held_out_batches(n, share) == expected


@pytest.mark.parametrize("batch", [3, 4])  # trained on, held out
def test_nan_in_outputs(batch, caplog):
    model = biased_llama()
    blocks, before = model.model.layers, model.model.layers[0].input_layernorm.weight.clone()
    stream = capture(model, blocks, SEQUENCES, 4)
    targets = Activations([stream.run(0, blocks[0], i) for i in range(8)], stream.arguments)
    targets.hidden[batch] = targets.hidden[batch] * torch.nan
    if batch == 4:
        with pytest.raises(
            ValueError, match="layer 0: got NaN or Inf in the output of this block or of the 2 after it"
        ):
            finetune_block("layer 0", 0, blocks, {}, stream, targets, CONFIG)
        return
    report = finetune_block("layer 0", 0, blocks, {}, stream, targets, CONFIG)
    assert report.epochs == 0 and "NaN or Inf in fine-tuning" in caplog.text
    assert torch.equal(blocks[0].input_layernorm.weight, before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_passes_that_are_replayed_on_a_gpu_are_those_that_are_launched(dtype, monkeypatch, caplog):
    """Also where the last batch is a smaller one, and after codes were searched again."""
    caplog.set_level("INFO")
    replays, plain, found = [], torch.cuda.CUDAGraph.replay, []
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda self: (replays.append(id(self)), plain(self))[1])
    config = CONFIG.replace(finetune_batch_size=8, finetune_search=1, finetune_held_out=0.2)
    for most in (2**38, 0):
        monkeypatch.setattr(block_module, "_LONG", most)
        model, report = tuned(config, biased_llama(dtype=dtype).cuda(), SEQUENCES[:30], batch_size=4)
        found.append((model.state_dict(), [block.history for block in report.blocks], len(replays)))
    assert found[0][2] == found[1][2] >= 3 * 2 * 4 and "CUDA graph" not in caplog.text
    assert found[0][1] == found[1][1]
    assert [name for name, tensor in found[0][0].items() if not torch.equal(tensor, found[1][0][name])] == []
