"""Every causal language model of the installed transformers, tiny and random: quantized, saved, loaded, compared.

    python tests/hf/sweep.py [--markdown docs/models.md] [--json FILE] [--jobs N] [MODEL_TYPE ...]

Each model runs in a process of its own, forked from one that has the libraries, with a time limit. It ends as one of
`OUTCOMES`; all but the first three are faults, and the script then exits with 1.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import re
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1] / "support")]

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from zoo import VOCABULARY, tiny_config

import aqlm_c.hf  # noqa: F401  (registers)
from aqlm_c.errors import one_line
from aqlm_c.io.checkpoint import quantized_linears, save_quantized
from aqlm_c.pipeline.progress import Progress
from aqlm_c.quantize import quantize_model
from aqlm_c.recipe import AqlmConfig

OUTCOMES = {
    "works": "quantized, saved, loaded again, and its logits are those in memory to 1e-3",
    "refused": "refused before the work, with the reason given",
    "not built": "transformers cannot build or run a tiny one here",
    "late": "an error after the work began",
    "traceback": "an error of another type than those for users",
    "not loaded": "saved, and cannot be loaded",
    "differs": "loaded, with other logits",
    "time": "not done within the time limit",
}
GOOD = ("works", "refused", "not built")
SCHEME = "1x4g8"
FAST = {"ldl_passes": 1, "max_sweeps": 1, "init_max_iter": 2, "finetune_epochs": 0}
SECONDS = 180  # for one model
TOLERANCE = 1e-3  # of logits, relative to the largest


@dataclasses.dataclass
class Result:
    """What became of one model type. linears: quantized, of all; error: largest difference of logits, relative;
    changed: that of the quantized model to the original; rule: that a refusal asked for, with which it was tried again.
    """

    model_type: str
    class_name: str
    outcome: str
    note: str = ""
    quantized: int = 0
    linears: int = 0
    dense: str = ""
    error: float | None = None
    changed: float | None = None
    rule: str = ""


class Begun(Progress):
    """Knows whether the work began."""

    begun = False

    def on_block(self, index: int, name: str) -> None:
        self.begun = True


def tiny_model(model_type: str) -> Any:
    """A random tiny model, float32, whose logits depend on all its blocks."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type), dtype=torch.float32).eval()
    if hasattr(model, "set_default_language"):
        model.set_default_language(model.config.languages[0])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 and parameter.is_floating_point():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)  # Reformer hashes at random
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def try_model(model_type: str) -> Result:
    """Build, quantize, save, load, compare."""
    result = Result(model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type], "works")
    ids = torch.randint(3, VOCABULARY - 20, (4, 16), generator=torch.Generator().manual_seed(0))
    try:
        model = tiny_model(model_type)
        original = logits(model, ids)
        if not torch.isfinite(original).all():
            raise ValueError("its logits are NaN")
    except Exception as error:  # of transformers, of any type
        return dataclasses.replace(result, outcome="not built", note=f"{type(error).__name__}: {one_line(error)[:160]}")
    result.class_name = type(model).__name__
    config, begun = AqlmConfig.from_scheme(SCHEME, **FAST), Begun()
    for attempt in range(2):
        try:
            report = quantize_model(model, ids, config, progress=begun)
            break
        except Exception as error:
            expected = isinstance(error, (ValueError, OSError))
            rule = re.search(r"--rule '(.*)=dense'", str(error))
            if attempt == 0 and rule and not begun.begun:  # its advice is followed
                config, result.rule = config.replace(rules={rule[1]: "dense"}), f"{rule[1]}=dense"
                continue
            outcome = "traceback" if not expected else "late" if begun.begun else "refused"
            return dataclasses.replace(result, outcome=outcome, note=_said(error, expected))
    result.quantized = len(report.layers)
    _describe(report, result)
    with tempfile.TemporaryDirectory() as directory:
        return _save_and_load(model, ids, original, Path(directory) / "out", result)


def _describe(report: Any, result: Result) -> None:
    plan = getattr(report, "plan", None) or {}
    result.linears, result.dense = plan.get("linears", 0), plan.get("text", "")


