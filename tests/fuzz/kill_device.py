"""SIGKILL at random moments of `aqlm-c quantize` and `aqlm-c finetune --pv`, with a work directory, on a device.

    python tests/fuzz/kill_device.py --device cuda --quantize 20 --finetune 20

The same command, undisturbed, then ends with the bytes of a run without a kill. Each run is a process of its own, since
CUDA lives in no fork (kill.py has many more kills, on the CPU). The last line is JSON: kills, kills that came after
something was kept, results that were equal.
"""

import argparse
import concurrent.futures
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

LENGTH = 64  # tokens of a sequence
QUANTIZE = ["--scheme", "2x6g8", "--embeddings", "dense", "--samples", "32", "--finetune-epochs", "2"]
QUANTIZE += ["--batch-size", "8"]  # else it follows the memory that is free
FINETUNE = ["--pv", "--steps", "60", "--batch-size", "8", "--set", "save_interval=5"]


class Kills:
    """The runs of one command. making: its arguments from the folders of the result and of the work."""

    def __init__(self, folder, device, making, seed):
        self.folder, self.device, self.making = folder, device, making
        self.rng, self.counts = random.Random(seed), Counter()
        started = time.perf_counter()
        self.right = self.finished(folder / "right", folder / "right-work")
        self.seconds = time.perf_counter() - started

    def started(self, out, work):
        command = [sys.executable, "-m", "aqlm_c", *self.making(out, work), "--device", self.device, "--quiet"]
        return subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def finished(self, out, work):
        """The weights of a run that is not disturbed."""
        process = self.started(out, work)
        _, said = process.communicate()
        assert process.returncode == 0, said
        return (out / "model.safetensors").read_bytes()

    def once(self, number, moment):
        """One kill, `moment` seconds after the start, then a run to the end."""
        out, work = self.folder / f"{number}", self.folder / f"{number}-work"
        process = self.started(out, work)
        try:
            process.communicate(timeout=moment)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        killed = process.returncode != 0  # perhaps when all was done
        kept = killed and work.exists() and any(path.suffix == ".safetensors" for path in work.rglob("*"))
        found = (out / "model.safetensors").read_bytes() if out.exists() else self.finished(out, work)
        assert found == self.right, f"another result after {moment:.2f} s"
        for path in (out, work):
            shutil.rmtree(path, ignore_errors=True)
        return Counter({"kills": int(killed), "kills after something was kept": int(kept), "results equal": 1})

    def run(self, wanted, side_by_side):
        """`wanted` kills, from the moment on at which Python has imported what it needs, about."""
        number = 0
        with concurrent.futures.ThreadPoolExecutor(side_by_side) as pool:
            while self.counts["kills"] < wanted:
                some = range(number, number + min(side_by_side, wanted - self.counts["kills"]))
                moments = [self.rng.uniform(0.3, 1) * self.seconds for _ in some]
                self.counts += sum(pool.map(self.once, some, moments), Counter())
                number = some.stop
        return self.counts


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quantize", type=int, default=20, help="kills of this command")
    parser.add_argument("--finetune", type=int, default=20, help="and of this one")
    parser.add_argument("--side-by-side", type=int, default=1, help="runs at once")
    parser.add_argument("--hidden", type=int, default=256, help="size of the model")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    import numpy as np
    import torch
    from tiny import BYTES, byte_tokenizer, tiny_llama

    found = {"device": args.device}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = {"hidden_size": args.hidden, "intermediate_size": 2 * args.hidden, "num_hidden_layers": 4}
        tiny_llama(torch.bfloat16, vocab_size=BYTES, **sizes).save_pretrained(folder / "model")
        byte_tokenizer().save_pretrained(folder / "model")
        np.save(folder / "tokens.npy", np.random.default_rng(args.seed).integers(0, BYTES, (64, LENGTH)))
        data = ["--data", folder / "tokens.npy", "--sequence-length", LENGTH]

        def quantize(out, work):
            return ["quantize", folder / "model", out, *QUANTIZE, *data, "--work-dir", work]

        def finetune(out, work):
            return ["finetune", folder / "q" / "right", folder / "model", out, *FINETUNE, *data, "--work-dir", work]

        for what, making, wanted in (("q", quantize, args.quantize), ("f", finetune, args.finetune)):
            (folder / what).mkdir()
            kills = Kills(folder / what, args.device, making, args.seed)
            counts = kills.run(wanted, args.side_by_side)
            found[making.__name__] = {"seconds": kills.seconds, **counts}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
