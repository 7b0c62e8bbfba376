"""kernels_check.c: the kernels on every instruction set here, on AArch64 by qemu, and under sanitizers."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from test_build import BUILD, CC, ROOT

FEW = "3"  # shapes, where they are slow
SANITIZERS = {"address": "address,undefined", "thread": "thread"}


def command(*words, cwd=None):
    run = subprocess.run([str(word) for word in words], cwd=cwd, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def build(folder, cc, isas, *flags):
    """kernels_check of these instruction sets, compiled as setup.py does and with further flags."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = []
        for name, info in BUILD.c_libraries(isas):
            own = [
                *info["cflags"],
                *flags,
                *(f"-D{key}={value}" for key, value in info["macros"]),
                f"-I{ROOT / 'csrc'}",
            ]
            for source in info["sources"] + ["tests/build/kernels_check.c"] * (name == "aqlm_core"):
                jobs.append(pool.submit(command, cc, *own, "-c", ROOT / source, cwd=folder))
    for job in jobs:
        job.result()
    program = folder / "kernels_check"
    command(cc, *flags, *folder.glob("*.o"), *BUILD.LINK_FLAGS, "-o", program)
    return program


def check(*words):
    """Runs it; the instruction sets that were checked and the hash of all results."""
    *isas, results = command(*words).split()
    return isas, results


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return build(tmp_path_factory.mktemp("native"), CC, BUILD.compiled_isas())


def test_every_isa(program):
    isas, _ = check(program)
    assert isas[0] == "scalar" and set(isas) <= set(BUILD.compiled_isas())


def test_aarch64_gives_the_same_bits(program, tmp_path):
    cross = shutil.which("aarch64-linux-gnu-gcc")
    qemu = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if not (cross and qemu):
        pytest.skip("no aarch64-linux-gnu-gcc or qemu-aarch64 (Debian: gcc-aarch64-linux-gnu, qemu-user)")
    isas, results = check(qemu, build(tmp_path, cross, BUILD.compiled_isas("aarch64"), "-O1", "-static"), FEW)
    assert isas == ["scalar", "neon"]
    assert results == check(program, FEW)[1]


@pytest.mark.parametrize("name", SANITIZERS)
def test_sanitizers(name, program, tmp_path):
    flags = ["-O1", "-g", f"-fsanitize={SANITIZERS[name]}", "-fno-sanitize-recover=all"]
    empty = tmp_path / "empty.c"
    empty.write_text("int main(void) { return 0; }\n")
    try:
        command(CC, *flags, empty, "-o", tmp_path / "empty")
        command(tmp_path / "empty")
    except AssertionError as error:
        pytest.skip(f"{CC} has no {name} sanitizer that runs here: {str(error).splitlines()[0]}")
    sanitized = build(tmp_path, CC, BUILD.compiled_isas(), *flags)
    assert check(sanitized, FEW) == check(program, FEW)
