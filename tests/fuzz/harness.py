"""What the fuzzers share: cases by seed and number, a limit of memory, and a parent that sees crashes and hangs.

A fuzzer calls `run(case, ...)`. `case(rng, number)` makes one input, gives it to the project and returns what came of
it in a word; anything wrong it raises. A case depends on the seed and its number alone: `--case N` does it again.
"""

import argparse
import contextlib
import faulthandler
import io
import json
import mmap
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

MEMORY = 3 * 2**30
PATIENCE = 60.0  # seconds for a case


def run(case, description, prepare=None, sanitized=None):
    """The fuzzer's main: exit code 1 for a case that crashed, hung, or raised what it must not."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="only this one, with what it raises")
    parser.add_argument("--sanitized", action="store_true", help="with AddressSanitizer and UBSan in the C code")
    parser.add_argument("--keep-going", action="store_true", help="after what a case must not raise")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is None and options.case is None:
        sys.exit(_parent(options, sanitized))
    if not os.environ.get("FUZZ_SANITIZED"):
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    faulthandler.enable()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        if prepare is not None:
            prepare(Path(folder))
        if options.case is not None:
            print(case(random.Random(f"{options.seed}:{options.case}"), options.case))
            sys.exit(0)
        sys.exit(_child(case, options))


def _child(case, options):
    counts, number, started = Counter(), 0, time.monotonic()
    with open(options.child, "r+b") as file, mmap.mmap(file.fileno(), 4096) as shared:
        while time.monotonic() - started < options.seconds:
            struct.pack_into("<qd", shared, 0, number, time.monotonic())
            try:
                counts[case(random.Random(f"{options.seed}:{number}"), number)] += 1
            except BaseException:
                print(f"case {number}: it raised", file=sys.stderr)
                traceback.print_exc()
                if not options.keep_going:
                    return 1
                counts["WRONG"] += 1
            number += 1
        struct.pack_into("<qd", shared, 0, number, 0.0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    facts = {"cases": number, "outcomes": dict(counts.most_common()), "seconds": round(time.monotonic() - started)}
    print(json.dumps({**facts, "peak GiB": round(peak, 2)}), flush=True)
    os._exit(0)  # threads of the libraries need not be waited for


def _parent(options, sanitized):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    if options.sanitized:
        sanitized.build()
        environment |= sanitized.environment()
    with tempfile.NamedTemporaryFile() as file:
        file.write(bytes(4096))
        file.flush()
        command = [sys.executable, sys.argv[0], "--seconds", options.seconds, "--seed", options.seed]
        command += ["--keep-going"] * options.keep_going
        child = subprocess.Popen([*map(str, command), "--child", file.name], env=environment)
        while child.poll() is None:
            time.sleep(0.1)
            number, since = struct.unpack("<qd", Path(file.name).read_bytes()[:16])
            if since and time.monotonic() - since > PATIENCE:
                child.send_signal(signal.SIGABRT)  # faulthandler says where it is
                child.wait()
                print(f"case {number}: it hung for {PATIENCE:g} s", file=sys.stderr)
        number = struct.unpack("<qd", Path(file.name).read_bytes()[:16])[0]
    if child.returncode:
        print(
            f"ended with {child.returncode} in case {number}; again: {sys.argv[0]} --seed {options.seed} "
            f"--case {number}{' --sanitized' * options.sanitized}",
            file=sys.stderr,
        )
    return int(child.returncode != 0)


def command_line(*arguments):
    """(exit code, stdout, stderr) of the command line in this process; raises for what no user may see."""
    from aqlm_c.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    stdout, stderr = out.getvalue(), err.getvalue()
    assert code in (0, 2), (code, stderr)
    assert "Traceback" not in stderr and "(not expected: " not in stderr, stderr
    assert code == 0 or len(stderr.splitlines()[-1]) < 3000, stderr
    assert "\x1b" not in stderr and (arguments[0] == "generate" or "\x1b" not in stdout), (stdout, stderr)
    return code, stdout, stderr
