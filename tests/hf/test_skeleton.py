"""What quantizes also loads: transformers' initialisation and conversions, and what is refused before the work."""

import pytest
import torch
import transformers
from loading import load, quantized_names
from safetensors.torch import load_file
from tiny import LINEAR_ATTENTION, VOCABULARY, random_model, random_tokens, tiny_llama
from torch import nn
from transformers import GPTBigCodeConfig, MambaConfig

import aqlm_c.hf
from aqlm_c.hf.quantizer import AqlmQuantizer, attach, check_loads
from aqlm_c.io.checkpoint import save_quantized
from aqlm_c.model import experts
from aqlm_c.pipeline.plan import make_plan
from aqlm_c.quantize import quantize_model
from aqlm_c.recipe import AqlmConfig

QUICK = {"finetune_epochs": 0, "max_sweeps": 1, "ldl_passes": 1, "init_max_iter": 2}
TOKENS = random_tokens(3, 16)
MAMBA = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 8}
IS_5 = hasattr(transformers, "GgufConfig")
needs_5 = pytest.mark.skipif(not IS_5, reason="transformers 4 converts nothing and ties weights alone")


def scheme(**options):
    return AqlmConfig.from_scheme("1x4g8", **QUICK, **options)


def round_trip(model, directory, **options):
    """The model quantized, saved and loaded; it gives the same logits."""
    quantize_model(model, TOKENS, scheme(**options))
    save_quantized(model, None, directory)
    loaded = load(directory)
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    assert quantized_names(loaded) == quantized_names(model)
    assert not any(layer.is_loading for layer in loaded.modules() if hasattr(layer, "is_loading"))
    return loaded


CONFIGS = {
    "bigcode": (GPTBigCodeConfig(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4), {}),
    "mamba": (MambaConfig(**MAMBA), {"dt_proj": "dense"}),  # its forward reads dt_proj.weight
    "mamba rescaled": (MambaConfig(**MAMBA, rescale_prenorm_residual=True), {"dt_proj": "dense"}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_initialisation_that_reads_weights_leaves_codes_alone(tmp_path, name):
    config, rules = CONFIGS[name]
    loaded = round_trip(random_model(config), tmp_path / "model", rules=rules)
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items() if "codes" in name}
    loaded.init_weights()
    after = loaded.state_dict()
    assert before and all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_forward_that_reads_a_quantized_weight(tmp_path, monkeypatch):
    monkeypatch.setattr("aqlm_c.pipeline.plan.dense_reasons", lambda *_: {})  # else what nobody calls stays dense
    model = random_model(MambaConfig(**MAMBA))
    quantize_model(model, None, scheme())  # without data: dt_proj is called by nobody
    save_quantized(model, None, tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert any(name.endswith("dt_proj") for name in quantized_names(loaded))
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, loaded.dequantize()(TOKENS).logits)


def lara():
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    if not hasattr(transformers, "LaraMiniConfig"):
        pytest.skip("a transformers without this model, whose checkpoints join linears")
    return random_model(transformers.LaraMiniConfig(**sizes, **LINEAR_ATTENTION))


@pytest.mark.parametrize("dense", ["", "in_proj", "in_proj_[ab]$"], ids=["all", "none", "two"])
def test_linears_that_are_joined_on_disk(tmp_path, dense):
    """Four linears are one tensor in dense checkpoints; codes are stored apart, dense ones with them."""
    loaded = round_trip(lara(), tmp_path / "model", rules={dense: "dense"} if dense else None)
    names = {name.rpartition("linear_attn.")[2] for name in load_file(tmp_path / "model" / "model.safetensors")}
    assert ("in_proj.weight" in names) == (dense == "in_proj")
    assert ("in_proj_qkv.codes" in names) == (dense != "in_proj")
    loaded.save_pretrained(tmp_path / "again")
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("model", "again")]
    assert files[0].keys() == files[1].keys()
    plain = loaded.dequantize()
    plain.save_pretrained(tmp_path / "dense")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "dense")(TOKENS).logits, plain(TOKENS).logits)


