"""Times of a product with cold weights, on either device: weights in rotation that together exceed the cache.

Needs torch alone, so that another package can be timed in the same way (_upstream.py).
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch


class Timing(NamedTuple):
    ms: float  # the median
    spread: float  # half the distance between the quartiles, in % of the median


def timing(ms: Sequence[float]) -> Timing:
    low, median, high = statistics.quantiles(ms, n=4)
    return Timing(median, 50 * (high - low) / median)


class Cpu:
    name, moved = "cpu", "read"

    def __init__(self, cache: float, least: float, threads: int) -> None:
        """`cache`: bytes; the weights in rotation fill twice as much. `least`: seconds for one median."""
        self.cache, self.least = cache, least
        torch.set_num_threads(threads)

    def copies(self, nbytes: int) -> int:
        """How many weights of this size are needed for none to be in the cache when it is used again."""
        return int(max(2, min(4096, -(-2 * self.cache // nbytes))))

    def time(self, call: Callable[[Any], Any], weights: Sequence[Any], keep: bool = False) -> Timing:
        """The time of call(weight). `keep`: results are written to new memory every time (a GPU's cache)."""
        rotation, times = itertools.cycle(weights), []
        for weight in itertools.islice(rotation, 2):
            call(weight)
        started = time.perf_counter()
        while len(times) < 4 or time.perf_counter() - started < self.least:
            weight = next(rotation)
            begun = time.perf_counter()
            call(weight)
            times.append((time.perf_counter() - begun) * 1e3)
        return timing(times)

    def bandwidth(self) -> float:
        """GB/s at which all threads read buffers larger than the cache: the best of a few methods and tries."""
        buffers = torch.ones(2, int(self.cache // 4))
        seconds = [
            self.seconds(lambda: torch.sum(buffers)),
            self.seconds(lambda: torch.amax(buffers)),
            self.seconds(lambda: torch.dot(*buffers)),
        ]
        return buffers.nbytes / min(seconds) * 1e-9

    def peak(self, dtype: torch.dtype) -> float:
        """TFLOP/s of torch's product of large matrices."""
        a, b = torch.randn(2, 1536, 1536, dtype=dtype)
        return 2 * 1536**3 / self.seconds(lambda: torch.nn.functional.linear(a, b)) * 1e-12

    def seconds(self, call: Callable[[], Any]) -> float:
        """The best of a few."""
        times = []
        for _ in range(7):
            begun = time.perf_counter()
            call()
            times.append(time.perf_counter() - begun)
        return min(times[1:])


class Gpu:
    """Calls of all weights are one CUDA graph, replayed: no time between launches is the processor's."""

    name, moved = "cuda", "copy"

    def __init__(self, cache: float, least: float, threads: int = 1) -> None:
        self.cache, self.least = cache, least

    copies = Cpu.copies

    def time(self, call: Callable[[Any], Any], weights: Sequence[Any], keep: bool = False) -> Timing:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for weight in weights[:2]:
                call(weight)
        torch.cuda.current_stream().wait_stream(side)
        graph, results = torch.cuda.CUDAGraph(), []
        with torch.cuda.graph(graph):
            for weight in weights:
                results.append(call(weight))
                if not keep:
                    results.clear()
        few = self.replay(graph, 3, 1)
        rounds = max(1, round(1.0 / min(few)))  # between two events, a millisecond at least
        repeats = max(7, min(200, round(self.least * 1e3 / (min(few) * rounds))))
        return timing([ms / len(weights) for ms in self.replay(graph, repeats, rounds)])

    @staticmethod
    def replay(graph: torch.cuda.CUDAGraph, repeats: int, rounds: int) -> list[float]:
        """Milliseconds of the graph, `repeats` times the mean of `rounds`."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        graph.replay()
        for event in events:
            event.record()
            if event is not events[-1]:
                for _ in range(rounds):
                    graph.replay()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / rounds for a, b in itertools.pairwise(events)]

    def bandwidth(self) -> float:
        """GB/s of a large copy, bytes read and bytes written: by the driver or by a kernel, whichever is faster."""
        source = torch.randn(1 << 28, device="cuda")
        target = torch.empty_like(source)
        copies = (target.copy_, lambda s: torch.neg(s, out=target))
        return 2 * source.nbytes / min(self.time(copy, [source]).ms for copy in copies) * 1e-6

    def peak(self, dtype: torch.dtype) -> float:
        a, b = torch.randn(2, 8192, 8192, device="cuda").to(dtype)
        return 2 * 8192**3 / self.time(lambda w: torch.nn.functional.linear(a, w), [b]).ms * 1e-9


DEVICES = {"cpu": Cpu, "cuda": Gpu}


def random_weight(
    out: int, in_features: int, K: int, B: int, g: int, dtype: torch.dtype, device: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, codebooks and scales as a checkpoint has them."""
    half, stored = 2 ** (B - 1), torch.int8 if B <= 8 else torch.int16
    codes = torch.randint(-half, half, (out, in_features // g, K), dtype=stored, device=device)
    codebooks = torch.randn(K, 2 * half, 1, g, device=device)
    scales = torch.rand(out, 1, 1, 1, device=device) + 0.5
    return codes, codebooks.to(dtype), scales.to(dtype)
