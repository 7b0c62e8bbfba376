"""Time of a LoRA training step on the quantized model beside the same step on the dense one.

    python benchmarks/lora_step.py

One step is forward, backward and AdamW on one sequence, LoRA of PEFT on all linears of the blocks. The quantized
model has the dense one's shapes and random codes: no time depends on their values. Both models' steps alternate.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import _bench
import torch
from peft import LoraConfig, get_peft_model

import aqlm_c.hf  # noqa: F401  (teaches PEFT the quantized layer)
from aqlm_c import Format
from aqlm_c.hf.models import load_model
from aqlm_c.model.blocks import find_blocks
from aqlm_c.nn import ops
from aqlm_c.nn.linear import QuantizedLinear


def with_random_codes(dense, scheme):
    """A copy of `dense` with random codes in the place of its blocks' linears, codebooks and scales float16."""
    format, model = Format.parse(scheme), copy.deepcopy(dense)
    _, blocks = find_blocks(model)
    for block in blocks:
        for name, linear in list(block.named_modules()):
            if isinstance(linear, torch.nn.Linear):
                layer = QuantizedLinear.empty(linear, format, torch.float16)
                for part in ("codes", "codebooks", "scales"):
                    tensor = torch.empty_like(getattr(layer, part), device="cpu")
                    setattr(layer, part, torch.nn.Parameter(tensor, requires_grad=False))
                half = 2 ** (format.nbits_per_codebook - 1)
                layer.codes.random_(-half, half)
                layer.codebooks.normal_(std=0.02)
                layer.scales.fill_(1.0)
                block.set_submodule(name, layer)
    return model


def check(quantized, tokens) -> float:
    """Largest difference, relative to the largest output, to torch's product with the first layer's weight."""
    layer = next(module for module in quantized.modules() if isinstance(module, QuantizedLinear))
    x = quantized.get_input_embeddings()(tokens)
    weight = ops.decode_rows(layer.codes, layer.codebooks.float(), layer.scales.float()).to(x.dtype)
    expected = torch.nn.functional.linear(x, weight, layer.bias)
    return float((layer(x) - expected).abs().max() / expected.abs().max())


def steps(model, rank, tokens):
    """An endless run of training steps, each of which yields its seconds."""
    model = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear")).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    while True:
        started = time.perf_counter()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--scheme", default="2x8g8")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10, help="steps of each that are timed, after one that is not")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--json")
    args = parser.parse_args()

    rows = []
    for dtype in args.dtypes:
        torch.manual_seed(0)
        dense, _, _ = load_model(args.model)
        dense = dense.to(getattr(torch, dtype))
        tokens = torch.randint(dense.config.vocab_size, (1, args.tokens))
        with torch.no_grad():
            quantized = with_random_codes(dense, args.scheme)
            error = check(quantized, tokens)
        runs = {name: steps(model, args.rank, tokens) for name, model in (("dense", dense), ("ours", quantized))}
        seconds = [{name: next(run) for name, run in runs.items()} for _ in range(args.steps + 1)][1:]
        ours, theirs = ([step[name] for step in seconds] for name in ("ours", "dense"))
        rows.append(
            {
                "model": args.model,
                "dtype": dtype,
                "ours s": statistics.median(ours),
                "dense s": statistics.median(theirs),
                "ratio": statistics.median(ours) / statistics.median(theirs),
                "ratio of the fastest": min(ours) / min(theirs),
                "spread of ours": (max(ours) - min(ours)) / statistics.median(ours),
                "max error": error,
            }
        )
    _bench.show(f"LoRA step, {args.scheme}, r={args.rank}, {args.tokens} tokens", rows)
    print(_bench.save("lora_step", rows, args.json, arguments=vars(args)))


if __name__ == "__main__":
    main()