def test_a_model_that_its_config_does_not_describe_is_refused(monkeypatch):
    model = tiny_llama()
    model.model.layers = model.model.layers[:1]
    with pytest.raises(ValueError, match=r"LlamaForCausalLM, .* not load again \(model\.layers\.1\..*no such param"):
        quantize_model(model, TOKENS, scheme())
    assert not quantized_names(model)
    model = tiny_llama()
    model.model.layers[0].mlp.extra = nn.Linear(32, 32)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.extra\.\w+: the model has \[32"):
        quantize_model(model, TOKENS, scheme())


def test_a_name_that_would_not_load_is_refused_before_the_work(monkeypatch):
    """Whatever transformers does to a name: here it is lost on saving."""

    def lossy(model, tensors):
        return {name.replace("up_proj.codes", "up_proj.code"): tensor for name, tensor in tensors.items()}

    monkeypatch.setattr(experts, "stored_tensors", lossy)
    started = []
    monkeypatch.setattr("aqlm_c.pipeline.pipeline.Pipeline.run", lambda self: started.append(1))
    with pytest.raises(ValueError, match=r"not load again \(model\.layers\.0\.mlp\.up_proj"):
        quantize_model(tiny_llama(), TOKENS, scheme())
    assert not started


@needs_5
def test_refused_models_stay_as_they_were(monkeypatch):
    model = random_model(
        transformers.MixtralConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
        )
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    monkeypatch.setattr(AqlmQuantizer, "place", lambda *_: (_ for _ in ()).throw(ValueError("name: missing")))
    with pytest.raises(ValueError, match="name: missing"):
        quantize_model(model, TOKENS, scheme())
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert not any(isinstance(module, experts.Experts) for module in model.modules())


def test_the_check_changes_nothing_and_is_asked_on_the_fly_too(tmp_path):
    model = tiny_llama()
    state, config = torch.get_rng_state(), model.config.to_dict()
    check_loads(model, make_plan(model, scheme()).targets(), scheme())
    assert torch.equal(torch.get_rng_state(), state) and model.config.to_dict() == config
    assert torch.get_default_dtype() == torch.float32
    assert not hasattr(model, "hf_quantizer")
    model.save_pretrained(tmp_path)
    fly = aqlm_c.hf.AqlmConfig(scheme="1x4g8", **{name: QUICK[name] for name in ("max_sweeps", "ldl_passes")})
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aqlm_c.hf.skeleton.check_loads", lambda *arguments: asked.append(arguments[1]))
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=fly)
    assert [len(formats) for formats in asked] == [14]


def quantized_embeddings(tied):
    rules = {"embed_tokens": "1x8g8"} if tied else {"embed_tokens": "1x8g8", "lm_head": "1x8g8"}
    model = tiny_llama(tie_word_embeddings=tied)
    config = scheme(rules=rules)
    quantize_model(model, TOKENS, config)
    return model


@needs_5
@pytest.mark.parametrize("tied", [True, False])
def test_resizing_quantized_embeddings_is_refused(tied):
    model = quantized_embeddings(tied)
    embedding = model.get_input_embeddings()
    for options in ({"new_num_tokens": VOCABULARY + 1}, {"pad_to_multiple_of": 64}, {"new_num_tokens": 8}):
        with pytest.raises(ValueError, match=rf"resize_token_embeddings: got \d+, expected {VOCABULARY}.*dequantize"):
            model.resize_token_embeddings(**options)
    for options in ({}, {"new_num_tokens": VOCABULARY}, {"pad_to_multiple_of": 32}):
        assert model.resize_token_embeddings(**options) is embedding
    assert model.config.vocab_size == VOCABULARY
    assert model.dequantize().resize_token_embeddings(VOCABULARY + 1).weight.shape[0] == VOCABULARY + 1


def test_resizing_beside_a_quantized_head_is_refused_before_anything_changes():
    model = tiny_llama(tie_word_embeddings=False)
    quantize_model(model, TOKENS, scheme(rules={"lm_head": "1x8g8"}))
    with pytest.raises(
        ValueError, match="resize_token_embeddings: got 100, expected 96, the rows of a QuantizedLinear"
    ):
        model.resize_token_embeddings(100)
    assert model.get_input_embeddings().weight.shape[0] == VOCABULARY
    dense = tiny_llama()
    assert dense.resize_token_embeddings(100).weight.shape[0] == 100


def test_attach_lists_dense_layers_by_the_names_of_both():
    model = lara()
    quantize_model(model, None, scheme(rules={"in_proj": "dense"}))
    attach(model, scheme(rules={"in_proj": "dense"}))
    names = model.config.quantization_config.linear_weights_not_to_quantize
    assert "model.layers.0.linear_attn.in_proj.weight" in names
    assert "model.layers.0.linear_attn.in_proj_qkv.weight" in names
