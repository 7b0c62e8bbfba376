"""What layers and blocks are drawn to: correction of what was quantized before, linears in turn, other targets."""

import copy
import json

import numpy as np
import pytest
import torch
from tiny import random_model, random_tokens, tiny_llama
from transformers import MixtralConfig

from aqlm_c.calibrate.activations import capture
from aqlm_c.calibrate.fisher import TokenWeights, token_weights
from aqlm_c.calibrate.hessians import HessianSums
from aqlm_c.calibrate.upstream import CrossSums, in_turn, original_of
from aqlm_c.cli.main import main
from aqlm_c.nn.linear import QuantizedLinear
from aqlm_c.pipeline.estimate import Work
from aqlm_c.pipeline.resume import fingerprint
from aqlm_c.quantize import quantize_model
from aqlm_c.recipe import AqlmConfig, RunConfig
from aqlm_c.report.layers import LayerReport

SOLVED = {"ldl_passes": 1, "max_sweeps": 1, "init_max_iter": 3, "gaussian_reference": False}
PLAIN = AqlmConfig.from_scheme("1x4g8", finetune_epochs=0, **SOLVED)
TUNED = PLAIN.replace(finetune_epochs=2, finetune_batch_size=4, finetune_held_out=0.25, finetune_lookahead=1)
EVERYTHING = {
    "error_correction": 0.5,
    "error_correction_skip": "",
    "finetune_target": "original",
    "tune_remaining": 1,
    "fisher_share": 0.3,
    "rules": {"embed_tokens": "1x6g8"},
}
TOKENS = random_tokens(24, 40)
ORDER = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def llama(**options):
    return tiny_llama(num_hidden_layers=3, tie_word_embeddings=False, **options)


def linears_of(model, index):
    block = model.model.layers[index]
    found = {name: module for name, module in block.named_modules() if isinstance(module, torch.nn.Linear)}
    return block, found


def inputs_of(model, ids=TOKENS):
    """float64 [tokens, in] of each linear, by name, as the model runs on ids."""
    found, hooks = {}, []
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, QuantizedLinear)):
            hook = lambda _m, args, name=name: found.update({name: args[0].flatten(0, 1).double()})  # noqa: E731
            hooks.append(module.register_forward_pre_hook(hook))
    with torch.no_grad():
        model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def output_error(original, model):
    """Mean over the quantized linears of ||X W^T - X^ Wq^T||^2 / ||X W^T||^2."""
    before, after, errors = inputs_of(original), inputs_of(model), []
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            y = before[name] @ original.get_submodule(name).weight.double().T
            quantized = after[name] @ layer.dequantize(torch.float32).weight.double().T
            errors.append(((y - quantized).square().sum() / y.square().sum()).item())
    return np.mean(errors)


def quantized(config, model=None, tokens=TOKENS, **options):
    model = llama() if model is None else model
    return model, quantize_model(model, tokens, config, batch_size=4, **options)


# ---- sums -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_sums_are_those_of_both_models(dtype):
    model = llama(dtype=dtype)
    block, linears = linears_of(model, 1)
    originals, inputs = (capture(model, model.model.layers, TOKENS, 5) for _ in range(2))
    for index, hidden in enumerate(inputs.hidden):
        inputs.hidden[index] = (hidden * (1 + 0.3 * torch.randn_like(hidden))).to(dtype)
    sums, hessians = CrossSums(linears), HessianSums(linears)
    sums.gather(originals, original_of(block, shared=True), inputs, 1, block)
    hessians.gather(inputs, 1, block)
    means, seen = sums.means(), {}
    assert means.keys() == linears.keys()
    for stream, activations in (("original", originals), ("own", inputs)):
        rows = {name: [] for name in linears}
        hooks = [
            linear.register_forward_pre_hook(lambda _m, args, name=name, rows=rows: rows[name].append(args[0].clone()))
            for name, linear in linears.items()
        ]
        for batch in range(len(inputs.hidden)):
            activations.run(1, block, batch)
        for hook in hooks:
            hook.remove()
        seen[stream] = {name: torch.cat(parts).flatten(0, 1).double() for name, parts in rows.items()}
    for name, mean in means.items():
        x, changed = seen["original"][name], seen["own"][name]
        truth = ((x - changed).T @ changed / len(x)).numpy()
        size = np.sqrt(np.outer(np.diag((x - changed).T @ (x - changed)), np.diag(changed.T @ changed))) / len(x)
        assert mean.dtype == np.float32 and np.abs((mean - truth) / size).max() < (1e-5 if dtype.itemsize > 2 else 1e-3)
        assert hessians.tokens_of(name) == sums.tokens[sums.leader[name]] == len(x)
    assert means["self_attn.q_proj"] is means["self_attn.v_proj"] is not means["self_attn.o_proj"]


