"""The build: what is compiled how, that the bindings stay apart, and that a missing one is said aloud."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

import aqlm_c
from aqlm_c import _core

ROOT = Path(__file__).resolve().parents[2]
C_FILES = sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("csrc/**/*.c"))
CC, CXX = (sysconfig.get_config_var(name).split()[0] for name in ("CC", "CXX"))


def setup_names():
    """setup.py's names, without building."""
    cwd = os.getcwd()
    os.chdir(ROOT)
    try:
        return SimpleNamespace(**runpy.run_path("setup.py", run_name="setup"))
    finally:
        os.chdir(cwd)


BUILD = setup_names()
LIBRARIES = dict(BUILD.c_libraries(list(BUILD.ISA_FLAGS)))
COMPILED = [path for _, info in BUILD.c_libraries(BUILD.compiled_isas()) for path in info["sources"]]


def python(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True
    )


def test_core_and_package_import_no_torch():
    run = python("import sys, aqlm_c, aqlm_c._core; sys.exit('torch' in sys.modules)")
    assert run.returncode == 0, run.stderr


def test_bindings_are_one_binary_for_every_python():
    from aqlm_c.core import extensions

    for binding in (_core, extensions._torch):
        assert Path(binding.__file__).name.split(".", 1)[1] == "abi3.so"


def test_bindings_take_the_isa_from_the_environment():
    code = "import aqlm_c._core as a, aqlm_c.nn.ops as b; print(a.get_isa(), b.get_isa())"
    assert python(code, AQLM_C_ISA="scalar").stdout.split() == ["scalar", "scalar"]


def test_only_isa_libraries_use_isa_flags():
    for name, info in LIBRARIES.items():
        flags = info["cflags"]
        assert "-ffp-contract=off" in flags and "-fno-lto" in flags and "-ffast-math" not in flags
        machine = [flag for flag in flags if flag.startswith("-m")]
        assert bool(machine) == (name in ("aqlm_avx2", "aqlm_avx512", "aqlm_avx512bf16")), (name, machine)
    assert {name for name, _ in LIBRARIES["aqlm_core"]["macros"]} == {
        "AQLM_HAVE_AVX2",
        "AQLM_HAVE_AVX512",
        "AQLM_HAVE_AVX512BF16",
        "AQLM_HAVE_NEON",
    }


def test_every_machine_has_scalar():
    compiled = BUILD.compiled_isas
    assert compiled("x86_64") == ["scalar", "avx2", "avx512", "avx512bf16"]
    assert compiled("arm64") == compiled("aarch64") == ["scalar", "neon"]
    assert compiled("riscv64") == ["scalar"]
    assert set(_core.available_isas()) <= set(compiled())


def test_every_c_file_is_built_and_every_header_watched():
    built = {source for info in LIBRARIES.values() for source in info["sources"]} | set(BUILD.core_binding().sources)
    assert built == set(C_FILES)
    headers = {p.relative_to(ROOT).as_posix() for p in ROOT.glob("csrc/**/*.h")}
    for info in LIBRARIES.values():
        assert headers <= set(info["obj_deps"][""])


@pytest.mark.skipif(BUILD.cuda_problem() is not None, reason="needs nvcc and torch")
def test_every_cuda_file_is_built(monkeypatch):
    monkeypatch.chdir(ROOT)
    built = {source for source in BUILD.cuda_binding().sources if source.endswith(".cu")}
    assert built == {p.relative_to(ROOT).as_posix() for p in ROOT.glob("csrc/**/*.cu")}


