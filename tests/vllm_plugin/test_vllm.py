"""Whole models in vLLM's CPU engine: the greedy tokens that transformers gives. docs/vllm.md has the commands."""

import concurrent.futures
import importlib.util
import json
import os
import pickle
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed here: docs/vllm.md says how these tests are run", allow_module_level=True)

import torch
import vllm
from tiny import BYTES, byte_tokenizer, random_model, tiny_llama
from transformers import AutoModelForCausalLM, MixtralConfig
from vllm.model_executor import custom_op
from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.plugins import load_general_plugins

import aqlm_c.hf
from aqlm_c.io.checkpoint import save_quantized
from aqlm_c.quantize import quantize_model
from aqlm_c.recipe import AqlmConfig
from aqlm_c.vllm import config as plugin
from aqlm_c.vllm.linear import AqlmEmbeddingMethod, AqlmLinearMethod

ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
TOKENS = 16
PROMPTS = [[10 * i + j for j in range(3 + i)] for i in range(8)]
SIZES = {"vocab_size": BYTES, "hidden_size": 128, "intermediate_size": 192, "max_position_embeddings": 256}
QUICK = {"max_sweeps": 1, "ldl_passes": 1, "init_max_iter": 2, "finetune_epochs": 0}
MIXED = {
    "rules": {r"layers\.0\.self_attn\.k_proj": "dense", r"layers\.1\..*gate_proj": "1x8g8", r"down_proj": "2x8g16"},
    "embeddings": "2x8g8",
}
KINDS = {
    "llama": (lambda: tiny_llama(**SIZES, tie_word_embeddings=False), {"embeddings": "dense"}),
    "llama_with_biases": (lambda: tiny_llama(**SIZES, attention_bias=True, mlp_bias=True), {"embeddings": "dense"}),
    "llama_of_several_schemes": (lambda: tiny_llama(**SIZES, tie_word_embeddings=False), MIXED),
    "llama_of_tied_codes": (lambda: tiny_llama(**SIZES), MIXED),
    "mixtral": (lambda: tiny_mixtral(), {"embeddings": "dense"}),
    "mixtral_of_several_schemes": (
        lambda: tiny_mixtral(),
        {"rules": {r"experts\.1\.w2": "3x8g8"}, "embeddings": "2x8g8"},
    ),
}


def tiny_mixtral():
    return random_model(
        MixtralConfig(
            **SIZES,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
            initializer_range=0.1,
        )
    )


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def directory(kind, tmp_path_factory):
    make, options = KINDS[kind]
    model = make()
    sequences = torch.randint(BYTES, (4, 32), generator=torch.Generator().manual_seed(0))
    quantize_model(model, sequences, AqlmConfig.from_scheme("2x8g8", **QUICK, **options))
    path = tmp_path_factory.mktemp("vllm") / kind
    save_quantized(model, byte_tokenizer(), path)
    return path


def greedy(directory):
    """What transformers gives, loaded from the same files."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    found = []
    for prompt in PROMPTS:
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=TOKENS, do_sample=False, eos_token_id=-1)
        found.append(ids[0, len(prompt) :].tolist())
    return found


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """One process, which takes a fifth of the time."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_greedy_tokens(directory, compiled):
    """All prompts at once. float32: in 16 bits ties of logits make another token as good."""
    engine = vllm.LLM(
        str(directory),
        dtype="float32",
        enforce_eager=not compiled,
        max_model_len=64,
        max_num_seqs=8,
        distributed_executor_backend="uni",
    )
    sampling = vllm.SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    requests = engine.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], sampling, use_tqdm=False)
    assert [list(request.outputs[0].token_ids) for request in requests] == greedy(directory)


