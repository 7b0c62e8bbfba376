"""Per-layer schemes, quantized embeddings and output layers: in memory, on disk, loaded again."""

import json
import logging

import pytest
import torch
import transformers
from loading import load
from tiny import VOCABULARY, random_tokens, tiny_llama
from transformers import AutoModelForCausalLM, Gemma3TextConfig

import aqlm_c.hf
from aqlm_c import quantize_model
from aqlm_c.evaluate import perplexity
from aqlm_c.hf.card import model_card
from aqlm_c.inspection import check_model, inspect_model
from aqlm_c.io.checkpoint import save_quantized
from aqlm_c.model.embeddings import find_embeddings
from aqlm_c.nn.embedding import QuantizedEmbedding
from aqlm_c.nn.linear import QuantizedLinear
from aqlm_c.pipeline.plan import make_plan
from aqlm_c.pipeline.progress import Progress
from aqlm_c.recipe import AqlmConfig, RunConfig, parse_rule

pytestmark = pytest.mark.hf

RULES = {
    r"layers\.0\.mlp\.down_proj": "dense",
    "down_proj": "3x4g8",
    "self_attn": "1x5g8",
    "embed_tokens": "2x4g4",
    "lm_head": "2x6g8",
}
CONFIG = AqlmConfig.from_scheme(
    "2x4g8", rules=RULES, ldl_passes=1, max_sweeps=1, finetune_epochs=1, finetune_held_out=0.5
)
SEQUENCES = random_tokens(4, 24)
GEMMA = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 8}


def quantized(tied, **changes):
    model = tiny_llama(tie_word_embeddings=tied)
    report = quantize_model(model, SEQUENCES, CONFIG.replace(**changes.pop("config", {})), **changes)
    return model, report


def schemes(model):
    kinds = (QuantizedLinear, QuantizedEmbedding)
    return {name: module.scheme for name, module in model.named_modules() if isinstance(module, kinds)}


def test_rules_give_each_layer_its_config():
    assert CONFIG.format_for("model.layers.0.mlp.down_proj") is None
    assert CONFIG.format_for("model.layers.1.mlp.down_proj").scheme == "3x4g8"
    up = CONFIG.format_for("model.layers.1.mlp.up_proj")
    assert up == CONFIG.format
    assert CONFIG.rules.scheme_for("model.layers.1.mlp.up_proj") is None
    assert AqlmConfig.from_dict(json.loads(json.dumps(CONFIG.to_dict()))) == CONFIG


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (3, "rules: got 3, expected a mapping"),
        ({"(": "2x8g8"}, r"rules: got '\(', expected a regular expression"),
        ({"down_proj": "9x8g8"}, "rules: 'down_proj': num_codebooks: got 9"),
        ({"down_proj": "none"}, "rules: 'down_proj': scheme: got 'none'.*'dense'"),
        ([["up", "2x8g8"], ["up", "3x8g8"]], "rules: got 'up' twice"),
    ],
)
@pytest.mark.parametrize("config", [AqlmConfig, aqlm_c.hf.AqlmConfig])
def test_wrong_rules_are_named(rules, message, config):
    with pytest.raises(ValueError, match=message):
        config(rules=rules)


@pytest.mark.parametrize("tied", [True, False])
def test_quantize_save_load(tmp_path, tied):
    if tied and not hasattr(transformers.PreTrainedModel, "get_expanded_tied_weights_keys"):
        with pytest.raises(ValueError, match="tied embeddings needs transformers 5"):
            quantized(tied)
        return
    model, report = quantized(tied)
    found = schemes(model)
    assert found["model.embed_tokens"] == "2x4g4"
    assert found["lm_head"] == ("2x4g4" if tied else "2x6g8")
    assert found["model.layers.1.mlp.down_proj"] == "3x4g8" and found["model.layers.0.self_attn.q_proj"] == "1x5g8"
    assert found["model.layers.0.mlp.up_proj"] == "2x4g8"
    assert "model.layers.0.mlp.down_proj" not in found and len(found) == 15
    assert {layer.name: layer.scheme for layer in report.layers} == {
        name: scheme for name, scheme in found.items() if not (tied and name == "lm_head")
    }
    save_quantized(model, None, tmp_path / "a")
    fields = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    assert fields["quant_method"] == "aqlm_c" and fields["rules"] == [list(rule) for rule in RULES.items()]
    again = load(tmp_path / "a")
    assert schemes(again) == found
    if tied:
        assert again.lm_head.codes is again.model.embed_tokens.codes
        assert again.lm_head.codebooks is again.model.embed_tokens.codebooks
    tokens = random_tokens(2, 9, seed=1)
    with torch.no_grad():
        logits = model(tokens).logits
        assert torch.equal(again(tokens).logits, logits)
        assert again.generate(tokens[:1], max_new_tokens=3, do_sample=False).shape == (1, 12)
        again.save_pretrained(tmp_path / "b")
        files = [(tmp_path / side / "model.safetensors").read_bytes() for side in "ab"]
        assert files[0] == files[1]
        body = load(tmp_path / "a", transformers.AutoModel) if tied else None
        if tied:
            hidden = again.model(tokens).last_hidden_state
            assert torch.equal(body(tokens).last_hidden_state, hidden)
        dense = again.dequantize()
        assert not schemes(dense)
        assert (dense.lm_head.weight is dense.model.embed_tokens.weight) == tied
        torch.testing.assert_close(dense(tokens).logits, logits, rtol=1e-4, atol=1e-4)
        dense.save_pretrained(tmp_path / "dense")
        assert torch.equal(load(tmp_path / "dense")(tokens).logits, dense(tokens).logits)


