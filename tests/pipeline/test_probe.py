"""What is quantized is decided by what a short pass shows: blocks by what runs, linears by what they compute."""

import logging

import numpy as np
import pytest
import torch
import transformers
from tiny import FAST, random_model, random_tokens, tiny_llama
from transformers import LlamaConfig

from aqlm_c.calibrate.activations import Activations
from aqlm_c.calibrate.hessians import HessianSums
from aqlm_c.calibrate.sources import SequenceCalibration
from aqlm_c.model.blocks import find_blocks
from aqlm_c.model.probe import NOT_CALLED, NOT_PLAIN, token_ids
from aqlm_c.nn.linear import QuantizedLinear
from aqlm_c.pipeline.plan import make_plan
from aqlm_c.pipeline.progress import Progress
from aqlm_c.quantize import quantize_model
from aqlm_c.recipe import AqlmConfig
from aqlm_c.report.report import QuantizationReport

CONFIG = AqlmConfig.from_scheme("1x4g8", **FAST)
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def hooks_of(model):
    return [hook for module in model.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]


# ---- linears --------------------------------------------------------------------------------------------------


class Scaled(torch.nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


class TwoInputs(torch.nn.Linear):
    def forward(self, x, _other=None):
        return super().forward(x)


class TwoOutputs(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x), x


class Harmless(torch.nn.Linear):
    pass


class TakesTwo(torch.nn.Module):
    def __init__(self, linear, call):
        super().__init__()
        self.linear, self.call = linear, call

    def forward(self, x):
        return self.call(self.linear, x)


def put(model, name, kind):
    """A linear of class `kind` in the place of a plain one, its weights the same."""
    old = model.get_submodule(name)
    new = kind(old.in_features, old.out_features, bias=False)
    new.weight = old.weight
    model.set_submodule(name, new)
    return new


NAME = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    "change", ["scaled", "hook", "pre-hook", "two inputs", "two outputs", "by name", "own forward"]
)
def test_a_linear_that_does_more_stays_dense_with_a_warning(change, caplog, monkeypatch):
    model, name = tiny_llama(), NAME
    monkeypatch.setattr("aqlm_c.hf.quantizer.check_loads", lambda *_: None)  # its config knows nothing of `TakesTwo`
    if change == "scaled":
        put(model, name, Scaled)
    elif change == "hook":
        model.get_submodule(name).register_forward_hook(lambda _module, _args, output: output * 1.01)
    elif change == "pre-hook":
        model.get_submodule(name).register_forward_pre_hook(lambda _module, args: (args[0] * 1.01,))
    elif change == "own forward":
        linear = model.get_submodule(name)
        plain = linear.forward
        linear.forward = lambda x: plain(x).relu()
    else:
        calls = {
            "two inputs": (TwoInputs, lambda linear, x: linear(x, x)),
            "two outputs": (TwoOutputs, lambda linear, x: linear(x)[0]),
            "by name": (Harmless, lambda linear, x: linear(input=x)),
        }
        kind, call = calls[change]
        model.set_submodule(name, TakesTwo(put(model, name, kind), call))
        name += ".linear"
    before = model.get_submodule(name)
    hooks = hooks_of(before)
    with caplog.at_level(logging.WARNING, "aqlm_c"):
        report = quantize_model(model, random_tokens(4, 12), CONFIG)
    assert len(report.layers) == 13 and model.get_submodule(name) is before
    assert report.plan["dense"][NOT_PLAIN] == [name]
    assert "mlp.up_proj" in caplog.text and "stay dense" in caplog.text
    assert hooks_of(before) == hooks


def test_a_subclass_and_a_hook_that_change_nothing_are_quantized():
    model, seen = tiny_llama(), []
    put(model, NAME, Harmless)
    model.get_submodule("model.layers.0.mlp.up_proj").register_forward_hook(lambda *call: seen.append(call))
    assert len(quantize_model(model, None, CONFIG).layers) == 14


class BitLinear(torch.nn.Linear):
    """As transformers' AutoBitLinear: weights of three values, inputs of 8 bits."""

    def forward(self, x):
        scale, step = self.weight.abs().mean(), x.abs().max(dim=-1, keepdim=True).values / 127
        weight = (self.weight / scale).round().clamp(-1, 1) * scale
        return torch.nn.functional.linear((x / step).round() * step, weight)


