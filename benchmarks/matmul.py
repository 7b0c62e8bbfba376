"""Time of the product with a quantized weight beside torch's with the dense one and upstream's, cold.

    python benchmarks/matmul.py --device cpu --core --upstream /elsewhere/bin/python
    python benchmarks/matmul.py --device cuda --core

Every timing is the median over weights that take turns and together exceed the cache (_cold.py); on a GPU the calls
are one CUDA graph. Ours is verified against float64 before it is timed. --core: the rows, shapes and schemes that the
README shows. --upstream is the interpreter of an environment with torch, `aqlm`, numba and scipy (_upstream.py).
Writes JSON and, from it, a roofline plot. The columns:

    ±%         half the distance between the quartiles of the times
    x PEER     times faster than torch with a dense weight of that dtype, or than upstream with the same format
    GB/s       bytes of codes, codebooks and scales by the time, and its share of the bandwidth that was measured here
    % of peak  multiplications and additions of the dense product by the time, of those of a large dense product
    bound      the part that alone would take the largest share of the time: reading codes (the weight's bytes at that
               bandwidth); arithmetic (at the peak); lookups, and setup, tables above all (CPU: the product with codes
               in the cache, for every output and for none; GPU: lookups are that whole product, in pieces that fit)
    error      |y - truth| / |truth|
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import _bench
import _cold
import torch
from _roofline import plot
from _upstream import Upstream

from aqlm_c import AqlmConfig, QuantizedLinear, ops

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
DTYPES = {"cpu": ["float32", "bfloat16"], "cuda": ["float16"]}  # ours and the dense peers
SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
LARGEST_ERROR = {"float32": 1e-3, "float16": 2e-3, "bfloat16": 1e-2}
FEW = 16  # rows
WARM = 3 << 19  # bytes of codes that stay in the cache, codebooks beside them
CACHE = {"cpu": 64.0, "cuda": 120.0}  # MB

Weight = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def quantized_weight(out: int, in_features: int, config: AqlmConfig, device: str) -> Weight:
    """A random one, as a loaded model has it."""
    fmt = config.num_codebooks, config.nbits_per_codebook, config.in_group_size
    codes, codebooks, scales = _cold.random_weight(out, in_features, *fmt, torch.float16, device)
    return ops.pack(codes) if ops.packs(codes) else codes, codebooks, scales


def error(x: torch.Tensor, weight: Weight) -> float:
    """|y - truth| / |truth| over all outputs, against float64."""
    codes, codebooks, scales = weight
    truth = x.double() @ ops.decode_rows(codes, codebooks.float(), scales.float()).double().T
    return float((ops.matmul(x, *weight).double() - truth).norm() / truth.norm())


class Ceilings:
    """What this machine reaches: GB/s, and TFLOP/s by dtype."""

    def __init__(self, device: Any, dtypes: list[str]) -> None:
        self.bandwidth = device.bandwidth()
        self.peak = {dtype: device.peak(dtype) for dtype in (getattr(torch, name) for name in dtypes)}


def parts(
    device: Any, ceilings: Ceilings, call: Callable[[Weight], Any], weight: Weight, config: AqlmConfig, x: torch.Tensor
) -> dict[str, float]:
    """Milliseconds that parts of call(weight), a product with x, would take by themselves."""
    nbytes, out, (n, in_features) = sum(t.nbytes for t in weight), len(weight[0]), x.shape
    found = {"reading codes": nbytes / ceilings.bandwidth * 1e-6}
    few = n <= FEW  # codes are looked up, else decoded
    if device.name == "cuda" or not few:
        found["arithmetic"] = 2 * n * out * in_features / ceilings.peak[x.dtype] * 1e-9
    if device.name == "cuda" and few:
        pieces = -(-4 * nbytes // int(device.cache))  # of its outputs, to fit the cache twice
        piece = quantized_weight(out // pieces, in_features, config, "cuda")
        found["lookups"] = device.time(call, [piece] * 16).ms * pieces
    if device.name == "cpu" and few and out >= 128:
        more = max(128, min(out, WARM * out // weight[0].nbytes // 64 * 64))
        less = max(64, more // 256 * 64)
        more_ms, less_ms = (
            device.time(call, [quantized_weight(outs, in_features, config, "cpu")]).ms for outs in (more, less)
        )
        each = (more_ms - less_ms) / (more - less)
        found |= {"lookups": each * out, "setup": more_ms - each * more}
    return found


def product_rows(
    args: argparse.Namespace, device: Any, ceilings: Ceilings, upstream: Upstream, plan: dict[str, list[int]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of products and, on a GPU, those of decoding, for every shape and scheme."""
    products, decoding = [], []
    for shape in args.shapes:
        out, in_features = shape
        inputs = {
            n: torch.randn(n, in_features, device=device.name) for n in {n for rows in plan.values() for n in rows}
        }
        dense = {name: dense_times(device, shape, inputs, name) for name in args.peers}
        for scheme, n_rows in plan.items():
            config = AqlmConfig.from_scheme(scheme)
            first = quantized_weight(out, in_features, config, device.name)
            nbytes = sum(t.nbytes for t in first)
            more = range(device.copies(nbytes) - 1)
            weights = [first] + [quantized_weight(out, in_features, config, device.name) for _ in more]
            fmt = config.num_codebooks, config.nbits_per_codebook, config.in_group_size
            theirs = upstream.times(shape, fmt, n_rows)
            about = {"shape": f"{out}x{in_features}", "scheme": scheme}
            for n, name in ((n, name) for n in n_rows for name in args.dtypes):
                x = inputs[n].to(getattr(torch, name))
                wrong = error(x, first)
                if not wrong <= LARGEST_ERROR[name]:
                    raise SystemExit(f"{about}: error {wrong:.2g} of {name}, expected at most {LARGEST_ERROR[name]}")
                call = lambda w, x=x: ops.matmul(x, *w)  # noqa: E731
                ours = device.time(call, weights)
                alone = parts(device, ceilings, call, first, config, x)
                most = max(alone, key=alone.get)
                peers = {SHORT[peer]: times[n] for peer, times in dense.items()} | {"upstream": theirs.get(n)}
                work = 2e-9 * n * out * in_features / ours.ms
                products.append(
                    {
                        **about,
                        "rows": n,
                        "dtype": name,
                        "ours ms": ours.ms,
                        "±%": ours.spread,
                        **{f"{peer} ms": times and times[0] for peer, times in peers.items()},
                        **{f"x {peer}": times and times[0] / ours.ms for peer, times in peers.items()},
                        "GB/s": nbytes / ours.ms * 1e-6,
                        f"% of {device.moved}": 100 * nbytes / ours.ms * 1e-6 / ceilings.bandwidth,
                        "% of peak": 100 * work / ceilings.peak[x.dtype],
                        "bound": f"{most} {100 * alone[most] / ours.ms:.0f}%",
                        "error": wrong,
                        "parts ms": alone,
                        "weight bytes": nbytes,
                    }
                )
            if device.name == "cuda":
                moved = nbytes + 2 * out * in_features
                found = device.time(lambda w: ops.decode_rows(*w), weights[: device.copies(moved)], keep=True)
                decoding.append(
                    {
                        **about,
                        "ours ms": found.ms,
                        "±%": found.spread,
                        "GB/s": moved / found.ms * 1e-6,
                        "% of copy": 100 * moved / found.ms * 1e-6 / ceilings.bandwidth,
                    }
                )
            del weights
    return products, decoding


