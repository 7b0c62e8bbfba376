"""Fuzzes both doors to the C core by tuples of arguments: `_core` on NumPy arrays, `torch.ops.aqlm_c` on tensors.

Arguments fit, and then some of them are spoiled. Whatever comes, the answer is a result or an exception that Python
programs know. With --sanitized the C code is compiled with AddressSanitizer and UndefinedBehaviorSanitizer.
"""

import importlib.util
import os
import sys
import warnings

import harness
import numpy as np

REFUSED = (TypeError, ValueError, OverflowError, MemoryError)
LOOPS = {"init_max_iter", "cg_steps", "steps"}  # what a large number makes long, not wrong
NUMBERS = [-(2**63), -(2**31), -1, 0, 1, 2, 3, 5, 8, 16, 17, 32, 63, 64, 65, 255, 2**16, 2**31, 2**62, 2**63, 2**64]
FLOATS = [float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 1e-300, 1e300, 3.4e38, 1e-45]
DTYPES = ["float32", "float64", "float16", "int8", "int16", "uint16", "int32", "int64", "uint8", "bool", "complex64"]


def load():
    """The modules; those with sanitizers where the environment says so."""
    global _core, torch
    if folder := os.environ.get("FUZZ_SANITIZED"):
        import torch

        import aqlm_c

        for name in ("_core", "_torch"):
            path = os.path.join(folder, f"{name}.abi3.so")
            spec = importlib.util.spec_from_file_location(f"aqlm_c.{name}", path)
            sys.modules[f"aqlm_c.{name}"] = module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            setattr(aqlm_c, name, module)
    import torch

    import aqlm_c.core.extensions
    from aqlm_c import _core

    torch.set_num_threads(1)
    if folder:
        assert _core.__file__.startswith(folder) and aqlm_c.core.extensions._torch.__file__.startswith(folder)