def test_linears_of_bitnet_stay_dense():
    model = tiny_llama()
    names = [f"model.layers.{index}.mlp.down_proj" for index in range(2)]
    for name in names:
        put(model, name, BitLinear)
    plan = make_plan(model, CONFIG)
    assert plan.n_layers == 12
    assert [name for name, reason in plan.dense.items() if reason == NOT_PLAIN] == names


def test_experts_that_no_token_reaches_are_called():
    sizes = {**SIZES, "num_hidden_layers": 2, "num_local_experts": 16, "num_experts_per_tok": 1}
    model = random_model(transformers.MixtralConfig(**sizes))
    assert make_plan(model, CONFIG).n_layers == 2 * (4 + 3 * 16)


def test_weights_that_linears_share_stay():
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    plan = make_plan(model, CONFIG)
    assert plan.n_layers == 12
    assert [name for name, reason in plan.dense.items() if reason == "shares its weight"] == [
        f"model.layers.{index}.mlp.up_proj" for index in range(2)
    ]


def test_a_pass_leaves_no_trace():
    model = tiny_llama().train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    find_blocks(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert not hooks_of(model) and not any("forward" in vars(module) for module in model.modules())


def test_tokens_of_a_pass_are_none_that_the_config_names():
    model = tiny_llama(pad_token_id=0, bos_token_id=1, eos_token_id=[2, 7])
    ids = token_ids(model).flatten().tolist()
    assert len(set(ids)) == len(ids) == 8 and not {0, 1, 2, 7} & set(ids) and max(ids) < 96


# ---- blocks ---------------------------------------------------------------------------------------------------


class Twice(torch.nn.ModuleList):
    """Blocks that a Llama runs twice, one after another."""

    def __getitem__(self, key):
        return [*self, *self] if isinstance(key, slice) else super().__getitem__(key)


@pytest.mark.parametrize("epochs", [0, 1])
def test_blocks_that_run_twice_are_calibrated_on_both_runs(epochs):
    model = random_model(LlamaConfig(**SIZES, num_hidden_layers=2, initializer_range=0.2))
    model.model.layers = Twice(model.model.layers)
    ids = random_tokens(4, 12)
    _, blocks = find_blocks(model)
    assert len(blocks) == 2 and blocks.runs == [2, 2] and not blocks.chained
    name = f"{blocks.names[1]}.mlp.up_proj"
    given = []
    model.get_submodule(name).register_forward_pre_hook(lambda _module, args: given.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(ids, use_cache=False)
    assert len(given) == 2
    x = torch.cat(given).double().numpy()
    calibration = SequenceCalibration(ids, CONFIG)
    with calibration:
        calibration.start(model, blocks, None)
        H = calibration.of_block(1, blocks[1], {name: model.get_submodule(name)}, False).hessians[name].H
    np.testing.assert_allclose(H, x.T @ x / len(x), rtol=1e-4, atol=1e-5)

    before = model(ids, use_cache=False).logits
    report = quantize_model(model, ids, CONFIG.replace(finetune_epochs=epochs, finetune_batch_size=2))
    assert len(report.layers) == 14 and len(report.blocks) == 2 * epochs
    assert "the model runs from its start for each block" in report.plan["text"]
    assert all(layer.tokens in (None, 2 * ids.numel()) for layer in report.layers)
    assert (model(ids, use_cache=False).logits - before).abs().max() > 0


def test_a_block_that_stands_under_two_names_is_refused():
    model = tiny_llama()
    first, second = model.model.layers
    model.model.layers = torch.nn.ModuleList([first, second, first, second])
    with pytest.raises(
        ValueError, match=r"model\.layers\.2: got the same module as model\.layers\.0, expected one of its"
    ):
        quantize_model(model, random_tokens(4, 12), CONFIG)


def test_a_module_that_stands_under_two_names_stays_dense():
    model = tiny_llama()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    plan = make_plan(model, CONFIG)
    assert plan.n_layers == 8
    shared = [name for name, reason in plan.dense.items() if reason == "shares its weight"]
    assert shared == [f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up", "down")]


def test_a_block_that_adds_to_what_it_was_given_before_is_refused_and_the_model_is_as_it_was():
    model = random_model(LlamaConfig(**SIZES, num_hidden_layers=2))
    layer = model.model.layers[1]
    forward, calls = layer.forward, []

    def counting(hidden_states, **kwargs):
        calls.append(1)
        return forward(hidden_states, **kwargs) * len(calls)

    layer.forward = counting
    with pytest.raises(ValueError, match=r"block model\.layers\.1 gives something else when it runs again"):
        quantize_model(model, random_tokens(4, 12), CONFIG)
    assert layer.forward is counting and not hooks_of(model)
    assert len(quantize_model(model, None, CONFIG).layers) == 14


def test_blocks_that_return_tuples_of_any_length():
    model = random_model(LlamaConfig(**SIZES, num_hidden_layers=2))
    ids, plain = random_tokens(4, 12), tiny_clone(model)
    for layer in model.model.layers:
        forward = layer.forward
        layer.forward = lambda *args, forward=forward, **kwargs: (forward(*args, **kwargs), None, torch.zeros(3))
    inner = model.model.forward

    def unpacking(*args, **kwargs):
        layers = list(model.model.layers)
        kept = [vars(layer)["forward"] for layer in layers]
        for layer, forward in zip(layers, kept, strict=True):

            def first(*args, forward=forward, **kwargs):
                hidden, _, _ = forward(*args, **kwargs)
                return hidden

            layer.forward = first
        try:
            return inner(*args, **kwargs)
        finally:
            for layer, forward in zip(layers, kept, strict=True):
                layer.forward = forward

    model.model.forward = unpacking
    wanted = quantize_model(plain, ids, CONFIG)
    report = quantize_model(model, ids, CONFIG)
    assert [layer.relative_error for layer in report.layers] == [layer.relative_error for layer in wanted.layers]


def tiny_clone(model):
    twin = type(model)(model.config).eval()
    twin.load_state_dict(model.state_dict())
    return twin


@pytest.mark.skipif(not hasattr(transformers, "BambaConfig"), reason="no Bamba in this transformers")
def test_bamba():
    config = transformers.BambaConfig(
        **{**SIZES, "hidden_size": 64},
        num_hidden_layers=3,
        attn_layer_indices=[1],
        mamba_n_heads=8,
        mamba_d_head=16,
        mamba_d_state=8,
        mamba_chunk_size=8,
    )
    model = random_model(config)
    report = quantize_model(model, random_tokens(4, 12), CONFIG)
    assert report.plan["blocks"] == 3 and report.plan["linears"] == len(report.layers) + 1


def test_blocks_of_several_classes_and_what_does_not_run_on_text():
    config = transformers.MllamaConfig(
        text_config={
            **SIZES,
            "num_hidden_layers": 4,
            "cross_attention_layers": [1],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            "rope_scaling": {"rope_type": "default"},
        },
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 12,
            "num_global_layers": 1,
            "attention_heads": 4,
            "intermediate_size": 512,
            "vision_output_dim": 64,
            "image_size": 28,
            "patch_size": 14,
            "intermediate_layers_indices": [0],
        },
    )
    model = transformers.MllamaForConditionalGeneration(config).eval()
    plan = make_plan(model, CONFIG)
    assert [step.name.rpartition(".")[2] for step in plan.steps] == ["0", "2", "3"]
    assert "language_model.layers" in plan.blocks.prefix and plan.n_layers == 21
    quiet = [name for name, reason in plan.dense.items() if reason == NOT_CALLED]
    assert any("vision" in name for name in quiet) and any("layers.1.cross_attn" in name for name in quiet)
    assert f"21 of {plan.n_linears} linears in 3 blocks" in plan.describe()
    assert plan.n_linears == 21 + len(plan.dense)


def test_a_larger_vision_tower_is_not_taken():
    vision = {
        "hidden_size": 32,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
    }
    config = transformers.LlavaConfig(
        text_config=LlamaConfig(**SIZES, num_hidden_layers=2), vision_config=transformers.CLIPVisionConfig(**vision)
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    report = quantize_model(model, random_tokens(4, 12), CONFIG)
    assert len(report.layers) == 14 and all("language_model" in layer.name for layer in report.layers)
    assert all("vision" in name or "projector" in name for name in report.plan["dense"][NOT_CALLED])


@pytest.mark.skipif(not hasattr(transformers, "JambaConfig"), reason="no Jamba in this transformers")
@pytest.mark.parametrize("experts", [1, 4])
def test_a_list_inside_a_block_is_not_taken(experts):
    config = transformers.JambaConfig(
        **SIZES,
        num_hidden_layers=4,
        num_experts=experts,
        num_experts_per_tok=1,
        attn_layer_period=2,
        attn_layer_offset=1,
        use_mamba_kernels=False,
        mamba_dt_rank=8,
        mamba_d_state=8,
    )
    model = random_model(config)
    prefix, blocks = find_blocks(model)
    assert prefix == "model.layers" and len(blocks) == 4 and len({type(block) for block in blocks}) == 2
    report = quantize_model(model, random_tokens(4, 12), CONFIG)
    names = [layer.name for layer in report.layers]
    assert not any("router" in name or "dt_proj" in name for name in names)
    assert any("mamba.in_proj" in name for name in names) and any("self_attn.q_proj" in name for name in names)


def test_a_model_that_does_not_run_on_token_ids_is_refused(caplog):
    model = tiny_llama()

    def forward(*args, **kwargs):
        raise RuntimeError("two\nlines")

    model.model.layers[0].forward = forward
    with pytest.raises(
        ValueError, match=r"model: got LlamaForCausalLM, expected .* token ids alone; it raises Runtime"
    ):
        quantize_model(model, random_tokens(4, 12), CONFIG)
    assert not hooks_of(model) and model.model.layers[0].forward is forward


def test_a_model_that_changes_its_weights_as_it_runs_is_refused():
    model = tiny_llama()
    layer = model.model.layers[1]
    layer.register_forward_pre_hook(lambda *_: layer.mlp.down_proj.weight.div_(1) is None or None)  # as RWKV
    with pytest.raises(
        ValueError, match=r"model\.layers\.1\.mlp\.down_proj\.weight: got one that Llama.* changes as it"
    ):
        quantize_model(model, random_tokens(4, 12), CONFIG)


@pytest.mark.parametrize("twice", [False, True])
def test_linears_that_share_their_input_at_times(twice):
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.calls = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), 0

        def forward(self, x):
            self.calls += 1
            self.first(x)
            if twice or self.calls == 1:
                self.second(x)
            if twice or self.calls > 1:
                self.second(x + 1)
            return x

    block, xs = Block(), [torch.randn(2, 5, 4) for _ in range(3)]
    sums = HessianSums({name: getattr(block, name) for name in ("first", "second")})
    sums.gather(Activations(list(xs), [[((), {})]] * 3), 0, block)
    second = [x + part for x in xs for part in (0, 1)] if twice else [xs[0], xs[1] + 1, xs[2] + 1]
    for name, given in (("first", xs), ("second", second)):
        x = torch.cat(given).reshape(-1, 4).double().numpy()
        np.testing.assert_allclose(sums.hessians()[name].H, x.T @ x / len(x), rtol=1e-4, atol=1e-5)
        assert sums.tokens_of(name) == len(x)


# ---- routers --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(transformers, "Gemma4TextConfig"), reason="no Gemma 4 in this transformers")
def test_a_router_in_a_module_of_its_own():
    config = transformers.Gemma4TextConfig(
        **SIZES,
        num_hidden_layers=2,
        head_dim=8,
        global_head_dim=8,
        hidden_size_per_layer_input=0,
        enable_moe_block=True,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=32,
        layer_types=["sliding_attention", "full_attention"],
        num_kv_shared_layers=0,
    )
    model = random_model(config)
    plan = make_plan(model, CONFIG)
    routers = [name for name, reason in plan.dense.items() if reason == "chooses experts"]
    assert routers == [f"model.layers.{index}.router.proj" for index in range(2)]
    assert "router.proj (2, chooses experts)" in plan.describe()


# ---- the plan -------------------------------------------------------------------------------------------------


class Plans(Progress):
    def __init__(self):
        self.calls = []

    def on_plan(self, plan):
        self.calls.append(("plan", plan.describe()))

    def on_block(self, index, name):
        self.calls.append(("block", name))


def test_the_plan_is_told_before_the_work_and_stands_in_the_report():
    model, progress = tiny_llama(), Plans()
    config = CONFIG.replace(rules={"down_proj": "dense", "embed_tokens": "1x8g8"})
    report = quantize_model(model, random_tokens(4, 12), config, layers="mlp", progress=progress)
    text = (
        "4 of 15 linears in 2 blocks, model.embed_tokens; dense: self_attn.q_proj, self_attn.k_proj, self_attn.v_proj, "
        "self_attn.o_proj (8, left out by layers), mlp.down_proj (2, by rule)"
    )
    assert progress.calls[0] == ("plan", text) and progress.calls[1][0] == "block"
    plan = report.to_dict()["plan"]
    assert plan["text"] == text and (plan["linears"], plan["quantized"], plan["blocks"]) == (15, 4, 2)
    assert plan["dense"]["by rule"] == [f"model.layers.{index}.mlp.down_proj" for index in range(2)]
    assert plan["chained"] is True


def test_a_report_of_before_has_no_plan():
    fields = QuantizationReport().to_dict()
    assert fields["plan"] == {} and QuantizationReport().plan == {}


def test_all_layers_that_groups_do_not_tile_are_named_at_once():
    model = tiny_llama(hidden_size=36, intermediate_size=60, num_attention_heads=2, num_key_value_heads=2, head_dim=16)
    with pytest.raises(ValueError) as error:
        quantize_model(model, random_tokens(4, 12), CONFIG)
    text = str(error.value)
    assert text.startswith(
        "in_group_size: got 8, expected a divisor of in_features=36 of layer model.layers.0.self_attn.q"
    )
    for kind in ("self_attn.k_proj [32, 36] x 2", "mlp.up_proj [60, 36] x 2", "mlp.down_proj [36, 60] x 2"):
        assert kind in text
    assert "\n" not in text and "o_proj" not in text
    pattern = text.split("--rule '")[1].split("=dense'")[0]
    report = quantize_model(model, random_tokens(4, 12), CONFIG.replace(rules={pattern: "dense"}))
    assert {layer.name.rpartition(".")[2] for layer in report.layers} == {"o_proj"}


def test_a_refusal_leaves_experts_fused():
    model = random_model(transformers.MixtralConfig(**SIZES, num_hidden_layers=2, num_local_experts=4))
    names = set(model.state_dict())
    for options in ({"layers": "no such layer"}, {"memory_limit": 1}):
        with pytest.raises(ValueError):
            quantize_model(model, random_tokens(4, 12), CONFIG, **options)
        assert set(model.state_dict()) == names and not hooks_of(model)


def test_a_dense_rule_for_what_stays_dense_anyway_is_none_that_decides_nothing():
    model = random_model(transformers.MixtralConfig(**SIZES, num_hidden_layers=2, num_local_experts=4))
    put(model, "model.layers.0.self_attn.q_proj", Scaled)
    assert make_plan(model, CONFIG.replace(rules={r"0\.self_attn\.q_proj": "dense"})).n_layers == 2 * (4 + 12) - 1
    model = tiny_llama()
    put(model, "model.layers.0.self_attn.q_proj", Scaled)
    with pytest.raises(ValueError, match=r"rules: got .*, expected a layer that can be quantized: .* stays dense"):
        make_plan(model, CONFIG.replace(rules={r"0\.self_attn\.q_proj": "2x8g8"}))


def test_quantized_linears_are_those_of_the_plan():
    model = tiny_llama()
    targets = set(make_plan(model, CONFIG).targets())
    quantize_model(model, None, CONFIG)
    assert {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)} == targets


def test_find_blocks_wants_linears():
    with pytest.raises(ValueError, match="expected one with a list of blocks with linear layers"):
        quantize_model(
            random_model(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96)), None, CONFIG
        )
