"""clang-tidy over the C core, the kernels of this machine and both bindings: python tests/build/tidy.py [file ...]

Each file is read with the flags that setup.py compiles it with; headers of Python, NumPy and torch count as the
system's. Which checks: .clang-tidy. Exits with 1 if there is a finding.
"""

import os
import runpy
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TIDY = Path(sys.executable).with_name("clang-tidy")
# Without this the analyzer takes 48 s of CPU time for two files, most of it in templates that are not ours; with it 11.
OWN_CODE = ["-Xclang", "-analyzer-config", "-Xclang", "c++-template-inlining=false"]


def flags_of_files():
    """The compiler's flags for every file that is read, by its path."""
    build = runpy.run_path("setup.py", run_name="setup")
    found = {}
    for _, library in build["c_libraries"](build["compiled_isas"]()):
        macros = [f"-D{name}={value}" for name, value in library["macros"]]
        for path in library["sources"]:
            found[path] = [*library["cflags"], *macros, "-Icsrc"]
    for binding in (build["core_binding"](), build["torch_binding"]()):
        macros = [f"-D{name}={value}" for name, value in binding.define_macros]
        folders = ["-Icsrc", "-isystem", sysconfig.get_path("include")]
        for folder in set(binding.include_dirs) - {"csrc"}:
            folders += ["-isystem", folder]
        for path in binding.sources:
            found[path] = [*binding.extra_compile_args, *macros, *folders, *OWN_CODE * path.endswith(".cpp")]
    return found


def check(path, flags):
    """What clang-tidy says of a file, or nothing."""
    run = subprocess.run([TIDY, "--quiet", path, "--", *flags], capture_output=True, text=True)
    return run.stdout + run.stderr if run.returncode else ""


def main(wanted):
    os.chdir(ROOT)
    files = {path: flags for path, flags in flags_of_files().items() if not wanted or path in wanted}
    largest_first = sorted(files, key=lambda path: (not path.endswith(".cpp"), -Path(path).stat().st_size))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        said = [text for text in pool.map(lambda path: check(path, files[path]), largest_first) if text]
    print(*said, sep="\n", end="" if not said else "\n")
    print(f"{'✗' if said else '✓'} clang-tidy: {len(files)} files, {len(said)} with findings")
    sys.exit(bool(said))


if __name__ == "__main__":
    main(sys.argv[1:])
