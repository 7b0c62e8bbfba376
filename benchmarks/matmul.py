"""Time of the product with a quantized weight beside torch's with the dense one and upstream's, cold.

    python benchmarks/matmul.py --device cpu --core --upstream /elsewhere/bin/python
    python benchmarks/matmul.py --device cuda --core

Every timing is the median over weights in rotation that together exceed the cache (_cold.py); on a GPU the calls
are one CUDA graph. Ours is verified against float64 before it is timed. --core: the rows, shapes and schemes that the
README shows. --upstream is the interpreter of an environment with torch, `aqlm`, numba and scipy (_upstream.py).
Writes JSON and, from it, a roofline plot. The columns:

    ±%         half the distance between the quartiles of the times
    x PEER     times faster than torch with a dense weight of that dtype, or than upstream with the same format
    GB/s       bytes of codes, codebooks and scales by the time, and its share of the bandwidth that was measured here
    % of peak  multiplications and additions of the dense product by the time, of those of a large dense product
    bound      the part that alone would take the largest share of the time: reading codes (the weight's bytes at that
               bandwidth); arithmetic (at the peak); decoding (to dense); lookups, and setup, tables above all: the
               product with codes in the cache, for every output and for none, scaled up where they do not fit
    error      |y - truth| / |truth|
"""

from __future__ import annotations

import argparse

import _bench
import _cold
import torch
from _product import SHORT, Bench, call_rows, gradient_rows, grouped_rows
from _roofline import plot
from _upstream import Upstream

from aqlm_c import Format
from aqlm_c.nn import ops

