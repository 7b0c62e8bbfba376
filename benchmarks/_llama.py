"""Decoding with a model of Llama's shape and random weights on a GPU, for generate.py: no checkpoint is needed.

The model is transformers', the loop around its layers is ours: a step has no word for the processor, so that all of it
is one CUDA graph, and every layer looks alike to torch.compile, which then compiles one of them.
"""

from __future__ import annotations

import inspect
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from aqlm_c import Format, QuantizedLinear, join_linears

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SHAPES = {
    "llama-2-7b": (4096, 11008, 32, 32, 32),
    "llama-2-70b": (8192, 28672, 80, 64, 8),
    "tiny": (64, 128, 3, 4, 2),
}
CACHE = "cache" if "cache" in inspect.signature(modeling_llama.LlamaAttention.forward).parameters else "past_key_values"


def build(shape: str, scheme: str | None, dtype: torch.dtype, device: str) -> LlamaForCausalLM:
    """A model with random weights, those of its layers as codes if there is a scheme."""
    config = LlamaConfig(**dict(zip(SIZES, SHAPES[shape], strict=True)), attn_implementation="sdpa")
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)
    for name, linear in list(model.model.named_modules()):
        if scheme and isinstance(linear, nn.Linear):
            model.model.set_submodule(name, QuantizedLinear.empty(linear, Format.parse(scheme), dtype))
    model.to_empty(device=device)
    model.model.rotary_emb = modeling_llama.LlamaRotaryEmbedding(config).to(device)
    for name, parameter in model.named_parameters():
        kind = name.rpartition(".")[2]
        if kind == "codes":
            half = 2 ** (model.get_submodule(name.rpartition(".")[0]).nbits_per_codebook - 1)
            parameter.random_(-half, half)
        elif kind == "codebooks":
            parameter.normal_(std=len(parameter) ** -0.5)
        elif "norm" in name:
            parameter.fill_(1)
        else:
            parameter.normal_(std=0.02)  # with a scale's sign: that of a row of weights
    join_linears(model)
    return model


class Cache:
    """Keys and values of one layer, all of their places allocated."""

    def __init__(self, config: LlamaConfig, length: int, like: Tensor, positions: Tensor) -> None:
        head = config.hidden_size // config.num_attention_heads
        self.keys, self.values = like.new_zeros(2, 1, config.num_key_value_heads, length, head)
        self.positions = positions

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        positions = self.positions[-keys.shape[2] :]
        return self.keys.index_copy_(2, positions, keys), self.values.index_copy_(2, positions, values)


