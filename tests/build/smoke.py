"""Does an installed aqlm_c work? python tests/build/smoke.py [--without-torch], in any environment, in half a minute.

It looks at what is installed, never at the checkout that it lies in, and needs no network: one weight is quantized,
multiplied and decoded; with torch, a tiny Llama is quantized, saved, loaded by transformers and asked for tokens.
--without-torch: the NumPy half works, and everything else names what is missing.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from importlib import metadata, util
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

LOADED_AGAIN = """
import sys, torch
import aqlm_c.hf
from transformers import AutoModelForCausalLM
from aqlm_c import QuantizedLinear
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == 14
ids = torch.tensor([[1, 2, 3, 4]])
assert torch.equal(model(ids).logits, torch.load("logits.pt"))
tokens = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
assert tokens.shape == (1, 9) and torch.equal(tokens[:, :4], ids), tokens
"""


def package():
    """The package, as pip installed it."""
    import aqlm_c

    home = Path(aqlm_c.__file__).resolve().parent
    assert not (home.parent / "pyproject.toml").exists(), f"{home}: a checkout, expected an installed package"
    installed = metadata.version("aqlm-c")
    assert installed.partition("+")[0] == aqlm_c.__version__, (installed, aqlm_c.__version__)
    assert (home / "py.typed").exists() and (home / "_core.pyi").exists()
    licences = {path.name for path in metadata.files("aqlm-c") if ".dist-info" in str(path)}
    assert {"LICENSE", "THIRD_PARTY_NOTICES.md"} <= licences, licences
    return f"aqlm_c {installed}, Python {sys.version.split()[0]}"


def numpy_half():
    """One weight by the C core: codes that decode to what the report says, and a product with them."""
    import numpy as np

    from aqlm_c import Format, _core, quantize_weight

    rng = np.random.default_rng(0)
    W, X = rng.standard_normal((64, 128)).astype(np.float32), rng.standard_normal((512, 128)).astype(np.float32)
    H = X.T @ X / len(X)
    found = quantize_weight(W, H, "2x8g8")
    K, B, g = 2, 8, 8
    codes = found.codes.astype(np.int64) % 2**B
    Wq = sum(found.codebooks[k, codes[..., k], 0] for k in range(K)).reshape(64, 16 * g) * found.scales.reshape(64, 1)
    np.testing.assert_allclose(found.decode(), Wq, rtol=1e-6, atol=1e-6)
    D = (W - Wq).astype(np.float64)
    error = np.trace(D @ H @ D.T) / np.trace(W @ H @ W.T)
    assert abs(error - found.relative_error) < 1e-3 * error and error < 0.1, (error, found.relative_error)
    assert found.format == Format(K, B, g)
    y = _core.matmul(X[:3], found.codes, found.codebooks, found.scales)
    np.testing.assert_allclose(y, X[:3] @ Wq.T, rtol=1e-3, atol=1e-3)
    return f"NumPy {np.__version__}, {_core.get_isa()}, relative error {error:.4f}"


def without_torch():
    """What needs torch says so in one line, with the cure."""
    import aqlm_c

    assert util.find_spec("torch") is None, "torch is installed, expected an environment without it"
    for name in ("aqlm_c.hf", "aqlm_c.nn.ops", "aqlm_c.pipeline.pipeline"):
        try:
            __import__(name)
        except ImportError as error:
            assert str(error) == "torch: got none that is installed here, expected one: pip install 'aqlm-c[hf]'", error
        else:
            raise AssertionError(f"{name}: imported without torch")
    try:
        aqlm_c.quantize_model  # noqa: B018
    except ImportError as error:
        assert "pip install 'aqlm-c[hf]'" in str(error), error
    said = command("doctor", code=1).stdout
    assert "torch" in said and "pip install" in said, said
    said = command("quantize", "model", "out", code=2).stderr
    assert len(said.splitlines()) == 1 and "pip install 'aqlm-c[hf]'" in said, said
    return "without torch: errors say the cure"


def with_torch(folder):
    """From a dense model to tokens of the quantized one, by the command line too."""
    import tokenizers
    import torch
    import transformers

    import aqlm_c

    torch.manual_seed(0)
    sizes = dict(vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=2, max_position_embeddings=64)
    dense = transformers.AutoModelForCausalLM.from_config(config).eval()
    words = {word: i for i, word in enumerate(["<unk>", *(f"w{i}" for i in range(95))])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", model_input_names=["input_ids", "attention_mask"]
    )
    fast = aqlm_c.AqlmConfig.from_scheme("1x4g8", ldl_passes=1, max_sweeps=1, init_max_iter=2, finetune_epochs=1)
    report = aqlm_c.quantize_model(dense, torch.randint(96, (4, 16)), fast)
    assert len(report.layers) == 14, report
    aqlm_c.save_quantized(dense, tokenizer, folder / "quantized")
    with torch.no_grad():
        torch.save(dense(torch.tensor([[1, 2, 3, 4]])).logits, folder / "logits.pt")
    run([sys.executable, "-c", LOADED_AGAIN, str(folder / "quantized")], folder)
    command("inspect", str(folder / "quantized"), "--check")
    said = command("generate", str(folder / "quantized"), "w1 w2 w3", "--max-new-tokens", "3").stdout
    assert said.strip(), said
    command("doctor")
    return f"torch {torch.__version__}, transformers {transformers.__version__}: quantized, saved, loaded, generated"


def run(arguments, folder=None, code=0):
    done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True)
    assert done.returncode == code, f"{arguments}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
    return done


def command(*arguments, code=0):
    """aqlm-c by the script that was installed."""
    return run([str(Path(sys.executable).parent / "aqlm-c"), *arguments], code=code)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--without-torch", action="store_true")
    arguments = parser.parse_args()
    for check in (package, numpy_half, *([without_torch] if arguments.without_torch else [])):
        print("✓", check(), flush=True)
    if not arguments.without_torch:
        with tempfile.TemporaryDirectory() as folder:
            print("✓", with_torch(Path(folder)), flush=True)


if __name__ == "__main__":
    main()
