"""Tuning a model of a large model's shape, for finetune_model.py: random weights, made where they are needed."""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import _bench
import _device
import torch
from random_checkpoint import config_of
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from aqlm_c import Format, QuantizedLinear
from aqlm_c.config import FinetuneOptions
from aqlm_c.distributed import device_of_rank, group, started
from aqlm_c.finetune import FinetuneProgress, finetune_model
from aqlm_c.nn import ops
from aqlm_c.recipe import options_of, parse_pair

UNEVEN = 0.3  # of a weight's size: what its codes are off
WARM = 2  # steps that are not timed


def models(args: argparse.Namespace, device: torch.device) -> tuple[Any, Any]:
    """The quantized model on `device`, and its original, in CPU memory if it is to be in shards: random codes, and the
    weights that these stand for with random errors. The same on all ranks.
    """
    config = config_of(args.shape, args.blocks)
    format, dtype = Format.parse(args.scheme), torch.bfloat16
    with torch.device("meta"):
        original, model = (LlamaForCausalLM(config).to(dtype).eval() for _ in range(2))
    generator = torch.Generator(device).manual_seed(args.seed)
    home = torch.device("cpu") if args.shard_original and group().size > 1 else device
    for one, place in ((model, device), (original, home)):
        one.model.rotary_emb = LlamaRotaryEmbedding(config).to(place)
    for name, linear in list(model.named_modules()):
        if not isinstance(linear, nn.Linear) or name == "lm_head":
            continue
        layer = QuantizedLinear.empty(linear, format, dtype)
        layer.to_empty(device=device)
        half = 2 ** (format.nbits_per_codebook - 1)
        layer.codes.data.random_(-half, half, generator=generator)
        layer.codebooks.data.normal_(std=(format.num_codebooks * linear.in_features) ** -0.5, generator=generator)
        layer.scales.data.fill_(1)
        dense = ops.decode_rows(layer.codes, layer.codebooks.float(), layer.scales.float())
        size = UNEVEN * linear.in_features**-0.5
        dense += size * torch.randn(dense.shape, generator=generator, device=device)
        model.set_submodule(name, layer)
        original.get_submodule(name).weight = nn.Parameter(dense.to(dtype).to(home))
    for name, parameter in list(original.named_parameters()):
        if not parameter.is_meta:
            continue
        value = torch.empty(parameter.shape, dtype=dtype, device=device)
        value = value.fill_(1) if parameter.ndim == 1 else value.normal_(std=0.02, generator=generator)
        owner, _, last = name.rpartition(".")
        setattr(original.get_submodule(owner), last, nn.Parameter(value.to(home)))
        setattr(model.get_submodule(owner), last, nn.Parameter(value.clone()))
    return model, original


class Times(FinetuneProgress):
    """The seconds of each step, to its end on the device; looks at held-out text are not in them."""

    def __init__(self, device: str) -> None:
        self.device, self.steps, self.begun = device, list[float](), 0.0

    def on_estimate(self, estimate: Any) -> None:
        if group().first:
            print(f"estimate: {estimate.describe()}", flush=True)

    def on_step(self, step: int, steps: int) -> None:
        _device.wait(self.device)
        now = time.perf_counter()
        self.steps.append(now - self.begun)
        self.begun = now
        if group().first:
            print(f"step {step}: {self.steps[-1]:.3f} s", flush=True)

    def on_look(self, entry: Any) -> None:
        _device.wait(self.device)
        self.begun = time.perf_counter()
        if group().first:
            print({name: round(x, 5) if isinstance(x, float) else x for name, x in entry.items()}, flush=True)


def options(args: argparse.Namespace) -> FinetuneOptions:
    given = {"steps": args.steps, "batch_size": args.batch_size, "seed": args.seed, "pv": args.pv}
    given |= {"shard_original": args.shard_original, "evaluation_interval": args.steps, "warmup": 2}
    given |= {"most_held_out": 2 * group().size, "patience": 0}
    return options_of(FinetuneOptions, {**given, **dict(parse_pair("--set", text) for text in args.set)})


def run(args: argparse.Namespace) -> None:
    """Steps of tuning; the first rank prints and writes."""
    with started() as ranks:
        device = device_of_rank(args.device)
        begun = time.perf_counter()
        model, original = models(args, device)
        _device.wait(args.device)
        if ranks.first:
            print(f"{args.shape} with random weights in {time.perf_counter() - begun:.1f} s", flush=True)
        chosen = options(args)
        count = chosen.steps * chosen.batch_size + chosen.most_held_out
        generator = torch.Generator().manual_seed(args.seed)
        sequences = torch.randint(model.config.vocab_size, (count, args.sequence_length), generator=generator)
        peak, times = _device.Peak(args.device), Times(args.device)
        report = finetune_model(model, original, sequences, chosen, progress=times, device=device.type)
        peaks = ranks.gather([peak.gigabytes(), report.peak_device_memory_bytes * 1e-9])
        timed = times.steps[WARM:] or times.steps
        seconds = statistics.median(timed)
        row = {
            **{"shape": args.shape, "blocks": model.config.num_hidden_layers, "ranks": ranks.size, "pv": chosen.pv},
            **{"moments": report.options["pv_states"], "tokens a step": chosen.batch_size * args.sequence_length},
            **{"seconds a step": seconds, "tokens/s": chosen.batch_size * args.sequence_length / seconds},
            **{name: max((one[0][name] for one in peaks if one[0][name]), default=None) for name in peaks[0][0]},
            **{"reserved GB": max(one[1] for one in peaks) or None},
            **{"KL before": report.held_out_before, "KL": report.history[-1]["held_out"]},
        }
        if not ranks.first:
            return
        _bench.show(f"tuning {args.shape} on {ranks.size} x {args.device}", [row])
        if args.json is not None:
            more = {"seconds": times.steps, "history": report.history, "options": report.options}
            arguments = {**vars(args), "json": None}
            print(
                _bench.save(
                    f"finetune_{args.shape}_{args.device}", [row], args.json, args.device, arguments=arguments, **more
                )
            )
