"""Tiny configs of every causal language model of the installed transformers: the defaults of its config, with each
size made small. What a model needs beside that stands in `SPECIAL`, as data.
"""

from __future__ import annotations

from typing import Any

VOCABULARY = 128
HEADS, HEAD = 4, 16
MOST_LAYERS = 5

# Fields of configs by name, and their tiny values.
SIZES: dict[str, int] = {
    **dict.fromkeys(
        ("vocab_size", "decoder_vocab_size", "unpadded_vocab_size", "vocab_size_per_layer_input"), VOCABULARY
    ),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_dim", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("embedding_size", "input_embedding_size", "output_embedding_size", "lru_width"), 64),
    **dict.fromkeys(("attention_hidden_size", "hidden_size_global", "out_hidden_size", "backbone_hidden_size"), 64),
    **dict.fromkeys(("cross_attention_hidden_size", "input_size", "ple_embed_dim", "adapter_out_dim"), 64),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim", "dim_ff", "dff"), 96),
    **dict.fromkeys(("ffn_hidden_size", "feed_forward_size", "d_inner", "intermediate_size_mlp", "d_ff"), 96),
    **dict.fromkeys(("dense_intermediate_size", "mlp_dim", "n_inner"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("shared_intermediate_size", "shared_experts_intermediate_size", "router_hidden_size"), 32),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "hidden_size_per_layer_input", "hc_lowrank"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers", "depth", "num_blocks", "conf_num_hidden_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "num_heads"), HEADS),
    **dict.fromkeys(("encoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"), HEADS),
    **dict.fromkeys(
        ("attention_heads", "swa_num_attention_heads", "linear_num_value_heads", "linear_num_heads"), HEADS
    ),
    **dict.fromkeys(("index_n_heads",), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "linear_num_key_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("num_query_groups",), 2),
    **dict.fromkeys(
        ("head_dim", "swa_head_dim", "global_head_dim", "linear_key_head_dim", "linear_value_head_dim"), HEAD
    ),
    **dict.fromkeys(("linear_head_dim", "kv_channels", "d_head", "dim_head", "attention_head_size", "d_kv"), HEAD),
    **dict.fromkeys(("v_head_dim", "qk_nope_head_dim", "index_head_dim", "attention_head_dim"), HEAD),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("qk_head_dim",), 24),
    **dict.fromkeys(
        ("kv_lora_rank", "q_lora_rank", "o_lora_rank", "laurel_rank", "adapter_rank", "loop_gate_rank"), 16
    ),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "num_experts_per_token", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), 256),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "window_size", "attention_window_size"), 8),
    **dict.fromkeys(("attention_chunk_size",), 8),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "mamba_dt_rank", "time_step_rank"), 8),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "block_size", "index_block_size"), 8),
    **dict.fromkeys(("image_size", "patch_size"), 16),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 2),
    "encoder_hash_byte_group_vocab": 64,
    "pronunciation_vocab_size": 64,
    "shape_vocab_size": 64,
    "index_topk": 8,
    "vocab_offset": 0,
}
_LEFT = {"id2label", "label2id"}  # say nothing of sizes


def tiny_config(model_type: str) -> Any:
    """The tiny config of a model type of transformers; raises whatever its class raises."""
    from transformers import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[model_type]
    special = SPECIAL.get(model_type, {})
    start = special.get("start", {})
    fields = _tiny_fields(config_class(**start))
    return config_class(**_merged(_merged(start, fields), special.get("fields", {})))


