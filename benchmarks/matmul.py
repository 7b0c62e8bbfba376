"""Time of the product with a quantized weight beside torch's with the dense one, cold: weights take turns.

    python benchmarks/matmul.py --device cpu --core

--core: one row, 2x8g8 1x8g8 4x8g8 8x8g8 1x16g8 and the three shapes of the acceptance lines alone. Every timing is the
median over weights that together are larger than the cache. Ours is verified against float64 before it is timed.
"""

from __future__ import annotations

import argparse
import statistics
import time

import _bench
import torch

from aqlm_c import AqlmConfig, ops

CORE = [(4096, 4096), (11008, 4096), (4096, 11008)]
SMOLLM2 = [(576, 576), (192, 576), (1536, 576), (576, 1536)]
SHAPES = [*CORE, (8192, 8192), (28672, 8192), *SMOLLM2]
SCHEMES = ["1x16g8", "2x8g8", "1x8g8", "4x8g8", "8x8g8", "1x12g8", "3x8g8"]


def copies(nbytes, cache):
    """How many weights of this size are needed for none to be in the cache when its turn comes."""
    return int(max(2, min(200, -(-2 * cache // nbytes))))


def random_weight(out, in_features, config):
    half, dtype = 2 ** (config.nbits_per_codebook - 1), torch.int8 if config.nbits_per_codebook <= 8 else torch.int16
    size = (out, in_features // config.in_group_size, config.num_codebooks)
    codes = torch.randint(-half, half, size, dtype=dtype)
    codebooks = torch.randn(config.num_codebooks, 2 * half, 1, config.in_group_size).half()
    if ops.packs(codes):
        codes = ops.pack(codes)  # as a loaded model has them
    return codes, codebooks, (torch.rand(out, 1, 1, 1) + 0.5).half()


def median_ms(function, weights, least):
    """Milliseconds of function(weight), each weight in turn, for at least `least` seconds after one round."""
    seconds, started = [], time.perf_counter()
    while len(seconds) < 2 * len(weights) or time.perf_counter() - started < least:
        for weight in weights:
            begun = time.perf_counter()
            function(weight)
            seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[len(weights) :]) * 1e3


def read_bandwidth(cache):
    """GB/s at which all threads read: the sum of a buffer larger than the cache, the best of a few."""
    buffer, best = torch.ones(4 * cache // 4), float("inf")
    for _ in range(7):
        begun = time.perf_counter()
        buffer.sum()
        best = min(best, time.perf_counter() - begun)
    return buffer.numel() * 4 / best * 1e-9


def error(x, weight):
    """|y - truth| / |truth| over all outputs, against float64."""
    codes, codebooks, scales = weight
    truth = x.double() @ ops.decode_rows(codes, codebooks.float(), scales.float()).double().T
    return float((ops.matmul(x, *weight).double() - truth).norm() / truth.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu"])
    parser.add_argument("--core", action="store_true", help="the acceptance lines alone")
    parser.add_argument("--shapes", nargs="+", metavar="OUTxIN")
    parser.add_argument("--schemes", nargs="+")
    parser.add_argument("--rows", nargs="+", type=int)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="of x for ours")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa", help="the instruction set for ours")
    parser.add_argument("--cache", type=float, default=64.0, help="MB; weights that take turns fill twice as much")
    parser.add_argument("--seconds", type=float, default=0.2, help="least time for one median")
    parser.add_argument("--json")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    if args.isa:
        ops.set_isa(args.isa)
    cache = int(args.cache * 1e6)
    shapes = [tuple(map(int, s.split("x"))) for s in args.shapes or []] or (CORE if args.core else SHAPES)
    schemes = args.schemes or (["2x8g8", "1x8g8", "4x8g8", "8x8g8", "1x16g8"] if args.core else SCHEMES)
    n_rows = args.rows or ([1] if args.core else [1, 2, 4, 8, 16, 64, 512])
    bandwidth = read_bandwidth(cache)

    rows = []
    for out, in_features in shapes:
        inputs = {n: torch.randn(n, in_features) for n in n_rows}
        peer = {}
        for dtype in (torch.float32, torch.bfloat16):
            dense = [
                torch.randn(out, in_features, dtype=dtype)
                for _ in range(copies(out * in_features * dtype.itemsize, cache))
            ]
            for n, x in inputs.items():
                x = x.to(dtype)
                peer[n, dtype] = median_ms(lambda W, x=x: torch.nn.functional.linear(x, W), dense, args.seconds)
            del dense
        for scheme in schemes:
            config = AqlmConfig.from_scheme(scheme)
            first = random_weight(out, in_features, config)
            nbytes = sum(t.nbytes for t in first)
            weights = [first] + [random_weight(out, in_features, config) for _ in range(copies(nbytes, cache) - 1)]
            for n, name in ((n, d) for n in n_rows for d in args.dtypes):
                x = inputs[n].to(getattr(torch, name))
                wrong = error(x, first)
                if not wrong <= (1e-3 if name == "float32" else 1e-2):
                    raise SystemExit(f"{scheme} {out}x{in_features}: error {wrong:.2g}, expected at most 1e-3")
                ours = median_ms(lambda w, x=x: ops.matmul(x, *w), weights, args.seconds)
                rate = nbytes / ours * 1e-6
                rows.append(
                    {
                        "shape": f"{out}x{in_features}",
                        "scheme": scheme,
                        "rows": n,
                        "dtype": name,
                        "isa": ops.get_isa(),
                        "ours ms": ours,
                        "fp32 ms": peer[n, torch.float32],
                        "bf16 ms": peer[n, torch.bfloat16],
                        "x fp32": peer[n, torch.float32] / ours,
                        "x bf16": peer[n, torch.bfloat16] / ours,
                        "GB/s": rate,
                        "% of read": 100 * rate / bandwidth,
                        "error": wrong,
                    }
                )
            del weights
    _bench.show(f"product with a quantized weight, {args.threads} threads, read {bandwidth:.1f} GB/s", rows)
    print(_bench.save("matmul", rows, args.json, arguments=vars(args), read_bandwidth=bandwidth))


if __name__ == "__main__":
    main()
