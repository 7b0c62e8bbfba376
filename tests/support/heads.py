"""Configs of tiny models that do different things between their last hidden states and their logits."""

from tiny import VOCABULARY
from transformers import (
    BloomConfig,
    Cohere2Config,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    OPTConfig,
    ProphetNetConfig,
    RecurrentGemmaConfig,
)

NAMES = {"vocab_size": VOCABULARY, "hidden_size": 32}
LAYERS = {**NAMES, "num_hidden_layers": 2, "initializer_range": 0.3, "pad_token_id": 0}
SIZES = {**LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
CONFIGS = {
    "llama, tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "soft caps": Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0),
    "logit_scale": CohereConfig(**SIZES, logit_scale=0.25),
    "logit_scale, tied": Cohere2Config(**SIZES, logit_scale=3.0, tie_word_embeddings=True),
    "logits_scaling": GraniteConfig(**SIZES, logits_scaling=7.0, embedding_multiplier=3.0),
    "recurrent, soft caps": RecurrentGemmaConfig(**SIZES, logits_soft_cap=3.0, attention_window_size=8),
    "experts": MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "GPT-2": GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3, n_positions=64),
    "GPT-NeoX": GPTNeoXConfig(**{**SIZES, "num_key_value_heads": None}),
    "a decoder in a body": OPTConfig(
        **{**SIZES, "ffn_dim": 64, "max_position_embeddings": 64, "word_embed_proj_dim": 16, "init_std": 0.3}
    ),
    "Bloom": BloomConfig(**NAMES, n_layer=2, n_head=4, initializer_range=0.3),
    "state spaces": MambaConfig(**LAYERS, state_size=4),
}
# Its output layer wants more than the last hidden states.
PROPHETNET = ProphetNetConfig(
    **{"vocab_size": VOCABULARY, "hidden_size": 32, "num_encoder_layers": 1, "num_decoder_layers": 1},
    **{"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_encoder_attention_heads": 2, "init_std": 0.3},
    **{"num_decoder_attention_heads": 2, "is_decoder": True, "is_encoder_decoder": False, "add_cross_attention": False},
)
