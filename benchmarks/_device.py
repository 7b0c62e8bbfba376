"""What benchmarks of the quantizer measure on either device: peak memory, phases to their end, the kernels' share."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from aqlm_c.files import peak_memory
from aqlm_c.methods.state import SolverState


def check_device(parser: argparse.ArgumentParser, device: str) -> None:
    """End with one line if there is no such device."""
    from aqlm_c.nn import ops

    if device == "cuda" and not (torch.cuda.is_available() and ops.has_cuda):
        parser.error("--device: got cuda, expected a GPU that torch can use, and aqlm_c built with _cuda")


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


@contextlib.contextmanager
def synchronized(device: str) -> Iterator[None]:
    """Every phase of a method is timed to its end on the device; in all that takes a little longer."""
    timed = SolverState.timed

    def to_the_end(self: SolverState, step: str, function: Callable[..., Any], *args: object) -> Any:
        def call() -> Any:
            result = function(*args)
            wait(device)
            return result

        return timed(self, step, call)

    SolverState.timed = to_the_end  # type: ignore[method-assign]
    try:
        yield
    finally:
        SolverState.timed = timed  # type: ignore[method-assign]


class Peak:
    """Most memory held since it was made: of the process, where Linux lets that be reset, and of the device."""

    def __init__(self, device: str) -> None:
        self.device, self.reset = device, True
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self.reset = False

    def gigabytes(self) -> dict[str, float | None]:
        host = float(peak_memory())
        if self.reset:
            status = Path("/proc/self/status").read_text().splitlines()
            host = 1024.0 * int(next(line for line in status if line.startswith("VmHWM")).split()[1])
        device = torch.cuda.max_memory_allocated() * 1e-9 if self.device == "cuda" else None
        return {"host GB": host * 1e-9, "device GB": device}


def kernel_intervals(events: Any) -> list[tuple[float, float, str]]:
    """(start, end, name), microseconds, of the kernels among a profile's events; neither copies nor annotations."""
    return sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in events
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not getattr(event, "is_user_annotation", False)
        and not event.name.startswith(("Memcpy", "Memset"))
    )


def covered(intervals: list[tuple[float, float, str]]) -> float:
    """Microseconds in which at least one kernel ran."""
    total, until = 0.0, float("-inf")
    for start, end, _ in intervals:
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


class KernelTime:
    """Kernels of a piece of a run, by torch's profiler; `started` and `stopped` around it."""

    def __init__(self) -> None:
        self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])

    def start(self) -> None:
        wait("cuda")
        self.profiler.start()
        self.begun = time.perf_counter()

    def stop(self, most: int = 12) -> dict[str, Any]:
        """Seconds of wall time, those in kernels, and the kernels that took `most`: name, seconds, launches."""
        wait("cuda")
        seconds = time.perf_counter() - self.begun
        self.profiler.stop()
        intervals = kernel_intervals(self.profiler.events())
        by_name: dict[str, list[float]] = {}
        for start, end, name in intervals:
            found = by_name.setdefault(name[:120], [0.0, 0])
            found[0] += (end - start) * 1e-6
            found[1] += 1
        largest = sorted(by_name.items(), key=lambda item: -item[1][0])[:most]
        kernels = [{"kernel": name, "seconds": spent, "launches": count} for name, (spent, count) in largest]
        return {"seconds": seconds, "kernel seconds": covered(intervals) * 1e-6, "kernels": kernels}