LLAMA_7B = [(4096, 4096), (11008, 4096), (4096, 11008)]
LLAMA_70B = [(8192, 8192), (28672, 8192), (8192, 28672)]
SMOLLM2 = [(576, 576), (192, 576), (1536, 576), (576, 1536)]
SCHEMES = ["1x16g8", "2x8g8", "1x8g8", "4x8g8", "8x8g8", "1x12g8", "3x8g8"]
SHAPES = {"cpu": [*LLAMA_7B, *LLAMA_70B[:2], *SMOLLM2], "cuda": [*LLAMA_7B, *LLAMA_70B, (1024, 8192)]}
ROWS = {"cpu": [1, 2, 4, 8, 16, 64, 512], "cuda": [2**i for i in range(13)]}
CORE_SHAPES = {"cpu": LLAMA_7B, "cuda": [*LLAMA_7B, *LLAMA_70B]}
CORE = {  # rows by scheme
    "cpu": {"2x8g8": [1, 16, 512], "1x8g8": [1, 16, 512], "4x8g8": [1], "8x8g8": [1], "1x16g8": [1, 16, 512]},
    "cuda": {"2x8g8": [1, 2, 4, 8], "1x8g8": [1], "4x8g8": [1], "8x8g8": [1], "1x16g8": [1]},
}
DTYPES = {"cpu": ["float32", "bfloat16"], "cuda": ["float16"]}  # of ours and of torch's product
CACHE = {"cpu": 64.0, "cuda": 120.0}  # MB
SECONDS = {"cpu": 0.2, "cuda": 0.05}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=list(_cold.DEVICES))
    parser.add_argument("--core", action="store_true", help="what the README shows, in a few minutes")
    parser.add_argument("--shapes", nargs="+", metavar="OUTxIN")
    parser.add_argument("--schemes", nargs="+")
    parser.add_argument("--rows", nargs="+", type=int)
    parser.add_argument("--gradient-rows", nargs="*", type=int, default=[2048], help="of backward to x, on a GPU")
    parser.add_argument("--dtypes", nargs="+", choices=list(SHORT), help="of x for ours")
    parser.add_argument(
        "--upstream", metavar="PYTHON", help="interpreter that can import aqlm (default: this one if it can)"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa", help="the instruction set for ours")
    parser.add_argument("--cache", type=float, help="MB; the weights in rotation fill twice as much")
    parser.add_argument("--seconds", type=float, help="least time for one median")
    parser.add_argument("--json")
    args = parser.parse_args()
    if args.device == "cuda" and not (torch.cuda.is_available() and ops.has_cuda):
        parser.error("--device: got cuda, expected a GPU that torch can use, and aqlm_c built with _cuda")
    try:
        given = [tuple(map(int, shape.split("x"))) for shape in args.shapes or []]
        assert all(len(shape) == 2 for shape in given)
    except (ValueError, AssertionError):
        parser.error(f"--shapes: got {' '.join(args.shapes)}, expected OUTxIN, such as 4096x4096")
    try:
        for scheme in args.schemes or []:
            Format.parse(scheme)
    except ValueError as error:
        parser.error(str(error))
    args.shapes = given or (CORE_SHAPES if args.core else SHAPES)[args.device]
    args.dtypes = args.dtypes or DTYPES[args.device]
    args.cache = args.cache or CACHE[args.device]
    args.seconds = SECONDS[args.device] if args.seconds is None else args.seconds
    return args


def main() -> None:
    args = arguments()
    torch.manual_seed(0)
    if args.isa:
        ops.set_isa(args.isa)
    core = CORE[args.device]
    schemes = args.schemes or (list(core) if args.core else SCHEMES)
    plan = {s: args.rows or (core.get(s, [1]) if args.core else ROWS[args.device]) for s in schemes}
    timer = {"cache": args.cache * 1e6, "least": args.seconds, "threads": args.threads}
    upstream = Upstream(args.upstream, device=args.device, **timer)
    products, decoding, gradients, grouped, calls = [], [], [], [], []
    with torch.inference_mode():
        bench = Bench(_cold.DEVICES[args.device](**timer), upstream, args.dtypes, DTYPES[args.device])
        for shape in args.shapes:
            more = bench.rows_of(shape, plan)
            products += more[0]
            decoding += more[1]
        if args.device == "cuda":
            gradients = gradient_rows(bench.device, args.shapes, schemes, args.gradient_rows)
            grouped = grouped_rows(bench.device, [s for s in schemes if Format.parse(s).nbits_per_codebook <= 8])
    upstream.close()
    if args.device == "cuda":
        calls = call_rows()

    on = torch.cuda.get_device_name() if args.device == "cuda" else f"{args.threads} threads, {ops.get_isa()}"
    peak = ", ".join(f"{SHORT[name]} {tera:.3g} TFLOP/s" for name, tera in bench.peak.items())
    title = f"product with a quantized weight, {on}: {bench.device.moved} {bench.bandwidth:.4g} GB/s, {peak}"
    peers = [name.removeprefix("x ") for name in products[0] if name.startswith("x ")]
    _bench.show(title, products, hidden={"parts ms", "weight bytes", *(f"{peer} ms" for peer in peers)})
    tables = {
        "decoding to dense": decoding,
        "forward and backward to x": gradients,
        "one row by several weights": grouped,
        "eager calls, 4096x4096, one row": calls,
    }
    for name, rows in tables.items():
        if rows:
            _bench.show(name, rows)
    print(f"\ntimes faster than {', '.join(peers)}:\n")
    print(_bench.pivot(products, ["rows", "scheme", "dtype"], "shape", [f"x {peer}" for peer in peers]))
    written = _bench.save(
        "matmul_cuda" if args.device == "cuda" else "matmul",
        products,
        args.json,
        args.device,
        arguments={name: value for name, value in vars(args).items() if name not in ("json", "upstream")},  # no paths
        isa=ops.get_isa(),
        bandwidth=bench.bandwidth,
        peak=bench.peak,
        decode_rows=decoding,
        gradients=gradients,
        joined=grouped,
        eager_calls=calls,
    )
    print(written)
    print(plot(written))


if __name__ == "__main__":
    main()