def dense_times(device: Any, shape: tuple[int, int], inputs: dict[int, torch.Tensor], name: str) -> dict[int, Any]:
    """The times of torch's product with a dense weight, by rows."""
    dtype = getattr(torch, name)
    n_weights = device.copies(shape[0] * shape[1] * dtype.itemsize)
    weights = [torch.randn(shape, dtype=dtype, device=device.name) for _ in range(n_weights)]
    linear = torch.nn.functional.linear
    inputs = {n: x.to(dtype) for n, x in inputs.items()}
    return {n: device.time(lambda w, x=x: linear(x, w), weights) for n, x in inputs.items()}


def call_rows(calls: int = 2000) -> list[dict[str, Any]]:
    """Microseconds of an eager call from Python, without waiting for the GPU: one row, 4096x4096, 2x8g8."""
    import time

    config, dtype = AqlmConfig.from_scheme("2x8g8"), torch.float16
    dense = torch.nn.Linear(4096, 4096, bias=False, device="cuda", dtype=dtype).requires_grad_(False)
    ours = QuantizedLinear.empty(dense, config, dtype).to_empty(device="cuda")
    for parameter, tensor in zip(ours.parameters(), quantized_weight(4096, 4096, config, "cuda"), strict=True):
        parameter.data = tensor
    x, weight = torch.randn(1, 4096, device="cuda", dtype=dtype), tuple(ours.parameters())
    compared = {
        "op": (lambda x: torch.nn.functional.linear(x, dense.weight), lambda x: ops.matmul(x, *weight)),
        "module": (dense, ours),
    }
    rows = []
    for what, pair in compared.items():
        for mode in ("inference", "grad", "grad to x"):
            given = x.clone().requires_grad_(mode == "grad to x")
            medians = []
            for call in pair:
                times = []
                for _ in range(9):
                    with torch.inference_mode(mode == "inference"):
                        call(given)
                        torch.cuda.synchronize()
                        begun = time.perf_counter()
                        for _ in range(calls):
                            call(given)
                        torch.cuda.synchronize()
                        times.append((time.perf_counter() - begun) / calls * 1e3)
                medians.append(_cold.timing(times))
            torch_s, ours_s = medians
            rows.append(
                {
                    "call": what,
                    "mode": mode,
                    "torch us": 1e3 * torch_s.ms,
                    "ours us": 1e3 * ours_s.ms,
                    "±%": ours_s.spread,
                    "x torch": torch_s.ms / ours_s.ms,
                }
            )
    return rows


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=list(_cold.DEVICES))
    parser.add_argument("--core", action="store_true", help="what the README shows, in a few minutes")
    parser.add_argument("--shapes", nargs="+", metavar="OUTxIN")
    parser.add_argument("--schemes", nargs="+")
    parser.add_argument("--rows", nargs="+", type=int)
    parser.add_argument("--dtypes", nargs="+", choices=list(SHORT), help="of x for ours")
    parser.add_argument(
        "--upstream", metavar="PYTHON", help="interpreter that can import aqlm (default: this one if it can)"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa", help="the instruction set for ours")
    parser.add_argument("--cache", type=float, help="MB; weights that take turns fill twice as much")
    parser.add_argument("--seconds", type=float, help="least time for one median (default 0.2, GPU 0.05)")
    parser.add_argument("--json")
    args = parser.parse_args()
    if args.device == "cuda" and not (torch.cuda.is_available() and ops.has_cuda):
        parser.error("--device=cuda: expected a GPU that torch can use, and aqlm_c built with _cuda")
    try:
        given = [tuple(map(int, shape.split("x"))) for shape in args.shapes or []]
        assert all(len(shape) == 2 for shape in given)
    except (ValueError, AssertionError):
        parser.error(f"--shapes: got {' '.join(args.shapes)}, expected OUTxIN, such as 4096x4096")
    try:
        for scheme in args.schemes or []:
            AqlmConfig.from_scheme(scheme)
    except ValueError as error:
        parser.error(str(error))
    args.shapes = given or (CORE_SHAPES if args.core else SHAPES)[args.device]
    args.peers = DTYPES[args.device]
    args.dtypes = args.dtypes or args.peers
    args.cache = args.cache or CACHE[args.device]
    args.seconds = {"cpu": 0.2, "cuda": 0.05}[args.device] if args.seconds is None else args.seconds
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
    device = _cold.DEVICES[args.device](**timer)
    upstream = Upstream(args.upstream, device=args.device, **timer)
    with torch.inference_mode():
        ceilings = Ceilings(device, list(dict.fromkeys([*args.dtypes, *args.peers])))
        products, decoding = product_rows(args, device, ceilings, upstream, plan)
    upstream.close()
    calls = call_rows() if args.device == "cuda" else []

    on = f"{torch.cuda.get_device_name()}" if args.device == "cuda" else f"{args.threads} threads, {ops.get_isa()}"
    peak = {str(dtype).removeprefix("torch."): tera for dtype, tera in ceilings.peak.items()}
    arithmetic = ", ".join(f"{SHORT[name]} {tera:.3g} TFLOP/s" for name, tera in peak.items())
    title = f"product with a quantized weight, {on}: {device.moved} {ceilings.bandwidth:.4g} GB/s, {arithmetic}"
    peers = [name.removeprefix("x ") for name in products[0] if name.startswith("x ")]
    _bench.show(title, products, hidden={"parts ms", "weight bytes", *(f"{peer} ms" for peer in peers)})
    for name, rows in (("decoding to dense", decoding), ("eager calls, 4096x4096, one row", calls)):
        if rows:
            _bench.show(name, rows)
    print(f"\ntimes faster than {', '.join(peers)}:\n")
    print(_bench.pivot(products, ["rows", "scheme", "dtype"], "shape", [f"x {peer}" for peer in peers]))
    said = {k: v for k, v in vars(args).items() if k not in ("json", "upstream", "peers")}  # not where files lie
    written = _bench.save(
        "matmul_cuda" if args.device == "cuda" else "matmul",
        products,
        args.json,
        args.device,
        arguments=said,
        isa=ops.get_isa(),
        bandwidth=ceilings.bandwidth,
        peak=peak,
        decode_rows=decoding,
        eager_calls=calls,
    )
    print(written)
    print(plot(written))


if __name__ == "__main__":
    main()
