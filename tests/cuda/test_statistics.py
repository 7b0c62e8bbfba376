"""H of a file, and sweeps, on a GPU."""

import numpy as np
import pytest
import torch
from tiny import BYTES, FAST, SCHEME, byte_tokenizer, random_tokens, tiny_llama

import aqlm_c
from aqlm_c.calibrate.statistics import Statistics
from aqlm_c.io.checkpoint import quantized_linears
from aqlm_c.nn import ops
from aqlm_c.quantize import quantize_model
from aqlm_c.recipe import AqlmConfig, RunConfig
from aqlm_c.run import run

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a GPU that torch can use", allow_module_level=True)
if not ops.has_cuda:
    pytest.skip("aqlm_c was built without _cuda", allow_module_level=True)

IDS = random_tokens(8, 32)
CONFIG = AqlmConfig.from_scheme(SCHEME, **FAST, embeddings="dense")


def codes(model):
    return {name: layer.codes.cpu() for name, layer in quantized_linears(model)}


def test_h_is_that_of_the_cpu(tmp_path):
    for device in ("cpu", "cuda"):
        aqlm_c.collect_hessians(tiny_llama(), IDS, tmp_path / device, device=device)
    found = [Statistics(tmp_path / device) for device in ("cpu", "cuda")]
    names = {name: 64 if "down" in name else 32 for name in found[0].facts["layers"]}
    cpu, gpu = (one.hessians(names, None) for one in found)
    for name in names:
        assert np.abs(cpu[name].H - gpu[name].H).max() <= 1e-2 * np.abs(cpu[name].H).max(), name


def test_the_first_block_is_as_calibrated(tmp_path):
    aqlm_c.collect_hessians(tiny_llama(), IDS, tmp_path / "h", device="cuda")
    models = [tiny_llama(), tiny_llama(), tiny_llama()]
    quantize_model(models[0], IDS, CONFIG, device="cuda")
    kept = Statistics(tmp_path / "h", tmp_path / "layers")
    for model in models[1:]:
        quantize_model(model, None, CONFIG, statistics=kept, device="cuda")
    one, stored, again = map(codes, models)
    assert all(torch.equal(one[name], stored[name]) for name in one if ".0." in name)
    assert all(torch.equal(stored[name], again[name]) for name in one)


def test_a_sweep_and_its_best_again(tmp_path):
    tiny_llama(torch.bfloat16, vocab_size=BYTES, max_position_embeddings=256).save_pretrained(tmp_path / "m")
    byte_tokenizer().save_pretrained(tmp_path / "m")
    options = {"preset": "fast", "samples": 8, "sequence_length": 32, "ldl_passes": 1, "max_sweeps": 1}
    evaluation = {"data": ["pydoc_data.topics"], "sequence_length": 64, "windows": 4}
    space = {"model": str(tmp_path / "m"), "options": options, "evaluation": evaluation, "keep": "best"}
    result = aqlm_c.sweep({**space, "space": {"scheme": ["1x4g8", "2x4g8"]}}, tmp_path / "s", workers=1, device="cuda")
    assert result.complete and {row["state"] for row in result.rows} == {"complete"}
    run(RunConfig.from_file(tmp_path / "s" / "best.yaml"))
    (kept,) = (tmp_path / "s" / "models").iterdir()
    files = [(path / "model.safetensors").read_bytes() for path in (kept, tmp_path / "s" / "best")]
    assert files[0] == files[1]