def test_linears_are_found_in_turn():
    model = llama()
    block, linears = linears_of(model, 0)
    backwards = dict(reversed(linears.items()))
    found = in_turn(capture(model, model.model.layers, TOKENS, 5), 0, block, backwards)
    assert [sorted(name.rpartition(".")[2] for name in names) for names in found] == [sorted(one) for one in ORDER]


def mixtral():
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return random_model(MixtralConfig(**sizes, **heads, num_local_experts=4, num_experts_per_tok=2))


def test_experts_are_not_corrected_and_come_in_turn(caplog):
    _, report = quantized(PLAIN.replace(error_correction=0.5, sequential=True), mixtral())
    corrected = {layer.name for layer in report.layers if layer.correction is not None}
    assert len(corrected) == 2 * 4 and all("self_attn" in name for name in corrected)
    assert any("see a part of the tokens" in message and "experts" in message for message in caplog.messages)
    kinds = list(dict.fromkeys(layer.name.rpartition(".")[2] for layer in report.layers if "layers.0" in layer.name))
    assert kinds[:4] == ["q_proj", "k_proj", "v_proj", "o_proj"] and set(kinds[4:6]) == {"w1", "w3"}
    assert kinds[6:] == ["w2"]


# ---- weights of tokens ----------------------------------------------------------------------------------------


def test_tokens_weigh_by_the_gradient_of_the_loss():
    """Against gradients to what is added to the outputs of linears, and with the tokens that the model draws."""
    model, ids = llama(), TOKENS[:3]
    linears = {
        name: module for name, module in model.model.layers.named_modules() if isinstance(module, torch.nn.Linear)
    }
    found = token_weights(model, linears, ids, 5, 1.0, 11)
    assert found.keys() == linears.keys() and found["0.mlp.up_proj"] is found["0.mlp.gate_proj"]
    groups = [["1.self_attn.q_proj", "1.self_attn.k_proj", "1.self_attn.v_proj"], ["2.mlp.down_proj"]]
    for names in groups:
        squares = []
        for number, one in enumerate(ids):
            added = [torch.zeros(len(one), linears[name].out_features, requires_grad=True) for name in names]
            hooks = [
                linears[name].register_forward_hook(lambda _m, _i, y, zero=zero: y + zero)
                for name, zero in zip(names, added, strict=True)
            ]
            logits = model(one[None], use_cache=False).logits[0]
            for hook in hooks:
                hook.remove()
            drawn = torch.Generator().manual_seed(11 + 7919 * (5 + number))
            labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=drawn)[:, 0]
            loss = -logits.log_softmax(-1).gather(1, labels[:, None]).sum()
            grads = torch.autograd.grad(loss, added)
            squares.append(sum(grad.double().square().sum(1) for grad in grads))
        truth = torch.stack(squares) / torch.stack(squares).mean()
        assert torch.allclose(found[names[0]].double(), truth, rtol=1e-3, atol=1e-6)
    mixed = token_weights(model, linears, ids, 5, 0.3, 11)["0.mlp.down_proj"]
    assert torch.allclose(mixed, 0.7 + 0.3 * found["0.mlp.down_proj"]) and mixed.mean() == pytest.approx(1, rel=1e-5)
    assert found["0.mlp.down_proj"].std() > 0.1
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_h_is_of_weighted_tokens(dtype):
    model = llama(dtype=dtype)
    block, linears = linears_of(model, 0)
    inputs = capture(model, model.model.layers, TOKENS, 5)
    weights = TokenWeights(token_weights(model, linears, TOKENS, 0, 0.5, 0), 5)
    sums, plain = HessianSums(linears, weigh=weights.applied), HessianSums(linears)
    for each in (sums, plain):
        each.gather(inputs, 0, block)
    for name in ("self_attn.k_proj", "mlp.down_proj"):
        rows, hooks = [], []
        hooks.append(linears[name].register_forward_pre_hook(lambda _m, args, rows=rows: rows.append(args[0].clone())))
        for batch in range(len(inputs.hidden)):
            inputs.run(0, block, batch)
        hooks[0].remove()
        x, w = torch.cat(rows).flatten(0, 1).double(), weights.weights[name].flatten().double()
        truth, H = ((x * w[:, None]).T @ x / len(x)).numpy(), sums.hessians()[name].H
        assert np.abs(H - truth).max() < 1e-5 * np.abs(truth).max()
        assert np.abs(H - plain.hessians()[name].H).max() > 1e-2 * np.abs(truth).max()