def _save_and_load(model: Any, ids: torch.Tensor, original: torch.Tensor, out: Path, result: Result) -> Result:
    try:
        wanted = logits(model, ids)
        result.changed = _difference(wanted, original)
        save_quantized(model, None, out)
    except Exception as error:
        expected = isinstance(error, (ValueError, OSError))
        return dataclasses.replace(result, outcome="late" if expected else "traceback", note=_said(error, False))
    try:
        known = type(model.config) in AutoModelForCausalLM._model_mapping
        loaded = (AutoModelForCausalLM if known else type(model)).from_pretrained(out, dtype=torch.float32).eval()
        if hasattr(loaded, "set_default_language"):
            loaded.set_default_language(loaded.config.languages[0])
        found = logits(loaded, ids)
    except Exception as error:
        return dataclasses.replace(result, outcome="not loaded", note=_said(error, False))
    result.error = _difference(found, wanted)
    if len(list(quantized_linears(loaded))) != len(list(quantized_linears(model))) or not result.changed:
        return dataclasses.replace(result, outcome="differs", note="its quantized layers are others")
    return result if result.error <= TOLERANCE else dataclasses.replace(result, outcome="differs")


def _difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def _said(error: Exception, expected: bool) -> str:
    text = one_line(error)[:400]
    if expected:
        return text
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {text} ({Path(frame.filename).name}:{frame.lineno})"


def _child(model_type: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    pipe.send(dataclasses.asdict(try_model(model_type)))
    pipe.close()


def run(model_type: str, seconds: float = SECONDS) -> Result:
    """`try_model` in a process of its own, with a time limit."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(model_type, theirs), daemon=True)
    process.start()
    theirs.close()
    failed = Result(model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type], "time")
    try:
        if ours.poll(seconds):
            return Result(**ours.recv())
    except EOFError:
        process.join()
        failed = dataclasses.replace(failed, outcome="traceback", note=f"the process ended with {process.exitcode}")
    finally:
        process.kill()
        process.join()
        ours.close()
    return failed


def sweep(model_types: list[str], jobs: int = 1, report: Any = None) -> list[Result]:
    """All of them, in order; `report` is called with each as it ends."""

    def one(model_type: str) -> Result:
        result = run(model_type)
        if report:
            report(result)
        return result

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(one, model_types))


def markdown(results: list[Result]) -> str:
    """The table of docs/models.md."""
    counts = Counter(result.outcome for result in results)
    lines = [
        "# Models",
        "",
        f"All {len(results)} causal language models of transformers {transformers.__version__}, as tiny random ones of "
        f"2 to 5 layers: quantized to {SCHEME} with calibration, saved, loaded by `from_pretrained`, and their logits "
        "compared with those in memory. Written by `python tests/hf/sweep.py --markdown docs/models.md`; not edited.",
        "",
        "| outcome | models | |",
        "|---|---|---|",
        *(f"| {outcome} | {counts[outcome]} | {text} |" for outcome, text in OUTCOMES.items() if counts[outcome]),
        "",
        "| model type | class | outcome | linears | why, what stays dense |",
        "|---|---|---|---|---|",
    ]
    for result in results:
        linears = f"{result.quantized} of {result.linears}" if result.linears else ""
        rule = f"with --rule '{result.rule}': " if result.rule else ""
        note = (rule + (result.note or result.dense)).replace("|", "\\|").replace("<", "&lt;")
        lines.append(f"| {result.model_type} | {result.class_name} | {result.outcome} | {linears} | {note} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_types", nargs="*", metavar="MODEL_TYPE", help="all, if none is named")
    parser.add_argument("--markdown", type=Path, help="write the table there")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    options = parser.parse_args()

    def say(result: Result) -> None:
        print(f"{result.model_type}: {result.outcome} {result.note or result.dense}".rstrip(), flush=True)

    results = sweep(options.model_types or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), options.jobs, say)
    print(", ".join(f"{n} {outcome}" for outcome, n in Counter(result.outcome for result in results).most_common()))
    if options.markdown:
        options.markdown.write_text(markdown(results), encoding="utf-8")
    if options.json:
        versions = {"transformers": transformers.__version__, "torch": torch.__version__}
        fields = {"versions": versions, "results": [dataclasses.asdict(result) for result in results]}
        options.json.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    return int(any(result.outcome not in GOOD for result in results))


if __name__ == "__main__":
    sys.exit(main())
