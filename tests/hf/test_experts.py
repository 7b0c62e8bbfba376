"""Mixtures of experts: published names in, the same names out, and calibration of experts that see few tokens."""

import copy
import json
import logging

import numpy as np
import pytest
import torch
import transformers
from loading import load, prefill_and_decode, quantized_names
from safetensors.numpy import load_file, save_file
from tiny import VOCABULARY, encode, quantization_config, random_model, random_tokens
from transformers import AutoModelForCausalLM, MixtralConfig

import aqlm_c.hf  # noqa: F401  (registers)
from aqlm_c.calibrate.activations import Activations, capture
from aqlm_c.calibrate.hessians import HessianSums
from aqlm_c.io.checkpoint import save_quantized
from aqlm_c.model import experts
from aqlm_c.model.blocks import find_blocks, routers
from aqlm_c.quantize import quantize_model
from aqlm_c.recipe import AqlmConfig

EXPERTS = 4
H, WIDTH = 32, 48
fuses = pytest.mark.skipif(int(transformers.__version__.split(".")[0]) < 5, reason="experts are lists already")
QUICK = {"max_sweeps": 1, "ldl_passes": 1, "init_max_iter": 2}


def tiny_mixtral(n_experts=EXPERTS, **options):
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=H,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        num_local_experts=n_experts,
        num_experts_per_tok=2,
        initializer_range=0.1,
        **options,
    )
    model = random_model(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate.weight"):
                parameter.mul_(20)  # routes that rounding does not change
    return model


def write_mixtral(directory, scheme):
    """Write a random Mixtral as upstream publishes it; returns the dense model of the same weights.

    Nothing of aqlm_c is used, and of transformers only the dense checkpoint of the same model.
    """
    rng = np.random.default_rng(0)
    tiny_mixtral().save_pretrained(directory)
    dense = load_file(directory / "model.safetensors")
    tensors = {}
    for name in list(dense):
        part = name.removesuffix(".weight")
        if "self_attn" in name or ".experts." in name:
            codes, codebooks, scales, weight = encode(rng, *dense[name].shape, scheme)
            tensors |= {f"{part}.codes": codes, f"{part}.codebooks": codebooks, f"{part}.scales": scales}
            dense[name] = weight.astype(np.float32)
        else:
            tensors[name] = dense[name]
    assert "model.layers.0.block_sparse_moe.experts.3.w1.codes" in tensors
    assert "model.layers.1.block_sparse_moe.gate.weight" in tensors
    save_file(dense, directory / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = quantization_config(scheme, [name for name in tensors if name.endswith("weight")])
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return model


@pytest.mark.parametrize("scheme", [(2, 8, 8, 1), (1, 16, 8, 1)], ids=["2x8g8", "1x16g8"])
@torch.no_grad()
def test_a_published_mixtral(tmp_path, scheme):
    dense = write_mixtral(tmp_path, scheme)
    model = load(tmp_path)
    assert len(quantized_names(model)) == 2 * (4 + 3 * EXPERTS)
    tokens = random_tokens(2, 12)
    expected = dense(tokens).logits
    bound = 1e-5 * expected.abs().max()
    assert (model(tokens).logits - expected).abs().max() <= bound
    cache = model(tokens[:, :-2], use_cache=True).past_key_values
    for position in (-2, -1):
        end = position + 1 or None
        decoded = model(tokens[:, position:end], past_key_values=cache).logits[:, 0]
        assert (decoded - expected[:, position]).abs().max() <= bound

    errors = []  # means, of many sequences: the largest is that of a token whose router chose otherwise, near a tie
    many = random_tokens(32, 12)
    truth = dense(many).logits
    for one in (copy.deepcopy(dense).bfloat16(), load(tmp_path, dtype=torch.bfloat16)):
        logits, decoded = prefill_and_decode(one, many)
        errors.append(((logits - truth).abs().mean(), (decoded - truth[:, -1]).abs().mean()))
    assert all(ours <= 2 * own for own, ours in zip(*errors, strict=True))

    model.save_pretrained(tmp_path / "again")
    stored, again = (load_file(path / "model.safetensors") for path in (tmp_path, tmp_path / "again"))
    assert again.keys() == stored.keys()
    assert all(again[name].tobytes() == stored[name].tobytes() for name in stored)
    assert torch.equal(load(tmp_path / "again")(tokens).logits, model(tokens).logits)

    model.dequantize().save_pretrained(tmp_path / "dense")
    assert not quantized_names(model)
    assert set(load_file(tmp_path / "dense" / "model.safetensors")) == {
        name.replace(".codes", ".weight") for name in stored if name.endswith(("weight", "codes"))
    }
    plain = load(tmp_path / "dense")
    assert torch.equal(plain(tokens).logits, model(tokens).logits)
    assert (plain(tokens).logits - expected).abs().max() <= bound


@fuses
def test_the_body_alone(tmp_path):
    dense = write_mixtral(tmp_path, (2, 8, 8, 1))
    body = transformers.AutoModel.from_pretrained(tmp_path)
    assert len(quantized_names(body)) == 2 * (4 + 3 * EXPERTS)
    tokens = random_tokens(2, 12)
    with torch.no_grad():
        expected = dense.model(tokens).last_hidden_state
        assert (body(tokens).last_hidden_state - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_an_expert_that_lacks_a_tensor_is_named(tmp_path):
    write_mixtral(tmp_path, (2, 8, 8, 1))
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.block_sparse_moe.experts.2.w3.scales"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"block_sparse_moe\.experts\.2\.w3\.scales: missing"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_quantized_attention_and_dense_experts(tmp_path):
    model = tiny_mixtral()
    names = set(model.state_dict())
    quantize_model(
        model, random_tokens(4, 16), AqlmConfig.from_scheme("2x4g8", finetune_epochs=0, **QUICK), layers="self_attn"
    )
    dense = {name for name in names if "self_attn" not in name}
    assert dense <= set(model.state_dict())  # experts as they were
    save_quantized(model, None, tmp_path / "out")
    loaded = load(tmp_path / "out")
    tokens = random_tokens(2, 12)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_quantized_experts_of_one_block(tmp_path):
    model = tiny_mixtral()
    config = AqlmConfig.from_scheme("2x4g8", finetune_epochs=0, **QUICK)
    report = quantize_model(model, random_tokens(4, 16), config, layers=r"layers\.1\..*experts\.\d+\.w[12]$")
    assert len(report.layers) == 2 * EXPERTS
    save_quantized(model, None, tmp_path / "out")
    kept = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    stored = load_file(tmp_path / "out" / "model.safetensors")
    # the list holds names of the file, which is what other programs compare with: of parameters, and of linear modules
    names = set(kept["linear_weights_not_to_quantize"])
    parameters = {name for name in stored if name.endswith("weight")}
    assert names >= parameters | {"lm_head"} and {f"{name}.weight" for name in names - parameters} <= parameters
    loaded = load(tmp_path / "out")
    assert quantized_names(loaded) == quantized_names(model)
    tokens = random_tokens(2, 12)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


# ---- fused and not --------------------------------------------------------------------------------------------


@fuses
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_unfused_equals_fused_and_shares_its_memory(implementation):
    model = tiny_mixtral()
    model.config._experts_implementation = implementation
    fused = model.model.layers[0].mlp.experts
    weight = fused.gate_up_proj
    expected = weight.detach().clone()
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(20, H, generator=generator)
    scores, chosen = torch.rand(20, EXPERTS - 1, generator=generator).topk(2)  # the last expert is never chosen
    with torch.no_grad():
        want = fused(hidden, chosen, scores)
    state = {name: value.clone() for name, value in model.state_dict().items()}

    experts.unfuse(model)
    unfused = model.model.layers[0].mlp.experts
    assert [name for name, _ in unfused.named_children()] == [str(i) for i in range(EXPERTS)]
    assert {name for name, _ in unfused[0].named_parameters()} == {"w1.weight", "w2.weight", "w3.weight"}
    assert unfused[1].w1.weight.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
    with torch.no_grad():
        torch.testing.assert_close(unfused(hidden, chosen, scores), want, rtol=1e-5, atol=1e-6)
    inputs = hidden.clone().requires_grad_()
    unfused(inputs, chosen, scores).sum().backward()
    assert inputs.grad.abs().sum() > 0 and unfused[0]["w2"].weight.grad is not None

    twin = copy.deepcopy(model)  # nothing of it may be tied to the first
    for one in (model, twin):
        experts.fuse(one)
        assert one.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[name]) for name, value in one.state_dict().items())
    assert torch.equal(model.model.layers[0].mlp.experts.gate_up_proj, expected)


@fuses
def test_experts_of_another_layout_stay_dense_with_a_warning(caplog):
    config = transformers.GptOssConfig(
        vocab_size=VOCABULARY,
        hidden_size=H,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=EXPERTS,
        pad_token_id=0,
    )
    model = random_model(config)
    before = model.model.layers[0].mlp.experts.gate_up_proj.detach().clone()
    with caplog.at_level(logging.WARNING, "aqlm_c"):
        report = quantize_model(
            model, random_tokens(4, 16), AqlmConfig.from_scheme("2x4g8", finetune_epochs=0, **QUICK)
        )
    assert "model.layers.0.mlp.experts (GptOssExperts) stays dense" in caplog.text
    assert len(report.layers) == 8 and not any("experts" in layer.name for layer in report.layers)
    assert torch.equal(model.model.layers[0].mlp.experts.gate_up_proj, before)


# ---- calibration ----------------------------------------------------------------------------------------------


def test_routers_are_not_quantized():
    model = tiny_mixtral()
    experts.unfuse(model)
    block = find_blocks(model)[1][0]
    gates = {name for name, module in block.named_modules() if name.endswith(".gate")}
    assert len(gates) == 1
    linears = {name for name, module in block.named_modules() if isinstance(module, torch.nn.Linear)}
    assert routers(block) == gates & linears


def starve(model, expert):
    """Let the router of the first block send nothing to `expert`."""
    mlp = next(module for name, module in model.named_modules() if name.endswith(("0.mlp", "0.block_sparse_moe")))
    weight = mlp.gate.weight.data
    forward = mlp.forward

    def prefer_others(hidden_states):  # by a direction of its input that is always positive
        hidden_states = hidden_states.clone()
        hidden_states[..., 0] = 5.0
        return forward(hidden_states)

    weight[:, 0] = 3.0
    weight[expert, 0] = -100.0
    mlp.forward = prefer_others


def hessian_sums(model, tokens, batch_size):
    experts.unfuse(model)
    prefix, blocks = find_blocks(model)
    linears = {
        f"{prefix}.0.{name}": module
        for name, module in blocks[0].named_modules()
        if isinstance(module, torch.nn.Linear) and ".experts." in name
    }
    stream = capture(model, blocks, tokens, batch_size)
    inputs = {name: [] for name in linears}
    for name, linear in linears.items():
        linear.register_forward_pre_hook(lambda _, args, name=name: inputs[name].append(args[0]))
    sums = HessianSums(linears)
    sums.gather(stream, 0, blocks[0])
    return sums, inputs


def gram(inputs):
    x = torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs]).double().numpy()
    return x.T @ x / len(x)


