"""Runs of several ranks, which are forks of one warm process. As a script: those of `test_distributed.py`, by name.

The process has used no threads yet, so that it may fork; it says what came of each run as JSON on stdout.
"""

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
os.environ |= {"TORCH_CPP_LOG_LEVEL": "ERROR"}

import numpy as np
import torch
import transformers
from tiny import BYTES, byte_tokenizer, random_model, random_tokens, tiny_llama
from transformers import MixtralConfig

import aqlm_c
from aqlm_c import _core, distributed
from aqlm_c.cli.main import main
from aqlm_c.pipeline.resume import sha256_of
from aqlm_c.quantize import quantize_model

TUNED = {"finetune_epochs": 2, "finetune_batch_size": 4, "finetune_learning_rate": 3e-3, "finetune_held_out": 0.25}
SOLVED = {"ldl_passes": 1, "max_sweeps": 1, "init_max_iter": 3}
OPTIONS = ["--scheme", "2x4g8", "--samples", "8", "--sequence-length", "32", "--threads", "1", "--embeddings", "2x4g8"]
OPTIONS += ["--finetune-epochs", "2", "--finetune-batch-size", "2", "--set", "max_sweeps=2", "--set", "ldl_passes=2"]


def ranks(size, function, *args, meddle=None):
    """(status, stderr) of each of `size` forks that call function(*args), and seconds from `meddle` to their ends.

    The status is the exit code or minus the signal. meddle(pids) is called once while they run.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    pids, outputs = [], [tempfile.TemporaryFile() for _ in range(size)]  # noqa: SIM115
    for rank, output in enumerate(outputs):
        if pid := os.fork():
            pids.append(pid)
            continue
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 1)
        os.dup2(output.fileno(), 2)
        code = 70
        with contextlib.suppress(SystemExit):
            code = function(*args)
        sys.stderr.flush()
        os._exit(code or 0)
    if meddle:
        meddle(pids)
    started = time.monotonic()
    signal.alarm(120)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    signal.alarm(0)
    seconds = time.monotonic() - started
    for output in outputs:
        output.seek(0)
    return {"codes": statuses, "lines": [output.read().decode() for output in outputs], "seconds": seconds}


def model_of(name):
    if name == "experts":
        config = MixtralConfig(
            **{"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
            **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
        )
        return random_model(config)
    return tiny_llama(tie_word_embeddings=name == "tied")


MODELS = {
    "tuned": {**TUNED, "finetune_search": 1, "rules": {"lm_head": "2x5g8", "embed_tokens": "2x4g4"}},
    "tied": {**TUNED, "rules": {"embed_tokens": "2x4g8"}},
    "experts": TUNED,
    "corrected": {**TUNED, "error_correction": 0.5, "tune_remaining": 1, "finetune_target": "original"}
    | {"tune_remaining_learning_rate": 1e-4, "fisher_share": 0.3, "rules": {"embed_tokens": "2x4g4"}},
}


def quantized(name, folder, batch_size=1, work_dir=None, without_data=False):
    """Quantize a model; each rank leaves what it has at the end, as a hash, and what differs from run to run."""
    torch.set_num_threads(1)
    _core.set_num_threads(1)
    with distributed.started() as group:
        model = model_of(name)
        config = aqlm_c.AqlmConfig.from_scheme("2x4g8", **SOLVED, **MODELS[name])
        tokens = None if without_data else random_tokens(7, 12)
        report = quantize_model(
            model, tokens, config, batch_size=None if without_data else batch_size, work_dir=work_dir
        )
        layers = [{**layer.to_dict(), "seconds": 0} for layer in report.layers]
        blocks = [{**block.to_dict(), "seconds": 0} for block in report.blocks]
        found = {
            "state": sha256_of(sorted(model.state_dict().items())),
            "report": json.dumps([layers, blocks], sort_keys=True),
            "ranks": report.to_dict().get("ranks"),
            "resumed": report.to_dict().get("resumed_ranks"),
            "improved": sum(block["held_out_after"] < block["held_out_before"] for block in blocks),
            "layers": len(layers),
        }
        (folder / f"{name}-{group.size}-{group.rank}.json").write_text(json.dumps(found))


def same_bits(folder):
    """What every rank has after runs of one, two and, where experts see few tokens, three."""
    found = {}
    for name in (*MODELS, "without data"):
        args = ("tuned", folder, 1, None, True) if name == "without data" else (name, folder)
        ends = {size: ranks(size, quantized, *args) for size in ((1, 2, 3) if name == "experts" else (1, 2))}
        assert all(end["codes"] == [0] * size and not any(end["lines"]) for size, end in ends.items()), ends
        kind = args[0]
        found[name] = {
            size: [json.loads((folder / f"{kind}-{size}-{rank}.json").read_text()) for rank in range(size)]
            for size in ends
        }
    return found


def added(folder):
    """Sums of the parts of two ranks as they are, in pieces of 7 numbers, and the most numbers that came at once."""
    distributed._PIECE = 7
    received, recv = [], torch.distributed.recv

    def counted(tensor, source):
        received.append(tensor.nbytes)
        return recv(tensor, source)

    torch.distributed.recv = counted
    found = []
    with distributed.started() as group:
        for root, dtype, size in itertools.product((0, 1), (torch.bfloat16, torch.float32), (0, 7, 30)):
            parts = [random_floats(rank, size).to(dtype) for rank in range(2)]
            total = group.sum_on(parts[group.rank].view(2, -1) if size % 2 == 0 else parts[group.rank], root)
            exact = parts[0].float() + parts[1].float()
            found.append(total is None if group.rank != root else torch.equal(total.view(-1), exact))
            found.append(group.rank != root or not size or max(received) == 7 * dtype.itemsize)
            received.clear()
        for root, having, size in itertools.product((0, 1), ([0], [1], [1, 0]), (0, 7, 30)):
            parts = [random_floats(rank, size).double() for rank in range(2)]
            part = parts[group.rank].numpy() if group.rank in having else None
            total = group.sum_in_order(part, having, root, lambda size=size: np.full(size, np.nan))
            exact = sum(parts[rank] for rank in having).numpy()
            found.append(total is None if group.rank != root else np.array_equal(total, exact))
            found.append(group.rank != root or max(received, default=0) <= 7 * 8)
            received.clear()
    (folder / f"added-{group.rank}.json").write_text(json.dumps(found))


def random_floats(seed, size):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def sums(folder):
    """Whether sums of two ranks are those of one process."""
    end = ranks(2, added, folder)
    return end | {"found": [json.loads(path.read_text()) for path in sorted(folder.glob("added-*.json"))]}


def resumed(folder):
    """Runs whose last block is done again by more or fewer ranks."""
    found = {}
    for first, then in ((2, 1), (1, 2)):
        work = folder / f"work-{first}-{then}"
        assert ranks(first, quantized, "tuned", folder, 1, work)["codes"] == [0] * first
        before = json.loads((folder / f"tuned-{first}-0.json").read_text())
        max(work.glob("*.safetensors")).unlink()
        end = ranks(then, quantized, "tuned", folder, 1, work)
        after = [json.loads((folder / f"tuned-{then}-{rank}.json").read_text()) for rank in range(then)]
        found[f"{first} {then}"] = {"before": before, "after": after, "end": end}
    return found


def command(folder, out, *options, other=()):
    """`aqlm-c quantize`; `other` options are of the last rank alone."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    given = ["quantize", folder / "model", folder / out, *OPTIONS, *options, *(other if last else ())]
    return main([str(one) for one in given])


