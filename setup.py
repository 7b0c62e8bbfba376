"""Builds the C core and its bindings; metadata is in pyproject.toml.

The core is plain C: one static library of csrc/core and one of csrc/simd per instruction set, each with its
own compiler flags, because a file compiled for AVX-512 must hold nothing that runs before dispatch. Both
bindings, `_core` (NumPy) and `_torch` (torch's stable ABI), link the same libraries. `_cuda` holds the kernels for
GPUs, which nvcc compiles, and links no driver: a wheel with it imports and works without one.

AQLM_C_REQUIRE=torch,cuda makes a binding that cannot be built an error instead of a printed ✗. AQLM_C_GPUS=none leaves
`_cuda` out, and such a wheel says so in its version, which then ends in +cpu.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from glob import glob
from importlib import metadata, util
from pathlib import Path
from sysconfig import get_path, get_platform

import numpy
from setuptools import Extension, setup
from setuptools.command.build_clib import build_clib
from setuptools.command.build_ext import build_ext

TORCH_OLDEST = (2, 11)
LIMITED_API = ("Py_LIMITED_API", "0x030A0000")

# Every instruction set gives the same bits, so the compiler may not fuse or reorder floating point, and
# link-time optimisation may not carry one library's instructions into another. Loops are aligned, so that their speed
# does not depend on what else is linked: the same code elsewhere took up to 3.7% longer (update_codebooks, Zen 4).
C_FLAGS = [
    *("-std=c11", "-O3", "-pthread", "-fvisibility=hidden", "-Wall", "-Wextra"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-lto", "-falign-loops=64"),
]
LINK_FLAGS = ["-pthread", "-lm"]
ISA_FLAGS = {
    "scalar": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vbmi", "-mavx512vnni", "-mfma"],
    "neon": [],
    "avx512bf16": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16"],
}


# PTX -> the GPUs whose machine code is made from it, and itself for GPUs later than all. 90a: the kernels are tuned for
# it. PTX for each GPU would give the same machine code, for half as much time again in nvcc's front end.
GPUS = {"80": ["sm_80", "sm_86", "sm_89"], "90a": ["sm_90a"], "100": ["sm_100", "sm_120", "compute_100"]}
NVCC_FLAGS = [
    *("-std=c++17", "-O3", "-Icsrc", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall", "--threads=0"),
    "-Xfatbin=-compress-all",  # a third of the bytes; all drivers that CUDA works with read it
]


def compiled_gpus():
    """The keys of GPUS that AQLM_C_GPUS names, all if it is empty, of "none" none. SystemExit for another."""
    named = [name for name in os.environ.get("AQLM_C_GPUS", "").split(",") if name]
    if named == ["none"]:
        return []
    if unknown := sorted(set(named) - set(GPUS)):
        known = f"none, or a comma-separated list of: {', '.join(GPUS)}"
        sys.exit(f"AQLM_C_GPUS: got {', '.join(unknown)}, expected {known}")
    return [name for name in GPUS if name in named or not named]


def compiled_isas(machine=None):
    """Names of the instruction sets compiled for `machine` (as platform.machine() says it)."""
    machine = (machine or platform.machine()).lower()
    if machine in ("x86_64", "amd64"):
        return ["scalar", "avx2", "avx512", "avx512bf16"]
    return ["scalar", "neon"] if machine in ("aarch64", "arm64") else ["scalar"]


def sources(*patterns):
    return sorted(path for pattern in patterns for path in glob(pattern, recursive=True))


HEADERS = sources("csrc/**/*.h")
EVERYTHING = sources("csrc/**/*.*")  # what a binding links is newer than it where any of these is


def c_libraries(isas):
    """(name, build_info) for build_clib: the core, then one library per instruction set."""

    def library(files, flags, macros=()):
        return {
            "sources": files,
            "include_dirs": ["csrc"],
            "cflags": C_FLAGS + flags,
            "macros": list(macros),
            "obj_deps": {"": [*HEADERS, "setup.py"]},
        }

    have = [(f"AQLM_HAVE_{isa.upper()}", "1") for isa in isas if isa != "scalar"]
    core = ("aqlm_core", library(sources("csrc/core/*/*.c"), [], have))
    return [core] + [(f"aqlm_{isa}", library([f"csrc/simd/kernels_{isa}.c"], ISA_FLAGS[isa])) for isa in isas]


def core_binding():
    return Extension(
        "aqlm_c._core",
        sources("csrc/python/*.c"),
        include_dirs=["csrc", numpy.get_include()],
        define_macros=[LIMITED_API],
        extra_compile_args=C_FLAGS,
        extra_link_args=LINK_FLAGS,
        depends=EVERYTHING,
        py_limited_api=True,
    )


def torch_home():
    """The folder of torch, or None. pip's isolated build hides the packages of the environment that it builds for, but
    not where they lie: its torch is the one to build for, and importing it would cost seconds anyway.
    """
    found = util.find_spec("torch")
    folders = [Path(found.origin).parent] if found else []
    folders += [Path(get_path(name), "torch") for name in ("purelib", "platlib")]
    return next((folder for folder in folders if (folder / "include").is_dir()), None)


def torch_problem():
    """Why `_torch` cannot be built here, or None."""
    home = torch_home()
    if home is None:
        return "got no torch here, expected it in the environment (uv hides it: use --no-build-isolation)"
    version = next(metadata.distributions(name="torch", path=[str(home.parent)])).version
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < TORCH_OLDEST:
        return f"torch {version} is older than {'.'.join(map(str, TORCH_OLDEST))}"
    return None


def cuda_problem():
    """Why `_cuda` cannot be built here, or None."""
    if not compiled_gpus():
        return "AQLM_C_GPUS is none"
    return torch_problem() or (None if nvcc() else "nvcc is neither in CUDA_HOME nor on the PATH")


def nvcc():
    """Path of the CUDA compiler, or None."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None)


