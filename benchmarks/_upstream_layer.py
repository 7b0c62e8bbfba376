"""One layer by the code of the upstream repository (its `aq_engine.py`), in a process of its own.

That process belongs to an interpreter which has torch and tqdm. It is given a checkout, the weight and H as .npy files,
and options; it prints one line of JSON: seconds in all and by phase, the relative error, epochs and peak memory.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Its `main.py`'s defaults, and the tolerance that its README quantizes with.
OPTIONS = {"lr": 1e-4, "steps_per_epoch": 100, "max_epochs": 1000, "init_max_iter": 100, "print_frequency": 10**9}


def check_checkout(checkout: str) -> None:
    """SystemExit if there is no upstream code in the directory."""
    if not (Path(checkout) / "aq_engine.py").is_file():
        raise SystemExit(f"--upstream: got {checkout}: no aq_engine.py, expected a checkout of Vahe1994/AQLM")


def quantize(checkout: str, job: dict[str, Any], interpreter: str | None = None) -> dict[str, Any]:
    """What the process says of `job`; {"failed": why} if it ended otherwise."""
    command = [interpreter or sys.executable, __file__, checkout, json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
        return {"failed": lines[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def timed(module: Any, name: str, step: str, seconds: dict[str, float], wait: Callable[[], None]) -> None:
    """The function `name` of a module or class adds its seconds to those of `step`."""
    function = getattr(module, name)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        wait()
        started = time.perf_counter()
        result = function(*args, **kwargs)
        wait()
        seconds[step] = seconds.get(step, 0.0) + time.perf_counter() - started
        return result

    setattr(module, name, call)


def run(job: dict[str, Any]) -> dict[str, Any]:
    import numpy as np
    import torch

    engines, core = importlib.import_module("aq_engine"), importlib.import_module("src.aq")
    device = torch.device(job["device"], 0) if job["device"] == "cuda" else torch.device(job["device"])
    weight, H = (torch.from_numpy(np.load(job[name])).to(device) for name in ("weight", "H"))
    torch.manual_seed(job["seed"])
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=device)
    linear.weight.data = weight
    engine = engines.AQEngine(linear)
    engine.XTX = H.double()
    seconds: dict[str, float] = {}
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    timed(core, "init_aq_kmeans", "kmeans", seconds, wait)
    # two waits a round: no time of the whole is lost by them
    timed(engines.AQEngine, "beam_search_update_codes_", "search", seconds, wait)
    args = argparse.Namespace(**{**OPTIONS, **job["options"]}, devices=[device], out_group_size=1, scale_nbits=0)
    args.codebook_value_nbits, args.codebook_value_num_groups, args.init_max_points_per_centroid = 16, 1, None
    epochs = 0

    class Counted(engines.QuantizedWeight):
        def beam_search_update_codes_(self, *args: Any, **kwargs: Any) -> Any:
            nonlocal epochs
            epochs += 1
            return super().beam_search_update_codes_(*args, **kwargs)

    engines.QuantizedWeight = Counted
    wait()
    started = time.perf_counter()
    found = engine.quantize(args=args, verbose=False)
    wait()
    total = time.perf_counter() - started
    seconds["codebooks"] = total - sum(seconds.values())
    with torch.no_grad():
        D, W = (found() - weight).double(), weight.double()
        error = float(((D @ engine.XTX) * D).sum() / ((W @ engine.XTX) * W).sum())
    return {
        **{"seconds": total, "error": error, "rounds": epochs},
        "host GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024e-9,
        "device GB": torch.cuda.max_memory_allocated() * 1e-9 if device.type == "cuda" else None,
        **{"kernels %": None, "phases": seconds, "kernels": None},
    }


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what it prints is no answer
    sys.path.insert(0, sys.argv[1])
    print(json.dumps(run(json.loads(sys.argv[2]))), file=answers, flush=True)
