"""Error and time of one layer, solver by solver (start x search x update), on a real model.

    python benchmarks/quantize_layer.py --data wikipedia.txt --data c4.txt

Without --data the text is Python's bundled documentation. With `--set` the default solver with these options takes
the place of the table.
H is gathered from the first `--samples` windows of each text in the unquantized model; the error under H of the
next as many windows is reported beside it. Gathering H is not timed.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path

import _bench
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
from aqlm_c.recipe import parse_option
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", action="append", help="text; repeatable (default: Python's documentation)")
    parser.add_argument("--samples", type=int, default=16, help="windows of each text (default 16)")
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--block", type=int, default=10)
    parser.add_argument("--layers", nargs="+", default=["mlp.gate_proj", "self_attn.q_proj", "mlp.down_proj"])
    parser.add_argument("--scheme", default="2x8g8")
    parser.add_argument("--default-only", action="store_true", help="no table of solvers")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="an AqlmConfig field")
    parser.add_argument("--json")
    args = parser.parse_args()

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
        config = AqlmConfig.from_scheme(args.scheme, **solver)
        paper = config.solver == "paper"
        beam_size, _ = (
            (config.options.beam_size or 1, False) if paper else search_options(config.format, config.options)
        )
        fresh = Hessian(shown[layer].H)  # so that its factor is timed too
        started = time.perf_counter()
        found = quantize_weight(weights[layer], fresh, config, dtype="bfloat16")
        seconds = time.perf_counter() - started
        rows.append(
            {
                "layer": layer,
                "start": start,
                "search": f"beam {beam_size}" if beam_size else "exact pairs",
                "update": "Adam (paper)" if paper else "CG",
                "error": found.relative_error,
                "held-out error": relative_error(weights[layer], found.decode(), hidden[layer].H),
                "seconds": seconds,
                "rounds": len(found.history) - 2,
            }
        )
    _bench.show(f"{args.model} block {args.block}, {args.scheme}", rows)
    arguments = {**vars(args), "data": [Path(source).name for source in args.data or []]}  # not where they lie
    print(_bench.save("quantize_layer", rows, args.json, arguments=arguments))


if __name__ == "__main__":
    main()