@pytest.mark.parametrize("kind", ["mixtral_of_several_schemes"], indirect=True)
def test_server_answers_eight_requests_at_once(directory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(directory)]
    command += ["--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "64"]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    url = f"http://127.0.0.1:{port}"

    def ask(prompt):
        body = {"model": str(directory), "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        content = json.dumps({**body, "return_token_ids": True}).encode()
        request = urllib.request.Request(f"{url}/v1/completions", content, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["choices"][0]["token_ids"]

    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                assert server.poll() is None, server.stderr.read()
                time.sleep(0.5)
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            assert list(pool.map(ask, PROMPTS)) == greedy(directory)
    finally:
        server.terminate()
        server.communicate(timeout=60)


def plugin_config(**fields):
    load_general_plugins()
    method = "aqlm_c" if fields.get("rules") else "aqlm"
    numbers = {"num_codebooks": 2, "nbits_per_codebook": 8, "in_group_size": 8, "out_group_size": 1}
    return get_quantization_config(method).from_config({"quant_method": method, **numbers, **fields})


def test_workers_pass_the_config_to_embeddings(monkeypatch):
    """They are sent the config: models that tell their embedding nothing would make a dense one."""
    config = plugin_config(rules=[["embed_tokens", "4x8g8"]])
    monkeypatch.setattr(custom_op, "op_registry_oot", {})
    monkeypatch.setattr(plugin, "op_registry_oot", custom_op.op_registry_oot)
    pickle.loads(pickle.dumps(config))
    assert custom_op.op_registry_oot["VocabParallelEmbedding"] is plugin.AqlmVocabParallelEmbedding


def bare(kind):
    return kind.__new__(kind)


def test_who_loads_which_layer():
    dense = [
        "lm_head.weight",
        "model.embed_tokens.weight",
        "a.gate_proj.weight",
        "a.up_proj.weight",
        "b.up_proj.weight",
    ]
    config = plugin_config(linear_weights_not_to_quantize=dense)
    config.packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}
    for kind, prefix, method in (
        (ColumnParallelLinear, "a.gate_up_proj", UnquantizedLinearMethod),
        (ColumnParallelLinear, "b.gate_up_proj", AqlmLinearMethod),
        (QKVParallelLinear, "a.qkv_proj", AqlmLinearMethod),
        (ParallelLMHead, "lm_head", UnquantizedEmbeddingMethod),
        (ParallelLMHead, "other", AqlmEmbeddingMethod),
        (VocabParallelEmbedding, "", UnquantizedEmbeddingMethod),
    ):
        assert type(config.get_quant_method(bare(kind), prefix)) is method, prefix
    assert config.get_quant_method(torch.nn.Linear(1, 1), "a") is None
    assert config.formats == {aqlm_c.AqlmConfig().format}
    ruled = plugin_config(rules=[["embed_tokens", "4x8g8"]], linear_weights_not_to_quantize=dense)
    assert type(ruled.get_quant_method(bare(VocabParallelEmbedding), "")) is AqlmEmbeddingMethod
    assert sorted(format.scheme for format in ruled.formats) == ["2x8g8", "4x8g8"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_codebooks": 9}, "num_codebooks: got 9"),
        ({"linear_weights_not_to_quantize": ["a", 1]}, "linear_weights_not_to_quantize: got"),
        ({"rules": [["(", "2x8g8"]]}, "rules: got '\\('"),
    ],
)
def test_configs_that_no_checkpoint_has(fields, message):
    with pytest.raises(ValueError, match=message):
        plugin_config(**fields)


def row_parallel(places, tensor, rank=1):
    """As vLLM's row parallel layers load: inputs are split."""
    if getattr(places, "input_dim", None) is not None:
        tensor = tensor.narrow(0, rank * len(places), len(places))
    assert places.shape == tensor.shape
    places.copy_(tensor)


def test_a_split_that_does_not_fit_groups_names_the_layer():
    config = plugin_config()
    for inputs, splits in ((32, False), (36, True)):
        layer, method = torch.nn.Module(), AqlmLinearMethod(config.formats, "model.layers.3.mlp.down_proj")
        method.create_weights(layer, inputs, [16], 2 * inputs, 16, torch.float32, weight_loader=row_parallel)
        tensors = {
            "codes": torch.zeros(16, 2 * inputs // 8, 2, dtype=torch.int8),
            "codebooks": torch.randn(2, 256, 1, 8),
            "scales": torch.ones(16, 1, 1, 1),
        }

        def load(layer=layer, tensors=tensors):
            for name, tensor in tensors.items():
                parameter = layer.get_parameter(name)
                parameter.weight_loader(parameter, tensor)

        if splits:
            with pytest.raises(
                ValueError, match=r"tensor_parallel_size: .*inputs 36 to 71 .*model.layers.3.mlp.down_pr"
            ):
                load()
        else:
            load()
            method.process_weights_after_loading(layer)
            assert method.apply(layer, torch.randn(3, inputs)).shape == (3, 16)


def test_a_layer_that_nothing_came_for_is_named():
    layer, method = torch.nn.Module(), AqlmLinearMethod(plugin_config().formats, "model.layers.3.mlp.down_proj")
    method.create_weights(layer, 32, [16], 32, 16, torch.float32, weight_loader=row_parallel)
    with pytest.raises(ValueError, match=r"model.layers.3.mlp.down_proj.codes: missing from the checkpoint"):
        method.process_weights_after_loading(layer)
