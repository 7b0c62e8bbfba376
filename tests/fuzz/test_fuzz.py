"""The fuzzers, a minute each, side by side, from a fixed seed; longer by hand: `python tests/fuzz/NAME.py --help`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
NAMES = ("doors", "directories", "inputs")


@pytest.fixture(scope="module")
def fuzzed():
    """name -> (exit code, stdout, stderr) of each fuzzer."""
    command = ["--seconds", "60", "--seed", "0"]
    running = {
        name: subprocess.Popen(
            [sys.executable, str(FOLDER / f"{name}.py"), *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in NAMES
    }
    try:
        texts = {name: process.communicate(timeout=400) for name, process in running.items()}
    finally:
        for process in running.values():
            process.kill()
    return {name: (running[name].returncode, *text) for name, text in texts.items()}


@pytest.mark.parametrize("name", NAMES)
def test_nothing_crashes_hangs_or_surprises(name, fuzzed):
    code, stdout, stderr = fuzzed[name]
    assert code == 0, stderr[-4000:]
    facts = json.loads(stdout.splitlines()[-1])
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


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--batching"]], ids=["one by one", "batched"])
def test_a_server_outlives_its_clients(options):
    pytest.importorskip("fastapi", reason="needs aqlm-c[serve]")
    command = [sys.executable, str(FOLDER / "serve.py"), "--seconds", "60", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout.splitlines()[-1])["requests"] > 50


@pytest.mark.slow
def test_a_kill_on_a_device_changes_no_bit():
    command = [sys.executable, str(FOLDER / "kill_device.py"), "--quantize", "2", "--finetune", "2", "--hidden", "32"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert all(found[what]["kills"] == 2 and found[what]["results equal"] >= 2 for what in ("quantize", "finetune"))
