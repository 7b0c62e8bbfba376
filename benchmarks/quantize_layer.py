"""Error and time of one layer, solver by solver, of a real model or synthetic.

    python benchmarks/quantize_layer.py --data wikipedia.txt --data c4.txt
    python benchmarks/quantize_layer.py --synthetic 4096x4096 --scheme 2x8g8 1x16g8 --device cuda --upstream DIR

Without --data the text is Python's bundled documentation. With `--set` the default solver with these options takes
the place of the table.
H is gathered from the first `--samples` windows of each text in the unquantized model; the error under H of the
next as many windows is reported beside it. Gathering H is not timed.

A synthetic layer's weights are N(0, 1) / sqrt(in), a row times exp(0.25 N(0, 1)); its inputs are Z C^(1/2) D, where C
has eigenvalues proportional to 1 / (k + 1) in a random orthogonal basis, D = exp(0.5 N(0, 1)) by channel; H is of
16,384 of them. The solvers are presets, our method `paper` and, where DIR is a checkout of Vahe1994/AQLM, its code in a
process of its own, with the options of the method `paper`. The whole is timed without a wait between phases, the second
of two runs on a GPU; phases of a GPU in a run of their own, in which each is waited for (--phases), and the share of
the time in kernels by torch's profiler in another (--profile).
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import _bench
import _device
import _upstream_layer
import numpy as np
import torch

from aqlm_c import AqlmConfig
from aqlm_c.calibrate.activations import capture
from aqlm_c.calibrate.hessians import HessianSums
from aqlm_c.core.hessian import Hessian
from aqlm_c.hf.models import load_model
from aqlm_c.io.data import BUNDLED, token_stream
from aqlm_c.methods.aqlm import search_options
from aqlm_c.model.blocks import find_blocks
from aqlm_c.recipe import PRESETS, parse_option, quantizer_options
from aqlm_c.weights import quantize_weight

DEFAULT = AqlmConfig()
SOLVERS = {  # by start
    "LDL": [{}, {"beam_size": 8}],
    "LDL, more rounds": [{"ldl_passes": 14, "max_sweeps": 12, "relative_mse_tolerance": 0.002}],
    "k-means": [
        {
            "ldl_passes": 0,
            "max_sweeps": DEFAULT.options.ldl_passes + DEFAULT.options.max_sweeps,
        },  # as many rounds in all
        {"solver": "paper", "beam_size": 1},
        {"solver": "paper", "beam_size": 8},
    ],
}


def hessians(model, sequences, block, names) -> tuple[dict[str, np.ndarray], dict[str, Hessian]]:
    """Weights and Hessians of the named linears of one block of the unquantized model."""
    prefix, blocks = find_blocks(model)
    linears = {name: model.get_submodule(f"{prefix}.{block}.{name}") for name in names}
    stream = capture(model, blocks, sequences)
    for index in range(block):
        stream.advance(index, blocks[index])
    sums = HessianSums(linears)
    sums.gather(stream, block, blocks[block])
    return {name: linear.weight.detach().float().numpy() for name, linear in linears.items()}, sums.hessians()


def relative_error(weight, decoded, H) -> float:
    D, W, H = (weight - decoded).astype(np.float64), weight.astype(np.float64), H.astype(np.float64)
    return float(np.sum((D @ H) * D) / np.sum((W @ H) * W))


def model_rows(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Layers of a model by the table of solvers."""
    model, tokenizer, _ = load_model(args.model)
    n, length = args.samples, args.sequence_length
    windows = []
    for text in args.data or [BUNDLED]:
        stream = token_stream(text, tokenizer, 2 * n * length)
        if len(stream) < 2 * n * length:
            parser.error(
                f"--data: got {text}: {len(stream)} tokens, expected {2 * n * length} (2 x {n} windows of {length})"
            )
        windows.append(stream.view(2 * n, length))
    seen, held_out = (torch.cat([text[part] for text in windows]) for part in (slice(n), slice(n, None)))
    weights, shown = hessians(model, seen, args.block, args.layers)
    _, hidden = hessians(model, held_out, args.block, args.layers)
    options = dict(map(parse_option, args.set))
    solvers = {"as set": [options]} if options else {"LDL": [{}]} if args.default_only else SOLVERS
    rows = []
    for layer, (start, solver) in itertools.product(args.layers, ((s, o) for s in solvers for o in solvers[s])):
        config = AqlmConfig.from_scheme(args.scheme[0], **solver)
        paper = config.solver == "paper"
        beam_size, _ = (
            (config.options.beam_size or 1, False) if paper else search_options(config.format, config.options)
        )
        weight, H = on(args.device, weights[layer], shown[layer].H)
        found, seconds = once(weight, H, config, args.device)
        decoded = found.decode() if args.device == "cpu" else found.decode().cpu().numpy()
        rows.append(
            {
                "layer": layer,
                "start": start,
                "search": f"beam {beam_size}" if beam_size else "exact pairs",
                "update": "Adam (paper)" if paper else "CG",
                "error": found.relative_error,
                "held-out error": relative_error(weights[layer], decoded, hidden[layer].H),
                "seconds": seconds,
                "rounds": len(found.history) - 2,
            }
        )
    return rows


