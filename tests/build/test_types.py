"""The package's annotations hold, and the stubs say what the extension modules have."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("command", [["-m", "mypy"], ["tests/build/stubs_check.py"]], ids=["mypy", "stubtest"])
def test_types(command):
    pytest.importorskip("mypy")
    result = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
