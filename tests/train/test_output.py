"""KL divergence slice by slice of positions: what full logits give, for models that do more than multiply."""

from types import SimpleNamespace

import pytest
import torch
from tiny import random_model, random_tokens, tiny_llama
from transformers import (
    BloomConfig,
    Cohere2Config,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    MambaConfig,
    MixtralConfig,
    OPTConfig,
)

from aqlm_c.train import output
from aqlm_c.train.output import Output, kl_divergence, slices

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS = {
    "soft caps": Gemma2Config(**SIZES, **HEADS, head_dim=8, final_logit_softcapping=0.7),
    "logit_scale": CohereConfig(**SIZES, **HEADS, logit_scale=0.3),
    "logit_scale, tied": Cohere2Config(**SIZES, **HEADS, logit_scale=3.0, tie_word_embeddings=True),
    "logits_scaling": GraniteConfig(**SIZES, **HEADS, logits_scaling=4.0, embedding_multiplier=3.0),
    "experts": MixtralConfig(**SIZES, **HEADS, num_local_experts=4, num_experts_per_tok=2),
    "GPT-2": GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "GPT-NeoX": GPTNeoXConfig(**SIZES, num_attention_heads=4),
    "a decoder in a body": OPTConfig(
        vocab_size=96, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=16
    ),
    "Bloom": BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4),
    "state spaces": MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=4),
}


def divergence(model, original, ids):
    """In float64 from full logits; the sum over positions."""
    with torch.no_grad():
        targets = original(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
    logits = model(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
    return (targets.exp() * (targets - logits)).sum()


@pytest.mark.parametrize("name", CONFIGS)
def test_sliced_divergence_is_that_of_full_logits(name, monkeypatch):
    monkeypatch.setattr(output, "_SLICE_BYTES_ON_CPU", 4 * 96 * 16)  # 16 positions
    original, model = (random_model(CONFIGS[name], seed=seed) for seed in (0, 1))
    with torch.no_grad():
        for parameter in [*original.parameters(), *model.parameters()]:
            parameter.mul_(4 if parameter.ndim == 2 else 1)  # so that predictions differ
    ids = random_tokens(3, 14)
    expected = divergence(model, original, ids)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    student, teacher = Output(model), Output(original)
    with torch.no_grad():
        targets = teacher.hidden(ids)
    found = kl_divergence(student, teacher, student.hidden(ids), targets, gradient=True)
    assert expected > 0.1 and found.item() == pytest.approx(expected.item(), rel=1e-4)
    assert gradients.keys() == {name for name, p in model.named_parameters() if p.grad is not None}
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-4, msg=name)
    with torch.no_grad():
        assert kl_divergence(student, teacher, student.hidden(ids), targets, False).item() == found.item()


def test_words_that_the_teacher_rules_out_add_nothing():
    as_it_is = SimpleNamespace(vocabulary=4, logits=lambda hidden: hidden * 1)
    own, other = torch.randn(3, 4), torch.randn(3, 4)
    other[:, 2] = -torch.inf
    found = kl_divergence(as_it_is, as_it_is, own, other, gradient=False).item()
    p, log_q = other.softmax(-1), own.log_softmax(-1)
    expected = (p * (p.clamp(min=1e-30).log() - log_q))[:, [0, 1, 3]].sum().item()
    assert found == pytest.approx(expected, rel=1e-5)


def test_logits_of_few_positions_are_in_memory_at_a_time():
    model = tiny_llama(vocab_size=4096)
    student, most = Output(model), []
    model.lm_head.register_forward_hook(lambda _module, _args, y: most.append(y.shape[-2]))
    hidden = torch.randn(1, 9000, 32)
    kl_divergence(student, student, hidden, hidden, gradient=False)
    assert max(most) * 4096 * 4 <= output._SLICE_BYTES_ON_CPU and sum(most) == 2 * 9000
    for n in (1, 2, 16, 17, 9000):
        places = list(slices(n, 4096, torch.device("cpu")))
        assert [i for place in places for i in range(place.start, place.stop)] == list(range(n))


def test_models_whose_logits_come_from_elsewhere_are_refused():
    model = tiny_llama()
    forward = model.forward

    def mixed(*args, **kwargs):
        found = forward(*args, **kwargs)
        found.logits = found.logits.cumsum(1)
        return found

    model.forward = mixed
    with pytest.raises(ValueError, match=r"model: got LlamaForCausalLM, expected one whose logits .* by itself"):
        Output(model)
