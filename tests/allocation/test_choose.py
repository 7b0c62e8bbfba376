"""Schemes for a size: sizes on disk, which layers get bits, refusals, runs, YAML, resume."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from tiny import random_model, random_tokens, tiny_llama, tiny_tokenizer
from transformers import MixtralConfig

import aqlm_c
from aqlm_c import RunConfig, choose_schemes, quantize_model
from aqlm_c.allocation.choose import measure_model
from aqlm_c.config import SizeOptions
from aqlm_c.io.checkpoint import save_quantized
from aqlm_c.nn.embedding import QuantizedEmbedding
from aqlm_c.nn.linear import QuantizedLinear
from aqlm_c.recipe import AqlmConfig
from aqlm_c.report.allocation import Allocation
from aqlm_c.run import run

CANDIDATES = ("1x4g8", "2x4g8", "3x4g8", "4x4g8", "6x4g8", "8x4g8", "8x4g4", "dense")
CONFIG = AqlmConfig.from_scheme("2x4g8", ldl_passes=1, max_sweeps=1, init_max_iter=2, finetune_epochs=0)
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
SEQUENCES = random_tokens(6, 32)


def model_of(**options):
    return tiny_llama(**{**SIZES, **options})


def measured(model, config=CONFIG, **options):
    return measure_model(model, SEQUENCES, config, **options)


def file_bytes(directory):
    return sum(path.stat().st_size for path in Path(directory).glob("*.safetensors"))


@pytest.fixture(scope="module")
def tiny():
    return measured(model_of())


@pytest.mark.parametrize("share", [0.45, 0.6, 0.8])
@pytest.mark.parametrize("tied", [True, False])
def test_size_on_disk_is_within_a_percent_and_never_above(tmp_path, tied, share):
    model = model_of(tie_word_embeddings=tied, num_hidden_layers=8)
    found = measured(model)
    target = int(share * found.original_bytes)
    allocation = found.choose(SizeOptions(target_size=target, candidates=CANDIDATES))
    quantize_model(model, SEQUENCES, CONFIG.replace(**allocation_options(allocation)))
    save_quantized(model, None, tmp_path / "out")
    size = file_bytes(tmp_path / "out")
    assert 0.99 * target <= size <= allocation.total_bytes <= target


def allocation_options(allocation):
    options = allocation.options
    return {**aqlm_c.Format.parse(options.pop("scheme")).to_dict(), **options}


def test_rules_give_each_layer_what_was_chosen():
    model = model_of()
    allocation = choose_schemes(
        model, SEQUENCES, CONFIG, target_size=int(0.5 * measured(model).original_bytes), candidates=CANDIDATES
    )
    assert len({layer.scheme for layer in allocation.layers}) > 1
    quantize_model(model, SEQUENCES, CONFIG.replace(**allocation_options(allocation)))
    kinds = (QuantizedLinear, QuantizedEmbedding)
    found = {name: module.scheme for name, module in model.named_modules() if isinstance(module, kinds)}
    chosen = {layer.name: layer.scheme for layer in allocation.layers if layer.scheme != "dense"}
    assert found == chosen


def test_layers_that_share_an_input_have_one_scheme(tiny):
    target = int(0.5 * tiny.original_bytes)
    schemes = {layer.name: layer.scheme for layer in tiny.choose(SizeOptions(None, target, CANDIDATES)).layers}
    for block in range(3):
        attention = [schemes[f"model.layers.{block}.self_attn.{part}_proj"] for part in "qkv"]
        gated = [schemes[f"model.layers.{block}.mlp.{part}_proj"] for part in ("gate", "up")]
        assert len(set(attention)) == len(set(gated)) == 1
    apart = tiny.choose(SizeOptions(None, target, CANDIDATES, together=False))
    assert apart.kl <= tiny.choose(SizeOptions(None, target, CANDIDATES)).kl * (1 + 1e-3)


def test_more_bytes_are_expected_to_be_better(tiny):
    losses = [
        tiny.choose(SizeOptions(None, int(share * tiny.original_bytes), CANDIDATES)).kl
        for share in (0.3, 0.4, 0.5, 0.7, 0.9)
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > 4 * losses[-1]


def test_no_scheme_for_all_is_better_at_its_size(tiny):
    for uniform in tiny.choose(SizeOptions(None, int(0.5 * tiny.original_bytes), CANDIDATES)).uniform:
        assert tiny.choose(SizeOptions(None, uniform.total_bytes, CANDIDATES, together=False)).kl <= uniform.kl * 1.001


def test_a_layer_that_matters_more_gets_more_bits():
    """The block whose outputs are scaled down does little to the predictions."""
    model = model_of()
    with torch.no_grad():
        quiet = model.model.layers[1]
        for part in (quiet.self_attn.o_proj, quiet.mlp.down_proj):
            part.weight.mul_(0.02)
    found = measured(model)
    allocation = found.choose(SizeOptions(None, int(0.45 * found.original_bytes), CANDIDATES))
    by_block = [
        sum(layer.stored_bytes for layer in allocation.layers if f"layers.{block}." in layer.name) for block in range(3)
    ]
    assert by_block[1] < min(by_block[0], by_block[2])
    of = {layer.name: layer.kl_per_error for layer in allocation.layers}
    assert of["model.layers.1.mlp.down_proj"] < 0.1 * of["model.layers.0.mlp.down_proj"]


def test_measured_kl_is_that_of_noise():
    """KL of the model with a weight disturbed by noise of the expected shape, against half the curvature."""
    model = model_of()
    found = measured(model, samples=6)
    with torch.no_grad():
        before = model(SEQUENCES).logits.log_softmax(-1)
    for name in ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj", "model.layers.2.self_attn.o_proj"):
        layer = found.sensitivities[name]
        weight = model.get_submodule(name).weight
        kept, losses = weight.detach().clone(), []
        generator = torch.Generator().manual_seed(0)
        rows = kept.square().mean(1, keepdim=True).sqrt()
        for _ in range(8):  # white noise: the part of the Fisher matrix's trace
            noise = torch.randn(kept.shape, generator=generator) * rows * 0.05
            with torch.no_grad():
                weight.copy_(kept + noise)
                after = model(SEQUENCES).logits.log_softmax(-1)
                losses.append((before.exp() * (before - after)).sum(-1).mean().item())
                weight.copy_(kept)
        expected = 0.5 * layer.squares.sum() * 0.05**2
        assert expected == pytest.approx(sum(losses) / len(losses), rel=0.35)


def test_model_is_as_it_was():
    model = model_of()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    asked = [parameter.requires_grad for parameter in model.parameters()]
    choose_schemes(model, SEQUENCES, CONFIG, bits=20, candidates=CANDIDATES)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == asked
    assert all(parameter.grad is None for parameter in model.parameters())


def test_bits_are_of_the_whole_model(tiny):
    allocation = tiny.choose(SizeOptions(bits=12.0, candidates=CANDIDATES))
    assert allocation.target_bytes == int(12.0 * tiny.parameters / 8)
    assert 0.98 * 12.0 <= allocation.effective_bits <= 12.0


def test_rules_keep_their_say():
    config = CONFIG.replace(rules={r"layers\.1\.mlp": "3x4g8", r"layers\.0\.self_attn\.q_proj": "dense"})
    model = model_of()
    found = measured(model, config)
    allocation = found.choose(SizeOptions(None, int(0.5 * found.original_bytes), CANDIDATES))
    schemes = {layer.name: (layer.scheme, layer.fixed) for layer in allocation.layers}
    assert schemes["model.layers.1.mlp.up_proj"] == ("3x4g8", True)
    assert "model.layers.0.self_attn.q_proj" not in schemes
    assert list(allocation.rules)[:2] == list(config.rules)


def test_experts_of_a_block_have_one_scheme_and_few_rules():
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 96}
    model = random_model(MixtralConfig(**sizes, initializer_range=0.1))
    found = measured(model)
    target = int(0.5 * found.original_bytes)
    allocation = found.choose(SizeOptions(None, target, CANDIDATES))
    experts = [layer for layer in allocation.layers if ".experts." in layer.name]
    assert len(experts) == 2 * 4 * 3
    for block in range(2):
        for part in ("w1", "w2", "w3"):
            alike = [x for x in experts if f"layers.{block}." in x.name and x.name.endswith(part)]
            assert len({layer.scheme for layer in alike}) <= 1
    quantize_model(model, SEQUENCES, CONFIG.replace(**allocation_options(allocation)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_size": 1000}, r"target_size: got 1000, expected at least [\d,]+ bytes"),
        ({"bits": 0.5}, r"bits: got 0.5, expected at least [\d,]+ bytes \(.* MB, [\d.]+ bits per parameter\)"),
        ({"target_size": "1GB"}, r"target_size: got 1000000000, expected less than the original's"),
        ({"bits": 3, "target_size": 10**5}, "bits: got 3, expected none beside target_size"),
        ({}, "bits: missing, expected bits or target_size"),
        ({"bits": 3, "candidates": ("2x8g8", "9x9")}, "candidates: num_codebooks: got 9"),
        ({"bits": 3, "candidates": ("dense",)}, "candidates: .*expected a scheme beside 'dense'"),
        ({"bits": 3, "candidates": ("1x8g8o2",)}, "candidates: '1x8g8o2'"),
        ({"bits": 3, "samples": 0}, "samples: got 0"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        choose_schemes(model_of(), SEQUENCES, CONFIG, **{"candidates": CANDIDATES, **options})


def test_smallest_size_that_is_named_works(tiny):
    with pytest.raises(ValueError, match=r"expected at least") as refused:
        tiny.choose(SizeOptions(None, 1000, CANDIDATES))
    least = int(str(refused.value).split("at least ")[1].split(" ")[0].replace(",", ""))
    assert tiny.choose(SizeOptions(None, least, CANDIDATES)).total_bytes <= least


def test_round_trips_and_tables(tiny, tmp_path):
    allocation = tiny.choose(SizeOptions(None, int(0.5 * tiny.original_bytes), CANDIDATES))
    again = Allocation.from_dict(json.loads(json.dumps(allocation.to_dict())))
    assert again == allocation
    pytest.importorskip("rich")
    assert "mlp.down_proj" in allocation._repr_html_()
    pytest.importorskip("matplotlib")
    for name in ("bits.png", "bits.svg"):
        allocation.plot(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 4000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bits.png", "bits.svg"]
    with pytest.raises(ValueError, match=r"plot: got .*expected a file ending in"):
        allocation.plot(tmp_path / "bits.txt")


def run_config(tmp_path, model, **options):
    if not model.exists():
        model_of().save_pretrained(model)
        tiny_tokenizer().save_pretrained(model)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i % 90}" for i in range(4000)))
    drawn = {"data": [str(text)], "samples": 6, "sequence_length": 32, "device": "cpu"}
    fast = {"ldl_passes": 1, "max_sweeps": 1, "init_max_iter": 2, "finetune_epochs": 0}
    return RunConfig.from_fields({"model": str(model), **drawn, **fast, **options})


def test_run_saves_rules_that_give_the_same_again(tmp_path):
    target = 200_000
    options = {"target_size": target, "candidates": list(CANDIDATES)}
    out = tmp_path / "out"
    pytest.importorskip("matplotlib")
    report = run(run_config(tmp_path, tmp_path / "model", out=str(out), **options), plot=tmp_path / "bits.png")
    assert 0.99 * target <= report.sizes["quantized_bytes"] <= target
    assert (tmp_path / "bits.png").exists()
    stored = json.loads((out / "report.json").read_text())
    assert stored["allocation"]["total_bytes"] >= report.sizes["quantized_bytes"]
    fields = yaml.safe_load((out / "run.yaml").read_text())
    assert fields["rules"] == stored["allocation"]["rules"]
    assert not {"bits", "target_size", "candidates"} & set(fields)
    again = run(RunConfig.from_file(out / "run.yaml", out=str(tmp_path / "again")))
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert not again.allocation


def test_yaml_names_the_size(tmp_path):
    config = RunConfig("m", "o", target_size="60MB", candidates=["2x8g8", "dense"])
    path = tmp_path / "run.yaml"
    path.write_text(config.to_yaml())
    again = RunConfig.from_file(path)
    assert again.to_yaml() == config.to_yaml()
    assert again.size == SizeOptions(None, "60MB", ("2x8g8", "dense"))
    assert RunConfig.from_file(path, target_size=None, bits=2.5).size.bits == 2.5
    with pytest.raises(ValueError, match=r"bits: got 2.5, expected none beside target_size"):
        RunConfig.from_file(path, bits=2.5)
    with pytest.raises(ValueError, match=r"candidates: got .*bits or target_size beside them"):
        RunConfig("m", "o", candidates=["2x8g8"])


class Stop(Exception):
    pass


def test_resume_goes_on_with_the_schemes_it_began_with(tmp_path, monkeypatch):
    from aqlm_c.pipeline.progress import Progress

    class Stopping(Progress):
        def on_block(self, index, name):
            if index == 2:
                raise Stop

    options = {"target_size": 200_000, "candidates": list(CANDIDATES), "work_dir": str(tmp_path / "work")}
    config = run_config(tmp_path, tmp_path / "model", out=str(tmp_path / "out"), **options)
    with pytest.raises(Stop):
        run(config, Stopping())
    chosen = json.loads((tmp_path / "work" / "schemes.json").read_text())["choice"]

    def never(*_args, **_options):
        raise AssertionError("schemes are chosen again")

    with monkeypatch.context() as patched:
        patched.setattr("aqlm_c.allocation.choose.choose_schemes", never)
        report = run(config)
    assert report.allocation == chosen
    for changed in ({"target_size": 150_000}, {"candidates": ["1x4g8", "3x4g8"]}, {"seed": 1}):
        other = run_config(tmp_path, tmp_path / "model", out=str(tmp_path / "x"), **{**options, **changed})
        with pytest.raises(ValueError, match=r"work_dir: got .*holds another run"):
            run(other)
    plain = run_config(
        tmp_path, tmp_path / "model", out=str(tmp_path / "y"), scheme="2x4g8", work_dir=str(tmp_path / "w")
    )
    run(plain)
    mixed = run_config(
        tmp_path, tmp_path / "model", out=str(tmp_path / "z"), **{**options, "work_dir": str(tmp_path / "w")}
    )
    with pytest.raises(ValueError, match=r"holds another run"):
        run(mixed)
