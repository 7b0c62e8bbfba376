"""Every method on layers of one block of a model, or on a synthetic one: error, true bits, time.

    python benchmarks/methods.py --data wikipedia.txt --data c4.txt
    python benchmarks/methods.py --synthetic 1024x1024

Errors are tr(D H D^T) / tr(W H W^T) under H of the first --samples windows of each text in the unquantized model, and
under H of the next as many. Without --data the text is Python's bundled documentation. "aqlm, rotated" is AQLM of the
weight after the random Hadamard transforms of QuIP#, whose signs count.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import _bench
import numpy as np
import torch
from quantize_layer import hessians, relative_error, synthetic

from aqlm_c import AqlmConfig
from aqlm_c.core.hessian import Hessian
from aqlm_c.format import Format
from aqlm_c.hf.models import load_model
from aqlm_c.io.data import BUNDLED, token_stream
from aqlm_c.methods import get_method
from aqlm_c.methods.incoherence import RandomHadamard, rotated, rotated_back, rotated_hessian
from aqlm_c.weights import quantize_weight

ROTATED = "aqlm, rotated"
OPTIONS: dict[str, dict[str, Any]] = {"rtn": {"group_size": 64}, ROTATED: {"method": "aqlm"}}
AQLM = ("2x8g8", "3x8g8", "4x8g8")
SCHEMES = {
    **dict.fromkeys(("rtn", "gptq", "quip", "quip_sharp", "additive", "aqlm_paper", "aqlm", ROTATED), AQLM),
    "kmeans": ("1x8g4", "1x12g4"),
    "product": ("2x8g8", "4x6g8", "4x8g8"),
}


def quantized(weight: np.ndarray, H: np.ndarray, method: str, scheme: str) -> tuple[np.ndarray, float, float]:
    """What a weight [out, in] decodes to, true bits per weight, and seconds from an H of which nothing is known yet."""
    config = AqlmConfig.from_scheme(scheme, **{"method": method, **OPTIONS.get(method, {})})
    started, hessian, (out, n) = time.perf_counter(), Hessian(H), weight.shape
    bits = get_method(config.solver).bits_per_weight(config.format, (out, n), config.options)
    if method != ROTATED:
        return quantize_weight(weight, hessian, config, dtype="bfloat16").decode(), bits, time.perf_counter() - started
    inputs, outputs = RandomHadamard(n, 0, 0), RandomHadamard(out, 0, 1)
    turned = quantize_weight(
        rotated(weight, inputs, outputs), rotated_hessian(hessian, inputs), config, dtype="bfloat16"
    )
    decoded = rotated_back(turned.decode(), inputs, outputs)
    return decoded, bits + (out + n) / (out * n), time.perf_counter() - started


def layers_of(args: argparse.Namespace) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
    """Weight, H and H of other text, by layer."""
    if args.synthetic:
        shape = _bench.shape(args.synthetic)
        assert shape is not None, "checked before"
        weight, H = synthetic(shape, 0, "cpu")
        return {f"synthetic {args.synthetic}": (np.asarray(weight), np.asarray(H), None)}
    model, tokenizer, _ = load_model(args.model)
    n, length, windows = args.samples, args.sequence_length, []
    for text in args.data or [BUNDLED]:
        windows.append(token_stream(text, tokenizer, 2 * n * length)[: 2 * n * length].view(2 * n, length))
    seen, held_out = (torch.cat([text[part] for text in windows]) for part in (slice(n), slice(n, None)))
    weights, shown = hessians(model, seen, args.block, args.layers)
    _, hidden = hessians(model, held_out, args.block, args.layers)
    return {name: (weights[name], shown[name].H, hidden[name].H) for name in args.layers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--block", type=int, default=10)
    parser.add_argument("--layers", nargs="+", default=["self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj"])
    parser.add_argument("--data", action="append")
    parser.add_argument("--samples", type=int, default=16, help="windows of each text")
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--synthetic", metavar="OUTxIN")
    parser.add_argument("--methods", nargs="+", default=list(SCHEMES), choices=list(SCHEMES))
    parser.add_argument("--bits", type=float, nargs="+", default=[2, 3, 4], help="of the codes")
    parser.add_argument("--json", nargs="?", const="", metavar="PATH", help="where to (default: benchmarks/results)")
    args = parser.parse_args()
    if args.synthetic and not _bench.shape(args.synthetic):
        parser.error(f"--synthetic: got {args.synthetic}, expected OUTxIN, such as 1024x1024")
    rows: list[dict[str, Any]] = []
    for name, (weight, H, other) in layers_of(args).items():
        for method, scheme in ((m, s) for m in args.methods for s in SCHEMES[m]):
            if Format.parse(scheme).code_bits_per_weight() not in args.bits:
                continue
            decoded, bits, seconds = quantized(weight, H, method, scheme)
            held_out = None if other is None else relative_error(weight, decoded, other)
            row = {"layer": name, "method": method, "scheme": scheme, "bits": bits}
            rows.append(
                {**row, "error": relative_error(weight, decoded, H), "held-out error": held_out, "seconds": seconds}
            )
            print(" ".join(map(_bench.text, rows[-1].values())), flush=True)
    _bench.show(f"block {args.block} of {args.model}" if not args.synthetic else args.synthetic, rows)
    if args.json is not None:
        arguments = {**vars(args), "data": [Path(source).name for source in args.data or []]}  # not where they lie
        print(_bench.save("methods", rows, args.json, arguments=arguments))


if __name__ == "__main__":
    main()