def test_experts_are_not_weighted(caplog):
    _, report = quantized(PLAIN.replace(fisher_share=0.5), mixtral())
    (message,) = [message for message in caplog.messages if "not weighted" in message]
    assert "experts.0" in message and "self_attn" not in message and report.layers


# ---- what it is for -------------------------------------------------------------------------------------------


def test_correction_brings_outputs_nearer_to_the_original():
    original = llama()
    errors = {}
    for name, options in {
        "plain": {},
        "sequential": {"sequential": True},
        "half": {"error_correction": 0.5},
        "both": {"error_correction": 1.0, "sequential": True, "error_correction_skip": ""},
    }.items():
        model, report = quantized(PLAIN.replace(**options))
        errors[name] = output_error(original, model)
        moved = [layer for layer in report.layers if layer.correction is not None]
        skipped = [layer.name for layer in report.layers if layer.correction is None]
        if name == "half":
            assert all("down_proj" in name for name in skipped) and len(skipped) == 3
            assert all(layer.correction > 0 for layer in moved if "layers.0" not in layer.name)
            assert all(layer.correction == 0 for layer in moved if "layers.0" in layer.name)  # nothing is before it
        elif name == "both":
            first = {f"model.layers.0.self_attn.{name}" for name in ORDER[0]}
            assert not skipped and all((layer.correction > 0) != (layer.name in first) for layer in moved)
        else:
            assert not moved
        assert all(LayerReport.from_dict(json.loads(json.dumps(x.to_dict()))) == x for x in report.layers)
    assert errors["half"] < 0.9 * errors["plain"]
    assert errors["both"] < 0.9 * min(errors["half"], errors["sequential"])


def test_quantized_embeddings_are_made_up_for_too():
    _, report = quantized(PLAIN.replace(error_correction=0.5, rules={"embed_tokens": "1x2g8"}))
    layers = {layer.name: layer.correction for layer in report.layers}
    assert layers["model.layers.0.self_attn.q_proj"] > 0 and layers["model.embed_tokens"] is None


def block_errors(original, model):
    """Relative errors of what each block gives, against the original's."""
    with torch.no_grad():
        states = [m(TOKENS, output_hidden_states=True).hidden_states[1:3] for m in (original, model)]
    return [((a - b).square().sum() / a.square().sum()).item() for a, b in zip(*states, strict=True)]


def test_the_original_models_output_as_target():
    own, original = (
        quantized(TUNED.replace(finetune_epochs=4, finetune_target=target))[0] for target in ("own", "original")
    )
    first, second = zip(block_errors(llama(), own), block_errors(llama(), original), strict=True)
    assert first[0] == first[1]  # nothing is before it
    assert second[1] < second[0]


def test_what_is_left_is_tuned():
    """With all linears but the last ones dense yet, tuning them takes up what the first ones lost."""
    plain, tuned = (
        quantized(TUNED.replace(sequential=True, tune_remaining=n, tune_remaining_learning_rate=3e-3)) for n in (0, 3)
    )
    for before, after in zip(plain[1].blocks, tuned[1].blocks, strict=True):
        assert after.held_out_before < 0.97 * before.held_out_before
    means = [np.mean([block.held_out_after for block in report.blocks]) for _, report in (plain, tuned)]
    assert means[1] < 0.97 * means[0]
    assert not any(parameter.dtype != torch.float32 for parameter in tuned[0].parameters() if parameter.dim() == 2)


def test_weights_that_were_tuned_are_quantized_in_float32():
    """Steps far below the resolution of bfloat16 are not lost."""
    options = {"tune_remaining_learning_rate": 1e-4, "sequential": True}
    codes = []
    for n in (0, 2):
        config = TUNED.replace(tune_remaining=n, **options)
        model, report = quantized(config, llama(dtype=torch.bfloat16), TOKENS[:12], layers=r"layers\.0")
        codes.append({name: x for name, x in model.state_dict().items() if "layers.0.mlp.down_proj.codebooks" in name})
        assert all(x.dtype == torch.bfloat16 for x in codes[-1].values()) and report.blocks
    assert not torch.equal(*(next(iter(one.values())) for one in codes))


# ---- runs -----------------------------------------------------------------------------------------------------


