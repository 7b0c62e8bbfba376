"""Faults at random moments of `aqlm-c quantize --work-dir`: SIGKILL, full disks, disks that turn read-only.

Runs are forks of one warm process. After each fault: OUT is absent, the old model or complete; what is finished in the
work directory is as it was; the same command ends with the bytes of a run without faults. OUT and the work directory
lie on one file system or two. Full and read-only disks are tmpfs in a mount namespace of their own, which needs root.
"""

import argparse
import ctypes
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}

BLOCKS = 3
OPTIONS = ["--scheme", "2x4g8", "--samples", "8", "--sequence-length", "32", "--threads", "1", "--finetune-epochs", "1"]
OPTIONS += ["--set", "finetune_lookahead=0", "--set", "max_sweeps=2", "--set", "ldl_passes=2"]
CLONE_NEWNS, MS_RDONLY, MS_REMOUNT, MS_REC, MS_PRIVATE = 0x20000, 1, 32, 16384, 1 << 18
LIBC = ctypes.CDLL(None, use_errno=True)


class Faults:
    """The runs, and what came of them in `counts`."""

    def __init__(self, folder, seed):
        self.folder, self.rng, self.counts = folder, random.Random(seed), Counter()
        self._prepare()
        started = time.perf_counter()
        code, text = self.run(folder / "right", folder / "right-work")
        assert code == 0, text
        self.seconds = time.perf_counter() - started
        self.right = files(folder / "right")

    def _prepare(self):
        """Import what a run imports; no thread may be alive, nor a lock held, in what forks."""
        import torch
        import transformers
        from tiny import BYTES, byte_tokenizer, tiny_llama

        from aqlm_c import _core
        from aqlm_c.cli.main import main

        torch.set_num_threads(1)
        _core.set_num_threads(1)
        transformers.utils.logging.disable_progress_bar()
        model = tiny_llama(torch.bfloat16, vocab_size=BYTES, num_hidden_layers=BLOCKS)
        model.save_pretrained(self.folder / "model")
        byte_tokenizer().save_pretrained(self.folder / "model")
        free = ["quantize", self.folder / "model", self.folder / "old", "--preset", "fast", *OPTIONS[:8]]
        assert main([*map(str, free), "--quiet"]) == 0
        self.old = files(self.folder / "old")

    def run(self, out, work, kill_after=None, more=()):
        """(exit code, stderr) of the command in a fork; -9 where it was killed first, `kill_after` seconds."""
        command = ["quantize", self.folder / "model", out, *OPTIONS, "--work-dir", work, "--quiet", *more]
        said = self.folder / "stderr"
        child = os.fork()
        if not child:
            os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            from aqlm_c.cli.main import main

            os._exit(main(list(map(str, command))))
        if kill_after is not None:
            until = time.monotonic() + kill_after
            while time.monotonic() < until:
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    return os.waitstatus_to_exitcode(status), said.read_text()
                time.sleep(0.002)
            os.kill(child, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said.read_text()

    def check(self, out, work, before, overwritten):
        """Raise unless nothing finished is lost. `before`: the blocks that were finished."""
        after = blocks(work)
        assert all(after.get(name) == content for name, content in before.items()), "a finished block was lost"
        if out.exists():
            assert files(out) in ([self.right, self.old] if overwritten else [self.right]), "OUT is half a model"
        return after

    def kills(self, wanted):
        """Runs that are killed once or several times and then left alone."""
        while self.counts["kills"] < wanted:
            places = [Path(tempfile.mkdtemp(dir=folder)) for folder in self.rng.sample(PLACES * 2, 2)]
            out, work = places[0] / "out", places[1] / "work"
            overwritten = self.rng.random() < 0.3
            if overwritten:
                shutil.copytree(self.folder / "old", out)
            more, finished, code = ["--overwrite"] * overwritten, {}, -signal.SIGKILL
            while code and self.counts["kills"] < wanted and self.rng.random() < 0.9:
                code, _ = self.run(out, work, self.rng.uniform(0, 1.1 * self.seconds), more)
                if code:
                    assert code == -signal.SIGKILL, code
                    self.counts["kills"] += 1
                    finished = self.check(out, work, finished, overwritten)
                    self.counts[f"kills with {len(finished)} finished blocks"] += 1
                    if self.rng.random() < 0.3:
                        break
            self.end(out, work, finished, more)
            left = [path.name for path in places[0].iterdir()]
            assert left == ["out"], left  # what killed processes left is cleared up
            for place in places:
                shutil.rmtree(place, ignore_errors=True)

    def end(self, out, work, finished, more=()):
        """The same command, undisturbed: the right result, without doing a finished block again."""
        if not (out.exists() and files(out) == self.right):
            code, text = self.run(out, work, more=more)
            assert code == 0, text
        self.check(out, work, finished, False)
        assert files(out) == self.right, "another result"
        self.counts["results equal"] += 1

    def disks(self, wanted):
        """Runs whose disk is full at a random point, of OUT, of the work directory or of both."""
        needed = sum(map(len, self.right.values()))
        for _ in range(wanted):
            kind = self.rng.choice(["OUT", "work", "both"])
            size = self.rng.uniform(0.05, 1.1) * needed * (2.5 if kind == "both" else 1)
            self.in_namespace(lambda size=size, kind=kind: self._full(int(size), kind))

    def _full(self, size, kind):
        disk, other = self.folder / "disk", Path(tempfile.mkdtemp(dir=self.folder))
        mount(disk, size)
        out = (disk if kind != "work" else other) / "out"
        work = (disk if kind != "OUT" else other) / "work"
        code, text = self.run(out, work)
        finished = self.check(out, work, {}, False)
        self.counts["full disks" if code else "disks that were not full"] += 1
        if code:
            assert code == 2 and text.count("\n") == 1 and text.startswith("aqlm-c: "), text
            kept = list(out.parent.glob("out.finished-*"))
            assert bool(kept) == ("is kept in" in text), (kept, text)
            self.counts["full disks after the model was written, which is kept"] += len(kept)
            for path in kept:
                assert (path / "model.safetensors").read_bytes() == self.right["model.safetensors"]
        mount(disk, 64 * 2**20, MS_REMOUNT)
        self.end(out, work, finished)

    def read_only(self, wanted):
        """OUT or the work directory in a folder that cannot be written, from the start or from some moment on."""
        for number in range(wanted):
            self.in_namespace(lambda number=number: self._read_only(number))

    def _read_only(self, number):
        disk, other = self.folder / "disk", Path(tempfile.mkdtemp(dir=self.folder))
        mount(disk, 64 * 2**20)
        out, work = (disk / "out", other / "work") if number % 2 else (other / "out", disk / "work")
        finished = {}
        if number % 3:  # later: a run that was killed has begun
            self.run(out, work, self.rng.uniform(0.2, 1) * self.seconds)
            finished = self.check(out, work, {}, False)
        if not out.exists():
            mount(disk, 64 * 2**20, MS_REMOUNT | MS_RDONLY)
            code, text = self.run(out, work)
            assert code == 2 and text.count("\n") == 1 and ("OUT" in text or "work_dir" in text), text
            self.counts["read-only folders refused"] += 1
            mount(disk, 64 * 2**20, MS_REMOUNT)
        self.end(out, work, finished)

    def in_namespace(self, function):
        """Run a function in a fork with mounts of its own, and take over what it counts."""
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            try:
                os.close(reader)
                if LIBC.unshare(CLONE_NEWNS) or LIBC.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None):
                    raise OSError(ctypes.get_errno(), "no mount namespace: this needs root")
                (self.folder / "disk").mkdir(exist_ok=True)
                self.counts = Counter()
                function()
                os.write(writer, json.dumps(self.counts).encode())
                os._exit(0)
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(1)
        os.close(writer)
        with open(reader, "rb") as pipe:
            told = pipe.read()
        assert os.waitpid(child, 0)[1] == 0, "see above"
        self.counts += Counter(json.loads(told))


def mount(folder, size, flags=0):
    if LIBC.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", flags, f"size={size}".encode()):
        raise OSError(ctypes.get_errno(), f"mount: {os.strerror(ctypes.get_errno())}")


VARY = {"report.json", "README.md", "run.yaml"}  # seconds, paths


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in VARY}


def blocks(work):
    return {path.name: path.read_bytes() for path in work.glob("block-*.safetensors")} if work.is_dir() else {}


PLACES = [path for path in (tempfile.gettempdir(), "/dev/shm") if os.access(path, os.W_OK)]

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for option, default in (("kills", 200), ("disks", 20), ("read-only", 6), ("seed", 0)):
        parser.add_argument(f"--{option}", type=int, default=default)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        faults = Faults(Path(name), chosen.seed)
        faults.kills(chosen.kills)
        faults.disks(chosen.disks)
        faults.read_only(chosen.read_only)
        print(json.dumps({**faults.counts, "seconds of a run": round(faults.seconds, 2)}), flush=True)
        os._exit(shutil.rmtree(name) or 0)
