"""`aqlm-c serve` on a GPU: requests that are answered together have the tokens of `generate`."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny import BYTES, byte_tokenizer, tiny_llama

from aqlm_c.cli.main import main
from aqlm_c.nn import ops

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a GPU that torch can use", allow_module_level=True)
if not ops.has_cuda:
    pytest.skip("aqlm_c was built without _cuda", allow_module_level=True)
pytest.importorskip("openai", reason="needs aqlm-c[serve]")
pytest.importorskip("transformers.cli.serving.completion", reason="needs a transformers that can serve")

from served import served  # noqa: E402

SMALL = ["--scheme", "2x4g8", "--samples", "4", "--sequence-length", "32", "--embeddings", "dense", "--quiet"]


@pytest.fixture(scope="module")
def quantized_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("served")
    tiny_llama(torch.float32, hidden_size=64, vocab_size=BYTES).save_pretrained(path / "dense")
    byte_tokenizer().save_pretrained(path / "dense")
    assert main(["quantize", str(path / "dense"), str(path / "small"), *SMALL, "--preset", "fast"]) == 0
    return path / "small"


@pytest.mark.parametrize("batch_tokens", [None, 2048], ids=["as fits", "2048 tokens"])
def test_together_as_alone(quantized_dir, batch_tokens):
    asked = [(prompt, n) for prompt in ("Is it so?", "x", "No, it is not.") for n in (1, 40, 20)]
    with served(quantized_dir, "cuda", batching=True, batch_tokens=batch_tokens) as (client, service):
        model, tokenizer, whole = service.model, service.tokenizer, {}
        for prompt, _ in asked:
            inputs = tokenizer(prompt, return_tensors="pt").to("cuda")
            ids = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            whole[prompt] = ids.tolist()

        def answer(one):
            made = client.completions.create(model="small", prompt=one[0], max_tokens=one[1], temperature=0)
            return made.choices[0].text

        with ThreadPoolExecutor(len(asked)) as pool:
            answers = list(pool.map(answer, asked))
        expected = [tokenizer.decode(whole[prompt][:n], skip_special_tokens=True) for prompt, n in asked]
        assert answers == expected
        pieces = client.completions.create(model="small", prompt="x", max_tokens=40, temperature=0.5, stream=True)
        assert sum(len(piece.choices[0].text) > 0 for piece in pieces) > 5  # sampled, in the other batch