def test_off_is_what_it_was():
    assert not AqlmConfig().target.changed() and "error_correction" not in AqlmConfig().to_dict()
    chosen = PLAIN.replace(**EVERYTHING)
    assert chosen.to_dict()["error_correction"] == 0.5 and AqlmConfig.from_dict(chosen.to_dict()) == chosen
    assert chosen.replace(error_correction=0, error_correction_skip="down_proj").target.changed() == {
        name: EVERYTHING[name] for name in ("finetune_target", "tune_remaining", "fisher_share")
    }
    prints = [fingerprint(llama(), TOKENS, config, None)["options"] for config in (PLAIN, chosen)]
    assert prints[1] == {**prints[0], **{name: EVERYTHING[name] for name in EVERYTHING if name != "rules"}} | {
        "rules": [["embed_tokens", "1x6g8"]]
    }


def test_options_without_effect_change_nothing():
    """Without data, and what belongs to block fine-tuning without it."""
    state = quantized(PLAIN)[0].state_dict()
    late = {"finetune_target": "original", "tune_remaining": 2}
    assert all(map(torch.equal, state.values(), quantized(PLAIN.replace(**late))[0].state_dict().values()))
    free, more = [llama(), llama()], {"error_correction": 0.5, "sequential": True, "fisher_share": 0.5}
    for model, config in zip(free, (PLAIN, PLAIN.replace(**late, **more)), strict=True):
        quantize_model(model, None, config)
    assert all(map(torch.equal, *(model.state_dict().values() for model in free)))


def test_blocks_that_are_no_chain_are_not_corrected(caplog):
    class Twice(torch.nn.ModuleList):
        def __getitem__(self, key):
            return [*self, *self] if isinstance(key, slice) else super().__getitem__(key)

    model = llama()
    model.model.layers = Twice(model.model.layers)
    _, report = quantized(TUNED.replace(**{**EVERYTHING, "rules": None, "finetune_epochs": 1}), model, TOKENS[:12])
    assert (
        "error_correction, finetune_target, fisher_share: no effect on a model whose blocks are no chain"
        in caplog.messages
    )
    assert all(layer.correction is None for layer in report.layers) and len(report.blocks) == 3


@pytest.mark.parametrize(("layers", "kept"), [(None, 1), (r"layers\.[02]", 2)])
def test_resumed_bit_for_bit(tmp_path, layers, kept):
    config, few = TUNED.replace(**EVERYTHING, finetune_epochs=1), TOKENS[:12]
    whole, first = quantized(config, tokens=few, layers=layers, work_dir=tmp_path / "work")
    for file in sorted((tmp_path / "work").glob("block-*.safetensors"))[1 + kept :]:  # the first is of embeddings
        file.unlink()
    again, second = quantized(config, tokens=few, layers=layers, work_dir=tmp_path / "work")
    assert all(map(torch.equal, whole.state_dict().values(), again.state_dict().values()))
    names = ("name", "relative_error", "correction")
    reports = [[[getattr(layer, name) for name in names] for layer in report.layers] for report in (first, second)]
    assert reports[0] == reports[1]
    with pytest.raises(ValueError, match=r"error_correction: 0\.5 in WORK_DIR, 0\.25 now"):
        quantized(config.replace(error_correction=0.25), tokens=few, layers=layers, work_dir=tmp_path / "work")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")
def test_on_a_gpu(tmp_path):
    """Every option there, in bfloat16, from a model in host memory; the same bits where the run goes on."""
    states, config = [], TUNED.replace(**EVERYTHING)
    for work_dir in (None, tmp_path / "work", tmp_path / "work"):
        model, report = quantized(config, llama(dtype=torch.bfloat16), work_dir=work_dir, device="cuda")
        states.append(model.state_dict())
        assert any(layer.correction for layer in report.layers)
        for file in sorted(tmp_path.glob("work/block-*.safetensors"))[2:]:
            file.unlink()
    for state in states[1:]:
        assert all(map(torch.equal, states[0].values(), state.values()))
    original = llama(dtype=torch.float32)
    plain = quantized(PLAIN, device="cuda")[0]
    corrected = quantized(PLAIN.replace(error_correction=1.0, sequential=True), device="cuda")[0]
    assert output_error(original, corrected) < 0.9 * output_error(original, plain)


