"""Time of a mixture's block of experts beside the dense one, cold, as a CUDA graph.

    python benchmarks/experts.py --json benchmarks/results/experts.json

A block is gated units of all experts and the weighted sum of those that a router chose, at random here; the router is
not part of it. All calls of a timing are one graph, over copies in rotation that together exceed the cache (_cold.py),
each with a choice of its own. Ours may be replayed with another choice; the dense ones:

    looped     an expert at a time, for a choice that was known when the graph was captured: what no dense block
               beats whose choice is not, apart from launches
    grouped    torch's grouped product of bfloat16, rows sorted by expert on the device

Ours is verified against float64 first. `x dense`: times faster than the faster of both.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import _bench
import _cold
import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from aqlm_c import Format
from aqlm_c.nn import ops
from aqlm_c.nn.experts import ExpertStacks, Stack

SHAPES = {"Mixtral": (4096, 14336, 8, 2), "Qwen3-30B": (2048, 768, 128, 8)}  # hidden, width, experts, chosen
LARGEST_ERROR = 2e-3


class Choice(NamedTuple):
    index: Tensor  # [tokens, k]
    weights: Tensor
    rows: list[tuple[int, Tensor, Tensor]]  # of each expert that is chosen: which one, tokens, weights [rows, 1]


def chosen(tokens: int, experts: int, k: int, device: str) -> Choice:
    index = torch.stack([torch.randperm(experts)[:k] for _ in range(tokens)])
    weights = torch.rand(tokens, k).softmax(-1)
    rows = []
    for e in index.unique().tolist():
        token, place = torch.where(index == e)
        rows.append((e, token.to(device), weights[token, place, None].half().to(device)))
    return Choice(index.to(device), weights.half().to(device), rows)


def gated(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up


def looped(x: Tensor, gate_up: Tensor, down: Tensor, choice: Choice) -> Tensor:
    output = torch.zeros_like(x)
    for e, token, weight in choice.rows:
        output.index_add_(0, token, linear(gated(linear(x[token], gate_up[e])), down[e]) * weight)
    return output


def grouped(x: Tensor, gate_up: Tensor, down: Tensor, choice: Choice) -> Tensor:
    """As transformers has it."""
    k = choice.index.shape[1]
    order = choice.index.flatten().argsort()
    each = choice.index.flatten()[:, None] == torch.arange(len(down), device=x.device)
    ends = each.sum(0).cumsum(0).int()
    hidden = gated(torch._grouped_mm(x[order // k], gate_up.transpose(-2, -1), offs=ends))
    y = torch._grouped_mm(hidden, down.transpose(-2, -1), offs=ends) * choice.weights.flatten()[order, None].to(x.dtype)
    return torch.zeros_like(x).index_add_(0, order // k, y)


def random_stack(experts: int, out: int, in_features: int, format: Format, device: str) -> Stack:
    K, B, g = format.num_codebooks, format.nbits_per_codebook, format.in_group_size
    parts = [_cold.random_weight(out, in_features, K, B, g, torch.float16, device) for _ in range(experts)]
    codes, codebooks, scales = (torch.stack(tensors) for tensors in zip(*parts, strict=True))
    return Stack(codes, codebooks * (in_features * K) ** -0.5, scales)


def error(ours: ExpertStacks, x: Tensor, choice: Choice) -> float:
    """|y - truth| / |truth|, truth in float64."""
    truth = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for e, token, weight in choice.rows:
        gate, up, down = (
            ops.decode_rows(s.codes[e], s.codebooks[e].float(), s.scales[e].float()).double()
            for s in (ours.gate, ours.up, ours.down)
        )
        hidden = silu(x[token].double() @ gate.T) * (x[token].double() @ up.T)
        truth.index_add_(0, token, hidden @ down.T * weight.double())
    return float((ours(x, choice.weights, choice.index, gated).double() - truth).norm() / truth.norm())


def dense_times(device: Any, shape: tuple[int, int, int, int], tokens: list[int]) -> dict[tuple[str, int], float]:
    """Milliseconds, by peer and tokens."""
    hidden, width, experts, k = shape
    times = {}
    for name, peer, dtype in (("looped", looped, torch.float16), ("grouped", grouped, torch.bfloat16)):
        weights = [
            (
                torch.randn(experts, 2 * width, hidden, dtype=dtype, device=device.name) * hidden**-0.5,
                torch.randn(experts, hidden, width, dtype=dtype, device=device.name) * width**-0.5,
            )
            for _ in range(2)
        ]
        for n in tokens:
            x = torch.randn(n, hidden, dtype=dtype, device=device.name)
            blocks = [(*w, chosen(n, experts, k, device.name)) for w in weights * 2]
            times[name, n] = device.time(lambda block, x=x, peer=peer: peer(x, *block), blocks).ms
        del weights, blocks
    return times


def measure(device: Any, name: str, schemes: list[str], tokens: list[int]) -> list[dict[str, Any]]:
    hidden, width, experts, k = SHAPES[name]
    dense = dense_times(device, SHAPES[name], tokens)
    rows = []
    for scheme in schemes:
        format = Format.parse(scheme)

        def block(format: Format = format) -> ExpertStacks:
            sizes = ((width, hidden), (width, hidden), (hidden, width))
            return ExpertStacks(*(random_stack(experts, *size, format, device.name) for size in sizes))

        blocks = [block() for _ in range(2)]
        nbytes = sum(t.nbytes for stack in (blocks[0].gate, blocks[0].up, blocks[0].down) for t in stack)
        for n in tokens:
            x = torch.randn(n, hidden, device=device.name).half()
            choices = [chosen(n, experts, k, device.name) for _ in range(8)]
            wrong = error(blocks[0], x, choices[0])
            if not wrong <= LARGEST_ERROR:
                raise SystemExit(f"{name}, {scheme}, {n} tokens: error {wrong:.2g}, expected at most {LARGEST_ERROR}")
            calls = [(blocks[i % 2], choice) for i, choice in enumerate(choices)]
            found = device.time(lambda c, x=x: c[0](x, c[1].weights, c[1].index, gated), calls)
            peers = {peer: dense[peer, n] for peer in ("looped", "grouped")}
            used = nbytes * len(choices[0].rows) / experts
            rows.append(
                {
                    "block": name,
                    "scheme": scheme,
                    "tokens": n,
                    "ours ms": found.ms,
                    "±%": found.spread,
                    **{f"{peer} ms": ms for peer, ms in peers.items()},
                    "x dense": min(peers.values()) / found.ms,
                    "GB/s": used / found.ms * 1e-6,
                    "error": wrong,
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--schemes", nargs="+", default=["2x8g8"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--json")
    args = parser.parse_args()
    if not (torch.cuda.is_available() and ops.has_cuda):
        parser.error("expected a GPU that torch can use, and aqlm_c built with _cuda")
    torch.manual_seed(0)
    device = _cold.Gpu(cache=120e6, least=0.05)
    rows = []
    with torch.inference_mode():
        for name in args.blocks:
            rows += measure(device, name, args.schemes, args.tokens)
    _bench.show(f"experts of a mixture, {torch.cuda.get_device_name()}", rows)
    print(_bench.save("experts", rows, args.json, "cuda", arguments={"schemes": args.schemes, "tokens": args.tokens}))


if __name__ == "__main__":
    main()
