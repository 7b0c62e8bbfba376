"""torch.compile of a loaded model: one graph, compiled once, and the tokens of eager mode."""

import pytest
import torch
from tiny import random_tokens, write_published
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, StaticCache

import aqlm_c.hf  # noqa: F401

pytestmark = pytest.mark.hf

STEPS = 5


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("published") / "model"
    write_published(directory, (2, 8, 8, 1), attention_bias=True, tie_word_embeddings=False)
    return AutoModelForCausalLM.from_pretrained(directory)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def greedy(model, forward, prompt):
    """STEPS tokens, the first from a prefill in eager mode, the others by `forward` on a static cache."""
    cache = StaticCache(config=model.config, max_cache_len=32)
    logits = model(prompt, past_key_values=cache).logits
    tokens = [logits[:, -1:].argmax(-1)]
    for step in range(STEPS):
        position = torch.tensor([prompt.shape[1] + step])  # transformers 4 asks the cache else, which does not compile
        logits = forward(tokens[-1], cache_position=position, position_ids=position[None], past_key_values=cache).logits
        tokens.append(logits.argmax(-1))
    return torch.cat(tokens, 1)


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_a_decode_step_is_one_graph_compiled_once(model, backend):
    prompt = random_tokens(1, 7)
    expected = greedy(model, model.forward, prompt)
    assert len(set(expected[0].tolist())) > 1
    step = torch.compile(model.forward, fullgraph=True, backend=backend)
    assert torch.equal(greedy(model, step, prompt), expected)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["recompiles"]
    with torch._dynamo.config.patch(error_on_recompile=True):  # another prompt, a cache of its own
        prompt = random_tokens(1, 9, seed=1)
        assert torch.equal(greedy(model, step, prompt), greedy(model, model.forward, prompt))


def test_prefill_of_any_length_is_compiled_once(model):
    forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (5, 11, 24):
        tokens = random_tokens(2, length)
        with torch._dynamo.config.patch(error_on_recompile=length != 5):
            logits = forward(tokens, use_cache=False).logits
        torch.testing.assert_close(logits, model(tokens, use_cache=False).logits, rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1


def test_generate_with_a_static_cache(model):
    prompt = random_tokens(1, 7)
    options = {"max_new_tokens": STEPS, "do_sample": False}
    expected = model.generate(prompt, **options)
    assert torch.equal(model.generate(prompt, cache_implementation="static", **options), expected)


def test_state_is_the_disk_layout_after_compiling(model, tmp_path):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    greedy(model, torch.compile(model.forward, backend="aot_eager"), random_tokens(1, 7))
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(random_tokens(1, 7)).logits, model(random_tokens(1, 7)).logits)