def test_cuda_files_are_compiled_again_if_what_they_include_changed(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    compiled = []

    def nvcc(command):  # as nvcc does: a list of what it read, then the object
        for source in map(Path, command[command.index("-c") + 1 : command.index("-odir")]):
            made = Path(command[-1], source.name).with_suffix(".o")
            made.with_suffix(".d").write_text(f"{made} : {source} \\\n  {source}h \\\n  setup.py\n")
            made.touch()
            compiled.append(source.name)

    def build():
        compiled.clear()
        objects = BUILD.compile_kernels([str(path) for path in files], str(tmp_path), nvcc)
        assert [Path(path).with_suffix(".cu") for path in objects] == files
        return sorted(compiled)

    files = [tmp_path / name for name in ("a.cu", "b.cu", "c.cu")]
    for path in files:
        path.touch(), Path(f"{path}h").touch()
    assert build() == ["a.cu", "b.cu", "c.cu"]
    assert build() == []
    later = time.time() + 60
    os.utime(tmp_path / "b.cuh", (later, later))
    assert build() == ["b.cu"]
    os.utime(tmp_path / "b.cuh", (0, 0))
    (tmp_path / "a.o").unlink()
    (tmp_path / "c.cuh").unlink()
    assert build() == ["a.cu", "c.cu"]


@pytest.mark.parametrize("path", COMPILED)
def test_core_is_plain_c11_without_warnings(path):
    """Also without Python, NumPy and torch: none of their folders is on the include path."""
    isa_flags = BUILD.ISA_FLAGS.get(Path(path).stem.removeprefix("kernels_"), [])
    run = subprocess.run(
        [CC, *BUILD.C_FLAGS, *isa_flags, "-Wpedantic", "-Werror", "-fsyntax-only", "-Icsrc", path],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr


HEADERS = sorted(p.relative_to(ROOT).as_posix() for p in [*ROOT.glob("csrc/aqlm/*.h"), *ROOT.glob("csrc/core/*/*.h")])


@pytest.mark.parametrize("path", ["csrc/aqlm.h", *HEADERS])
def test_headers_include_what_they_use(path):
    """Each is C11 by itself; those of the public interface are C++ too."""
    for compiler, standard, language in ((CC, "c11", "c"), (CXX, "c++17", "c++")):
        if language == "c++" and path.startswith("csrc/core"):
            continue
        flags = ["-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only", "-Icsrc"]
        run = subprocess.run(
            [compiler, f"-std={standard}", *flags, f"-x{language}", "-"],
            cwd=ROOT,
            input=f'#include "{path.removeprefix("csrc/")}"\n',
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr


def test_torch_binding_uses_the_stable_abi_only():
    includes = {
        include
        for path in ROOT.glob("csrc/torch/*")
        for include in re.findall(r"#include <((?:torch|ATen|c10)/[^>]+)>", path.read_text())
    }
    assert includes
    stable = ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/c/")
    assert all(i.startswith(stable) for i in includes), includes


def test_missing_torch_is_printed_or_an_error():
    hide = (
        "import importlib.util as u, runpy, sysconfig; find = u.find_spec; sysconfig.get_path = lambda name: 'nowhere';"
        "u.find_spec = lambda name, *a: None if name == 'torch' else find(name, *a);"
        "print([e.name for e in runpy.run_path('setup.py', run_name='setup')['bindings']({})])"
    )
    run = python(hide.format([]))
    assert run.returncode == 0, run.stderr
    assert "✓ aqlm_c._core" in run.stdout and "✗ aqlm_c._torch: got no torch here" in run.stdout
    assert "['aqlm_c._core']" in run.stdout

    run = python(hide.format(["torch"]))
    assert run.returncode == 1
    assert "AQLM_C_REQUIRE=torch, but got no torch here" in run.stderr and "--no-build-isolation" in run.stderr

    run = python(hide.format(["tpu"]))
    assert run.returncode == 1 and "AQLM_C_REQUIRE: got tpu, expected" in run.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("CC", "C compiler /nowhere/cc: not found, .*gcc"),
        ("CXX", r"C\+\+ compiler /nowhere/cc: not found, .*g\+\+"),
        ("Python.h", "Python headers .*: not found, .*python3-dev"),
        ("venv", "Python module venv: not found, .*python3-venv"),
    ],
)
def test_make_names_what_this_machine_lacks(tmp_path, missing, message):
    stub = tmp_path / "python"  # lacks `missing`, has all else, and would make the environment in vain
    stub.write_text(f'#!/bin/sh\ncase "$*" in *{missing}*) exit 1; esac\n')
    stub.chmod(0o755)
    tools = {"CC": "true", "CXX": "true"} | ({missing: "/nowhere/cc"} if missing.startswith("C") else {})
    outer = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of `make test`
    run = subprocess.run(
        ["make", f"PYTHON={stub}", f"VENV={tmp_path / 'venv'}", str(tmp_path / "venv" / ".tools")],
        cwd=ROOT,
        env={**outer, **tools},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2
    assert re.match(rf"{message}.*\nmake: \*\*\*", run.stderr), run.stderr


@pytest.mark.skipif(not (ROOT / ".git").exists() or shutil.which("git") is None, reason="needs a git checkout")
def test_the_source_distribution_is_the_whole_checkout(tmp_path):
    """In a copy, since egg-info is written beside what is packed and names what the next one packs."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    files = [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    copy = tmp_path / "copy"
    for name in files:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    (copy / "tests" / "left.so").touch()
    command = [sys.executable, "setup.py", "-q", "sdist", "--formats", "tar", "--dist-dir", str(tmp_path)]
    run = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    with tarfile.open(next(tmp_path.glob("*.tar"))) as archive:
        packed = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    made = {"PKG-INFO", "setup.cfg"} | {name for name in packed if name.startswith("aqlm_c.egg-info/")}
    assert packed - made == set(files)


def test_torch_is_found_from_a_build_that_does_not_see_it(monkeypatch):
    """pip's isolated build: torch cannot be imported, but lies in the environment that is installed into."""
    import torch

    find_spec = BUILD.util.find_spec
    monkeypatch.setattr(
        BUILD.util, "find_spec", lambda name, *rest: None if name == "torch" else find_spec(name, *rest)
    )
    home = BUILD.torch_home()
    assert home is not None and home.samefile(Path(torch.__file__).parent) and BUILD.torch_problem() is None


def test_the_version_stands_in_one_place():
    assert metadata.version("aqlm-c").partition("+")[0] == aqlm_c.__version__
    for name in ("pyproject.toml", "setup.py", "CITATION.cff", "Makefile"):
        assert aqlm_c.__version__ not in (ROOT / name).read_text(encoding="utf-8"), name


def test_a_wheel_without_kernels_says_so_in_its_version(tmp_path, monkeypatch):
    monkeypatch.setenv("AQLM_C_GPUS", "none")
    assert BUILD.compiled_gpus() == [] and BUILD.cuda_problem() == "AQLM_C_GPUS is none"
    for gpus, label in (("none", "+cpu"), ("", "")):
        folder = tmp_path / f"of_{gpus}"
        folder.mkdir()
        command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(folder)]
        subprocess.run(command, cwd=ROOT, env={**os.environ, "AQLM_C_GPUS": gpus}, check=True, capture_output=True)
        (found,) = folder.glob("*/PKG-INFO")
        assert f"\nVersion: {aqlm_c.__version__}{label}\n" in found.read_text(encoding="utf-8")
    monkeypatch.setenv("AQLM_C_GPUS", "none,80")
    with pytest.raises(SystemExit, match="AQLM_C_GPUS: got none, expected"):
        BUILD.compiled_gpus()
