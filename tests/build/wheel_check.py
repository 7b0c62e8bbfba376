"""What must hold of the wheel that `make wheel` builds: python tests/wheel_check.py dist/aqlm_c-*.whl

It is one binary for every Python and every machine: nothing in it may ask for a driver, for CUDA's runtime or for the
machine it was built on, and it works without torch, with torch for the CPU, and with torch for GPUs.
"""

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

LARGEST = 40e6  # bytes
SYSTEM = re.compile(r"(ld-linux.*|libc|libm|libdl|librt|libpthread|libgcc_s|libstdc\+\+)\.so")
TORCH = re.compile(r"libtorch(_cpu)?\.so")
FOREIGN = re.compile(r"_ZN?K?(2at|3c10|5torch)|cu(da)?[A-Z]")  # torch's own C++, CUDA's driver and runtime

WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
import numpy as np, aqlm_c
from aqlm_c import _core
from aqlm_c.weights import quantize_weight
W = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
assert quantize_weight(W, np.eye(64, dtype=np.float32), aqlm_c.AqlmConfig.from_scheme("1x4g8")).relative_error < 1
try:
    import aqlm_c.nn.ops
except ImportError as error:
    assert str(error).startswith("torch: got none"), error
else:
    sys.exit("aqlm_c.nn.ops: imports without torch")
print(f"without torch: ✓ _core, {_core.get_isa()}")
"""
WITH_TORCH = """
import torch
from aqlm_c.nn import ops
codes = torch.randint(-128, 128, (64, 8, 2), dtype=torch.int8)
codebooks, scales, x = torch.randn(2, 256, 1, 8), torch.ones(64, 1, 1, 1), torch.randn(3, 64)
for device in ["cpu", *(["cuda"] if torch.cuda.is_available() and ops.has_cuda else [])]:
    x, *weight = (t.to(device) for t in (x, codes, codebooks, scales))
    y, truth = ops.matmul(x, *weight), x @ ops.decode_rows(*weight).T
    assert (y - truth).norm() <= 1e-3 * truth.norm(), device
    print(f"torch {torch.__version__}: ✓ {device}")
print(f"torch {torch.__version__}: {'✓' if ops.has_cuda else '✗'} _cuda")
"""


def said(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def problems_of(binding):
    """What in a shared library would tie it to a machine; and the glibc that it needs."""
    dynamic, symbols = said("readelf", "-d", binding), said("nm", "-D", "--undefined-only", binding)
    allowed = [SYSTEM] if "_core" in binding.name else [SYSTEM, TORCH]
    for needed in re.findall(r"NEEDED.*\[(.+)\]", dynamic):
        if not any(pattern.match(needed) for pattern in allowed):
            yield f"{binding.name} needs {needed}"
    for path in re.findall(r"(?:RPATH|RUNPATH).*\[(.+)\]", dynamic):
        yield f"{binding.name} looks for libraries in {path}"
    for symbol in re.findall(r" U (\w+)", symbols):
        if FOREIGN.match(symbol):
            yield f"{binding.name} wants {symbol}"


def glibc(binding):
    versions = re.findall(r"GLIBC_(\d+)\.(\d+)", said("nm", "-D", "--undefined-only", binding))
    return max(tuple(map(int, version)) for version in versions)


def check(wheel):
    """Prints what was found; SystemExit with what is wrong."""
    problems = []
    if "-cp310-abi3-" not in wheel.name:
        problems.append(f"{wheel.name}: expected the tag cp310-abi3")
    if wheel.stat().st_size > LARGEST:
        problems.append(f"{wheel.name}: {wheel.stat().st_size * 1e-6:.0f} MB, expected at most {LARGEST * 1e-6:.0f}")
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        bindings = sorted(Path(folder, "aqlm_c").glob("*.so"))
        names = {binding.name.split(".", 1)[0] for binding in bindings}
        problems += [f"{b.name}: expected *.abi3.so" for b in bindings if not b.name.endswith(".abi3.so")]
        problems += [f"{name} is missing" for name in sorted({"_core", "_torch"} - names)]
        problems += [problem for binding in bindings for problem in problems_of(binding)]
        if not problems:
            for code in (WITHOUT_TORCH, WITH_TORCH):
                command = [sys.executable, "-c", code]
                run = subprocess.run(command, cwd=folder, env={"PYTHONPATH": folder}, capture_output=True, text=True)
                print(run.stdout, end="")
                if run.returncode:
                    problems.append((run.stderr.strip().splitlines() or ["failed"])[-1])
        if problems:
            sys.exit("\n".join(problems))
        needs = ".".join(map(str, max(map(glibc, bindings))))
    print(f"✓ {wheel.name}: {wheel.stat().st_size * 1e-6:.1f} MB, {', '.join(sorted(names))}, glibc {needs} or newer")


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        check(Path(argument))
