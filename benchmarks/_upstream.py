"""The product of the upstream package `aqlm`, timed in a process of its own as _cold.py times ours.

That process belongs to an interpreter which has torch and aqlm: this one, or that of a throw-away environment. It reads
jobs from stdin and writes times to stdout, a line of JSON each.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

LONGEST = 4.0  # seconds that one call may take; its kernels take as long for 16 rows as 16 times for one


class Upstream:
    """Times by upstream's package; none where there is no interpreter that has it."""

    def __init__(self, interpreter: str | None, **device: Any) -> None:
        """`device`: the arguments of `worker`. SystemExit if the interpreter that was named cannot import aqlm."""
        self.worker = None
        command = interpreter or (sys.executable if importlib.util.find_spec("aqlm") else None)
        if not command:
            return
        try:
            self.worker = subprocess.Popen(
                [command, __file__, json.dumps(device)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        except OSError as error:
            raise SystemExit(f"--upstream={command}: {error.strerror}, expected a Python interpreter") from None
        if answer := self.ask(None).get("error"):
            raise SystemExit(f"--upstream={command}: {answer}, expected an interpreter that imports torch and aqlm")

    def ask(self, job: Any) -> dict[str, Any]:
        try:
            self.worker.stdin.write(json.dumps(job) + "\n")
            self.worker.stdin.flush()
            return json.loads(self.worker.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            return {"error": "ended early"}

    def times(self, shape: tuple[int, int], fmt: tuple[int, int, int], n_rows: list[int]) -> dict[int, list[float]]:
        """[ms, spread] by rows, as far as upstream's kernels do them in bearable time."""
        if self.worker is None:
            return {}
        answer = self.ask({"shape": shape, "format": fmt, "n_rows": sorted(n_rows)})
        if "error" in answer:
            print(f"upstream: {fmt[0]}x{fmt[1]}g{fmt[2]}, {shape[0]}x{shape[1]}: {answer['error']}", file=sys.stderr)
        return {int(n): found for n, found in answer.get("times", {}).items()}

    def close(self) -> None:
        if self.worker:
            self.worker.stdin.close()
            self.worker.wait()


def layer(shape: tuple[int, int], fmt: tuple[int, int, int], dtype: Any, device: str) -> Any:
    """One of upstream's layers with random values."""
    import torch
    from _cold import random_weight
    from aqlm import QuantizedLinear

    (out, in_features), (K, B, g) = shape, fmt
    made = QuantizedLinear(in_features, out, g, 1, K, B, bias=False, device="meta")
    tensors = random_weight(out, in_features, *fmt, dtype, device)
    for name, tensor in zip(("codes", "codebooks", "scales"), tensors, strict=True):
        setattr(made, name, torch.nn.Parameter(tensor, requires_grad=False))
    return made


def measure(job: dict[str, Any], device: Any) -> dict[int, list[float]]:
    import torch

    shape, fmt = job["shape"], job["format"]
    if device.name == "cuda" and fmt not in ([1, 16, 8], [2, 8, 8], [1, 8, 8]):
        return {}  # by Triton, tuned for each shape for half a minute
    dtype = torch.float32 if device.name == "cpu" else torch.float16  # the only one of its numba kernels
    first = layer(shape, fmt, dtype, device.name)
    nbytes = sum(t.nbytes for t in first.parameters())
    layers = [first] + [layer(shape, fmt, dtype, device.name) for _ in range(device.copies(nbytes) - 1)]
    times, by = {}, 0.0
    with torch.inference_mode():
        for n in job["n_rows"]:
            if by * n > LONGEST * 1e3:
                break
            x = torch.randn(n, shape[1], device=device.name).to(dtype)
            found = device.time(lambda module, x=x: module(x), layers)
            times[n], by = list(found), found.ms / n
    return times


def worker(arguments: dict[str, Any]) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what compilers print is no answer
    problem = device = None
    for line in sys.stdin:
        job = json.loads(line)
        try:
            if job is None:
                import aqlm  # noqa: F401
                from _cold import DEVICES

                device = DEVICES[arguments.pop("device")](**arguments)
            answer = {} if job is None else {"times": measure(job, device)}
        except Exception as error:
            problem = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            answer = {"error": problem}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    worker(json.loads(sys.argv[1]))
