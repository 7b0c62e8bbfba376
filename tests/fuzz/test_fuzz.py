"""The fuzzers, for a few seconds each and always the same cases; longer by hand: `python tests/fuzz/NAME.py --help`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


@pytest.mark.parametrize(("name", "seconds"), [("doors", 4), ("directories", 8), ("inputs", 4)])
def test_nothing_crashes_hangs_or_surprises(name, seconds):
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--seconds", str(seconds), "--seed", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["cases"] > 5 and facts["peak GiB"] < 3