def test_h_that_do_not_fit_together(monkeypatch):
    """Groups of a turn are under the same H, and corrected alike."""
    from aqlm_c.pipeline import block as module

    config = PLAIN.replace(sequential=True, error_correction=0.5)
    whole = quantized(config)[0].state_dict()
    monkeypatch.setattr(module, "groups_of", lambda shapes, _: [[name] for name in shapes])
    assert all(map(torch.equal, whole.values(), quantized(config)[0].state_dict().values()))


def test_activations_on_disk(tmp_path):
    from aqlm_c.calibrate.sources import SequenceCalibration
    from aqlm_c.pipeline.pipeline import Pipeline

    config = TUNED.replace(**EVERYTHING, finetune_epochs=1)
    states = []
    for place in (None, tmp_path):
        model = llama()
        pipeline = Pipeline(model, config, SequenceCalibration(TOKENS[:12], config, 4))
        pipeline._place = lambda *_, place=place: place
        pipeline.run()
        states.append(model.state_dict().values())
    assert all(map(torch.equal, *states)) and not list(tmp_path.iterdir())


def test_the_originals_are_not_written_to():
    model = llama()
    block = model.model.layers[0]
    shared, own = original_of(block, shared=True), original_of(block, shared=False)
    names = [name for name, _ in block.named_parameters()]
    assert all(shared.get_parameter(name) is block.get_parameter(name) for name in names)
    assert all(own.get_parameter(name) is not block.get_parameter(name) for name in names)
    before = copy.deepcopy(own.state_dict())
    block.self_attn.q_proj.weight.data.zero_()
    assert all(map(torch.equal, before.values(), own.state_dict().values()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"error_correction": 1.5}, r"error_correction: got 1.5, expected a number in \[0, 1\]"),
        ({"error_correction": True}, "error_correction: got True, expected a number"),
        ({"error_correction_damp": 0}, r"error_correction_damp: got 0, expected a number in \(0, 1\)"),
        ({"error_correction_skip": "("}, r"error_correction_skip: got '\(', expected a regular expression"),
        ({"finetune_target": "both"}, "finetune_target: got 'both', expected one of own, original"),
        ({"tune_remaining": -1}, "tune_remaining: got -1, expected an integer >= 0"),
        ({"tune_remaining_learning_rate": 2}, "tune_remaining_learning_rate: got 2, expected a number"),
        ({"fisher_share": -0.1}, r"fisher_share: got -0.1, expected a number in \[0, 1\]"),
        ({"sequential": 1}, "sequential: got 1, expected true or false"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        PLAIN.replace(**options)


def test_the_command_line_takes_and_records_them(tmp_path, monkeypatch, capsys):
    from tiny import BYTES, byte_tokenizer

    monkeypatch.chdir(tmp_path)
    llama(vocab_size=BYTES).save_pretrained("model")
    byte_tokenizer().save_pretrained("model")
    given = ["quantize", "model", "out", "--scheme", "1x4g8", "--samples", "8", "--sequence-length", "32", "--quiet"]
    given += ["--finetune-epochs", "1", "--set", "error_correction=0.5", "--set", "sequential=true"]
    given += ["--set", "finetune_target=original", "--set", "ldl_passes=1", "--set", "max_sweeps=1"]
    assert main(given) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["config"]["error_correction"] == 0.5 and report["config"]["finetune_target"] == "original"
    assert report["config"]["tune_remaining"] == 0 and any("correction" in layer for layer in report["layers"])
    again = RunConfig.from_file(tmp_path / "out" / "run.yaml").resolve().config
    assert again.target.error_correction == 0.5 and again.target.sequential
    assert main([*given, "--overwrite", "--set", "error_correction=2"]) == 2
    assert "error_correction: got 2.0, expected a number in [0, 1]" in capsys.readouterr().err


def test_the_estimate_counts_them():
    def work(**options):
        config = AqlmConfig.from_scheme("2x8g8", **options)
        shapes = {"a.q": (512, 512), "a.o": (512, 512), "m.gate": (1024, 512), "m.down": (512, 1024)}
        return Work.from_shapes(shapes, tokens=8192, sequence_length=512, hidden_size=512, config=config)

    from aqlm_c.pipeline.estimate import Rates

    plain = work()
    for options in ({"error_correction": 0.5}, {"finetune_target": "original"}, {"tune_remaining": 1}):
        more = work(**options)
        assert sum(more.seconds(Rates()).values()) > sum(plain.seconds(Rates()).values()), options
        assert more.activations() >= plain.activations() and more.device_memory() >= plain.device_memory()
    assert work(error_correction=0.5).activations() > plain.activations()
    assert work(error_correction=0.5).memory() >= plain.memory()
