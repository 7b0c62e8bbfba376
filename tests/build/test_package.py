"""The package itself: its public names, and what importing them costs."""

import subprocess
import sys

import pytest

import aqlm_c


def test_public_names_resolve():
    for name in aqlm_c.__all__:
        assert getattr(aqlm_c, name) is not None
    assert set(aqlm_c.__all__) <= set(dir(aqlm_c))
    with pytest.raises(AttributeError, match="nosuch"):
        aqlm_c.nosuch  # noqa: B018


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_every_way_in_says_what_is_missing_and_the_cure(package):
    """As where it was never installed; each import in a process that has none of it yet."""
    ways = ["import aqlm_c.hf", "from aqlm_c import load_model", "import aqlm_c.hf.models"]
    if package == "torch":
        modules = (
            "quantize",
            "evaluate",
            "nn.linear",
            "io.data",
            "pipeline.pipeline",
            "calibrate.hessians",
            "train.block",
        )
        ways += ["from aqlm_c import quantize_model, perplexity", *(f"import aqlm_c.{module}" for module in modules)]
    code = """
import sys
class Missing:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == sys.argv[1]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing)
for way in sys.argv[2:]:
    try:
        exec(way)
    except ImportError as error:
        print(error)
    else:
        print("imported", way)
"""
    done = subprocess.run([sys.executable, "-c", code, package, *ways], capture_output=True, text=True)
    lines = set(done.stdout.splitlines())
    assert lines == {f"{package}: got none that is installed here, expected one: pip install 'aqlm-c[hf]'"}, done


def test_one_weight_needs_no_torch():
    code = "import sys, aqlm_c; aqlm_c.quantize_weight, aqlm_c.AqlmConfig, aqlm_c.QuantizationReport"
    check = "sys.exit(bool({'torch', 'transformers', 'rich'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", f"{code}; {check}"]).returncode == 0
