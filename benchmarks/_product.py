"""What matmul.py measures: products by shape and scheme; on a GPU also decoding to dense, and eager calls."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import _cold
import torch
from _upstream import Upstream
from torch import Tensor
from torch.nn.functional import linear

from aqlm_c import Format, QuantizedLinear, join_linears
from aqlm_c.nn import ops

SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
LARGEST_ERROR = {"float32": 1e-3, "float16": 2e-3, "bfloat16": 1e-2}
FEW = 16  # rows for which codes are looked up, not decoded
WARM = 3 << 19  # bytes of codes that stay in a CPU's cache, codebooks beside them

Weight = tuple[Tensor, Tensor, Tensor]
Row = dict[str, Any]


def quantized_weight(shape: tuple[int, int], format: Format, device: str) -> Weight:
    """A random one, as a loaded model has it."""
    codes, *rest = _cold.random_weight(*shape, *format_of(format), torch.float16, device)
    return ops.pack(codes) if ops.packs(codes) else codes, *rest


def format_of(format: Format) -> tuple[int, int, int]:
    return format.num_codebooks, format.nbits_per_codebook, format.in_group_size


def error(x: Tensor, weight: Weight) -> float:
    """|y - truth| / |truth| over about a thousand outputs, against float64."""
    codes, codebooks, scales = weight
    some = slice(None, None, max(1, len(codes) // 1024))
    truth = x.double() @ ops.decode_rows(codes[some], codebooks.float(), scales[some].float()).double().T
    return float((ops.matmul(x, *weight)[:, some].double() - truth).norm() / truth.norm())


class Bench:
    """`device`: of _cold.py. `dtypes`: names, of x for ours and of torch's dense product."""

    def __init__(self, device: Any, upstream: Upstream, dtypes: list[str], peers: list[str]) -> None:
        self.device, self.upstream, self.dtypes, self.peers = device, upstream, dtypes, peers
        self.bandwidth = device.bandwidth()  # GB/s
        self.peak = {name: device.peak(getattr(torch, name)) for name in dict.fromkeys([*dtypes, *peers])}  # TFLOP/s

    def rows_of(self, shape: tuple[int, int], plan: dict[str, list[int]]) -> tuple[list[Row], list[Row]]:
        """Products of one shape, and decoding it; `plan`: numbers of rows by scheme."""
        products, decoding = [], []
        inputs = {n: torch.randn(n, shape[1], device=self.device.name) for rows in plan.values() for n in rows}
        dense = {SHORT[name]: self.dense_times(shape, inputs, name) for name in self.peers}
        for scheme, n_rows in plan.items():
            format = Format.parse(scheme)
            first = quantized_weight(shape, format, self.device.name)
            copies = self.device.copies(sum(t.nbytes for t in first))
            weights = [first] + [quantized_weight(shape, format, self.device.name) for _ in range(copies - 1)]
            peers = dense | {"upstream": self.upstream.times(shape, format_of(format), n_rows)}
            about = {"shape": f"{shape[0]}x{shape[1]}", "scheme": scheme}
            to_dense = self.decoding(shape, weights) if self.device.name == "cuda" else {}
            if to_dense:
                decoding.append({**about, **to_dense})
            for n, dtype in ((n, dtype) for n in n_rows for dtype in self.dtypes):
                others = {peer: times[n][0] if n in times else None for peer, times in peers.items()}
                x = inputs[n].to(getattr(torch, dtype))
                row = self.product(x, dtype, weights, format, others, to_dense.get("ours ms"))
                products.append({**about, "rows": n, "dtype": dtype, **row})
        return products, decoding

    def dense_times(self, shape: tuple[int, int], inputs: dict[int, Tensor], name: str) -> dict[int, _cold.Timing]:
        """The times of torch's product with a dense weight, by rows."""
        dtype = getattr(torch, name)
        copies = self.device.copies(shape[0] * shape[1] * dtype.itemsize)
        weights = [torch.randn(shape, dtype=dtype, device=self.device.name) for _ in range(copies)]
        inputs = {n: x.to(dtype) for n, x in inputs.items()}
        return {n: self.device.time(lambda w, x=x: linear(x, w), weights) for n, x in inputs.items()}

    def product(
        self,
        x: Tensor,
        dtype: str,
        weights: list[Weight],
        format: Format,
        others: dict[str, float | None],
        to_dense: float | None,
    ) -> Row:
        """Milliseconds: `others`, by peer; `to_dense`, of decoding, which many rows on a GPU begin with."""
        wrong = error(x, weights[0])
        if not wrong <= LARGEST_ERROR[dtype]:
            limit = LARGEST_ERROR[dtype]
            raise SystemExit(
                f"{format.scheme}, x {tuple(x.shape)} {dtype}: error {wrong:.2g}, expected at most {limit}"
            )

        def call(weight: Weight) -> Tensor:
            return ops.matmul(x, *weight)

        ours = self.device.time(call, weights)
        operations, nbytes = 2 * x.numel() * len(weights[0][0]), sum(t.nbytes for t in weights[0])
        parts = {"reading codes": nbytes / self.bandwidth * 1e-6, "arithmetic": operations / self.peak[dtype] * 1e-9}
        if len(x) <= FEW:
            if self.device.name == "cpu":
                del parts["arithmetic"]  # is not what tables do
            parts |= self.without_reading(call, weights[0], format)
        elif to_dense:
            parts["decoding"] = to_dense
        most = max(parts, key=parts.get)
        return {
            "ours ms": ours.ms,
            "±%": ours.spread,
            **{f"{peer} ms": ms for peer, ms in others.items()},
            **{f"x {peer}": ms and ms / ours.ms for peer, ms in others.items()},
            "GB/s": nbytes / ours.ms * 1e-6,
            f"% of {self.device.moved}": 100 * nbytes / ours.ms * 1e-6 / self.bandwidth,
            "% of peak": 100 * operations / ours.ms * 1e-9 / self.peak[dtype],
            "bound": f"{most} {100 * parts[most] / ours.ms:.0f}%",
            "error": wrong,
            "parts ms": parts,
            "weight bytes": nbytes,
        }

    def without_reading(self, call: Callable[[Weight], Any], weight: Weight, format: Format) -> dict[str, float]:
        """Milliseconds of the same product with codes that are in the cache: scaled up from fewer outputs."""
        out, in_features = len(weight[0]), weight[0].shape[1] * format.in_group_size

        def warm(outs: int) -> float:
            return self.device.time(call, [quantized_weight((outs, in_features), format, self.device.name)] * 16).ms

        if out < 128:
            return {}
        gpu = self.device.name == "cuda"
        fits = int(self.device.cache) // 4 if gpu else WARM
        more = max(128, min(out, fits * out // weight[0].nbytes // 64 * 64))
        less = max(64, more // 256 * 64)
        more_ms, less_ms = warm(more), warm(less)
        each = max(0.0, (more_ms - less_ms) / (more - less))
        if gpu:  # outputs are spread over all of it: no time is that of one
            return {"lookups": more_ms + each * (out - more)}
        return {"lookups": each * out, "setup": more_ms - each * more}

    def decoding(self, shape: tuple[int, int], weights: list[Weight]) -> Row:
        moved = sum(t.nbytes for t in weights[0]) + shape[0] * shape[1] * weights[0][1].itemsize
        found = self.device.time(lambda w: ops.decode_rows(*w), weights[: self.device.copies(moved)], keep=True)
        rate = moved / found.ms * 1e-6
        return {"ours ms": found.ms, "±%": found.spread, "GB/s": rate, "% of copy": 100 * rate / self.bandwidth}


def gradient_rows(device: Any, shapes: list[tuple[int, int]], schemes: list[str], n_rows: list[int]) -> list[Row]:
    """Products with the weight and, as backward to x has them, with its transpose: cold fp16, beside torch's dense."""
    rows = []
    for shape in shapes:
        copies = device.copies(2 * shape[0] * shape[1])
        dense = [torch.randn(shape, device=device.name, dtype=torch.float16) for _ in range(copies)]
        weights = {s: [quantized_weight(shape, Format.parse(s), device.name)] for s in schemes}
        for scheme, some in weights.items():
            copies = device.copies(sum(t.nbytes for t in some[0]))
            some += [quantized_weight(shape, Format.parse(scheme), device.name) for _ in range(copies - 1)]
        for n in n_rows:
            x = torch.randn(n, shape[1], device=device.name, dtype=torch.float16)
            grad_y = torch.randn(n, shape[0], device=device.name, dtype=torch.float16)
            forward = device.time(lambda w, x=x: linear(x, w), dense).ms
            backward = device.time(lambda w, grad_y=grad_y: grad_y @ w, dense).ms
            for scheme, some in weights.items():
                ours = device.time(lambda w, x=x: ops.matmul(x, *w), some)
                to_x = device.time(lambda w, grad_y=grad_y: torch.ops.aqlm_c.matmul_backward(grad_y, *w), some)
                rows.append(
                    {
                        "shape": f"{shape[0]}x{shape[1]}",
                        "scheme": scheme,
                        "rows": n,
                        "forward ms": ours.ms,
                        "backward ms": to_x.ms,
                        "fp16 forward ms": forward,
                        "fp16 backward ms": backward,
                        "of fp16": (ours.ms + to_x.ms) / (forward + backward),
                    }
                )
    return rows


GROUPED = {  # outputs of weights with one input, by model
    "7B q, k, v": ([4096, 4096, 4096], 4096),
    "7B gate, up": ([11008, 11008], 4096),
    "70B q, k, v": ([8192, 1024, 1024], 8192),
    "70B gate, up": ([28672, 28672], 8192),
}


def grouped_rows(device: Any, schemes: list[str]) -> list[Row]:
    """One row by several weights, cold: in as few launches as can be, one by one, and torch's by all of them as one."""
    rows = []
    for name, (outs, in_features) in GROUPED.items():
        x = torch.randn(1, in_features, device=device.name, dtype=torch.float16)
        size, copies = (sum(outs), in_features), device.copies(2 * sum(outs) * in_features)
        whole = [torch.randn(size, device=device.name, dtype=torch.float16) for _ in range(copies)]
        dense = device.time(lambda w, x=x: linear(x, w), whole).ms
        del whole
        for scheme in schemes:
            format = Format.parse(scheme)

            def some(format=format, outs=outs, in_features=in_features) -> list[tuple[Any, ...]]:
                return [(*quantized_weight((out, in_features), format, device.name), None) for out in outs]

            first = some()
            nbytes = sum(t.nbytes for weight in first for t in weight[:3])
            groups = [first, *(some() for _ in range(device.copies(nbytes) - 1))]
            grouped = device.time(lambda group, x=x: ops.matmul_grouped(x, group), groups)
            apart = device.time(lambda group, x=x: [ops.matmul(x, *weight) for weight in group], groups)
            rows.append(
                {
                    "weights": name,
                    "scheme": scheme,
                    "joined ms": grouped.ms,
                    "±%": grouped.spread,
                    "x apart": apart.ms / grouped.ms,
                    "x fp16": dense / grouped.ms,
                    "GB/s": nbytes / grouped.ms * 1e-6,
                }
            )
    return rows


def call_rows(calls: int = 2000, repeats: int = 9) -> list[Row]:
    """Microseconds of an eager call from Python that does not wait for the GPU: one row, 4096x4096, 2x8g8."""
    format, dtype = Format.parse("2x8g8"), torch.float16
    dense = torch.nn.Linear(4096, 4096, bias=False, device="cuda", dtype=dtype).requires_grad_(False)
    weight = quantized_weight((4096, 4096), format, "cuda")

    def quantized() -> QuantizedLinear:
        layer = QuantizedLinear.empty(dense, format, dtype).to_empty(device="cuda")
        for parameter, tensor in zip(layer.parameters(), weight, strict=True):
            parameter.data = tensor
        return layer

    ours = quantized()

    class Attention(torch.nn.Module):
        def __init__(self, make: Callable[[], torch.nn.Module]) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = make(), make(), make()

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    attention = Attention(quantized)
    join_linears(attention)
    x = torch.randn(1, 4096, device="cuda", dtype=dtype)
    compared = {
        "op": (lambda x: linear(x, dense.weight), lambda x: ops.matmul(x, *weight)),
        "module": (dense, ours),
        "q, k, v": (Attention(lambda: dense), attention),
    }
    rows = []
    for what, pair in compared.items():
        for mode in ("no grad",) if what == "q, k, v" else ("inference", "grad", "grad to x"):
            given = x.clone().requires_grad_(mode == "grad to x")
            with torch.no_grad() if mode == "no grad" else torch.inference_mode(mode == "inference"):
                torchs, found = (call_timing(call, given, calls, repeats) for call in pair)
            us = {"torch us": 1e3 * torchs.ms, "ours us": 1e3 * found.ms}
            rows.append({"call": what, "mode": mode, **us, "±%": found.spread, "x torch": torchs.ms / found.ms})
    return rows


def call_timing(call: Callable[[Tensor], Any], x: Tensor, calls: int, repeats: int) -> _cold.Timing:
    times = []
    for _ in range(repeats):
        call(x)
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(calls):
            call(x)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begun) / calls * 1e3)
    return _cold.timing(times)
