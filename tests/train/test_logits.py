"""Logits in slices of positions, and their KL with its gradients: what full logits give, for models that do more than
multiply.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from heads import CONFIGS, PROPHETNET
from tiny import VOCABULARY, random_model, random_tokens, tiny_llama
from torch import nn

from aqlm_c.model import logits as logits_module
from aqlm_c.model.logits import SplitModel, cross_entropy, kl_and_gradient, kl_divergence, slices
from aqlm_c.train.output import sliced_kl

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", CONFIGS)
def test_slices_of_logits_are_the_models_own(name):
    model, ids = random_model(CONFIGS[name]), random_tokens(3, 21)
    split = SplitModel(model)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        hidden, one = split.hidden(ids), split.hidden(ids[1])
    assert split.is_split and split.vocabulary == VOCABULARY and split.dtype == hidden.dtype
    assert hidden.shape[:2] == (3, 21) and hidden.shape[2] != VOCABULARY
    torch.testing.assert_close(one, hidden[1], rtol=1e-5, atol=1e-5)
    whole = sum(parameter.numel() for parameter in model.parameters())
    for _ in range(2):  # before and after its body is gone
        found = torch.cat([split.float_logits(one[part]) for part in (slice(0, 1), slice(1, 9), slice(9, 21))])
        assert found.dtype == torch.float32 and not found.requires_grad
        torch.testing.assert_close(found, expected[1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(split.logits(hidden.flatten(0, 1)), expected.flatten(0, 1), rtol=1e-5, atol=1e-5)
        assert split.release()
    assert sum(parameter.numel() for parameter in model.parameters()) < whole / 2


def test_a_model_whose_output_layer_is_not_found_gives_whole_windows():
    model, ids = random_model(PROPHETNET), random_tokens(1, 12)[0]
    split = SplitModel(model)
    assert not split.is_split and not split.release() and (split.vocabulary, split.dtype) == (0, None)
    with torch.no_grad():
        expected, hidden = model(input_ids=ids[None]).logits[0], split.hidden(ids)
    kept = hidden.clone()
    split.float_logits(hidden[3:7]).zero_()  # a copy
    torch.testing.assert_close(split.float_logits(hidden[3:7]), expected[3:7])
    assert torch.equal(hidden, kept)
    with pytest.raises(ValueError, match=r"got ProphetNetForCausalLM, .* by itself; it raises IndexError: "):
        SplitModel(model, whole=False)


class Named(nn.Module):
    """A model that calls no body, but another model that does."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.config = inner, inner.config
        self.base_model = inner.model

    def get_input_embeddings(self):
        return self.inner.get_input_embeddings()

    def forward(self, **arguments):
        return self.inner(**arguments)


def test_a_body_that_is_not_what_the_model_calls_is_found_by_its_name():
    model, ids = Named(tiny_llama()), random_tokens(2, 12)
    split = SplitModel(model)
    assert split.is_split and split._body.module is model.base_model
    with torch.no_grad():
        found = split.logits(split.hidden(ids).flatten(0, 1))
        torch.testing.assert_close(found, model(input_ids=ids).logits.flatten(0, 1), rtol=1e-5, atol=1e-5)


def mixing(model, change):
    """The model, with `change` to its logits [n, length, vocabulary]."""
    forward = model.forward

    def mixed(*args, **kwargs):
        found = forward(*args, **kwargs)
        found.logits = change(found.logits)
        return found

    model.forward = mixed
    return model


@pytest.mark.parametrize(
    "change", [lambda y: y.cumsum(1), lambda y: y - y.mean(1, keepdim=True), lambda y: y / y.shape[1]]
)
def test_models_whose_logits_come_from_elsewhere_are_refused(change):
    model = mixing(tiny_llama(), change)
    with pytest.raises(ValueError, match=r"model: got LlamaForCausalLM, expected one whose logits .* by itself$"):
        SplitModel(model, whole=False)
    assert not SplitModel(model).is_split


def test_the_output_layer_sees_one_position_while_hidden_states_are_made():
    model, seen = tiny_llama(), []
    split = SplitModel(model)
    model.lm_head.register_forward_hook(lambda _module, args, _y: seen.append(tuple(args[0].shape[:2])))
    split.hidden(random_tokens(3, 40))
    assert seen == [(3, 1)]


