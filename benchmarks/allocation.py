"""Schemes by layer for sizes of a model, and what they are expected to cost; for some layers also what they do cost.

    python benchmarks/allocation.py --data WIKIPEDIA.txt --sizes 45MB 60MB 75MB 90MB --check 9 --json allocation

Sizes are those of the files, without quantizing. --check N: of N layers, spread over the blocks and kinds, each is
quantized to 2x8g8 under H of the calibration tokens and put into the model alone, and then all of them together; KL is
measured on text that was not calibrated on. No perplexity is measured here.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from _bench import machine, save, show

from aqlm_c.allocation.choose import Measured, measure_model
from aqlm_c.allocation.sensitivity import hessians_of
from aqlm_c.config import SizeOptions
from aqlm_c.core.runtime import find_device, set_threads
from aqlm_c.evaluate import divergence
from aqlm_c.format import Format
from aqlm_c.hf.models import load_model
from aqlm_c.io.data import load_sequences
from aqlm_c.model.embeddings import find_embeddings
from aqlm_c.recipe import AqlmConfig
from aqlm_c.units import parse_size
from aqlm_c.weights import quantize_weight

SCHEME = "2x8g8"


def sizes_of(measured: Measured, sizes: list[str], folder: Path | None) -> list[dict[str, Any]]:
    """A row for each size: what was chosen, layers by scheme, and the largest uniform scheme that is no larger. folder:
    of plots.
    """
    rows = []
    for size in sizes:
        found = measured.choose(SizeOptions(target_size=parse_size("--sizes", size)))
        near = [each for each in found.uniform if each.total_bytes <= found.total_bytes]
        uniform = max(near, key=lambda each: each.total_bytes, default=None)
        rows.append(
            {
                "target": size,
                "bytes": found.total_bytes,
                "of target": found.total_bytes / found.target_bytes,
                "bits": found.effective_bits,
                "expected KL": found.kl,
                "uniform": "" if uniform is None else uniform.scheme,
                "its bytes": None if uniform is None else uniform.total_bytes,
                "its KL": None if uniform is None else uniform.kl,
                **{scheme: sum(x.scheme == scheme for x in found.layers) for scheme in found.candidates},
            }
        )
        if folder is not None:
            found.plot(folder / f"bits_{size}.png")
    return rows


def checks_of(
    model: Any, original: Any, measured: Measured, calibration: torch.Tensor, held_out: torch.Tensor, count: int
) -> list[dict[str, Any]]:
    """A row for each of `count` layers that is quantized alone, and one for all of them together."""
    names = [name for name in measured.sensitivities if name not in measured.embeddings]
    names = [names[round(place * (len(names) - 1) / max(1, count - 1))] for place in range(count)]
    modules = {name: model.get_submodule(name) for name in names}
    hessians = hessians_of(model, calibration, modules, find_embeddings(model))
    format, config = Format.parse(SCHEME), measured.config.replace(gaussian_reference=False)
    rows: list[dict[str, Any]] = []
    decoded: dict[str, torch.Tensor] = {}
    length = held_out.shape[1]

    def kl() -> float:
        return float(divergence(model, original, held_out.flatten(), length)["kl"])

    for name, module in modules.items():
        solved = quantize_weight(module.weight.detach(), hessians[name], config, dtype="bfloat16")
        kept = module.weight.detach().clone()
        decoded[name] = torch.as_tensor(solved.decode()).to(kept)
        rate = measured.rates.rate(format, tuple(kept.shape))
        expected = measured.sensitivities[name]
        rows.append({"layer": name, "error": solved.relative_error, "expected error": expected.relative_error(rate)})
        module.weight.data.copy_(decoded[name])
        rows[-1] |= compared(kl(), expected.kl(rate))
        module.weight.data.copy_(kept)
        print(rows[-1], flush=True)
    for name, weight in decoded.items():
        modules[name].weight.data.copy_(weight)
    total = sum(row["expected KL"] for row in rows)
    together = compared(kl(), total)
    return [*rows, {"layer": "all of them", "error": None, "expected error": None, **together}]


def compared(kl: float, expected: float) -> dict[str, float]:
    return {"KL": kl, "expected KL": expected, "ratio": kl / expected}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--sizes", nargs="+", default=["45MB", "60MB", "75MB", "90MB"])
    parser.add_argument("--samples", type=int, default=32, help="calibration sequences")
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--gradients", type=int, default=8, help="sequences whose gradients are measured")
    parser.add_argument("--check", type=int, default=0, metavar="N", help="layers that are quantized")
    parser.add_argument("--plots", type=Path, help="folder of plots")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", help="name of the file in results/")
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    device, held = find_device(arguments.device), 4
    started = time.perf_counter()
    model, tokenizer, _ = load_model(arguments.model, "auto", str(device))
    drawn = load_sequences(
        arguments.data, tokenizer, arguments.samples + held * len(arguments.data), arguments.sequence_length
    )
    calibration, held_out = drawn[:-held], drawn[-held:]
    config = AqlmConfig.from_scheme(SCHEME, finetune_epochs=0)
    measured = measure_model(model, calibration, config, samples=arguments.gradients)
    print(f"measured in {time.perf_counter() - started:.0f} s", flush=True)
    rows = sizes_of(measured, arguments.sizes, arguments.plots)
    show(f"{arguments.model}: schemes for sizes", rows)
    checks = []
    if arguments.check:
        original, _, _ = load_model(arguments.model, "float32", str(device))
        checks = checks_of(model.float(), original, measured, calibration, held_out, arguments.check)
        show("layers quantized alone: KL per token, against what is expected", checks)
    if arguments.json:
        save(arguments.json, rows, device=device.type, checks=checks, measured_seconds=measured.seconds)
    else:
        print(machine(device.type))


if __name__ == "__main__":
    main()
