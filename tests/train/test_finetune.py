"""Tuning a whole quantized model on tiny random ones: what it lowers, what it keeps, and that it goes on."""

import copy
import functools
import json
import os
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import transformers
from ranks import ranks
from tiny import FAST, random_model, random_tokens, tiny_llama
from transformers import MixtralConfig

from aqlm_c import _core, distributed, finetune_model, quantize_model
from aqlm_c.config import FinetuneOptions
from aqlm_c.nn.linear import QuantizedLinear
from aqlm_c.pipeline.resume import sha256_of
from aqlm_c.recipe import AqlmConfig
from aqlm_c.train import cost
from aqlm_c.train import pv as pv_module
from aqlm_c.train import replay as replay_module
from aqlm_c.train import student as student_module
from aqlm_c.train import teacher as teacher_module
from aqlm_c.train.buffers import Buffer, bytes_of, owners
from aqlm_c.train.distill import Order, rate_of
from aqlm_c.train.pv import CodeTuning
from aqlm_c.train.sampling import sample_sequences
from aqlm_c.train.student import Student
from aqlm_c.train.teacher import moved_bytes

pytestmark = pytest.mark.usefixtures("one_thread")

GLOO = torch.distributed.is_available() and torch.distributed.is_gloo_available()
SEQUENCES = random_tokens(64, 24, seed=1)
HELD_OUT = [10, 32, 53]  # the numbers of those that validate
OPTIONS = {
    "steps": 24,
    "batch_size": 8,
    "evaluation_interval": 8,
    "micro_batch_size": 4,
    "warmup": 2,
    "learning_rate": 0.02,
}
PV = {"pv": True, "pv_learning_rate": 0.05, "pv_fraction": 0.05, "pv_trust_ratio": 0.2}
MIXTRAL = MixtralConfig(
    **{"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
)


def models(name="llama", scheme="2x6g8", dtype=torch.float32, **options):
    """A quantized model and its original, copies of those that were made first."""
    return copy.deepcopy(_models(name, scheme, dtype, *options.items()))


@functools.cache
def _models(name, scheme, dtype, *items):
    options = dict(items)
    make = {"llama": lambda: tiny_llama(dtype=dtype, **options), "experts": lambda: random_model(MIXTRAL, dtype)}[name]
    original, model = make(), make()
    quantize_model(model, None, AqlmConfig.from_scheme(scheme, **FAST))
    return model, original


def tuned(pair=None, sequences=SEQUENCES, work_dir=None, **options):
    model, original = pair or models()
    return model, finetune_model(model, original, sequences, {**OPTIONS, **options}, work_dir=work_dir)


def held_out_divergence(model, original, numbers):
    ids = SEQUENCES[numbers]
    with torch.no_grad():
        p, q = (one(input_ids=ids).logits.float().log_softmax(-1) for one in (original, model))
    return (p.exp() * (p - q)).sum(-1).mean().item()


@pytest.mark.parametrize(
    ("dtype", "more"),
    [(torch.float32, {}), (torch.float32, PV), (torch.bfloat16, PV), (torch.float16, {})],
    ids=["float32", "float32, codes too", "bfloat16, codes too", "float16"],
)
def test_held_out_divergence_falls_to_what_is_reported(dtype, more):
    model, original = models(dtype=dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    _, report = tuned((model, original), **more)
    looks = [entry["held_out"] for entry in report.history]
    assert report.held_out_after == min(looks) < 0.9 * looks[0] and report.held_out_before == looks[0]
    assert [entry["step"] for entry in report.history] == [0, 8, 16, 24]
    found = held_out_divergence(model, original, HELD_OUT)
    noise = 2e-2 if dtype == torch.bfloat16 else 1e-3  # of 8 seeds the most are 1e-2, and 9e-4 in float16
    assert report.held_out == 3 and found == pytest.approx(report.held_out_after, rel=noise)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    codes = {name for name in changed if name.endswith(".codes")}
    assert bool(codes) == bool(more) == bool(report.changed)
    assert {name for name in before if name.endswith((".codebooks", ".scales", "norm.weight"))} == changed - codes
    for name, parameter in model.named_parameters():
        assert parameter.dtype == before[name].dtype and parameter.grad is None
        assert parameter.requires_grad == parameter.is_floating_point()
    assert not any("forward" in vars(module) for module in model.modules())


def test_experts_and_biases():
    for pair in (models("experts"), models(attention_bias=True, mlp_bias=True)):
        biases = {name: p.clone() for name, p in pair[0].named_parameters() if name.endswith("bias")}
        model, report = tuned(pair, **PV, gradient_checkpointing="always", steps=12)
        assert report.held_out_after < 0.95 * report.held_out_before and report.changed
        assert all(not torch.equal(model.get_parameter(name), value) for name, value in biases.items())


@pytest.mark.hf
@pytest.mark.skipif(transformers.__version__ < "5", reason="tied embeddings in codes need transformers 5")
@pytest.mark.parametrize("tied", [True, False])
def test_quantized_embeddings_are_trained_only_if_asked(tied):
    found = {}
    for embeddings in (False, True):
        original, model = (tiny_llama(tie_word_embeddings=tied) for _ in range(2))
        rules = {"embed_tokens": "2x4g4", "lm_head": "2x4g4"}
        quantize_model(model, None, AqlmConfig.from_scheme("2x6g8", **FAST, rules=rules))
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        _, report = tuned((model, original), embeddings=embeddings, **PV, steps=12, seed=2)
        assert report.held_out_after < report.held_out_before
        found[embeddings] = report.held_out_after
        for name, tensor in model.state_dict().items():
            if "embed_tokens" in name or "lm_head" in name:
                trained = embeddings and not name.endswith(".codes")
                assert torch.equal(tensor, before[name]) != trained and tensor.dtype == before[name].dtype
        assert held_out_divergence(model, original, HELD_OUT) == pytest.approx(report.held_out_after, rel=1e-3)
        if tied:
            assert model.lm_head.codebooks is model.model.embed_tokens.codebooks
    assert found[True] < found[False]


def test_gradients_are_those_of_the_plain_model():
    """Of decoded weights, checkpointed or not, in one pass or in parts, to codebooks, scales and norms."""
    found = []
    for checkpointing, micro, pv in (
        ("never", 8, False),
        ("always", 8, False),
        ("never", 2, False),
        ("always", 4, True),
    ):
        model, original = models()
        options = {"gradient_checkpointing": checkpointing, "micro_batch_size": micro, "pv": pv, "pv_start": 100}
        tuned((model, original), steps=3, **options)
        found.append(model.state_dict())
    for other in found[1:]:
        for name, tensor in other.items():
            torch.testing.assert_close(tensor, found[0][name], rtol=1e-3, atol=1e-4)


def test_one_step_moves_by_the_rates():
    model, original = models()
    student = Student(model, FinetuneOptions(learning_rate=0.01, scale_rate=0.5))
    before = student.together.values()
    tuned((model, original), steps=1, warmup=0, learning_rate=0.01, scale_rate=0.5, held_out=0.02)
    codebooks = [layer.codebooks for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    for old, new in zip(before, codebooks, strict=False):
        steps = (new.detach() - old).abs() / old.square().mean().sqrt()
        assert steps.max() == pytest.approx(0.01, rel=0.15)  # rounded to 16 bits


def test_weights_of_one_block_are_decoded_at_a_time(monkeypatch):
    alive, most, plain = [0], [], student_module._Decoded.forward

    class Counted(student_module._Decoded):
        @staticmethod
        def forward(ctx, anchor, weight, dtype):
            dense = plain(ctx, anchor, weight, dtype)
            alive[0] += 1
            most.append(alive[0])
            weakref.finalize(dense.untyped_storage(), lambda: alive.__setitem__(0, alive[0] - 1))
            return dense

    monkeypatch.setattr(student_module, "_Decoded", Counted)
    tuned(models(num_hidden_layers=4), steps=1, gradient_checkpointing="never")
    without, most[:] = max(most), []
    tuned(models(num_hidden_layers=4), steps=1, gradient_checkpointing="always")
    assert without >= 28 and max(most) <= 8


def test_buffers_follow_codebooks_and_changes_stay_small():
    student = Student(models()[0], FinetuneOptions(**OPTIONS, **PV))
    weights = [weight for weight in student.weights if weight.trained]
    options = FinetuneOptions(**{**OPTIONS, **PV, "pv_trust_ratio": 0.2, "pv_states": "float32"})
    tuning = CodeTuning(weights, options)
    generator = torch.Generator().manual_seed(0)
    dense = [weight.decoded(torch.float32) for weight in weights]
    offsets = [tuning.buffers.own[place].offset for place in range(len(weights))]
    for offset, weight in zip(offsets, dense, strict=True):
        offset.copy_(0.5 * weight.std() * torch.randn(weight.shape, generator=generator))
    goals = [weight + offset for weight, offset in zip(dense, offsets, strict=True)]
    tuning.step(changes=True)
    made = tuning.changes
    assert 0 < made.changed < 0.05 * made.groups
    for before, goal, weight, offset in zip(dense, goals, weights, offsets, strict=True):
        now = weight.decoded(torch.float32)
        assert (now - before).norm() <= 0.2 * before.norm() * (1 + 1e-5)
        torch.testing.assert_close(now + offset, goal)  # the buffer itself stays
        assert ((now - goal).view(-1, 8).norm(dim=1) <= (before - goal).view(-1, 8).norm(dim=1) + 1e-5).all()
    codes = tuning.codes()
    undone = tuning.undo()
    tuning.forget(undone)
    assert tuning.refused == made.changed
    for weight, before, old, offset in zip(weights, dense, codes, offsets, strict=True):
        assert torch.equal(weight.decoded(torch.float32), before)
        same = (weight.codes == old).all(-1)
        assert not offset.view(*same.shape, 8)[~same].any() and offset.view(*same.shape, 8)[same].any()


def test_codes_that_make_it_worse_are_undone():
    wild = {**PV, "pv_learning_rate": 0.9, "pv_fraction": 0.5, "pv_trust_ratio": 0.9, "pv_beta1": 0.0}
    _, report = tuned(**wild, learning_rate=1e-3)
    assert any(entry["undone"] for entry in report.history)
    assert report.history[-1]["held_out"] <= 1.01 * report.held_out_before
    _, kept = tuned(**wild, learning_rate=1e-3, pv_undo=False)
    assert kept.history[-1]["held_out"] > 1.1 * report.history[-1]["held_out"]
    assert kept.held_out_after <= kept.held_out_before


def test_it_ends_early_and_keeps_the_best():
    model, report = tuned(learning_rate=0.9, patience=2, steps=80, warmup=0, schedule="constant")
    assert report.steps == report.best_step + 16 < 80
    assert held_out_divergence(model, models()[1], HELD_OUT) == pytest.approx(report.held_out_after, rel=1e-3)


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_a_kept_teacher_gives_what_a_live_one_does(cache):
    (live, _), (kept, report) = tuned(steps=10), tuned(steps=10, cache_teacher=cache)
    assert report.tokens == 10 * 8 * 24
    for name, tensor in live.state_dict().items():
        torch.testing.assert_close(kept.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)


def test_schedule_and_order():
    options = FinetuneOptions(steps=20, warmup=4, final_rate=0.1)
    rates = [rate_of(step, options) for step in range(20)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0] and rates[4:] == sorted(rates[4:], reverse=True)
    assert 0.1 < rates[-1] < 0.12
    assert rate_of(19, FinetuneOptions(steps=20, warmup=4, schedule="constant")) == 1
    order = Order([3, 5, 7, 9, 11], seed=0)
    drawn = [number for step in range(5) for number in order.of_step(step, 2)]
    assert sorted(drawn[:5]) == sorted(drawn[5:]) == [3, 5, 7, 9, 11] and drawn[:5] != drawn[5:]
    assert Order([3, 5, 7, 9, 11], seed=0).of_step(3, 2) == drawn[6:8]  # whatever was asked for before


@pytest.mark.parametrize(
    ("options", "words"),
    {
        ("steps", 0): r"steps: got 0, expected an integer >= 1",
        ("batch_size", True): r"batch_size: got True, expected an integer",
        ("learning_rate", 1.5): r"learning_rate: got 1\.5, expected a number in \(0, 1\)",
        ("scale_rate", 2): r"scale_rate: got 2\.0, expected a number in \[0, 1\]",
        ("pv_fraction", float("nan")): r"pv_fraction: got nan, expected a number in \[0, 1\]",
        ("schedule", "step"): r"schedule: got 'step', expected one of cosine, linear, constant",
        ("cache_teacher", "gpu"): r"cache_teacher: got 'gpu', expected one of none, memory, disk",
        ("pv", 1): r"pv: got 1, expected true or false",
        ("pv_states", "4bit"): r"pv_states: got '4bit', expected one of auto, float32, 8bit",
        ("shard_original", 2): r"shard_original: got 2, expected true or false",
        ("step", 1): r"unknown option 'step': did you mean 'steps'",
    }.items(),
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        tuned(**dict([options]))


def test_wrong_models_are_refused(tmp_path):
    model, original = models()
    with pytest.raises(ValueError, match="model: got LlamaForCausalLM without a quantized layer"):
        finetune_model(tiny_llama(), original, SEQUENCES)
    with pytest.raises(ValueError, match="original: got str, expected a transformers model"):
        finetune_model(model, "path", SEQUENCES)
    with pytest.raises(ValueError, match="original: got a vocabulary of 128, expected 96"):
        finetune_model(model, tiny_llama(vocab_size=128), SEQUENCES)
    with pytest.raises(ValueError, match="sequences: got 1, expected at least 2"):
        finetune_model(model, original, SEQUENCES[:1])
    with pytest.raises(ValueError, match=r"sequences: token id 96, expected 0\.\.95"):
        finetune_model(model, original, SEQUENCES + 1)
    tuned((model, original), steps=2, work_dir=tmp_path / "work", save_interval=1)
    with pytest.raises(ValueError, match=r"holds another run .*original: its weights differ"):
        finetune_model(models()[0], tiny_llama(seed=1), SEQUENCES, {**OPTIONS, "steps": 2}, work_dir=tmp_path / "work")


LIKE = {"save_interval": 3, "evaluation_interval": 4, "steps": 14, "patience": 0}
KILLED_AT = (3, 8, 13)


class Killing:
    """Progress that ends the process in the middle of a step's end."""

    def __init__(self, step):
        self.step = step

    def __getattr__(self, name):
        return lambda *_: None

    def on_step(self, step, steps):
        if step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def facts(model, report):
    history = [{**entry, "seconds": 0} for entry in report.history]
    return {"state": sha256_of(sorted(model.state_dict().items())), "history": history, "ranks": report.ranks}


def killed(folder):
    """Runs that are killed in one of their steps, and go on."""
    found = {}
    for name, more in (("continuous", {}), ("codes too", PV), ("8 bits", {**PV, "pv_states": "8bit"})):
        found[name] = [facts(*tuned(**LIKE, **more))]
        for step in KILLED_AT:
            work = folder / f"{name}-{step}"
            if (pid := os.fork()) == 0:
                finetune_model(*models(), SEQUENCES, {**OPTIONS, **LIKE, **more}, work_dir=work, progress=Killing(step))
                os._exit(3)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
            assert (work / "state.safetensors").exists() == (step > 3)
            found[name].append(facts(*tuned(work_dir=work, **LIKE, **more)))
    return found


RUNS = {
    "continuous": {},
    "codes too": PV,
    "in parts": {**PV, "micro_batch_size": 2},
    "8 bits": {**PV, "pv_states": "8bit"},
    "8 bits in parts": {**PV, "pv_states": "8bit", "micro_batch_size": 2, "pv_follow": False},
    "original in shards": {**PV, "shard_original": True, "batch_size": 7, "gradient_checkpointing": "always"},
    "original in shards, kept": {**PV, "shard_original": True, "cache_teacher": "memory"},
    "experts": {**PV, "shard_original": True},
}


def curve(folder, size):
    """Runs of one of `size` ranks, which leaves its looks and what it has."""
    torch.set_num_threads(1)
    buffers, plain = [], pv_module.Buffers.__init__

    def counted(self, *arguments):
        plain(self, *arguments)
        buffers.append(sum(tensor.nbytes for own in self.own.values() for tensor in own.tensors.values()))

    pv_module.Buffers.__init__ = counted
    with distributed.started() as group:
        found = {}
        for name, more in RUNS.items():
            pair = models("experts") if name == "experts" else models()
            dense = [parameter.clone() for parameter in pair[1].parameters()]
            more = {"micro_batch_size": 4, "save_interval": 5, **more}
            work = folder / f"{size}-{name}" if name == "8 bits" else None
            found[name] = facts(*tuned(pair, work_dir=work, **more, steps=12, evaluation_interval=4))
            found[name]["buffers"] = buffers.pop() if buffers else 0
            found[name]["kept"] = all(map(torch.equal, dense, pair[1].parameters()))
            if size == 1 and work:  # from the state that two ranks have left
                assert (folder / f"2-{name}" / "state.safetensors").exists()
                again = facts(*tuned(work_dir=folder / f"2-{name}", **more, steps=12, evaluation_interval=4))
                found[name]["again"] = again
        (folder / f"{size}-{group.rank}.json").write_text(json.dumps(found))


def two_ranks(folder):
    for size in (2, 1):
        ends = ranks(size, curve, folder, size)
        assert ends["codes"] == [0] * size, ends
    return [json.loads((folder / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1")]


@pytest.fixture(scope="module", autouse=True)
def begun(request, tmp_path_factory):
    """The process whose forks are runs, since it has no other threads: it works while other tests do."""
    if not any("forked" in item.fixturenames for item in request.session.items):
        yield None
        return
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1] / "support")
    folder = tmp_path_factory.mktemp("runs")
    with (folder / "stderr").open("w") as stderr:
        process = subprocess.Popen([sys.executable, __file__, folder], env=environment, stderr=stderr)
    yield process, folder
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def forked(begun):
    """What came of those runs."""
    process, folder = begun
    assert process.wait(300) == 0, (folder / "stderr").read_text()
    return json.loads((folder / "found.json").read_text())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("name", ["continuous", "codes too", "8 bits"])
def test_a_killed_run_goes_on_to_the_same_bits(forked, name):
    whole, *resumed = forked["killed"][name]
    assert len(resumed) == len(KILLED_AT) and all(one == whole for one in resumed)
    assert any(entry.get("changed") for entry in whole["history"]) == (name != "continuous")


@pytest.mark.skipif(not (hasattr(os, "fork") and GLOO), reason="needs fork and gloo")
@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_have_the_losses_of_one(forked, name):
    """To the same bits where their passes are those of one process; else other last bits choose other codes."""
    one, first, second = (run[name] for run in forked["ranks"])
    assert first["ranks"] == second["ranks"] == 2 and one["kept"] and first["kept"] and second["kept"]
    assert first["state"] == second["state"] and first["history"] == second["history"]
    held_out = [[entry["held_out"] for entry in run["history"]] for run in (one, first)]
    same = "batch_size" not in RUNS[name] and RUNS[name].get("micro_batch_size", 4) == 4
    assert held_out[1] == pytest.approx(held_out[0], rel=1e-3 if same else 2e-2)
    if same:
        assert first["state"] == one["state"]
    if name != "continuous":
        assert any(entry["changed"] for entry in first["history"])
        assert one["buffers"] == first["buffers"] + second["buffers"]
        assert 0.4 < first["buffers"] / one["buffers"] < 0.6
    if "again" in one:
        assert one["again"] == {name: one[name] for name in one["again"]}


def test_buffers_are_shared_out():
    assert owners([5, 1, 3, 3, 2], 2) == [0, 1, 1, 1, 0] and owners([1, 1, 1], 4) == [0, 1, 2]
    assert owners([4, 4], 1) == [0, 0] and owners([], 2) == []


def test_moments_of_8_bits():
    """Losses are those of float32 but for a few percent of what tuning brings, buffers take 6/12 of the memory."""
    float32, small = (tuned(**PV, pv_states=states)[1] for states in ("float32", "8bit"))
    assert small.changed and small.held_out_after < 0.9 * small.held_out_before
    assert small.held_out_after == pytest.approx(float32.held_out_after, rel=0.05)
    sizes = [bytes_of(FinetuneOptions(pv_states=states)) for states in ("float32", "8bit")]
    assert sizes == [12, 6 + 2 / 64] and bytes_of(FinetuneOptions(pv_states="8bit", pv_beta1=0)) == 5 + 1 / 64
    buffer = Buffer(torch.ones(16, 32), FinetuneOptions(pv_states="8bit"))
    assert sum(tensor.nbytes for tensor in buffer.tensors.values()) == sizes[1] * 16 * 32


def test_moments_are_as_memory_likes(monkeypatch, tmp_path):
    """Few bytes are free, and then many: a run that goes on keeps what it was begun with."""
    options = {**PV, "steps": 5, "save_interval": 3, "gradient_checkpointing": "never"}
    found = [tuned(**options)]
    with monkeypatch.context() as patch:
        patch.setattr(cost, "available_memory", lambda: 2**20)
        found.append(tuned(**options, work_dir=tmp_path))
    found.append(tuned(**options, work_dir=tmp_path))
    assert [report.options["pv_states"] for _, report in found] == ["float32", "8bit", "8bit"]
    states = [sha256_of(sorted(model.state_dict().items())) for model, _ in found]
    assert states[1] == states[2]
    with pytest.raises(ValueError, match=r"holds another run .*pv_states"):
        tuned(**options, pv_states="float32", work_dir=tmp_path)


def test_what_is_estimated(monkeypatch):
    """Buffers, moments and gradients as they are kept; what of the original comes and goes."""
    model, original = models()
    layers = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    n, codes = (
        sum(size) for size in zip(*((w.in_features * w.out_features, w.codes.nbytes) for w in layers), strict=True)
    )

    def needed(moved=0, **more):
        options = FinetuneOptions(**{**OPTIONS, "gradient_checkpointing": "never", "pv": True, **more})
        return cost.estimate(model, SEQUENCES, options, torch.device("cpu"), moved).bytes

    plain = needed(pv=False)
    assert needed(pv_states="float32") - plain == 16 * n + 4 * codes  # with the sum of two passes
    assert needed(pv_states="8bit") - plain == int((10 + 2 / 64) * n) + codes
    assert needed(pv_states="8bit", pv_beta1=0.0) - plain == int((9 + 1 / 64) * n) + codes
    whole = needed(pv=False, micro_batch_size=8)
    assert needed(pv_states="float32", micro_batch_size=8) - whole == 12 * n + 4 * codes
    blocks = ["model.layers.0", "model.layers.1"]
    of_blocks = sum(p.nbytes for name in blocks for p in original.get_submodule(name).parameters())
    assert moved_bytes(original, blocks, False, False) == 0 and moved_bytes(original, blocks, False, True) == -of_blocks
    all_bytes = sum(p.nbytes for p in original.parameters())
    monkeypatch.setattr(teacher_module, "group", lambda: type("Two", (), {"size": 2}))
    assert moved_bytes(original, blocks, True, True) == all_bytes - of_blocks
    assert moved_bytes(original, blocks, True, False) == all_bytes  # half of two, and one while it runs
    assert needed(moved=-1000, pv=False) == plain - 1000


@pytest.mark.parametrize("checkpointing", ["never", "always"])
def test_gradients_of_one_pass_are_taken_at_once(checkpointing):
    """The same bits as from a sum of one gradient, though a weight is used twice in the pass or not at all."""
    found = []
    for at_once in (True, False):
        for name in ("llama", "experts"):
            model, original = models(name)
            if name == "llama":  # a layer that runs again
                model.model.layers[1].mlp.up_proj = model.model.layers[1].mlp.gate_proj
            options = {**PV, "gradient_checkpointing": checkpointing, "micro_batch_size": 8}
            with pytest.MonkeyPatch.context() as patch:
                plain = CodeTuning.__init__

                def summed(self, weights, options, dtype, once, held, plain=plain, wanted=at_once):
                    assert once and not held
                    plain(self, weights, options, dtype, wanted)

                patch.setattr(CodeTuning, "__init__", summed)
                tuned((model, original), **options, steps=4, batch_size=8)
            found.append(sha256_of(sorted(model.state_dict().items())))
    assert found[:2] == found[2:]


@pytest.mark.parametrize("trust_ratio", [0.2, 0.0])
def test_layers_that_are_encoded_together_change_as_one_by_one(trust_ratio, monkeypatch):
    batches, plain = [], pv_module.CodeTuning._encode
    monkeypatch.setattr(
        pv_module.CodeTuning, "_encode", lambda self, batch: (batches.append(len(batch.places)), plain(self, batch))[1]
    )
    found = []
    for most in (2**26, 32 * 32, 0):
        monkeypatch.setattr(pv_module, "_MOST_TOGETHER", most)
        model, report = tuned(**{**PV, "pv_trust_ratio": trust_ratio}, steps=16)
        assert report.changed or trust_ratio == 0
        found.append((sha256_of(sorted(model.state_dict().items())), max(batches)))
        batches.clear()
    assert len({bits for bits, _ in found}) == 1
    assert found[0][1] > found[1][1] > found[2][1] == 1


def test_a_damaged_state_is_not_used(tmp_path, caplog):
    options = {"save_interval": 2, "steps": 5, "work_dir": tmp_path}
    whole, _ = tuned(**options)
    state = bytearray((tmp_path / "state.safetensors").read_bytes())
    state[-5] ^= 1
    (tmp_path / "state.safetensors").write_bytes(state)
    again, _ = tuned(**options)
    assert "state.safetensors is damaged: its SHA-256 differs" in caplog.text
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in again.state_dict().items())


def test_text_of_the_models_own_is_drawn_from_it():
    model, starts = tiny_llama(), torch.tensor([5, 7])
    made = sample_sequences(model, 64 * 12, 12, starts, seed=3)
    assert made.shape == (64, 12) and set(made[:, 0].tolist()) == {5, 7}
    assert torch.equal(made, sample_sequences(model, 64 * 12 - 5, 12, starts, seed=3))
    assert not torch.equal(made, sample_sequences(model, 64 * 12, 12, starts, seed=4))
    with torch.no_grad():
        loss = model(input_ids=made, labels=made).loss
        p = model(input_ids=made[:, :-1]).logits.softmax(-1)
    entropy = -(p * p.log()).sum(-1).mean()
    assert loss.item() == pytest.approx(entropy.item(), rel=0.05)  # temperature 1
    settings = model.generation_config.to_dict()
    sample_sequences(model, 12, 12, starts, seed=3)
    assert model.generation_config.to_dict() == settings


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("options", [PV, {"pv": False}, {**PV, "cache_teacher": "memory"}], ids=["pv", "-", "kept"])
def test_steps_that_are_replayed_on_a_gpu_are_those_that_are_launched(options, monkeypatch, caplog):
    caplog.set_level("INFO")
    pair, replays = [one.cuda() for one in models()], []
    plain = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda self: (replays.append(self), plain(self))[1])
    model, report = tuned((copy.deepcopy(pair[0]), pair[1]), **options)
    assert "CUDA graph" not in caplog.text and len(set(replays)) == (2 if options["pv"] else 1)  # held out: 2 at a time
    assert bool(report.changed) == options["pv"]
    monkeypatch.setattr(replay_module.Replayed, "__call__", lambda self: self._run())
    launched, _ = tuned((copy.deepcopy(pair[0]), pair[1]), **options)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, launched.state_dict()[name]), name


class Places:
    """Progress that notes where the original's first block is at each step."""

    def __init__(self, original):
        self.weight, self.found = original.model.layers[0].mlp.up_proj, []

    def __getattr__(self, name):
        return lambda *_: None

    def on_step(self, step, steps):
        self.found.append(self.weight.weight.device.type)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_an_original_that_is_kept_leaves_the_gpu():
    pair = [one.cuda() for one in models()]
    found = []
    for cache in ("none", "memory"):
        model = copy.deepcopy(pair[0])
        places = Places(pair[1])
        options = {**OPTIONS, **PV, "pv_states": "8bit", "micro_batch_size": 8, "cache_teacher": cache, "steps": 6}
        report = finetune_model(model, pair[1], SEQUENCES, options, progress=places)
        found.append((set(places.found), pair[1].model.layers[0].mlp.up_proj.weight.device.type, report))
    assert [one[:2] for one in found] == [({"cuda"}, "cuda"), ({"cpu"}, "cuda")]
    losses = [[entry["held_out"] for entry in one[2].history] for one in found]
    assert losses[1] == pytest.approx(losses[0], rel=2e-2) and losses[0][-1] < losses[0][0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("states", ["float32", "8bit"])
def test_a_gpu_goes_on_to_the_same_bits(states, tmp_path):
    """From a state in the middle; with gradients that are taken at once or summed."""
    pair = [one.cuda() for one in models()]
    for micro in (8, 4):
        options = {**OPTIONS, **PV, "pv_states": states, "micro_batch_size": micro, "steps": 10, "save_interval": 6}
        whole, again = copy.deepcopy(pair[0]), copy.deepcopy(pair[0])
        report = finetune_model(whole, pair[1], SEQUENCES, options, work_dir=tmp_path / str(micro))
        finetune_model(again, pair[1], SEQUENCES, options, work_dir=tmp_path / str(micro))
        assert report.changed and report.held_out_after < report.held_out_before
        for name, tensor in whole.state_dict().items():
            assert torch.equal(tensor, again.state_dict()[name]), (micro, name)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
def test_two_gpus_have_the_losses_of_one(tmp_path):
    script = Path(__file__).parents[2] / "benchmarks" / "finetune_model.py"
    given = ["--device", "cuda", "--shape", "tiny", "--steps", "6", "--batch-size", "8", "--sequence-length", "64"]
    given += ["--pv", "--set", "micro_batch_size=4", "--set", "pv_learning_rate=0.3", "--set", "most_held_out=4"]
    found = []
    for size in (1, 2):
        path = tmp_path / f"{size}.json"
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size), str(script), *given]
        subprocess.run([*launch, "--shard-original", "--json", str(path)], check=True)
        found.append(json.loads(path.read_text()))
    losses = [[entry["held_out"] for entry in one["history"]] for one in found]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3) and losses[0][-1] < losses[0][0]
    assert [one["rows"][0]["ranks"] for one in found] == [1, 2] and found[0]["history"][-1]["changed"] > 0


if __name__ == "__main__":
    import torch._dynamo  # by Adam: the forks then need not
    import torch.distributed.fsdp

    torch.set_num_threads(1)
    _core.set_num_threads(1)
    models(), models("experts")  # the forks have them
    folder = Path(sys.argv[1])
    found = {"killed": killed(folder), "ranks": two_ranks(folder) if GLOO else None}
    (folder / "found.json").write_text(json.dumps(found))
