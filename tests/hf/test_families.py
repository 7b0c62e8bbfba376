"""Every decoder architecture that is promised, on tiny random models: quantize, save, load, generate."""

import pytest
import torch
from loading import load, quantized_names
from safetensors.torch import load_file
from tiny import VOCABULARY, random_model, random_tokens
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

import aqlm_c.hf  # noqa: F401  (registers)
from aqlm_c.io.checkpoint import save_quantized
from aqlm_c.quantize import quantize_model
from aqlm_c.recipe import AqlmConfig

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "pad_token_id": 0,
}
WINDOW = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}  # shorter than the sequences
EXPERTS = 4

# name: config, linears in the blocks, epochs of fine-tuning
FAMILIES = {
    "llama": (LlamaConfig(**SIZES, attention_bias=True), 14, 1),
    "mistral": (MistralConfig(**SIZES, sliding_window=8), 14, 0),
    "mixtral": (MixtralConfig(**SIZES, num_local_experts=EXPERTS), 2 * (4 + 3 * EXPERTS), 1),
    "qwen2": (Qwen2Config(**SIZES, tie_word_embeddings=True), 14, 0),
    "qwen3": (Qwen3Config(**SIZES, head_dim=8), 14, 0),
    "qwen3_moe": (
        Qwen3MoeConfig(
            **SIZES,
            head_dim=8,
            num_experts=EXPERTS,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            mlp_only_layers=[1],
        ),
        7 + 4 + 3 * EXPERTS,
        1,
    ),
    "gemma2": (Gemma2Config(**SIZES, **WINDOW, head_dim=8), 14, 1),
    "gemma3": (Gemma3TextConfig(**SIZES, **WINDOW, head_dim=8), 14, 1),
    "phi3": (Phi3Config(**SIZES), 8, 0),
    "olmo2": (Olmo2Config(**SIZES), 14, 0),
    "gpt_neox": (GPTNeoXConfig(**SIZES), 8, 1),
    "falcon": (FalconConfig(**SIZES, bias=True), 8, 1),
    "falcon_new": (FalconConfig(**SIZES, new_decoder_architecture=True, num_kv_heads=2), 8, 0),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_quantize_save_load_generate(tmp_path, family):
    config, n_linears, epochs = FAMILIES[family]
    model = random_model(config)
    model.generation_config.eos_token_id = None
    tokens = random_tokens(4, 24)
    original = model(tokens).logits
    quick = {"max_sweeps": 1, "ldl_passes": 1, "init_max_iter": 2, "finetune_lookahead": 1}
    scheme = AqlmConfig.from_scheme("2x4g8", finetune_epochs=epochs, **quick)
    report = quantize_model(model, tokens, scheme)
    assert len(report.layers) == n_linears == len(quantized_names(model))
    assert not [name for name in dense_names(model) if not name.endswith((".gate", "lm_head", "embed_out"))]
    assert len(report.blocks) == (2 if epochs else 0)
    save_quantized(model, None, tmp_path / "quantized")

    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", output_loading_info=True)
    assert not any(info.values()), info
    assert quantized_names(loaded) == quantized_names(model)
    with torch.no_grad():
        logits = loaded(tokens).logits
        assert torch.equal(logits, model(tokens).logits)
        assert (logits - original).abs().max() > 1e-3  # the comparisons say something
        generated = loaded.generate(tokens[:1, :8], max_new_tokens=6, do_sample=False)
        assert generated.shape == (1, 14)

        loaded.save_pretrained(tmp_path / "again")
        files = [load_file(tmp_path / name / "model.safetensors") for name in ("quantized", "again")]
        assert files[0].keys() == files[1].keys()
        assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])

        dense = loaded.dequantize()
        assert not quantized_names(dense)
        scale = logits.abs().max()
        assert (dense(tokens).logits - logits).abs().max() <= 1e-5 * scale
        assert torch.equal(dense.generate(tokens[:1, :8], max_new_tokens=6, do_sample=False), generated)
        dense.save_pretrained(tmp_path / "dense")
        plain = load(tmp_path / "dense")
        assert torch.equal(plain(tokens).logits, dense(tokens).logits)


def dense_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