def test_slices_depend_on_the_vocabulary():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [part.stop for part in slices(10, 5, cpu, 4)] == [4, 8, 10]
    assert [part.stop - part.start for part in slices(200, 2**18, cpu)][:3] == [64, 64, 64]
    assert len(list(slices(200, 2**18, gpu, 256))) == 1
    assert list(slices(2, 2**40, cpu)) == [slice(0, 1), slice(1, 2)] and list(slices(0, 5, cpu)) == []
    for n in (1, 2, 16, 17, 9000):
        assert [i for place in slices(n, 4096, cpu) for i in range(place.start, place.stop)] == list(range(n))


def test_kl_of_words_that_are_ruled_out():
    p = torch.tensor([[0.0, 0.0, -torch.inf], [1.0, 2.0, 3.0]])
    q = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, -torch.inf]])
    assert kl_divergence(p.clone(), q.clone()).tolist() == [pytest.approx(math.log(1.5)), math.inf]
    assert kl_divergence(p.clone(), p.clone()).tolist() == [0, 0]
    assert cross_entropy(p, torch.tensor([0, 2])).tolist() == pytest.approx([math.log(2), 0.4076059])


def test_kl_of_distributions_that_are_close():
    generator = torch.Generator().manual_seed(0)
    p = 3 * torch.randn(8, 20_000, generator=generator) + 20
    for scale in (1e-4, 1e-2, 3.0):  # KL of 5e-9, 5e-5 and more
        q = p + scale * torch.randn(p.shape, generator=generator)
        log_p, log_q = (each.double().log_softmax(-1) for each in (p, q))
        wanted = (log_p.exp() * (log_p - log_q)).sum(-1)
        found, gradient = kl_and_gradient(p.clone(), q)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=3e-8)
        torch.testing.assert_close(gradient.double(), log_q.exp() - log_p.exp(), rtol=1e-4, atol=2e-6)
    ruled_out = torch.tensor([[0.0, -200.0]]), torch.tensor([[0.0, -torch.inf]])  # a share that is 0 in float32
    assert kl_divergence(*ruled_out).tolist() == [0]


# ---- with gradients -------------------------------------------------------------------------------------------------


def divergence(model, original, ids):
    """In float64 from full logits; the sum over positions."""
    with torch.no_grad():
        targets = original(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
    logits = model(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
    return (targets.exp() * (targets - logits)).sum()


@pytest.mark.parametrize("name", CONFIGS)
def test_sliced_divergence_is_that_of_full_logits(name, monkeypatch):
    monkeypatch.setattr(logits_module, "_CPU_LOGITS", VOCABULARY * 16)  # 16 positions
    original, model = (random_model(CONFIGS[name], seed=seed) for seed in (0, 1))
    ids = random_tokens(3, 14)
    expected = divergence(model, original, ids)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    student, teacher = (SplitModel(one, whole=False) for one in (model, original))
    with torch.no_grad():
        targets = teacher.hidden(ids)
    found = sliced_kl(student, teacher, student.hidden(ids), targets, gradient=True)
    assert expected > 0.1 and found.item() == pytest.approx(expected.item(), rel=1e-4)
    assert gradients.keys() == {name for name, p in model.named_parameters() if p.grad is not None}
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-4, msg=name)
    with torch.no_grad():
        assert sliced_kl(student, teacher, student.hidden(ids), targets, False).item() == found.item()


def test_words_that_the_teacher_rules_out_add_nothing():
    as_it_is = SimpleNamespace(vocabulary=4, logits=lambda hidden: hidden * 1, float_logits=lambda hidden: hidden * 1)
    own, other = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    other[:, 2] = -torch.inf
    found = sliced_kl(as_it_is, as_it_is, own, other, gradient=True).item()
    p, log_q = other.softmax(-1), own.detach().log_softmax(-1)
    expected = (p * (p.clamp(min=1e-30).log() - log_q))[:, [0, 1, 3]].sum().item()
    assert found == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(own.grad, log_q.exp() - p)


def test_logits_of_few_positions_are_in_memory_at_a_time():
    model = tiny_llama(vocab_size=4096)
    student, most = SplitModel(model, whole=False), []
    model.lm_head.register_forward_hook(lambda _module, _args, y: most.append(y.shape[-2]))
    hidden = torch.randn(1, 9000, 32)
    sliced_kl(student, student, hidden, hidden, gradient=False)
    assert max(most) * 4096 <= logits_module._CPU_LOGITS and sum(most) == 2 * 9000