def test_inspect_tells_the_schemes(tmp_path):
    model, _ = quantized(False)
    save_quantized(model, None, tmp_path / "model")
    inspection = inspect_model(tmp_path / "model")
    assert {layer.name: layer.scheme for layer in inspection.layers if layer.quantized} == {
        name: scheme for name, scheme in schemes(model).items() if name not in ("lm_head", "model.embed_tokens")
    }
    assert {matrix.name: matrix.scheme for matrix in inspection.embeddings} == {
        "model.embed_tokens": "2x4g4",
        "lm_head": "2x6g8",
    }
    assert check_model(tmp_path / "model") > 0


def test_the_config_of_a_checkpoint_must_fit_its_files(tmp_path):
    model, _ = quantized(False)
    save_quantized(model, None, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    lies = {
        "embed_tokens": (None, r"model.embed_tokens.codes in .*: unexpected"),
        "down_proj": ("4x4g8", r"model.layers.1.mlp.down_proj.codes in .*expected I8 \[32, 8, 4\]"),
    }
    for rule, (scheme, message) in lies.items():
        rules = {name: scheme if name == rule else kept for name, kept in RULES.items()}
        config["quantization_config"]["rules"] = [[name, kept] for name, kept in rules.items() if kept]
        path.write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "model")


def test_a_rule_for_the_head_of_a_tied_model_is_one_for_the_embedding(tmp_path):
    if not hasattr(transformers.PreTrainedModel, "get_expanded_tied_weights_keys"):
        pytest.skip("tied embeddings are quantized with transformers 5 or newer")
    model, _ = quantized(True, config={"rules": {"lm_head": "2x4g8"}, "finetune_epochs": 0})
    assert schemes(model)["model.embed_tokens"] == schemes(model)["lm_head"] == "2x4g8"
    save_quantized(model, None, tmp_path / "model")
    tokens = random_tokens(2, 9, seed=1)
    body = load(tmp_path / "model", transformers.AutoModel)
    with torch.no_grad():
        assert torch.equal(body(tokens).last_hidden_state, model.model(tokens).last_hidden_state)


def test_resumed_embeddings_are_the_same(tmp_path, caplog):
    model, _ = quantized(False)

    class Stopped(Exception):
        pass

    class Stop(Progress):
        def on_block(self, index, name):
            if index == 2:
                raise Stopped

    with pytest.raises(Stopped):
        quantized(False, work_dir=tmp_path, progress=Stop())
    with caplog.at_level(logging.INFO, "aqlm_c"):
        again, report = quantized(False, work_dir=tmp_path)
    states = [m.state_dict() for m in (model, again)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert report.layers[0].name == "model.embed_tokens"


def test_embeddings_alone(tmp_path):
    """What is not to be quantized stays as it is, bit by bit."""
    original = tiny_llama(tie_word_embeddings=False)
    model, _ = quantized(False, layers="down_proj", config={"rules": {"down_proj": "dense", "lm_head": "2x4g8"}})
    assert list(schemes(model)) == ["lm_head"]
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in original.state_dict().items() if name in state)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"down_prj": "3x4g8"}, "'down_prj': matches no layer"),
        ({"norm": "3x4g8"}, "'norm': matches no layer"),  # none that can be quantized
        ({"mlp": "dense", "up_proj": "3x4g8"}, "'up_proj': expected before 'mlp'"),
    ],
)
def test_a_rule_that_decides_nothing(rules, message):
    with pytest.raises(ValueError, match=f"rules: {message}"):
        quantized(False, config={"rules": rules})


