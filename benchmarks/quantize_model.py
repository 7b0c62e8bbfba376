"""Time, memory and perplexity of quantizing a whole model, preset by preset, over a few seeds.

    python benchmarks/quantize_model.py --device cuda --data wikipedia.txt --data c4.txt --text wikitext2_test_raw.txt

Without --data the calibration text is Python's bundled documentation. What is timed is `quantize_model`, without
loading. Perplexity is of windows of 2,048 tokens of --text, both over the first --windows of them (0: none) and, with
--full, over all. Each row is one run; means and the sample standard deviation over seeds follow. --profile looks at the
kernels of the first run while it is in the blocks FROM to TO - 1, so that its time is more than that of the others.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from pathlib import Path
from typing import Any

import _bench
import _device
import torch

from aqlm_c.core.runtime import set_threads
from aqlm_c.evaluate import perplexity
from aqlm_c.hf.models import load_model
from aqlm_c.io.data import BUNDLED, load_sequences, token_stream
from aqlm_c.pipeline.progress import Progress
from aqlm_c.quantize import quantize_model
from aqlm_c.recipe import PRESETS, AqlmConfig, parse_option, quantizer_options

MEANS = ("seconds", "perplexity", "full perplexity", "host GB", "device GB")


class Watch(Progress):
    """Says where a run is; profiles the kernels of the blocks first to last - 1."""

    def __init__(self, title: str, blocks: tuple[int, int] | None) -> None:
        self.title, self.blocks, self.kernels = title, blocks, {}
        self.profile: _device.KernelTime | None = None
        self.begun: list[float] = []

    def on_block(self, index: int, name: str) -> None:
        print(f"\r{self.title}: {name:40}", end="", flush=True)
        self.begun.append(time.perf_counter())
        if self.blocks and index == self.blocks[0]:
            self.profile = _device.KernelTime()
            self.profile.start()
        elif self.blocks and index == self.blocks[1]:
            self.close()

    def close(self) -> None:
        if self.profile:
            self.kernels, self.profile = self.profile.stop(), None


def score(model: Any, stream: torch.Tensor | None, args: argparse.Namespace) -> dict[str, float | None]:
    """Perplexities by name: of the first windows and of all, in one pass."""
    if stream is None:
        return {"perplexity": None, "full perplexity": None}
    first: dict[int, float] = {}
    count = None if args.full else args.windows
    found = perplexity(
        model, stream, args.window, count, progress=lambda done, total, so_far: first.setdefault(done, so_far)
    )
    few = first.get(args.windows, found["perplexity"])
    return {"perplexity": few, "full perplexity": found["perplexity"] if args.full else None}


def quantized(model: Any, ids: torch.Tensor, config: AqlmConfig, watch: Watch, args: argparse.Namespace) -> Any:
    """The row of one run. A model in host memory comes to the device block by block."""
    limits = {"memory_limit": args.memory_limit, "device_memory_limit": args.device_memory_limit}
    peak = _device.Peak(args.device)
    _device.wait(args.device)
    started = time.perf_counter()
    report = quantize_model(model, ids, config, progress=watch, device=args.device, **limits)
    _device.wait(args.device)
    ended = time.perf_counter()
    watch.close()
    print("\r" + " " * 79 + "\r", end="")
    return {
        **{"seconds": ended - started, "bits": report.bits_per_weight, "effective bits": report.effective_bits},
        **peak.gigabytes(),
        "phases": dict(report.phases),
        "by step": [after - before for before, after in itertools.pairwise([*watch.begun, ended])],
        "profile": watch.kernels,
    }


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds, and the sample standard deviation of perplexity, for each scheme and preset."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["scheme"], row["preset"]), []).append(row)
    found = []
    for (scheme, preset), group in groups.items():
        line: dict[str, Any] = {"scheme": scheme, "preset": preset, "seeds": len(group)}
        for name in MEANS:
            values = [row[name] for row in group if row[name] is not None]
            line[name] = statistics.mean(values) if values else None
            if "perplexity" in name:
                line[f"± {name}"] = statistics.stdev(values) if len(values) > 1 else None
        found.append(line)
    return found


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--scheme", nargs="+", default=["2x8g8"])
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), default=["fast", "balanced"])
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="an AqlmConfig field")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--data", action="append", help="calibration text; repeatable")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--text", default=BUNDLED, help="perplexity is of this text")
    parser.add_argument("--window", type=int, default=2048, help="tokens of its windows")
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--memory-limit", metavar="SIZE", help="of the host, such as 24GiB")
    parser.add_argument("--device-memory-limit", metavar="SIZE")
    parser.add_argument("--full", action="store_true", help="perplexity of all windows too")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--profile", metavar="FROM:TO", help="kernels of these blocks of the first run")
    parser.add_argument("--json", nargs="?", const="", metavar="PATH", help="where to (default: benchmarks/results)")
    args = parser.parse_args()
    _device.check_device(parser, args.device)
    if args.seeds < 1 or args.windows < 0:
        parser.error(f"--seeds, --windows: got {args.seeds}, {args.windows}, expected at least 1, 0")
    if args.profile:
        first, colon, last = args.profile.partition(":")
        if not (colon and first.isdecimal() and last.isdecimal() and int(first) < int(last)):
            parser.error(f"--profile: got {args.profile}, expected FROM:TO, such as 2:4")
        if args.device == "cpu":
            parser.error("--profile: got --device cpu, expected cuda")
        args.blocks = int(first), int(last)
    else:
        args.blocks = None
    return args


def main() -> None:
    args = parse_arguments()
    set_threads(args.threads)
    model, tokenizer, _ = load_model(args.model)
    stream = None
    if args.windows:
        stream = token_stream(args.text, tokenizer, None if args.full else args.windows * args.window)
    original = score(model.to(args.device) if args.windows else model, stream, args)
    sources, rows = args.data or [BUNDLED], []
    options = dict(map(parse_option, args.set))
    ids = load_sequences(sources, tokenizer, args.samples, args.sequence_length)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    for scheme, preset, seed in itertools.product(args.scheme, args.presets, seeds):
        fields = quantizer_options(preset)
        config = AqlmConfig.from_scheme(scheme, **{**fields, **options, "seed": seed})
        watch = Watch(f"{scheme} {preset}, seed {seed}", None if rows else args.blocks)
        del model
        model, _, _ = load_model(args.model)
        row = quantized(model, ids, config, watch, args)
        scores = score(model.to(args.device) if args.windows else model, stream, args)
        rows.append({"scheme": scheme, "preset": preset, "seed": seed, **scores, **row})
        _bench.show(f"{Path(args.model).name} on {args.device}", rows[-1:], hidden=("phases", "by step", "profile"))
        print(", ".join(f"{name} {took:.3g}" for name, took in row["phases"].items()), "s", flush=True)
    finish(args, rows, original)


def finish(args: argparse.Namespace, rows: list[dict[str, Any]], original: dict[str, float | None]) -> None:
    """Show the summary and the profile; write the JSON if asked."""
    for row in rows:
        if found := row["profile"]:
            share = 100 * found["kernel seconds"] / found["seconds"]
            print(f"blocks {args.profile}: {found['seconds']:.3g} s, {share:.3g}% of it in kernels")
            for kernel in found["kernels"]:
                print(f"    {kernel['seconds'] * 1e3:9.2f} ms {kernel['launches']:6d}  {kernel['kernel'][:100]}")
    means = summary(rows)
    _bench.show(f"means over seeds; the original: {_bench.text(original['perplexity'])}", means)
    if args.json is not None:
        named = {"model": Path(args.model).name, "text": Path(args.text).name}
        names = {**named, "data": [Path(source).name for source in args.data or []]}  # not where they lie
        more = {"arguments": {**vars(args), **names}, "original": original, "means": means}
        print(_bench.save(f"quantize_model_{args.device}", rows, args.json, args.device, **more))


if __name__ == "__main__":
    main()
