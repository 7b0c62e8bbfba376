"""Fuzzes what is read from directories: checkpoints, dense, sharded and quantized, and work directories, by mutation.

Each is given to inspect --check, evaluate, generate, quantize or a resumed quantize: the answer is a result or a line.
"""

import shutil
import sys
from pathlib import Path

import harness
import mutate

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

SMALL = ["--scheme", "2x4g8", "--samples", "4", "--sequence-length", "16", "--preset", "fast", "--threads", "1"]
FIXED = {"work": ("block-0000.safetensors", "block-0001.safetensors", "fingerprint.json", "lock")}


def prepare(folder):
    """The directories that are mutated: small, and right."""
    global FOLDER
    import torch
    from tiny import BYTES, byte_tokenizer, tiny_llama

    torch.set_num_threads(1)
    FOLDER = folder
    model = tiny_llama(torch.bfloat16, vocab_size=BYTES)
    tokenizer = byte_tokenizer(chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}")
    for name, options in (("dense", {}), ("sharded", {"max_shard_size": "20KB"})):
        model.save_pretrained(folder / name, **options)
        tokenizer.save_pretrained(folder / name)
    rules = ["--rule", "mlp.down_proj=dense", "--rule", "layers.1.*up_proj=1x4g8"]
    for name, more in (("quantized", []), ("ruled", rules)):
        assert harness.command_line("quantize", folder / "dense", folder / name, *SMALL, *more)[0] == 0
    work = ["--work-dir", folder / "work"]
    assert harness.command_line("quantize", folder / "dense", folder / "first", *SMALL, *work)[0] == 0


def case(rng, number):
    source = rng.choice(["dense", "sharded", "quantized", "quantized", "ruled", "ruled", "work"])
    target = FOLDER / "case"
    shutil.copytree(FOLDER / source, target)
    files = sorted(path for path in target.iterdir())
    weights = [path for path in files if path.suffix == ".safetensors"] + [target / "config.json"] * 3
    for _ in range(rng.choice([1, 1, 1, 2])):
        path = rng.choice(weights if rng.random() < 0.4 and source != "work" else files)
        if path.is_file() and not path.is_symlink():
            mutate.mutate_file(rng, path)
    try:
        command = "resume" if source == "work" else rng.choice(["inspect", "evaluate", "generate", "quantize"])
        if command == "quantize" and source not in ("dense", "sharded"):
            command = "inspect"
        code = COMMANDS[command](target)[0]
        return f"{command} {'result' if code == 0 else 'refused'}"
    finally:
        shutil.rmtree(target)
        shutil.rmtree(FOLDER / "out", ignore_errors=True)


COMMANDS = {
    "inspect": lambda path: harness.command_line("inspect", path, "--check"),
    "evaluate": lambda path: harness.command_line("evaluate", path, "--sequence-length", 16, "--windows", 1),
    "generate": lambda path: harness.command_line("generate", path, "hello", "--max-new-tokens", 2),
    "quantize": lambda path: harness.command_line("quantize", path, FOLDER / "out", *SMALL, "--layers", "up_proj"),
    "resume": lambda path: harness.command_line(
        "quantize", FOLDER / "dense", FOLDER / "out", *SMALL, "--work-dir", path
    ),
}

if __name__ == "__main__":
    harness.run(case, __doc__, prepare)
