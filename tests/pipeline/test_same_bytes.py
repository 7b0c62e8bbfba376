"""A change of the code that is to change no result changes none: hashes of whole runs, recorded before it.

Weights alone need NumPy only and hold everywhere. Models go through torch and LAPACK, whose last bits depend on their
versions and on the CPU: they run in a process of their own whose environment fixes the arithmetic, and only with the
versions they were recorded with. `python tests/pipeline/test_same_bytes.py --record` records again, which is right
after a change that is meant to change results, and after new versions of those packages.
"""

import argparse
import gc
import hashlib
import itertools
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

import aqlm_c

RECORD = Path(__file__).with_name("same_bytes.json")
COMMAND = "python tests/pipeline/test_same_bytes.py --record"
SOLVERS = ("ldl", "paper")
FIXED = {  # read when torch and NumPy are first imported: kernels that every x86-64 CPU has, and one order of sums
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "OPENBLAS_CORETYPE": "Nehalem",
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
}
QUIET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
OF_THE_RUN = {"seconds", "phases", "peak_memory_bytes", "versions", "threads", "isa"}  # in a report: differ each time
LATER = {"parameters", "stored_bytes", "effective_bits", "embedding", "embeddings", "plan"}  # fields since the record
VOCABULARY, WIDTH, BLOCKS = 96, 32, 2

# Weights: scheme -> shape.
WEIGHTS = {"2x4g8": (48, 64), "3x4g8": (40, 48), "1x6g8": (64, 64), "2x3g4": (24, 40)}

# Models: a scheme, and rules for each: another scheme, a dense layer, and embeddings or output layers too.
SCHEME = "2x4g8"
RULES = {
    "dense": {"embed_tokens": "2x4g4", "lm_head": "2x5g8", r"layers\.0\.mlp\.down_proj": "dense", "self_attn": "1x5g8"},
    "tied": {"embed_tokens": "2x4g8", "down_proj": "3x4g8", r"layers\.1\.self_attn\.v_proj": "dense"},
    "moe": {"lm_head": "2x5g8", "self_attn": "dense", r"layers\.1\..*w2$": "1x5g4"},
}
TUNED = {"finetune_epochs": 1, "finetune_held_out": 0.25, "finetune_batch_size": 4, "finetune_learning_rate": 3e-3}
CALIBRATED, DATA_FREE, ON_THE_FLY, RESUMED = "calibrated", "data-free", "on the fly", "resumed"


def cases():
    """name -> (model, how, options, layers) of every run of a model."""
    found = {}
    for model, solver in itertools.product(RULES, SOLVERS):
        name, plain, tuned = f"{model} {solver}", {"solver": solver, "finetune_epochs": 0}, {"solver": solver, **TUNED}
        ruled = {**plain, "rules": RULES[model]}
        found |= {
            name: (model, CALIBRATED, plain, None),
            f"{name} rules": (model, CALIBRATED, ruled, None),
            f"{name} rules {ON_THE_FLY}": (model, ON_THE_FLY, ruled, None),
            f"{name} {DATA_FREE}": (model, DATA_FREE, plain, None),
            f"{name} rules {DATA_FREE}": (model, DATA_FREE, ruled, None),
            f"{name} tuned": (model, CALIBRATED, tuned, None),
        }
    ruled = {**TUNED, "rules": RULES["tied"]}
    searched = {**TUNED, "finetune_search": 1, "relative_damp": 0.1}
    return found | {
        "dense ldl some layers": ("dense", CALIBRATED, {"finetune_epochs": 0, "seed": 3}, r"1\.mlp|q_proj"),
        "dense ldl tuned resumed": ("dense", RESUMED, {"solver": "ldl", **TUNED}, None),
        "tied ldl rules tuned": ("tied", CALIBRATED, ruled, None),
        "tied ldl rules tuned resumed": ("tied", RESUMED, ruled, None),
        "moe ldl rules searched": ("moe", CALIBRATED, {**searched, "rules": RULES["moe"]}, None),
    }


CASES = cases()


def noise(seed, *shape):
    """Values like those of a normal distribution, float32, exact on every machine and with every NumPy."""
    count = int(np.prod(shape))
    octets = np.random.PCG64(seed).random_raw(count).view(np.uint8).reshape(count, 8)
    sums = octets.sum(axis=1, dtype=np.int64) - 4 * 255
    return (sums.astype(np.float32) / 256).reshape(shape)