def on(device: str, *arrays: np.ndarray) -> tuple[Any, ...]:
    return tuple(array if device == "cpu" else torch.from_numpy(array).to(device) for array in arrays)


def once(weight: Any, H: Any, config: AqlmConfig, device: str) -> tuple[Any, float]:
    """The quantized weight, and seconds from an H of which nothing is known yet, its factor included."""
    fresh = Hessian(H)
    _device.wait(device)
    started = time.perf_counter()
    found = quantize_weight(weight, fresh, config, dtype="bfloat16")
    _device.wait(device)
    return found, time.perf_counter() - started


def synthetic(shape: tuple[int, int], seed: int, device: str, samples: int = 16384) -> tuple[Any, Any]:
    """W [out, in] and H [in, in], float32, of the recipe above; other devices draw other numbers."""
    (out, width), generator = shape, torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device)

    weight = normal(out, width) / width**0.5 * (0.25 * normal(out, 1)).exp()
    basis, _ = torch.linalg.qr(normal(width, width))
    root = (basis * torch.arange(1, width + 1, device=device).rsqrt()) @ basis.T
    channels = (0.5 * normal(width)).exp()
    H = torch.zeros(width, width, dtype=torch.float64, device=device)
    for count in (min(2048, samples - first) for first in range(0, samples, 2048)):
        x = normal(count, width) @ root * channels
        H += (x.T @ x).double()
    return weight, ((H + H.T) / (2 * samples)).float()  # products need not be symmetric to the bit


def solve_timed(weight: Any, H: Any, config: AqlmConfig, args: argparse.Namespace) -> dict[str, Any]:
    """The row of one layer and solver."""
    again = functools.partial(once, weight, H, config, args.device)
    if args.device == "cuda":
        again()  # kernels are loaded, memory is the allocator's
    peak = _device.Peak(args.device)
    found, seconds = again()
    row = {
        **{"seconds": seconds, "error": found.relative_error, "rounds": len(found.history) - 2},
        **peak.gigabytes(),
        **{"kernels %": None, "phases": found.seconds if args.device == "cpu" else None, "kernels": None},
    }
    if args.phases and args.device == "cuda":
        with _device.synchronized(args.device):
            row["phases"] = again()[0].seconds
    if args.profile:
        profile = _device.KernelTime()
        profile.start()
        again()
        profiled = profile.stop()
        row["kernels %"] = 100 * profiled["kernel seconds"] / seconds  # of the run that nobody watched
        row["kernels"] = profiled["kernels"]
    return row


def upstream_timed(weight: torch.Tensor, H: torch.Tensor, config: AqlmConfig, args: argparse.Namespace) -> Any:
    """The same row of upstream's code, None where it failed."""
    format, options = config.format, config.options
    with tempfile.TemporaryDirectory() as folder:
        job = {"device": args.device, "seed": args.seed}
        for name, tensor in (("weight", weight), ("H", H)):
            job[name] = str(Path(folder) / f"{name}.npy")
            np.save(job[name], tensor.cpu().numpy())
        job["options"] = {
            **{"num_codebooks": format.num_codebooks, "nbits_per_codebook": format.nbits_per_codebook},
            **{"in_group_size": format.in_group_size, "beam_size": options.beam_size or 1},
            "relative_mse_tolerance": options.relative_mse_tolerance,
        }
        found = _upstream_layer.quantize(args.upstream, job, args.python)
    if "failed" in found:
        print(f"upstream: {format.scheme}: {found['failed']}", file=sys.stderr)
        return None
    return found