def torch_extension(name, files, include_dirs=(), define_macros=(), library_dirs=(), link=(), **options):
    """A binding by torch's stable ABI."""
    root = torch_home()
    return Extension(
        f"aqlm_c.{name}",
        files,
        include_dirs=["csrc", *include_dirs],
        define_macros=[
            LIMITED_API,
            ("TORCH_TARGET_VERSION", "0x{:02x}{:02x}000000000000".format(*TORCH_OLDEST)),
            *define_macros,
        ],
        extra_compile_args=[
            *("-std=c++17", "-O2", "-pthread", "-fvisibility=hidden", "-fno-lto", "-Wall", "-Wextra"),
            *("-isystem", str(root / "include")),
        ],
        library_dirs=[str(root / "lib"), *library_dirs],
        extra_link_args=[*LINK_FLAGS, *link],
        language="c++",
        depends=EVERYTHING,
        py_limited_api=True,
        **options,
    )


def torch_binding():
    files = ["csrc/torch/module.cpp", *sources("csrc/torch/*_cpu.cpp")]
    return torch_extension("_torch", files, libraries=["torch_cpu"])


def cuda_binding():
    """Torch's CUDA library may be absent where this is built: what it offers is found when the binding is loaded."""
    said = subprocess.run([nvcc(), "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    toolkit = Path(re.search(r"TOP=(.*)", said)[1])  # nvcc on the PATH may be a script that calls another
    return torch_extension(
        "_cuda",
        [*sources("csrc/torch/*_cuda.cpp"), *sources("csrc/cuda/*.cu", "csrc/cuda/*/*.cu")],
        include_dirs=[str(toolkit / "include")],
        define_macros=[("USE_CUDA", "1")],
        library_dirs=[str(toolkit / "lib64"), str(toolkit / "lib")],  # as installed; as packages of pip have it
        libraries=["cudart_static", "dl", "rt"],
        link=["-Wl,--no-as-needed", "-ltorch"],
    )


def is_stale(compiled):
    """Whether `compiled`, made by nvcc, is older than setup.py or a file that nvcc read for it, which lie beside it."""
    read = compiled.with_suffix(".d")
    if not compiled.exists() or not read.exists():
        return True
    files = ["setup.py", *read.read_text().partition(":")[2].replace("\\\n", " ").split()]
    made = read.stat().st_mtime  # when nvcc began: what was edited since then is newer
    return not all(os.path.exists(path) and os.path.getmtime(path) <= made for path in files)


def compile_kernels(files, to, spawn):
    """The objects of .cu files, in folder `to`. Those that are stale are made by one nvcc for each folder, whose
    threads, one a processor, share the steps of all its files and GPUs."""
    made = {path: Path(to, path).with_suffix(".o") for path in files}
    stale = [path for path in files if is_stale(made[path])]
    of_gpus = [f"-gencode=arch=compute_{ptx},code=[{','.join(GPUS[ptx])}]" for ptx in compiled_gpus()]
    for folder in sorted({os.path.dirname(path) for path in stale}):
        paths = [path for path in stale if os.path.dirname(path) == folder]
        for path in paths:
            made[path].parent.mkdir(parents=True, exist_ok=True)
            made[path].unlink(missing_ok=True)
        spawn([nvcc(), *NVCC_FLAGS, *of_gpus, "-MD", "-c", *paths, "-odir", str(Path(to, folder))])
    return [str(path) for path in made.values()]


def bindings(required):
    """The extensions that can be built here. SystemExit if one named in `required` cannot."""
    found = {"torch": (torch_problem(), torch_binding), "cuda": (cuda_problem(), cuda_binding)}
    unknown = set(required) - set(found)
    if unknown:
        names = ", ".join(found)
        sys.exit(f"AQLM_C_REQUIRE: got {', '.join(sorted(unknown))}, expected a comma-separated list of: {names}")
    print("✓ aqlm_c._core")
    for name, (problem, _) in found.items():
        print(f"✗ aqlm_c._{name}: {problem}" if problem else f"✓ aqlm_c._{name}", flush=True)
        if problem and name in required:
            sys.exit(f"AQLM_C_REQUIRE={name}, but {problem}")
    return [core_binding()] + [binding() for problem, binding in found.values() if not problem]


class BuildCLib(build_clib):
    """Keeps the objects between builds, editable ones too: they depend on no Python."""

    def finalize_options(self):
        super().finalize_options()
        self.build_clib = self.build_temp = f"build/clib.{get_platform()}"

    def build_libraries(self, libraries):
        for name, _ in libraries:  # `ar` would keep the members of files that are gone
            Path(self.build_clib, f"lib{name}.a").unlink(missing_ok=True)
        super().build_libraries(libraries)


class BuildExt(build_ext):
    def run(self):
        self.run_command("build_clib")  # which `build_ext --inplace` alone would skip
        super().run()

    def build_extensions(self):
        """Without the path of this machine's Python in what is linked: a wheel is for others."""
        for name in ("linker_so", "linker_so_cxx"):
            command = getattr(self.compiler, name, None) or []
            setattr(self.compiler, name, [part for part in command if not part.startswith("-Wl,-rpath")])
        super().build_extensions()

    def build_extension(self, ext):
        """Objects of CUDA are kept between builds, as those of the C libraries are."""
        kernels = [path for path in ext.sources if path.endswith(".cu")]
        ext.sources = [path for path in ext.sources if path not in kernels]
        some = "" if len(compiled_gpus()) == len(GPUS) else f"-{'-'.join(compiled_gpus())}"
        objects = compile_kernels(kernels, f"build/cuda.{get_platform()}{some}", self.spawn)
        ext.extra_objects += objects
        ext.depends += objects
        super().build_extension(ext)


if __name__ == "__main__":
    setup(
        ext_modules=bindings([name for name in os.environ.get("AQLM_C_REQUIRE", "").split(",") if name]),
        libraries=c_libraries(compiled_isas()),
        cmdclass={"build_clib": BuildCLib, "build_ext": BuildExt},
        options={
            "bdist_wheel": {"py_limited_api": "cp310"},
            "egg_info": {} if compiled_gpus() else {"tag_build": "+cpu"},
        },
    )
