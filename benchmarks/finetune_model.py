"""Tuning a whole quantized model: tokens per second, memory, held-out KL and perplexity before and after.

    python benchmarks/finetune_model.py --device cuda --model smollm2 --scheme 2x8g8 --preset balanced \\
        --data distill_web.txt --data distill_wiki.txt --steps 400 --both \\
        --text wikitext2_test_raw.txt --text c4_evaluation.txt --json

The quantized model is --quantized DIR or, without it, made first by `quantize_model` (of --calibration text), whose
time is told apart. --both tunes it twice from there, without codes and with them (PV-Tuning), on the same sequences.
--shape 8b: a model of Llama-3.1-8B's shape instead, of random codes and nearby weights (--blocks N: the first N of its
blocks), which takes --steps of random tokens: seconds a step, tokens per second, memory; also by several ranks:

    torchrun --nproc-per-node 2 benchmarks/finetune_model.py --device cuda --shape 8b --pv --steps 8 --shard-original

Perplexity is of windows of 2,048 tokens: of all of each --text, and of the first --windows. --phases tells where a
step's time goes: kernels of a profiled step, and what indexing the codes anew takes.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import _bench
import _device
import _tuning_shape
import torch
from random_checkpoint import SHAPES

from aqlm_c.config import FinetuneOptions
from aqlm_c.core.runtime import set_threads
from aqlm_c.evaluate import perplexity
from aqlm_c.finetune import FinetuneProgress, FinetuneRun, finetune_model, tuning_sequences
from aqlm_c.hf.models import load_model
from aqlm_c.io.checkpoint import save_quantized
from aqlm_c.io.data import BUNDLED, load_sequences, token_stream
from aqlm_c.nn import ops
from aqlm_c.nn.linear import QuantizedLinear
from aqlm_c.quantize import quantize_model
from aqlm_c.recipe import PRESETS, AqlmConfig, options_of, parse_option, parse_pair, quantizer_options


class Watch(FinetuneProgress):
    """Prints looks; profiles the kernels of step `profiled`."""

    def __init__(self, profiled: int | None) -> None:
        self.profiled, self.kernels = profiled, {}
        self.profile: _device.KernelTime | None = None

    def on_estimate(self, estimate: Any) -> None:
        print(f"estimate: {estimate.describe()}", flush=True)

    def on_step(self, step: int, steps: int) -> None:
        if self.profile is not None:
            self.kernels, self.profile = self.profile.stop(), None
        if self.profiled is not None and step == self.profiled:
            self.profile = _device.KernelTime()
            self.profile.start()

    def on_look(self, entry: Any) -> None:
        print(
            {name: round(value, 5) if isinstance(value, float) else value for name, value in entry.items()}, flush=True
        )


def scores(model: Any, streams: dict[str, torch.Tensor], args: argparse.Namespace) -> dict[str, float]:
    """Perplexities by text: of the first windows and of all."""
    found = {}
    for name, stream in streams.items():
        so_far: list[float] = []
        count = None if args.full else args.windows
        perplexity(model, stream, args.window, count, progress=lambda *told, to=so_far: to.append(told[2]))
        found[f"{name}, {args.windows}"] = so_far[min(args.windows, len(so_far)) - 1]
        if args.full:
            found[name] = so_far[-1]
    return found


def index_seconds(model: Any) -> float:
    """Seconds to index the codes of all quantized linears anew, as a step that changes codes does."""
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    device = layers[0].codes.device.type
    for _ in range(2):  # the first one warms up
        _device.wait(device)
        started = time.perf_counter()
        for layer in layers:
            ops.index_codes(layer.codes, layer.codebooks.float(), layer.scales.float())
        _device.wait(device)
    return time.perf_counter() - started


def start(original: Any, tokenizer: Any, args: argparse.Namespace) -> tuple[Any, float]:
    """The quantized model, and the seconds that quantizing took."""
    if args.quantized:
        return load_model(args.quantized, "auto", args.device)[0], 0.0
    sources = args.calibration or args.data or [BUNDLED]
    ids = load_sequences(sources, tokenizer, args.calibration_samples, args.sequence_length)
    fields = quantizer_options(args.preset)
    config = AqlmConfig.from_scheme(
        args.scheme, **{**fields, **dict(map(parse_option, args.quantize)), "seed": args.seed}
    )
    model, _, _ = load_model(args.model)
    _device.wait(args.device)
    started = time.perf_counter()
    quantize_model(model, ids, config, device=args.device)
    _device.wait(args.device)
    return model.to(args.device), time.perf_counter() - started


def row_of(name: str, report: Any, peak: Any, found: dict[str, float]) -> dict[str, Any]:
    return {
        **{"tuning": name, "steps": report.steps, "seconds": report.seconds, "tokens/s": report.tokens_per_second},
        **peak.gigabytes(),
        **{"KL before": report.held_out_before, "KL": report.held_out_after, "best step": report.best_step},
        **{"groups changed": report.changed, **found},
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="the original")
    parser.add_argument("--quantized", metavar="DIR")
    parser.add_argument("--shape", choices=list(SHAPES), help="of random weights, instead of a model")
    parser.add_argument("--blocks", type=int, help="with --shape: so many, if not all")
    parser.add_argument("--shard-original", action="store_true", help="with --shape: over the ranks")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--scheme", default="2x8g8")
    parser.add_argument("--preset", choices=list(PRESETS), default="balanced")
    parser.add_argument("--quantize", action="append", default=[], metavar="FIELD=VALUE", help="of AqlmConfig")
    parser.add_argument("--calibration", action="append", metavar="FILE", help="text to quantize with; repeatable")
    parser.add_argument("--calibration-samples", type=int, default=64)
    parser.add_argument("--data", action="append", help="text to tune on, or self:N; repeatable")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--pv", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--both", action="store_true", help="without codes, then with them")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="of FinetuneOptions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", action="append", help="perplexity is of this; repeatable")
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--full", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--phases", action="store_true")
    parser.add_argument("--work-dir", metavar="FOLDER", help="states, and the quantized model, are kept there")
    parser.add_argument("--save", metavar="FOLDER", help="where the tuned models go, by name")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", nargs="?", const="", metavar="PATH", help="where to (default: benchmarks/results)")
    args = parser.parse_args()
    _device.check_device(parser, args.device)
    return args


def main() -> None:
    args = parse_arguments()
    set_threads(args.threads)
    if args.shape:
        return _tuning_shape.run(args)
    common = {"steps": args.steps, "batch_size": args.batch_size, "seed": args.seed}
    options = options_of(FinetuneOptions, {**common, **dict(parse_pair("--set", text) for text in args.set)})
    original, tokenizer, _ = load_model(args.model, "auto", args.device)
    streams = {Path(text).stem: token_stream(text, tokenizer) for text in args.text or [BUNDLED]}
    draw = {"samples": args.samples, "sequence_length": args.sequence_length, "device": args.device}
    run = FinetuneRun(args.quantized or "-", args.model, "-", data=args.data or [], options=options, **draw)
    sequences = tuning_sequences(run, original, tokenizer, FinetuneProgress())
    print(f"{len(sequences)} sequences of {args.sequence_length}", flush=True)
    scored = {"original": scores(original, streams, args)}
    quantized, seconds = start(original, tokenizer, args)
    scored["quantized"] = scores(quantized, streams, args)
    print(f"quantized in {seconds:.1f} s", scored, flush=True)
    more: dict[str, Any] = {"quantize seconds": seconds, "scores": scored}
    if args.phases:
        more["index seconds"] = index_seconds(quantized)
        print(f"indexing all codes: {more['index seconds'] * 1e3:.1f} ms", flush=True)
    rows, looks = [], {}
    for pv in [False, True] if args.both else [args.pv]:
        name = "codes too" if pv else "continuous"
        model = copy.deepcopy(quantized)
        watch = Watch(3 if args.phases and args.device == "cuda" else None)
        peak = _device.Peak(args.device)
        chosen = options_of(FinetuneOptions, {**vars(options), "pv": pv})
        work = str(Path(args.work_dir) / name.replace(" ", "-")) if args.work_dir else None
        report = finetune_model(model, original, sequences, chosen, progress=watch, work_dir=work)
        rows.append(row_of(name, report, peak, scores(model, streams, args)))
        looks[name] = {"history": report.history, "options": report.options, "kernels": watch.kernels}
        if watch.kernels:
            print(f"a step: {watch.kernels['seconds']:.3f} s, {watch.kernels['kernel seconds']:.3f} s in kernels")
            for kernel in watch.kernels["kernels"]:
                print(f"    {kernel['seconds'] * 1e3:9.2f} ms {kernel['launches']:6d}  {kernel['kernel'][:100]}")
        if args.save:
            save_quantized(model, tokenizer, Path(args.save) / name.replace(" ", "-"), overwrite=True)
        _bench.show(f"{Path(args.model).name} on {args.device}", rows)
    if args.json is not None:
        names = {"model": Path(args.model).name, "quantized": args.quantized and Path(args.quantized).name}
        for option in ("data", "text", "calibration"):  # not where they lie
            names[option] = [Path(source).name for source in getattr(args, option) or []]
        arguments = {**vars(args), **names, "work_dir": None, "save": None}
        print(
            _bench.save(
                f"finetune_model_{args.device}", rows, args.json, args.device, arguments=arguments, looks=looks, **more
            )
        )


if __name__ == "__main__":
    main()