class Normed(torch.nn.Embedding):
    def forward(self, ids):
        return torch.nn.functional.normalize(super().forward(ids), dim=-1)


class TwiceScaled(torch.nn.Embedding):
    embed_scale = 3.0

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale**2


@pytest.mark.parametrize("kind", [Normed, TwiceScaled])
def test_an_embedding_that_does_more_than_looking_up(kind, monkeypatch):
    model = tiny_llama(tie_word_embeddings=False, vocab_size=4096)
    model.model.embed_tokens.__class__ = kind
    monkeypatch.setattr("aqlm_c.pipeline.block.quantize_module", None)
    with pytest.raises(ValueError, match=rf"rules: got model\.embed_tokens, a {kind.__name__}"):
        quantize_model(model, None, CONFIG.replace(rules={"embed": "2x4g8"}))
    plan = make_plan(model, CONFIG.replace(rules=None))  # of its own accord it leaves it dense
    assert {name for name in plan.targets() if "layers" not in name} == {"lm_head"}


def test_nothing_left_names_the_rules():
    with pytest.raises(ValueError, match=r"layers: got None with rules \{'layers': 'dense'\}, which leave no linear"):
        quantized(False, config={"rules": {"layers": "dense"}})


def test_perplexity_with_a_quantized_embedding():
    model, _ = quantized(False, config={"rules": {"embed_tokens": "2x4g8"}, "finetune_epochs": 0})
    found = perplexity(model, random_tokens(1, 64).flatten(), 16)
    dense = perplexity(model.dequantize(), random_tokens(1, 64).flatten(), 16)
    assert found["perplexity"] == pytest.approx(dense["perplexity"], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_quantized_embedding_gives_the_models_dtype(tmp_path, dtype):
    quantized(False, config={"finetune_epochs": 0})[0].save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert model.model.embed_tokens(SEQUENCES).dtype == model(SEQUENCES).logits.dtype == dtype


def test_a_task_model_leaves_a_quantized_head_out(tmp_path):
    quantized(False, config={"finetune_epochs": 0})[0].save_pretrained(tmp_path)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, pad_token_id=0)
    assert isinstance(model.score, torch.nn.Linear)
    assert schemes(model) == {name: s for name, s in schemes(load(tmp_path)).items() if name != "lm_head"}


def test_refused_before_any_work():
    with pytest.raises(ValueError, match="out_group_size: got 2"):
        quantized(False, config={"rules": {"lm_head": "2x8g8o2"}})


def test_rules_of_a_run():
    assert parse_rule(r"q=k|\.v=3x8g8") == (r"q=k|\.v", "3x8g8")
    for text in ("3x8g8", "=3x8g8", "a="):
        with pytest.raises(ValueError, match="expected regex=scheme"):
            parse_rule(text)
    run = RunConfig("m", "o", rules=RULES)
    assert run.resolve().config.rules == RULES
    with pytest.raises(ValueError, match="rules: got 'x', expected a mapping"):
        RunConfig("m", "o", rules="x")


def test_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(RunConfig("m", "o", rules=RULES).to_yaml())
    assert RunConfig.from_file(path).rules == RULES