def sha256(*items):
    """Of arrays, as dtype, shape and bytes, and of anything else as JSON, its keys in order."""
    digest = hashlib.sha256()
    for item in items:
        if isinstance(item, np.ndarray):
            digest.update(f"{item.dtype} {list(item.shape)}\n".encode())
            digest.update(np.ascontiguousarray(item).tobytes())
        else:
            digest.update(json.dumps(item, allow_nan=False).encode() + b"\n")
    return digest.hexdigest()


def without_run(fields):
    """A report without what differs from run to run and from machine to machine, and without newer fields."""
    if isinstance(fields, dict):
        return {name: without_run(value) for name, value in fields.items() if name not in OF_THE_RUN | LATER}
    return [without_run(value) for value in fields] if isinstance(fields, list) else fields


def environment():
    """What the last bits of a model's run depend on."""
    versions = {name: metadata.version(name) for name in ("numpy", "torch", "transformers")}
    return {**versions, "platform": f"{sys.platform} {platform.machine()}"}


# ---- weights --------------------------------------------------------------------------------------------------


def weight_hashes(solver, scheme):
    """Hashes of a weight that is quantized under an H of sums of integers, which is exact."""
    out_features, in_features = WEIGHTS[scheme]
    weight = noise(1, out_features, in_features) * np.float32(0.125)
    inputs = (noise(2, 4 * in_features, in_features) * 32).astype(np.int64)
    inputs[:, 1:] += inputs[:, :-1] // 2  # correlated, well conditioned
    H = (inputs.T @ inputs).astype(np.float32) / np.float32(2**16)
    config = aqlm_c.AqlmConfig.from_scheme(scheme, solver=solver)
    quantized = aqlm_c.quantize_weight(weight, H, config)
    arrays = {name: sha256(getattr(quantized, name)) for name in ("codes", "codebooks", "scales")}
    return {**arrays, "errors": sha256(quantized.relative_error, quantized.history)}


# ---- models ---------------------------------------------------------------------------------------------------