def files(folder):
    return (
        {path.name: path.read_bytes().hex() for path in sorted(folder.glob("*.safetensors"))}
        if folder.exists()
        else None
    )


def prepare(folder):
    torch.set_num_threads(1)
    model = tiny_llama(torch.bfloat16, vocab_size=BYTES, num_hidden_layers=3)
    model.save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")


def command_line(folder):
    """Two ranks of the command line, and one, and refusals."""
    prepare(folder)
    found = {"two": ranks(2, command, folder, "two"), "one": ranks(1, command, folder, "one", "--quiet")}
    found["same"] = files(folder / "one") == files(folder / "two") != {}
    found["report"] = json.loads((folder / "two" / "report.json").read_text()).get("ranks")
    (folder / "text.txt").write_text("Other words than those of the other rank. " * 40)
    for name, other in (("options", ["--seed", 7]), ("data", ["--data", folder / "text.txt"])):
        found[name] = ranks(2, lambda other=other: command(folder, "refused", other=other))
        found[name]["out"] = (folder / "refused").exists()
    found["usage"] = ranks(2, command, folder, "refused", "--beam-size", -1)
    found["exists"] = ranks(2, command, folder, "two")
    found["many"] = ranks(3, command, folder, "refused", "--samples", 4, "--batch-size", 2)
    return found


def killed(folder, seed=0):
    """Two ranks, one of which is killed at a random moment, or interrupted; the same command then goes on."""
    prepare(folder)
    rng, found = random.Random(seed), []
    assert ranks(2, command, folder, "right", "--work-dir", folder / "work")["codes"] == [0, 0]
    for number, (who, how) in enumerate([(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGINT)]):
        out, work = f"out-{number}", folder / f"work-{number}"
        after = rng.choice(["fingerprint.json", *(f"block-{block:04d}.safetensors" for block in range(3))])

        def meddle(pids, who=who, how=how, file=work / after):
            until = time.monotonic() + 60
            while not file.exists() and time.monotonic() < until:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.1))
            os.kill(pids[who], how)

        end = ranks(2, command, folder, out, "--quiet", "--work-dir", work, meddle=meddle)
        again = ranks(2, command, folder, out, "--quiet", "--work-dir", work, "--overwrite")
        same = files(folder / out) == files(folder / "right")
        found.append({"who": who, "how": how, "end": end, "again": again, "same": same})
        shutil.rmtree(work)
    return found


def warm(folder):
    """Import what runs import; the forks then need not, and no thread may be alive."""
    import torch._dynamo  # by Adam
    import torch.distributed

    torch.set_num_threads(1)
    _core.set_num_threads(1)
    config = aqlm_c.AqlmConfig.from_scheme("2x4g8", **SOLVED, **TUNED)
    quantize_model(model_of("tied"), random_tokens(4, 12), config, batch_size=2)
    threads = Path("/proc/self/task")
    assert not threads.exists() or len(list(threads.iterdir())) == 1, list(threads.iterdir())


if __name__ == "__main__":
    warm(None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(json.dumps({what: globals()[what](Path(tempfile.mkdtemp(dir=folder))) for what in sys.argv[1:]}))