def _tiny_fields(config: Any) -> dict[str, Any]:
    """The fields of a config to change, with their tiny values; of configs inside it too."""
    given = {name: value for name, value in vars(config).items() if name not in _LEFT and not name.startswith("_")}
    layers = next((given[name] for name in ("num_hidden_layers", "n_layer", "num_layers") if name in given), 0)
    kept = _kept_layers([v for v in given.values() if isinstance(v, (list, tuple)) and len(v) == layers])
    fields: dict[str, Any] = {}
    for name, value in given.items():
        if hasattr(value, "to_dict"):
            fields[name] = {"model_type": value.model_type, **_tiny_fields(value)}
        elif isinstance(value, bool):
            continue
        elif name in ("num_hidden_layers", "n_layer", "num_layers") and isinstance(value, int):
            fields[name] = len(kept)
        elif isinstance(value, int) and name in SIZES:
            fields[name] = SIZES[name]
        elif name.endswith(("token_id", "token_index")) and isinstance(value, int) and value >= VOCABULARY:
            fields[name] = VOCABULARY - 1 - len(fields) % 16
        elif name.endswith("token_id") and isinstance(value, (list, tuple)):
            fields[name] = [VOCABULARY - 1]
        elif isinstance(value, (list, tuple)) and len(value) == layers > 2:
            fields[name] = [value[index] for index in kept]
    if "kv_lora_rank" in given and "num_key_value_heads" in given:
        fields["num_key_value_heads"] = HEADS  # latent attention has a key for every head
        fields |= {"head_dim": 8} if "head_dim" in given else {}  # what is rotated
    return fields


def _kept_layers(lists: list[Any]) -> list[int]:
    """Layers, at least two, among which every value of each list of one value a layer is found."""
    kept = {0, 1}
    for values in lists:
        kept |= {values.index(value) for value in values}
    return sorted(kept)[:MOST_LAYERS]


def _merged(fields: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    merged = dict(fields)
    for name, value in others.items():
        inside = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merged(merged[name], value) if inside else value
    return merged


NOTE = {"swa_num_attention_heads": HEADS, "swa_num_key_value_heads": HEADS, "num_key_value_heads": HEADS}
HEAD_GIVEN = {"fields": {"head_dim": HEAD}}  # where its config has none and its model wants one
INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": HEAD,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}
SHARED_KV = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}

# model type -> "fields": what differs from the tiny config; "start": what its config needs to be made at all
SPECIAL: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "fields": {
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
                "full_attention": None,
            },
        }
    },
    "dbrx": {
        "fields": {
            "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
            "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
        }
    },
    "dots1": {
        "fields": {
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
        }
    },
    "deepseek_v2": {"fields": {"num_experts_per_tok": 2}},
    "dots3_note_text": {"fields": NOTE},
    "dots3_note": {
        "fields": {
            "text_config": NOTE,
            "vision_config": {"adapter_in_dim": 64},
            "audio_config": {"adapter_input_size": 64},
        }
    },
    "gemma3n_text": {
        "fields": {**SHARED_KV, "intermediate_size": [96] * 4, "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0]}
    },
    "gemma4_text": {
        "fields": {
            **SHARED_KV,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
        }
    },
    "hunyuan_v1_dense": HEAD_GIVEN,
    "hunyuan_v1_moe": HEAD_GIVEN,
    "lfm2_moe": {"fields": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2}},
    "mamba2": {"fields": {"num_heads": 8, "head_dim": 16}},
    "ministral": HEAD_GIVEN,
    "mllama": {"fields": {"text_config": {"num_hidden_layers": 4, "cross_attention_layers": [1], "layer_types": None}}},
    "nemotron_h": {"fields": {"mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2}},
    "nemotron": {"fields": {"num_key_value_heads": 2, "head_dim": HEAD}},
    "qwen4_exp": {"fields": {"text_config": INDEXER}},
    "qwen4_exp_text": {"fields": INDEXER},
    "reformer": {
        "start": {"is_decoder": True},
        "fields": {
            "axial_pos_embds_dim": [32, 32],
            "axial_pos_shape": [4, 4],
            "local_attn_chunk_length": 4,
            "lsh_attn_chunk_length": 4,
            "attn_layers": ["local", "lsh"],
            "num_buckets": 2,
            "hash_seed": 0,
        },
    },
    "zamba": {
        "fields": {
            "num_hidden_layers": 5,
            "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"],
            "attention_head_dim": 32,
            "attention_hidden_size": 128,
        }
    },
    "zamba2": {
        "fields": {
            "num_hidden_layers": 4,
            "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
            "hybrid_layer_ids": [1, 3],
            "attention_head_dim": 32,
            "attention_hidden_size": 128,
            "mamba_headdim": 16,
        }
    },
    "zaya": {"fields": {"num_experts_per_tok": 1}},
}