def build(name):
    """A tiny model of two blocks, float32, all its parameters from `noise`."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": name == "tied",
    }
    if name == "moe":
        config = MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2)
    else:
        config = LlamaConfig(**sizes, attention_bias=name == "dense")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for seed, (part, parameter) in enumerate(model.named_parameters()):
            values = torch.from_numpy(noise(seed, *parameter.shape))
            if parameter.ndim == 1:  # norms and biases
                values = values * 0.125 + (0 if part.endswith("bias") else 1)
            else:
                values = values * (2 if part.endswith("gate.weight") else 0.125)
            parameter.copy_(values)
    return model


def token_ids():
    """Calibration sequences, int64 [n, length]."""
    import torch

    drawn = np.random.PCG64(9).random_raw(16 * 24).reshape(16, 24) >> np.uint64(33)
    return torch.from_numpy((drawn % VOCABULARY).astype(np.int64))


def run_case(name, directory):
    """Hashes of one run of a model: of all its quantized layers, its report, and the checkpoint it is saved as.

    directory: an empty one, the current one: reports keep the names of models, which are then the same everywhere.
    """
    from transformers import AutoModelForCausalLM

    import aqlm_c.hf

    model_name, how, options, layers = CASES[name]
    model = build(model_name)
    if how in (DATA_FREE, ON_THE_FLY):
        model.save_pretrained("original")
        data = {"dataset": token_ids()} if how == ON_THE_FLY else {}
        config = aqlm_c.hf.AqlmConfig(scheme=SCHEME, **options, **data)
        model = AutoModelForCausalLM.from_pretrained("original", quantization_config=config, dtype=model.dtype)
        report = model.hf_quantizer.report
    else:
        config = aqlm_c.AqlmConfig.from_scheme(SCHEME, **options)
        if how == RESUMED:
            aqlm_c.quantize_model(model, token_ids(), config, layers=layers, work_dir="work")
            *kept, last = sorted(directory.glob("work/*.safetensors"))
            written = [file.stat().st_mtime_ns for file in kept]
            last.unlink()
            model = build(model_name)
        work_dir = "work" if how == RESUMED else None
        report = aqlm_c.quantize_model(model, token_ids(), config, layers=layers, work_dir=work_dir)
        if how == RESUMED:  # the last block was done again, and no other
            assert kept and last.exists() and written == [file.stat().st_mtime_ns for file in kept]
    aqlm_c.save_quantized(model, None, "quantized")
    fields = without_run(report.to_dict())
    improved = sum(block["held_out_after"] < block["held_out_before"] for block in fields["blocks"])
    searched = sum(block["searched"] for block in fields["blocks"])
    hashes = {**layer_hashes(model), "report": sha256(fields), **saved_hashes(directory)}
    return {"blocks improved": improved, "layers searched again": searched, **hashes}


def layer_hashes(model):
    """Hashes of the codes, codebooks and scales of all quantized layers, with their names."""
    state = model.state_dict()
    layers = [name.removesuffix(".codes") for name in state if name.endswith(".codes")]
    assert layers
    return {
        part: sha256(*(item for layer in layers for item in (layer, state[f"{layer}.{part}"].numpy())))
        for part in ("codes", "codebooks", "scales")
    }


def saved_hashes(directory):
    """Hashes of the tensors of the saved checkpoint, with their names, and of its quantization config."""
    from safetensors.numpy import load_file

    (file,) = directory.glob("quantized/*.safetensors")
    tensors = load_file(file)
    config = json.loads((directory / "quantized" / "config.json").read_text(encoding="utf-8"))
    return {
        "checkpoint": sha256(*(item for name in sorted(tensors) for item in (name, tensors[name]))),
        "quantization_config": sha256(config["quantization_config"]),
    }


def run_models():
    """Hashes of all cases, computed in this process: of an environment as `FIXED` has it."""
    import torch

    torch.backends.mkldnn.enabled = False  # its kernels differ between CPUs, and no variable turns it off
    if hasattr(os, "sched_setaffinity"):  # no threads for such small layers: five times as fast
        os.sched_setaffinity(0, {random.choice(sorted(os.sched_getaffinity(0)))})
    found, here = {}, os.getcwd()
    for name in CASES:
        with tempfile.TemporaryDirectory() as directory:
            os.chdir(directory)
            try:
                found[name] = run_case(name, Path(directory))
            finally:
                os.chdir(here)
        gc.collect()
    return found


def models_in_a_process():
    """What `run_models` gives in a process of its own whose arithmetic is fixed."""
    result = subprocess.run(
        [sys.executable, __file__, "--models"], env={**os.environ, **FIXED, **QUIET}, stdout=subprocess.PIPE, text=True
    )
    assert result.returncode == 0, "the process that runs the models failed, see above"
    return json.loads(result.stdout)


# ---- tests ----------------------------------------------------------------------------------------------------


def recorded():
    return json.loads(RECORD.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def models():
    """The hashes of this machine's runs; skips unless they can be those that were recorded."""
    for name in ("torch", "transformers"):
        pytest.importorskip(name)
    if (now := environment()) != (then := recorded()["environment"]):
        pytest.skip(f"recorded with {then}, here are {now}: record again, before a change, by `{COMMAND}`")
    return models_in_a_process()


@pytest.mark.parametrize("scheme", WEIGHTS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_weight(solver, scheme):
    assert weight_hashes(solver, scheme) == recorded()["weights"][f"{solver} {scheme}"]


@pytest.mark.parametrize("case", CASES)
def test_a_model(case, models):
    assert models[case] == recorded()["models"][case]


def test_only_the_same_run_has_the_same_hashes():
    """One on the fly, or resumed, gives what it gives otherwise; no other two cases give the same codes and books."""
    models, plain = recorded()["models"], {}
    assert list(models) == list(CASES)
    for case, (_, how, options, _) in CASES.items():
        assert models[case]["blocks improved"] or not options["finetune_epochs"], case
        assert models[case]["layers searched again"] or not options.get("finetune_search"), case
        plain[case] = case.removesuffix(f" {how}") if how in (ON_THE_FLY, RESUMED) else case
    layers = {
        case: tuple(models[case][part] for part in ("codes", "codebooks", "scales", "checkpoint")) for case in models
    }
    for one, other in itertools.combinations(CASES, 2):
        assert (layers[one] == layers[other]) == (plain[one] == plain[other]), (one, other)
    assert all(models[case]["report"] == models[plain[case]]["report"] for case in CASES if CASES[case][1] == RESUMED)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--record", action="store_true", help=f"write {RECORD.name} beside this file")
    what.add_argument("--models", action="store_true", help="print the hashes of the models, in this environment")
    if parser.parse_args().models:
        print(json.dumps(run_models(), indent=2))
        return
    weights = {f"{solver} {scheme}": weight_hashes(solver, scheme) for solver in SOLVERS for scheme in WEIGHTS}
    record = {"environment": environment(), "weights": weights, "models": models_in_a_process()}
    RECORD.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"{RECORD}: recorded with {Path(aqlm_c.__file__).parent}")


if __name__ == "__main__":
    main()