def test_embeddings_are_quantized_where_they_are_large():
    """More than a tenth of the result, and large enough for codebooks of their own."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = AqlmConfig.from_scheme("1x4g8", ldl_passes=1, max_sweeps=0, finetune_epochs=0)
    for tied, vocabulary, expected in ((False, 4096, {"model.embed_tokens", "lm_head"}), (False, 96, set())):
        model = tiny_llama(tie_word_embeddings=tied, vocab_size=vocabulary, **sizes)
        report = quantize_model(model, None, config)
        found = {name for name in schemes(model) if "layers" not in name}
        assert found == expected and {layer.name for layer in report.layers if layer.embedding} == expected
        assert all(schemes(model)[name] == "4x8g8" for name in found)
        rules = model.config.quantization_config.rules
        assert rules == {f"^{name.replace('.', chr(92) + '.')}$": "4x8g8" for name in sorted(expected, reverse=True)}


@pytest.mark.parametrize(
    ("asked", "layers", "expected"),
    [
        ({"embeddings": "dense"}, None, {}),
        ({}, "q_proj", {}),  # some layers alone
        ({"embeddings": "1x4g8"}, None, {"model.embed_tokens": "1x4g8", "lm_head": "1x4g8"}),
        ({"rules": {"lm_head": "dense"}}, None, {"model.embed_tokens": "4x8g8"}),
        ({"rules": {"lm_head": "1x5g8"}}, None, {"model.embed_tokens": "4x8g8", "lm_head": "1x5g8"}),
    ],
)
def test_what_is_asked_of_embeddings_counts(asked, layers, expected):
    model = tiny_llama(tie_word_embeddings=False, vocab_size=4096, hidden_size=32, num_hidden_layers=1)
    config = AqlmConfig.from_scheme("1x4g8", ldl_passes=0, max_sweeps=0, finetune_epochs=0, **asked)
    quantize_model(model, None, config, layers=layers)
    assert {name: scheme for name, scheme in schemes(model).items() if "layers" not in name} == expected
    assert (model.config.quantization_config.quant_method == "aqlm") == (not expected)


def test_a_wrong_scheme_for_embeddings_is_named():
    with pytest.raises(ValueError, match="embeddings: got 'small', expected 'auto', 'dense' or a scheme"):
        AqlmConfig.from_scheme("2x8g8", embeddings="small")
    with pytest.raises(ValueError, match=r"in_group_size: got 32, expected a divisor .* of layer model.embed_tokens"):
        quantize_model(
            tiny_llama(hidden_size=48, head_dim=8), None, AqlmConfig.from_scheme("1x4g8", embeddings="1x8g32")
        )


def test_effective_bits_are_those_of_the_file(tmp_path):
    model = tiny_llama(tie_word_embeddings=False, vocab_size=4096, hidden_size=32, num_hidden_layers=1)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    config = AqlmConfig.from_scheme("1x4g8", ldl_passes=0, max_sweeps=0, finetune_epochs=0)
    report = quantize_model(model.to(torch.bfloat16), None, config)
    save_quantized(model, None, tmp_path / "model")
    inspection = inspect_model(tmp_path / "model")
    assert report.parameters == inspection.parameters == parameters
    headers = 8 * 8192 / parameters
    assert report.effective_bits <= inspection.effective_bits < report.effective_bits + headers
    blocks = [layer for layer in report.layers if not layer.embedding]
    assert report.bits_per_weight == pytest.approx(inspection.bits_per_weight)
    assert len({layer.bits_per_weight for layer in blocks}) > 1 and report.bits_per_weight < report.effective_bits
    assert f"{report.effective_bits:.3f} bits per parameter" in model_card(model)


@pytest.mark.parametrize("buffer", [True, False])
def test_a_scaled_embedding_stays_scaled(buffer, tmp_path):
    if buffer:
        config = Gemma3TextConfig(**GEMMA, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    else:
        config = transformers.XGLMConfig(
            vocab_size=VOCABULARY, d_model=32, ffn_dim=64, num_layers=1, attention_heads=4, max_position_embeddings=64
        )
    if not hasattr(transformers.PreTrainedModel, "get_expanded_tied_weights_keys"):
        pytest.skip("tied embeddings need transformers 5")
    model = AutoModelForCausalLM.from_config(config).eval()
    name = "model.embed_tokens"
    dense = model.get_submodule(name)
    ids = random_tokens(1, 9)
    options = {"ldl_passes": 1, "max_sweeps": 0, "finetune_epochs": 0, "embeddings": "2x8g4"}
    quantize_model(model, None, AqlmConfig.from_scheme("1x4g8", **options))
    embedding = model.get_submodule(name)
    assert isinstance(embedding, QuantizedEmbedding)
    again = embedding.dequantize(torch.float32)
    assert type(again) is type(dense) and again.weight.dtype == torch.float32
    assert torch.equal(again(ids), torch.nn.functional.embedding(ids, again.weight) * 32**0.5)
    torch.testing.assert_close(embedding(ids), again(ids), rtol=1e-2, atol=1e-3)
    save_quantized(model, None, tmp_path / "model")
    loaded = load(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_head_of_other_sizes_is_not_tied():
    """Whatever the config says: CPM-Ant's has fewer rows than its embedding."""
    model = tiny_llama(tie_word_embeddings=True)
    assert find_embeddings(model).tied
    model.lm_head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size // 2, bias=False)
    assert not find_embeddings(model).tied