def synthetic_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    options = dict(map(parse_option, args.set))
    ours = {"as set": options} if options else {name: own_options(name) for name in args.solvers}
    rows = []
    for text, seed in itertools.product(args.synthetic, range(args.seed, args.seed + args.seeds)):
        tensors = synthetic(_bench.shape(text), seed, args.device)
        weight, H = tensors if args.device == "cuda" else (tensor.numpy() for tensor in tensors)
        for scheme in args.scheme:
            for solver, chosen in ours.items():
                config = AqlmConfig.from_scheme(scheme, seed=seed, **chosen)
                found = solve_timed(weight, H, config, args)
                rows.append({"layer": text, "scheme": scheme, "seed": seed, "solver": solver, **found})
            if args.upstream and seed == args.seed:  # it takes a minute or more
                config = AqlmConfig.from_scheme(scheme, seed=seed, **own_options("paper"))
                if found := upstream_timed(*tensors, config, args):
                    rows.append({"layer": text, "scheme": scheme, "seed": seed, "solver": "upstream", **found})
    return rows


def own_options(name: str) -> dict[str, Any]:
    """Of a preset or of the method `paper`, for one layer."""
    if name == "paper":
        return {"solver": "paper"}
    return {key: value for key, value in quantizer_options(name).items() if not key.startswith("finetune")}


def show_synthetic(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """A line for each layer, solvers side by side; phases below it."""
    _bench.show(f"synthetic layers on {args.device}", rows, hidden=("phases", "kernels"))
    print("seconds / relative error")
    print(_bench.pivot(rows, ["layer", "scheme", "seed"], "solver", ["seconds", "error"]))
    for row in rows:
        if row["phases"]:
            parts = ", ".join(f"{name} {seconds:.3g}" for name, seconds in row["phases"].items())
            print(f"{row['layer']} {row['scheme']} {row['solver']}: {parts} s")
        for kernel in row["kernels"] or []:
            print(f"    {kernel['seconds'] * 1e3:9.2f} ms {kernel['launches']:6d}  {kernel['kernel'][:100]}")


def parse_arguments() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", action="append", help="text; repeatable (default: Python's documentation)")
    parser.add_argument("--samples", type=int, default=16, help="windows of each text (default 16)")
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--block", type=int, default=10)
    parser.add_argument("--layers", nargs="+", default=["mlp.gate_proj", "self_attn.q_proj", "mlp.down_proj"])
    parser.add_argument("--scheme", nargs="+", default=["2x8g8"])
    parser.add_argument("--default-only", action="store_true", help="no table of solvers")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="an AqlmConfig field")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--synthetic", nargs="+", metavar="OUTxIN", help="these layers in the place of a model's")
    parser.add_argument("--solvers", nargs="+", choices=[*PRESETS, "paper"], default=["balanced", "fast", "paper"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=1, help="how many synthetic layers of a shape")
    parser.add_argument("--upstream", metavar="DIR", help="a checkout of Vahe1994/AQLM")
    parser.add_argument("--python", help="the interpreter for it (default: this one)")
    parser.add_argument("--phases", action="store_true", help="time phases of a GPU in a run of their own")
    parser.add_argument("--profile", action="store_true", help="share of the time in kernels, and which")
    parser.add_argument("--json", nargs="?", const="", metavar="PATH", help="where to (default: benchmarks/results)")
    args = parser.parse_args()
    _device.check_device(parser, args.device)
    for text in args.synthetic or []:
        if not _bench.shape(text):
            parser.error(f"--synthetic: got {text}, expected OUTxIN, such as 4096x4096")
    if args.upstream and not args.synthetic:
        parser.error("--upstream: got a model's layers, expected --synthetic OUTxIN")
    if args.profile and args.device == "cpu":
        parser.error("--profile: got --device cpu, expected cuda")
    if args.upstream:
        _upstream_layer.check_checkout(args.upstream)
    return parser, args


def main() -> None:
    parser, args = parse_arguments()
    given = {name: value for name, value in vars(args).items() if name not in ("upstream", "python")}
    arguments = {**given, "data": [Path(source).name for source in args.data or []]}  # not where they lie
    if args.synthetic:
        rows, name = synthetic_rows(args), f"quantize_layer_{args.device}"
        show_synthetic(rows, args)
        if args.json is None:
            return
    else:
        rows, name = model_rows(parser, args), "quantize_layer"
        _bench.show(f"{args.model} block {args.block}, {args.scheme[0]}", rows)
    print(_bench.save(name, rows, args.json, args.device, arguments=arguments))


if __name__ == "__main__":
    main()
