"""The fuzzers, for a few seconds each and always the same cases; longer by hand: `python tests/fuzz/NAME.py --help`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


@pytest.mark.parametrize(("name", "seconds"), [("doors", 4), ("directories", 6), ("inputs", 4)])
def test_nothing_crashes_hangs_or_surprises(name, seconds):
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--seconds", str(seconds), "--seed", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["cases"] > 5 and facts["peak GiB"] < 3


@pytest.mark.slow
def test_no_kill_and_no_full_disk_loses_anything():
    mounts = [] if os.geteuid() == 0 else ["--disks", "0", "--read-only", "0"]
    command = [sys.executable, str(FOLDER / "kill.py"), "--kills", "200", *mounts]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-4000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["kills"] == 200 and counts["results equal"] > 50
    assert mounts or counts["full disks"] + counts["disks that were not full"] == 20
