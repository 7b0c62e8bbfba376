"""Mutations of files: of their bytes, of the JSON in them, of headers of safetensors, of what they are at all."""

import json
import os
import struct

NASTY = [
    None, True, -1, 0, 1, 2, 7, 10**4, 300_000, 2**31, 2**63, 10**30, 1e308, 0.5, -0.0, "", "x", "x" * 5000, "../x",
    "/etc/passwd", "org/kernel", "\x1b[2J\x07", "\u202e", "\ud800", "é" * 100, "(a+)+$", "2x8g8", "dense", "aqlm",
    "aqlm_c", "llama", "mixtral", "gpt2", "float64", "int8", [], {}, [[]], [1, 2], ["x"], {"": 0}, [None],
    {"a": {"b": []}},
]  # fmt: skip
NAMES = ["attn_implementation", "_attn_implementation", "auto_map", "num_hidden_layers", "rules", "vocab_size", "dtype"]
NAMES += ["quantization_config", "text_config", "tie_word_embeddings", "num_experts", "torch_dtype", "model_type", "x"]


def nasty(rng):
    if rng.random() < 0.03:
        value = []
        for _ in range(rng.choice([50, 500, 900])):
            value = [value] if rng.random() < 0.5 else {"a": value}
        return value
    if rng.random() < 0.03:
        return [rng.choice(NASTY)] * 3000
    return rng.choice(NASTY)


def mutate_json(rng, value, names=NAMES):
    """`value`, changed in one place, however deep."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        name = rng.choice(list(value))
        kind = rng.random()
        if kind < 0.7:
            return {**value, name: mutate_json(rng, value[name], names)}
        if kind < 0.85:
            return {key: inner for key, inner in value.items() if key != name}
        return {**value, rng.choice([*names, *value]): nasty(rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        if rng.random() < 0.15:
            return value[:at] + value[at + 1 :]
        return [*value[:at], mutate_json(rng, value[at], names), *value[at + 1 :]]
    if type(value) is int and rng.random() < 0.5:
        return value + rng.choice([-1, 1, -value, value, 2**20])
    return nasty(rng)


def mutate_bytes(rng, data):
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at, kind = rng.randrange(len(data) + 1), rng.randrange(6)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            del data[at : at + rng.choice([1, 4, 100])]
        elif kind == 3:
            data[at:at] = rng.randbytes(rng.choice([1, 4, 100]))
        elif kind == 4:
            data[at : at + 8] = struct.pack("<Q", rng.choice([0, 1, 2**31, 2**63, 2**64 - 1, rng.randrange(2**20)]))
        else:
            data[at : at + 4] = b"\xff\xfe\xfd\x00"
    return bytes(data)


def mutate_header(rng, data):
    """The content of a safetensors file with another header."""
    size = struct.unpack("<Q", data[:8])[0]
    try:
        header = json.loads(data[8 : 8 + size])
    except ValueError:  # mutated before
        return mutate_bytes(rng, data)
    for _ in range(rng.choice([1, 1, 2])):
        kind = rng.random()
        name = rng.choice(list(header))
        if kind < 0.5:
            header[name] = mutate_json(rng, header[name])
        elif kind < 0.65:
            header[rng.choice(["x.codes", "lm_head.codes", "a\x1b[2J.weight", "x" * 300, name + "x"])] = header[name]
        elif kind < 0.8:
            header.pop(name)
        elif isinstance(header[name], dict) and "shape" in header[name]:
            shape = header[name]["shape"]
            header[name]["shape"] = rng.choice(
                [[0], [2**40], [2**62, 4], [-1], [], [1] * 100, shape[::-1] if isinstance(shape, list) else 1]
            )
        if not header:
            break
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def mutate_file(rng, path, names=NAMES):
    """Change a file in a way that fits its kind, or make it another kind of file."""
    kind = rng.random()
    if kind < 0.06:
        path.unlink()
        what = rng.randrange(6)
        if what == 0:
            os.mkfifo(path)
        elif what == 1:
            path.symlink_to("/dev/zero")
        elif what == 2:
            path.symlink_to(path.name)
        elif what == 3:
            path.mkdir()
        elif what == 4:
            path.write_bytes(b"")
        return
    data = path.read_bytes()
    try:
        value = json.loads(data) if path.suffix == ".json" else None
    except (ValueError, RecursionError):  # mutated before
        value = None
    if kind < 0.65 and value is not None:
        text = json.dumps(mutate_json(rng, value, names))
        if rng.random() < 0.05:
            text = text.replace(rng.choice(["1", "0", '"']), rng.choice(["NaN", "1e999", "[" * 50_000, "9" * 5000]), 1)
        path.write_text(text)
    elif kind < 0.65 and path.suffix == ".safetensors" and len(data) > 8:
        path.write_bytes(mutate_header(rng, data))
    else:
        path.write_bytes(mutate_bytes(rng, data))