def arguments(rng):
    """(verb, arguments by name) that fit, for one of all verbs of the core."""
    gen = np.random.default_rng(rng.randrange(2**32))
    g, K, B = rng.choice([4, 8, 8, 16, 32]), rng.randint(1, 4), rng.choice([1, 2, 3, 4, 4, 8, 9])
    out, J = rng.choice([1, 2, 7, 16, 33, 64, 70]), rng.randint(1, 5)
    width = J * g
    x = gen.standard_normal((2 * width, width), dtype=np.float32)
    common = {
        "weight": gen.standard_normal((out, width), dtype=np.float32),
        "H": (x.T @ x / len(x) + 0.01 * np.eye(width, dtype=np.float32)).astype(np.float32),
        "codes": gen.integers(0, 2**B, (out, J, K)).astype(np.uint16),
        "codebooks": gen.standard_normal((K, 2**B, g), dtype=np.float32),
        "scales": gen.uniform(0.5, 2, out).astype(np.float32),
    }

    def take(*names, **others):
        return {**{name: common[name] for name in names}, **others}

    og = rng.choice([1, 1, 1, 2]) if out % 2 == 0 else 1
    stored = {
        "codes": gen.integers(-(2 ** (B - 1)), 2 ** (B - 1), (out // og, J, K)).astype(np.int8 if B <= 8 else np.int16),
        "codebooks": gen.standard_normal((K, 2**B, og, g), dtype=np.float32),
        "scales": gen.uniform(0.5, 2, (out // og, 1, 1, 1)).astype(np.float32),
    }
    rows = rng.choice([0, 1, 2, 7, 16, 17, 40])
    search = {"beam_size": rng.choice([0, 1, 2, 8]), "pairs": K >= 2 and B <= 8 and rng.random() < 0.5}
    size = K * 2**B * g + out
    metric = np.stack([np.eye(g, dtype=np.float32)] * J)
    feedback = np.triu(gen.standard_normal((width, width), dtype=np.float32), 1)
    shape = {"num_codebooks": K, "nbits_per_codebook": B, "in_group_size": g}
    of_bytes = rng.random() < 0.5
    moments = {
        "first": np.zeros((out, width), np.int8 if of_bytes else np.float32),
        "second": np.zeros((out, width), np.uint8 if of_bytes else np.float32),
        "scales": np.zeros((2, -(-out * width // 256)), np.float32) if of_bytes else None,
    }
    verbs = {
        "residual_kmeans": take("weight", "scales", **shape, init_max_iter=3, tolerance=1e-3, seed=1),
        "accumulate_hessian": {"sum": np.zeros((width, width)), "x": x},
        "accumulate_product": {"sum": np.zeros((width, width)), "x": x, "y": x[::-1].copy()},
        "correct_weight": take("weight", "H", cross=common["H"][::-1].copy(), alpha=0.5, relative_damp=0.01),
        "factor_hessian": take("H", in_group_size=g, relative_damp=0.01),
        "search_sweep": take("codes", "weight", "H", "codebooks", "scales", seed=3, **search),
        "search_ldl": take("weight", order=gen.permutation(J).astype(np.int32), feedback=feedback, metric=metric)
        | take("codebooks", "scales", **search),
        "update_codebooks": take("codebooks", "weight", "H", "codes", "scales", cg_steps=2),
        "update_scales": take("scales", "weight", "H", "codes", "codebooks"),
        "update_adam": take("codebooks", "scales", moments=np.zeros((2, size)))
        | take("weight", "H", "codes", steps=2, learning_rate=1e-3, steps_before=1),
        "buffer_step": {"buffer": common["weight"].copy(), "gradient": common["weight"], **moments}
        | {"divisor": 2.0, "learning_rate": 1e-2, "beta1": 0.5, "beta2": 0.95, "step": 3},
        "quantization_error": take("weight", "H", "codes", "codebooks", "scales"),
        "gaussian_reference": {"eigenvalues": gen.uniform(0, 1, width), "rate": 2.0},
        "decode_rows": stored,
        "matmul": {"x": gen.standard_normal((rows, width), dtype=np.float32), **stored, "bias": None},
        "matmul_backward": {"grad_y": gen.standard_normal((rows, out), dtype=np.float32), **stored},
        "decode_rows_backward": {"grad_rows": common["weight"], **stored, "need_codebooks": True, "need_scales": True},
        "pack_codes": take("codes", nbits_per_codebook=B),
        "unpack_codes": {"codes": stored["codes"], "nbits_per_codebook": B},
    }
    if rng.random() < 0.5:
        verbs["matmul"]["bias"] = gen.standard_normal(out, dtype=np.float32)
    verb = rng.choice(list(verbs))
    return verb, dict(verbs[verb])


def spoiled(rng, name, value):
    """Another value for an argument."""
    if isinstance(value, np.ndarray) and rng.random() < 0.9:
        return spoiled_array(rng, value)
    if name in LOOPS:
        return rng.choice([-(2**63), -1, 0, 1, 4, None, "x", 2.5])
    return rng.choice([rng.choice(NUMBERS), rng.choice(FLOATS), None, "x", [1, 2], True, np.zeros(3, np.float32)])


def spoiled_array(rng, array):
    kind = rng.randrange(10)
    if kind == 0:
        return array.astype(rng.choice(DTYPES))
    if kind == 1:  # another shape
        shape = list(array.shape) or [1]
        shape[rng.randrange(len(shape))] = rng.choice([0, 1, 2, 3, 8, 64])
        return np.resize(array, shape).astype(array.dtype) if 0 not in shape else np.zeros(shape, array.dtype)
    if kind == 2:
        return array.T
    if kind == 3:  # strided, and backwards
        return array[::-1] if array.ndim else array
    if kind == 4:
        return array[tuple(slice(None, None, 2) for _ in array.shape)]
    if kind == 5:  # more or fewer sides
        return array[None] if rng.random() < 0.5 else array.reshape(-1)
    if kind == 6:  # values that are none
        array = array.copy()
        values = (
            FLOATS if array.dtype.kind == "f" else [0, 1, np.iinfo(array.dtype).max if array.dtype.kind in "iu" else 0]
        )
        for _ in range(rng.randint(1, 4) if array.size else 0):
            with np.errstate(over="ignore"):
                array.reshape(-1)[rng.randrange(array.size)] = rng.choice(values)
        return array
    if kind == 7:  # not aligned
        raw = np.frombuffer(b"\0" + np.ascontiguousarray(array).tobytes(), np.uint8)[1:]
        return raw.view(array.dtype).reshape(array.shape) if array.size else array
    if kind == 8:
        return np.broadcast_to(array[:1], array.shape) if array.ndim and array.size else array
    return array.astype(array.dtype.newbyteorder(">"))


def by_numpy(verb, values, positional):
    function = getattr(_core, verb, None)
    if function is None:
        return "no verb"
    return function(*values.values()) if positional else function(**values)


def by_torch(verb, values, rng):
    if verb in ("matmul", "decode_rows", "matmul_backward", "decode_rows_backward"):
        dtype = rng.choice([torch.float32, torch.float16, torch.bfloat16])
    else:
        dtype = None
    tensors = {}
    for name, value in values.items():
        if isinstance(value, np.ndarray):
            try:
                value = torch.from_numpy(np.array(value) if min(value.strides, default=0) < 0 else value)
            except TypeError:
                value = torch.zeros(value.shape, dtype=torch.float64)
            if dtype is not None and value.dtype == torch.float32 and rng.random() < 0.9:
                value = value.to(dtype)
        tensors[name] = value
    if verb == "matmul" and len(tensors) == 5 and rng.random() < 0.3:
        lists = [[tensors[name]] * 2 for name in ("codes", "codebooks", "scales")]
        biases = [] if tensors["bias"] is None else [tensors["bias"]] * 2
        return torch.ops.aqlm_c.matmul_grouped(tensors["x"], *lists, biases)
    return getattr(torch.ops.aqlm_c, verb)(*tensors.values())


def case(rng, number):
    verb, values = arguments(rng)
    fits = rng.random() < 0.15
    for _ in range(0 if fits else rng.choice([1, 1, 1, 2, 3])):
        name = rng.choice(list(values))
        values[name] = spoiled(rng, name, values[name])
    if not fits and rng.random() < 0.05:
        values.pop(rng.choice(list(values)))
    door = rng.choice(["NumPy", "torch"])
    try:
        if door == "NumPy":
            by_numpy(verb, values, rng.random() < 0.5)
        else:
            by_torch(verb, values, rng)
    except REFUSED as error:
        assert "\n" not in str(error) or door == "torch", error
        return f"{door} {type(error).__name__}"
    except (RuntimeError, NotImplementedError, IndexError) as error:
        assert door == "torch", error
        return f"{door} {type(error).__name__}"
    return f"{door} result"


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # of casts that spoil values
    import sanitized

    harness.run(case, __doc__, lambda _: load(), sanitized)
