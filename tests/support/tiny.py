"""Tiny random models, a tokenizer, and an independent writer of published AQLM checkpoints, for the tests."""

import json

import numpy as np
import torch
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

VOCABULARY = 96
BYTES = 257
FAST = {"ldl_passes": 1, "max_sweeps": 1, "init_max_iter": 2, "finetune_epochs": 0}  # options
SCHEME = "1x4g8"
LINEAR_ATTENTION = {  # with experts, as in Qwen3-Next: sizes beside those of a tiny Llama
    "head_dim": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "shared_expert_intermediate_size": 16,
}


def tiny_llama(dtype=torch.float32, seed=0, **options):
    """A random Llama of two blocks with grouped-query attention; `options` override its config."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "initializer_range": 0.1,  # logits that depend on the blocks
    }
    return random_model(LlamaConfig(**{**sizes, **options}), dtype, seed)


def random_model(config, dtype=torch.float32, seed=0):
    """A model of any transformers config, every parameter random: biases and norms too."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tiny_tokenizer():
    """A word-level tokenizer of VOCABULARY words, with a chat template."""
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(VOCABULARY - 3))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    return tokenizer


def byte_tokenizer(**options):
    """A tokenizer of BYTES words, one for each byte, so that any text has many tokens."""
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab={**vocabulary, "<eos>": 256}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", **options)


def random_tokens(n, length, seed=0):
    """Token ids [n, length] for `tiny_llama`."""
    return torch.randint(VOCABULARY, (n, length), generator=torch.Generator().manual_seed(seed))


def encode(rng, out_features, in_features, scheme):
    """Random codes in the disk layout, codebooks and scales, and the weight they stand for."""
    K, B, g, og = scheme
    codes = rng.integers(0, 2**B, (out_features // og, in_features // g, K))
    codebooks = rng.normal(0, 0.1, (K, 2**B, og, g)).astype(np.float16)
    scales = rng.uniform(0.5, 1.5, (out_features // og, 1, 1, 1)).astype(np.float16)
    groups = sum(codebooks[k].astype(np.float64)[codes[..., k]] for k in range(K))  # [O, J, og, g]
    weight = (groups * scales.astype(np.float64)).transpose(0, 2, 1, 3).reshape(out_features, in_features)
    stored = np.where(codes >= 2 ** (B - 1), codes - 2**B, codes)
    return stored.astype(np.int8 if B <= 8 else np.int16), codebooks, scales, weight


def quantization_config(scheme, not_quantized):
    """As published models have it in config.json."""
    return {
        "quant_method": "aqlm",
        "num_codebooks": scheme[0],
        "nbits_per_codebook": scheme[1],
        "in_group_size": scheme[2],
        "out_group_size": scheme[3],
        "linear_weights_not_to_quantize": not_quantized,
    }


def write_published(directory, scheme, keep=(), extra=None, **options):
    """Write a random quantized tiny Llama; returns the dense model of the same weights."""
    rng = np.random.default_rng(0)
    dense = tiny_llama(**options)
    tensors, others = {}, []
    for name, module in dense.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name and name not in keep:
            codes, codebooks, scales, weight = encode(rng, *module.weight.shape, scheme)
            tensors |= {f"{name}.codes": codes, f"{name}.codebooks": codebooks, f"{name}.scales": scales}
            if module.bias is not None:
                tensors[f"{name}.bias"] = module.bias.detach().numpy()
            module.weight.data = torch.from_numpy(weight).float()
    tied = dense.config.tie_word_embeddings
    for name, parameter in dense.named_parameters(remove_duplicate=False):
        if name.rpartition(".")[0] + ".codes" not in tensors:
            others.append(name)
            if not (tied and name == "lm_head.weight"):
                tensors[name] = parameter.detach().numpy().copy()
    config = dense.config.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    config["quantization_config"] = {**quantization_config(scheme, others), **(extra or {})}
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return dense
