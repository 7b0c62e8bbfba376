"""Installs a wheel and an sdist in clean environments and runs smoke.py in each: `make check-wheels`.

    python tests/build/check_wheels.py WHEEL SDIST PYTHON...

Each PYTHON gets an environment without torch and one with it. Between them the environments have the oldest and the
newest of NumPy, torch and transformers that are supported. The sdist is built in the first PYTHON, outside of the
checkout, without torch and with it. Needs the network; an environment with torch for GPUs takes 6 GB, one at a time.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SMOKE = Path(__file__).resolve().with_name("smoke.py")
# By Python: NumPy, then what stands beside it with torch. What is not named is the newest that pip finds.
OLDEST = ["numpy==1.26.0", "torch==2.11.*", "transformers==4.56.0"]
WANTED = {
    (3, 10): OLDEST,
    (3, 11): ["numpy", "torch==2.13.*", "transformers"],
    (3, 12): ["numpy==1.26.*", "torch", "transformers==4.56.*"],
}
NEWEST = ["numpy", "torch", "transformers"]


def run(*command, cwd, **env):
    """What the command printed; SystemExit with it if it failed."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MAKE", "VIRTUAL"))}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=kept | env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


class Environment:
    """An environment of one Python, in a folder that is removed at the end."""

    def __init__(self, folder, python, name):
        self.folder, self.name = Path(folder, name), name
        run(python, "-m", "venv", self.folder, cwd=folder)
        self.python = self.folder / "bin" / "python"

    def install(self, *what, **env):
        run(
            self.python,
            "-m",
            "pip",
            "install",
            "--disable-pip-version-check",
            "-q",
            "--no-compile",
            *what,
            cwd=self.folder,
            **env,
        )

    def smoke(self, *arguments):
        began = time.monotonic()
        said = run(self.python, SMOKE, *arguments, cwd=self.folder)
        print(f"{self.name}, {time.monotonic() - began:.0f} s\n{said}", end="", flush=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        shutil.rmtree(self.folder)


def check_wheel(wheel, python, folder):
    version = tuple(map(int, run(python, "-c", "import sys; print(*sys.version_info[:2])", cwd=folder).split()))
    numpy, *others = WANTED.get(version, NEWEST)
    label = "{}.{}".format(*version)
    with Environment(folder, python, f"{label} without torch") as environment:
        environment.install(wheel, numpy)
        environment.smoke("--without-torch")
    with Environment(folder, python, f"{label} with torch") as environment:
        environment.install(f"{wheel}[hf]", numpy, *others)
        environment.smoke()


def check_sdist(sdist, python, folder):
    """Without torch the core alone is built, by pip in an isolated environment; then again for torch."""
    with Environment(folder, python, "sdist") as environment:
        environment.install(sdist)
        environment.smoke("--without-torch")
        environment.install("torch==2.13.*")  # before what must see it
        required = {"AQLM_C_REQUIRE": "torch"}
        environment.install("--no-deps", "--force-reinstall", "--no-cache-dir", sdist, **required)
        environment.install(f"{sdist}[hf]", **required)
        environment.smoke()


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("sdist", type=Path)
    parser.add_argument("pythons", nargs="+", metavar="PYTHON")
    arguments = parser.parse_args()
    pythons = [shutil.which(python) for python in arguments.pythons]
    if None in pythons:
        sys.exit(f"PYTHONS: got {arguments.pythons[pythons.index(None)]}, expected interpreters that are installed")
    with tempfile.TemporaryDirectory(prefix="check-wheels-") as folder:
        for python in pythons:
            check_wheel(arguments.wheel.resolve(), python, folder)
        check_sdist(arguments.sdist.resolve(), pythons[0], folder)
    print(f"✓ {len(pythons)} Pythons, without torch and with it, and the sdist")


if __name__ == "__main__":
    main()