class Decoder:
    """One sequence: `prefill`, then `step` after `step`, greedy."""

    def __init__(self, model: LlamaForCausalLM, length: int) -> None:
        self.model, self.layers = model.model, list(model.model.layers)
        self.head, weight = model.lm_head, model.lm_head.weight
        self.token = torch.zeros(1, 1, dtype=torch.long, device=weight.device)
        self.places = torch.arange(length, device=weight.device)
        self.position = self.places[:1].clone()
        self.caches = [Cache(model.config, length, weight, self.position) for _ in self.layers]
        self.inputs = {n: weight.new_ones(1, n) for n in (model.config.hidden_size, model.config.intermediate_size)}
        for layer in self.layers:
            layer.self_attn.layer_idx = 0  # each has a cache of its own

    def forward(self, tokens: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        x = self.model.embed_tokens(tokens)
        rotary = self.model.rotary_emb(x, positions[None])
        for layer, cache in zip(self.layers, self.caches, strict=True):
            cache.positions = positions
            x = layer(x, attention_mask=mask, position_embeddings=rotary, **{CACHE: cache})
        return self.head(self.model.norm(x[:, -1:]))

    def prefill(self, tokens: Tensor) -> None:
        self.token.copy_(self.forward(tokens, self.places[: tokens.shape[1]], None)[:, -1].argmax(-1, keepdim=True))
        self.position.fill_(tokens.shape[1])

    def step(self) -> None:
        logits = self.forward(self.token, self.position, (self.places <= self.position)[None, None, None])
        self.token.copy_(logits[:, -1].argmax(-1, keepdim=True))
        self.position += 1

    def products(self) -> None:
        """The products with the layers' weights in a step, and nothing else."""
        for linear in (module for layer in self.layers for module in layer.modules()):
            if isinstance(linear, QuantizedLinear) and linear.grouped and linear.grouped[1] == 0:
                linear.grouped[0].begin(linear.grouped[0].parent())  # as the forward of the module around them
            if isinstance(linear, nn.Linear | QuantizedLinear):
                linear(self.inputs[linear.in_features])


def captured(call: Callable[[], Any], device: str) -> Callable[[], Any]:
    """The same, its launches as one CUDA graph."""
    if device == "cpu":
        call()
        return call
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(call: Callable[[], Any], times: int, repeats: int, device: str, before: Callable[[], Any]) -> float:
    """The median, over `repeats`, of the mean of `times` calls in a row; `before` each row something else."""
    found = []
    for _ in range(repeats):
        before()
        wait(device)
        begun = time.perf_counter()
        for _ in range(times):
            call()
        wait(device)
        found.append((time.perf_counter() - begun) / times)
    return statistics.median(found)


def kernels(call: Callable[[], Any], times: int = 3, most: int = 12) -> list[dict[str, Any]]:
    """The kernels that a call launches, longest first: name, launches and microseconds in one call.

    Kernels that wait for the one before them count that time too.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(times):
            call()
        torch.cuda.synchronize()
    time_of, launches = Counter(), Counter()
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            time_of[event.name[:100]] += event.self_device_time_total / times
            launches[event.name[:100]] += 1 / times
    found = [(name, launches[name], us) for name, us in time_of.most_common()]
    found[most:] = [("all others", sum(n for _, n, _ in found[most:]), sum(us for _, _, us in found[most:]))]
    return [{"kernel": name, "launches": round(n, 2), "us": round(us, 2)} for name, n, us in found]


def worker(job: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of one model: eager, and compiled if the job asks for that."""
    device, start, new = job["device"], job["prompt_tokens"], job["new_tokens"]
    dtype = getattr(torch, job["dtype"])
    rows = []
    with torch.no_grad():
        model = build(job["shape"], job["scheme"], dtype, device)
        prompt = torch.randint(model.config.vocab_size, (1, start), device=device)
        decoder = Decoder(model, start + new)

        def rewind() -> None:
            decoder.position.fill_(start)

        prefill = seconds(lambda: decoder.prefill(prompt), 1, 3, device, lambda: None)
        products = seconds(captured(decoder.products, device), 10, 5, device, lambda: None)
        for compiled in (False, True) if job["compile"] else (False,):
            if compiled:
                for layer in decoder.layers:
                    layer.compile(dynamic=False, fullgraph=True)
            rewind()
            step = captured(decoder.step, device)
            token = seconds(step, new, job["repeats"], device, rewind)
            rewind()
            row = {
                "contender": "ours" if job["scheme"] else "dense",
                "shape": job["shape"],
                "format": job["scheme"] or job["dtype"],
                "compiled": "yes" if compiled else "no",
                "context": start + new,
                "tokens/s": 1 / token,
                "x dense": None,
                "ms a token": 1e3 * token,
                "in products": 1e3 * products,
                "outside %": 100 * (1 - products / token),
                "prefill/s": start / prefill,
                "model GB": sum(p.nbytes for p in model.parameters()) * 1e-9,
                "peak GiB": None,
                "kernels": [],
            }
            if device == "cuda":
                free, total = torch.cuda.mem_get_info()
                beyond = torch.cuda.max_memory_reserved() - torch.cuda.memory_reserved()
                row["peak GiB"] = (total - free + beyond) / 2**30
                row["kernels"] = kernels(step)
            rows.append(row)
    return rows
