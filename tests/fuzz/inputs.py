"""Fuzzes the files a user names: --data (.txt .jsonl .npy .safetensors) and --config, made wrong from right ones.

Readers are called as the command line calls them: the answer is token ids or a run, or a ValueError or OSError of one
line that is not endless.
"""

import json
import os
import sys
from pathlib import Path

import harness
import mutate
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

OPTIONS = ["model", "out", "scheme", "preset", "data", "samples", "sequence_length", "shuffle", "seed", "threads"]
OPTIONS += ["layers", "work_dir", "memory_limit", "overwrite", "rules", "solver", "beam_size", "options", "cg_steps"]
OPTIONS += ["device", "device_memory_limit"]
RIGHT = {"model": "m", "out": "o", "scheme": "2x8g8", "preset": "fast", "data": ["a.txt"], "samples": 4, "seed": 3}
RIGHT |= {"rules": {"mlp": "1x8g8", r"layers\.0\.": "dense"}, "memory_limit": "8GiB", "layers": "up|down"}
TAGS = ["!!binary", "!!python/name:os.system", "!!timestamp", "!!float", "!!int", "!!set", "!!omap", "&a", "*a", "<<:"]
PATTERNS = ["(a+)+", ".*", "[", "(?P<a>b)\\1", "\\d{1,999}", "(" * 200, "x{99}{99}", "(?=a)", "a|b", "^$", "\\"]


def prepare(folder):
    global FOLDER, TOKENIZER
    from tiny import byte_tokenizer

    import aqlm_c.io.data  # noqa: F401

    FOLDER, TOKENIZER = folder, byte_tokenizer()


def data_file(rng):
    """A --data file that is nearly right."""
    suffix = rng.choice([".txt", ".jsonl", ".npy", ".safetensors"])
    path, text = FOLDER / f"data{suffix}", "All happy families are alike. " * 20
    if suffix == ".txt":
        path.write_text(text + rng.choice(["", "é漢😀" * 10, "\0" * 10]))
    elif suffix == ".jsonl":
        lines = [{"text": text, "id": n} for n in range(4)]
        lines[rng.randrange(4)] = mutate.mutate_json(rng, lines[0], ["text", "id"])
        path.write_text("\n".join(map(json.dumps, lines)))
    else:
        dtype = rng.choice(["i8", "u2", "i4", ">i4", "f4", "u8", "c8", "U3", "?", "i1"])
        shape = rng.choice([(500,), (5, 100), (0,), (500, 0), (1, 1, 500), (), (2, 0)])
        ids = (np.arange(int(np.prod(shape))) % 256 * rng.choice([1, 1, 1, -1, 2**40])).reshape(shape).astype(dtype)
        if suffix == ".npy":
            np.save(path, ids)
        else:
            from safetensors.numpy import save_file

            save_file({rng.choice(["input_ids", "input_ids", "x"]): ids.astype(ids.dtype.newbyteorder("="))
                       if ids.dtype.kind not in "cU" else np.zeros(3, "i8")}, path)  # fmt: skip
    if rng.random() < 0.6:
        mutate.mutate_file(rng, path)
    elif suffix == ".npy" and rng.random() < 0.5:  # a header that promises more
        content = path.read_bytes()
        path.write_bytes(content.replace(b"500", rng.choice([b"99999999999", b"-1", b"5e3", b"501"]), 1))
    return path


def read_data(rng):
    from aqlm_c.io.data import check_source, load_sequences, sha256, token_stream

    path = data_file(rng)
    try:
        check_source(str(path))
        if rng.random() < 0.5:
            token_stream(str(path), TOKENIZER, rng.choice([None, 0, 10, 10_000]))
        else:
            sources = [str(path)] * rng.choice([1, 1, 2])
            load_sequences(sources, TOKENIZER, rng.choice([1, 2, 9]), rng.choice([2, 16, 400]), rng.random() < 0.5)
        sha256(str(path))
    finally:
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink()


def yaml_text(rng):
    import yaml

    fields = dict(RIGHT)
    for _ in range(rng.choice([0, 1, 2])):
        fields = mutate.mutate_json(rng, fields, OPTIONS)
        if not isinstance(fields, dict):
            break
    if isinstance(fields, dict) and rng.random() < 0.3:
        fields["rules"] = {"".join(rng.choices(PATTERNS, k=rng.randint(1, 4))): "2x8g8" for _ in range(3)}
    try:
        text = json.dumps(fields)
        if len(text) < 100_000 and rng.random() < 0.6:  # yaml writes slowly
            text = yaml.safe_dump(fields)
    except RecursionError:
        text = json.dumps(fields)
    kind = rng.random()
    if kind < 0.2:  # laughs
        names = "abcdefgh"[: rng.randint(1, 8)]
        anchors = [f"{n}: &{n} [{', '.join([f'*{b}'] * 9)}]" for b, n in zip("z" + names, names, strict=False)]
        text = "\n".join(["z: &z [x, x]", *anchors, text])
    elif kind < 0.4:
        at = rng.randrange(len(text) + 1)
        text = text[:at] + rng.choice([*TAGS, "[" * 5000, "{a: " * 300, "\t", "%", "---\n", "- ", "? "]) + text[at:]
    return text


def read_config(rng):
    from aqlm_c.model.kinds import kind_of
    from aqlm_c.patterns import pattern_of
    from aqlm_c.recipe import RunConfig

    path = FOLDER / "run.yaml"
    text = yaml_text(rng).encode("utf-8", "surrogatepass")
    path.write_bytes(mutate.mutate_bytes(rng, text) if rng.random() < 0.3 else text)
    config = RunConfig.from_file(path, **rng.choice([{}, {"out": "x"}, {"preset": "best"}, {"solver": "paper"}]))
    resolved = config.resolve()
    resolved.config.check_searchable()
    for name in ("model.layers.10.mlp.experts.3.down_proj", "a" * 90, ""):
        kind_of(name)
        resolved.config.format_for(name)
        pattern_of("layers", config.layers or "").found_in(name)
    config.to_yaml()


def case(rng, number):
    os.chdir(FOLDER)
    what = rng.choice([read_data, read_config])
    try:
        what(rng)
    except (ValueError, OSError) as error:
        assert len(str(error)) < 20_000, str(error)[:500]
        return f"{what.__name__} {'ValueError' if isinstance(error, ValueError) else 'OSError'}"
    return f"{what.__name__} result"


if __name__ == "__main__":
    harness.run(case, __doc__, prepare)
