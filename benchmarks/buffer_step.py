"""A step of Adam for buffers of PV-Tuning: ours, with moments of 32 and of 8 bits, beside torch's, foreach and fused.

    python benchmarks/buffer_step.py --device cuda --json

Columns: the root mean square of what two steps are off those in float64, over the learning rate (checked before
anything is timed); bytes that a step has to move for each weight (buffer and moments read and written, the gradient
read), GB/s of these, and their share of the bandwidth that was measured here (of a CPU: that of reading). Buffers in
rotation exceed the cache. torch's Adam takes gradients that are divided by the number of positions already.
"""

from __future__ import annotations

import argparse
from typing import Any

import _bench
import _cold
import _device
import torch
from torch import Tensor

from aqlm_c.core import verbs

RATE, BETAS, EPS = 1e-2, (0.5, 0.95), 1e-12
OURS = {"ours, float32": False, "ours, 8 bits": True}
BLOCK = 256


class Ours:
    """A buffer and its moments, after one step."""

    def __init__(self, buffer: Tensor, gradient: Tensor, small: bool, beta1: float) -> None:
        self.buffer, self.gradient, self.betas = buffer.clone(), gradient, (beta1, BETAS[1])
        kinds = (torch.int8, torch.uint8) if small else (torch.float32, torch.float32)
        first = torch.zeros_like(buffer, dtype=kinds[0]) if beta1 else None
        scales = buffer.new_zeros(2, -(-buffer.numel() // BLOCK)) if small else None
        self.moments = first, torch.zeros_like(buffer, dtype=kinds[1]), scales

    def step(self, number: int = 2) -> None:
        verbs.buffer_step(self.buffer, self.gradient, self.moments, 1.0, RATE, self.betas, number)

    def bytes(self) -> int:
        kept = [self.buffer, *(one for one in self.moments if one is not None)]
        return 2 * sum(one.nbytes for one in kept) + self.gradient.nbytes


class Torchs:
    """The same by torch.optim.Adam, which takes float32 gradients."""

    def __init__(self, buffer: Tensor, gradient: Tensor, fused: bool, beta1: float) -> None:
        self.buffer = torch.nn.Parameter(buffer.clone())
        self.buffer.grad = gradient.float()
        how = {"fused": True} if fused else {"foreach": True}
        on_gpu = buffer.device.type == "cuda"  # so that it can be recorded
        self.optimizer = torch.optim.Adam([self.buffer], RATE, (beta1, BETAS[1]), EPS, capturable=on_gpu, **how)

    def step(self, number: int = 2) -> None:
        self.optimizer.step()

    def bytes(self) -> int:
        return 3 * 2 * self.buffer.nbytes + self.buffer.grad.nbytes


def make(name: str, buffer: Tensor, gradient: Tensor, beta1: float) -> Ours | Torchs:
    if name in OURS:
        return Ours(buffer, gradient, OURS[name], beta1)
    return Torchs(buffer, gradient, name == "torch, fused", beta1)


def error(contender: Ours | Torchs, beta1: float) -> float:
    """What the first two steps are off those in float64, over the learning rate."""
    buffer, gradient = contender.buffer.detach().double(), contender.gradient if isinstance(contender, Ours) else None
    gradient = (contender.buffer.grad if gradient is None else gradient).double()  # type: ignore[union-attr]
    first = second = torch.zeros_like(buffer)
    for number in (1, 2):
        first = beta1 * first + (1 - beta1) * gradient
        second = BETAS[1] * second + (1 - BETAS[1]) * gradient.square()
        size = (second / (1 - BETAS[1] ** number)).sqrt() + EPS
        buffer = buffer - RATE * first / (1 - beta1**number) / size
        contender.step(number)
    return float((contender.buffer.detach() - buffer).square().mean().sqrt()) / RATE


def row_of(name: str, shape: tuple[int, int], bench: Any, args: argparse.Namespace, bandwidth: float) -> dict[str, Any]:
    generator = torch.Generator(args.device).manual_seed(0)
    buffer = torch.randn(shape, generator=generator, device=args.device)
    gradient = (1e-4 * torch.randn(shape, generator=generator, device=args.device)).to(getattr(torch, args.dtype))
    contender = make(name, buffer, gradient, args.beta1)
    off = error(contender, args.beta1)
    if not off < (0.05 if name == "ours, 8 bits" else 1e-3):
        raise SystemExit(f"{name}: got an error of {off:.3g} of the learning rate, expected less: not timed")
    nbytes = contender.bytes()
    rotation = [make(name, buffer, gradient.clone(), args.beta1) for _ in range(bench.copies(nbytes))]
    for one in rotation:
        one.step(1)
    found = bench.time(lambda one: one.step(), rotation)
    rate = nbytes / found.ms * 1e-6
    return {
        **{"shape": "x".join(map(str, shape)), "contender": name, "error": off, "ms": found.ms, "±%": found.spread},
        **{"bytes a weight": nbytes / buffer.numel(), "GB/s": rate, f"% of {bench.moved}": 100 * rate / bandwidth},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shape", nargs="+", default=["4096x4096", "14336x4096"], metavar="OUTxIN")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="of gradients, for ours")
    parser.add_argument("--beta1", type=float, default=BETAS[0])
    parser.add_argument("--cache", type=float, default=256e6, help="bytes that buffers in rotation exceed twice")
    parser.add_argument("--least", type=float, default=0.5, help="seconds for a median")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", nargs="?", const="", metavar="PATH", help="where to (default: benchmarks/results)")
    args = parser.parse_args()
    _device.check_device(parser, args.device)
    shapes = [_bench.shape(text) for text in args.shape]
    if None in shapes:
        parser.error(f"--shape: got {' '.join(args.shape)}, expected OUTxIN")
    bench = _cold.DEVICES[args.device](args.cache, args.least, args.threads)
    bandwidth = bench.bandwidth()
    names = [*OURS, "torch, foreach", "torch, fused"]
    rows = [row_of(name, shape, bench, args, bandwidth) for shape in shapes if shape for name in names]
    _bench.show(f"a step of Adam on {args.device}, {bench.moved} {bandwidth:.4g} GB/s", rows)
    if args.json is not None:
        arguments = {**vars(args), "json": None}
        path = _bench.save(
            f"buffer_step_{args.device}", rows, args.json, args.device, arguments=arguments, bandwidth=bandwidth
        )
        print(path)


if __name__ == "__main__":
    main()