def test_each_expert_has_the_h_of_its_own_tokens(caplog):
    # batches of one short sequence: most leave some expert without a token, and the last one called varies
    sums, inputs = hessian_sums(tiny_mixtral(), random_tokens(64, 4), 1)
    with caplog.at_level(logging.WARNING, "aqlm_c"):
        hessians = sums.hessians()
    assert not caplog.records
    counts = {name: sum(len(x.reshape(-1, x.shape[-1])) for x in seen) for name, seen in inputs.items()}
    assert any(len(seen) < 64 for seen in inputs.values()) and min(counts.values()) >= WIDTH
    for name, seen in inputs.items():
        np.testing.assert_allclose(hessians[name].H, gram(seen), rtol=1e-4, atol=1e-5)
        assert sums.tokens_of(name) == counts[name]
        if name.endswith("w1"):  # one object for the two linears of an input
            assert hessians[name] is hessians[name.replace("w1", "w3")] is not hessians[name.replace("w1", "w2")]


def test_no_token_of_an_expert_is_lost_and_none_is_no_shared_input():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))

        def forward(self, x):
            for index, expert in enumerate(self.experts):
                expert(x[x[:, 0] == index])
            return x

    block = Block()
    x = torch.randn(5, 16, 4, generator=torch.Generator().manual_seed(0))
    # to no expert, to the second, to the first, and to both in two batches: none of these ends before the second
    x[:, :, 0] = torch.tensor([[2, 2], [1, 1], [0, 0], [0, 1], [0, 1]]).repeat(1, 8)
    sums = HessianSums({f"experts.{index}": expert for index, expert in enumerate(block.experts)})
    sums.gather(Activations(list(x), [[((), {})]] * len(x)), 0, block)
    hessians = sums.hessians()
    for index in range(2):
        H = hessians[f"experts.{index}"].H
        np.testing.assert_allclose(H, gram([x[x[:, :, 0] == index]]), rtol=1e-5, atol=1e-6)


