"""Builds both bindings with AddressSanitizer and UndefinedBehaviorSanitizer, beside the others: build/sanitized/.

`environment()` makes a process load them: with `doors.py --sanitized`.
"""

import os
import platform
import runpy
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "sanitized"
FLAGS = ["-O1", "-g", "-fPIC", "-fno-omit-frame-pointer", "-fsanitize=address,undefined"]
FLAGS += ["-fno-sanitize-recover=all", "-fno-sanitize=vptr"]
CC, CXX = os.environ.get("CC", "gcc"), os.environ.get("CXX", "g++")


def build():
    """Compile what is older than its sources; returns the paths by module."""
    os.chdir(ROOT)
    setup = runpy.run_path("setup.py", run_name="setup")
    FOLDER.mkdir(parents=True, exist_ok=True)
    newest = max(path.stat().st_mtime for path in ROOT.glob("csrc/**/*.*") if path.parent.name != "torch")
    torch_newest = max(newest, *(path.stat().st_mtime for path in ROOT.glob("csrc/torch/*")))
    objects = []
    for name, info in setup["c_libraries"](setup["compiled_isas"](platform.machine())):
        flags = [flag for flag in info["cflags"] if flag != "-O3"]
        macros = [f"-D{key}={value}" for key, value in info["macros"]]
        for source in info["sources"]:
            objects.append(_compile(CC, source, [*flags, *macros, "-Icsrc"], name, newest))
    made = {}
    for extension in (setup["core_binding"](), setup["torch_binding"]()):
        compiler = CXX if extension.language == "c++" else CC
        newest = torch_newest if compiler == CXX else newest
        flags = [flag for flag in extension.extra_compile_args if flag not in ("-O3", "-O2")]
        flags += [f"-I{folder}" for folder in [*extension.include_dirs, *_python_headers()]]
        flags += [f"-D{key}={value}" for key, value in extension.define_macros]
        own = [_compile(compiler, source, flags, extension.name, newest) for source in extension.sources]
        target = FOLDER / f"{extension.name.rpartition('.')[2]}.abi3.so"
        if not target.exists() or target.stat().st_mtime < newest:
            libraries = [f"-L{folder}" for folder in extension.library_dirs] + [f"-l{n}" for n in extension.libraries]
            command = [
                compiler,
                "-shared",
                *FLAGS,
                *own,
                *objects,
                "-o",
                target,
                *libraries,
                *extension.extra_link_args,
            ]
            subprocess.run(list(map(str, command)), check=True)
        made[extension.name] = target
    return made


def environment():
    """Variables of a process whose bindings are those of `build`."""
    runtime = [subprocess.run([CC, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
               for name in ("libasan.so", "libubsan.so")]  # fmt: skip
    options = {"LD_PRELOAD": " ".join(runtime), "FUZZ_SANITIZED": str(FOLDER)}
    options |= {"ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:handle_segv=1:abort_on_error=1"}
    return {**os.environ, **options, "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1:abort_on_error=1"}


def _compile(compiler, source, flags, name, newest):
    target = FOLDER / f"{name}-{source.replace('/', '-')}.o"
    if not target.exists() or target.stat().st_mtime < newest:
        subprocess.run(list(map(str, [compiler, *flags, *FLAGS, "-c", source, "-o", target])), check=True)
    return target


def _python_headers():
    import sysconfig

    return {sysconfig.get_path("include"), sysconfig.get_path("platinclude")}


if __name__ == "__main__":
    print(*build().values(), sep="\n")
    sys.exit(0)
