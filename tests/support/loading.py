"""Models as transformers loads them, and what they hold and compute, for the tests."""

import torch
from transformers import AutoModelForCausalLM

import aqlm_c.hf  # noqa: F401  (registers)
from aqlm_c.nn.linear import QuantizedLinear


def load(directory, cls=AutoModelForCausalLM, **options):
    """The loaded model; fails if any tensor was missing, left over or of another shape."""
    model, info = cls.from_pretrained(directory, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model


def quantized_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]


def prefill_and_decode(model, tokens):
    """Logits of all tokens, and those of the last one after the others are in the cache, in float32."""
    with torch.no_grad():
        logits = model(tokens).logits.float()
        cache = model(tokens[:, :-1], use_cache=True).past_key_values
        return logits, model(tokens[:, -1:], past_key_values=cache).logits[:, 0].float()