def test_experts_with_few_tokens_share_a_pooled_h_and_a_warning_names_them(caplog):
    model = tiny_mixtral()
    starve(model, 2)
    sums, inputs = hessian_sums(model, random_tokens(32, 6), 4)
    assert not any(inputs[name] for name in inputs if ".2." in name)
    with caplog.at_level(logging.WARNING, "aqlm_c"):
        hessians = sums.hessians()
    (record,) = caplog.records
    for kind in ("w1", "w2", "w3"):
        starved = next(name for name in inputs if name.endswith(f"experts.2.{kind}"))
        assert starved in record.getMessage() and starved.replace(".2.", ".1.") not in record.getMessage()
        seen = [x for name, all_x in inputs.items() if name.endswith(kind) for x in all_x]
        np.testing.assert_allclose(hessians[starved].H, gram(seen), rtol=1e-4, atol=1e-5)
        assert sums.tokens_of(starved) == 2 * 32 * 6


def test_quantizing_with_starved_experts_and_fine_tuning(tmp_path, caplog):
    model = tiny_mixtral(8)
    starve(model, 5)
    tokens = random_tokens(6, 6)
    gate = next(value for name, value in model.state_dict().items() if name.endswith("gate.weight")).clone()
    with caplog.at_level(logging.WARNING, "aqlm_c"):
        report = quantize_model(model, tokens, AqlmConfig.from_scheme("2x4g8", finetune_epochs=2, **QUICK))
    warned = [record.getMessage() for record in caplog.records if "experts taken" in record.getMessage()]
    assert len(warned) == 2 and "layers.0." in warned[0] and "layers.1." in warned[1]  # one a block
    assert len(report.layers) == 2 * (4 + 3 * 8) and len(report.blocks) == 2
    assert all(block.held_out_after <= block.held_out_before for block in report.blocks)
    assert all(np.isfinite(layer.relative_error) and layer.tokens > 0 for layer in report.layers)
    after = next(value for name, value in model.state_dict().items() if name.endswith("gate.weight"))
    assert torch.equal(after, gate)
    save_quantized(model, None, tmp_path / "out")
    assert len(quantized_names(load(tmp_path / "out"))) == 2 * (4 + 3 * 8)
