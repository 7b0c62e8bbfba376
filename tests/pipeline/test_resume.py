"""The directory of a resumable run, and runs that are killed at any moment. As a script: those runs, in one process."""

import copy
import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import pytest
import torch
import transformers
from tiny import random_tokens, tiny_llama

import aqlm_c
from aqlm_c import _core
from aqlm_c.nn.linear import QuantizedLinear
from aqlm_c.pipeline import resume
from aqlm_c.pipeline.resume import WorkDir, block_state, fingerprint, restore_block
from aqlm_c.quantize import quantize_linear, quantize_model
from aqlm_c.recipe import AqlmConfig
from aqlm_c.versions import versions

CONFIG = AqlmConfig.from_scheme(
    "2x4g8",
    ldl_passes=1,
    max_sweeps=1,
    finetune_epochs=2,
    finetune_batch_size=2,
    finetune_learning_rate=3e-4,
    finetune_search=1,
)


def fingerprint_of(model=None, tokens=None, config=CONFIG, layers=None, **options):
    return fingerprint(
        model or tiny_llama(), random_tokens(4, 8) if tokens is None else tokens, config, layers, **options
    )


def tensors(seed=0):
    return {"codes": torch.arange(12, dtype=torch.int8).view(3, 4) + seed, "norm": torch.full((5,), 0.5 + seed)}


@pytest.fixture
def three_blocks(tmp_path):
    """The path of a directory with three finished blocks."""
    with WorkDir.open(tmp_path / "work", fingerprint_of()) as work_dir:
        for index in range(3):
            work_dir.save_block(index, tensors(index), {"index": index})
    return work_dir.path


def names(path):
    return sorted(file.name for file in path.iterdir())


# ---- fingerprint ------------------------------------------------------------------------------------------------


def test_the_same_run_has_the_same_fingerprint():
    first = fingerprint_of()
    assert first == fingerprint_of(tokens=random_tokens(4, 8).int()) == json.loads(json.dumps(first))
    assert first["options"] == {**CONFIG.to_dict(), "rules": [], "layers": None} and first["versions"]["aqlm_c"]
    moved = tiny_llama()
    moved.config._name_or_path = "somewhere/else"
    assert fingerprint_of(moved) == first


def other_model(change):
    model = tiny_llama()
    with torch.no_grad():
        change(model)
    return model


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (
            lambda: {"model": other_model(lambda model: model.model.norm.weight[3].add_(1e-6))},
            "model: its weights differ",
        ),
        (
            lambda: {"model": other_model(lambda model: model.model.rotary_emb.inv_freq.mul_(2))},
            "model: its weights differ",
        ),
        (lambda: {"model": tiny_llama(dtype=torch.bfloat16)}, "model: its weights differ"),
        (lambda: {"model": tiny_llama(rms_norm_eps=1e-3)}, "model.rms_norm_eps: 1e-06 in WORK_DIR, 0.001 now"),
        (lambda: {"tokens": random_tokens(4, 8, seed=1)}, "data: the calibration tokens differ"),
        (lambda: {"tokens": random_tokens(4, 8).view(8, 4)}, r"data.shape: \[4, 8\] in WORK_DIR, \[8, 4\] now"),
        (
            lambda: {"config": AqlmConfig.from_dict({**CONFIG.to_dict(), "relative_mse_tolerance": 0.01})},
            r"\(relative_mse_tolerance: 0.003 in WORK_DIR, 0.01 now\)",
        ),
        (
            lambda: {"config": AqlmConfig.from_dict({**CONFIG.to_dict(), "seed": 7, "in_group_size": 4})},
            r"\(in_group_size: 8 in WORK_DIR, 4 now; seed: 0 in WORK_DIR, 7 now\)",
        ),
        (
            lambda: {"config": CONFIG.replace(rules={"up": "1x4g8", "mlp": "dense"})},
            r"\(rules: \[\] in WORK_DIR, \[\['up', '1x4g8'\], \['mlp', 'dense'\]\] now\)",
        ),
        (lambda: {"layers": "mlp"}, r"\(layers: None in WORK_DIR, 'mlp' now\)"),
        (lambda: {"batch_size": 2}, r"\(batch_size: None in WORK_DIR, 2 now\)"),
    ],
)
def test_another_run_is_refused(three_blocks, other, said):
    before = names(three_blocks)
    with pytest.raises(ValueError, match=rf"work_dir: got '.*work': holds another run.*{said}.*another --work-dir"):
        WorkDir.open(three_blocks, fingerprint_of(**other()))
    assert names(three_blocks) == before
    WorkDir.open(three_blocks, fingerprint_of()).close()  # refusing gave it free


def test_the_order_of_rules_counts(tmp_path):
    rules = {"up": "1x4g8", "mlp": "dense"}
    WorkDir.open(tmp_path / "w", fingerprint_of(config=CONFIG.replace(rules=rules))).close()
    turned = CONFIG.replace(rules=dict(reversed(rules.items())))
    with pytest.raises(ValueError, match="rules: "):
        WorkDir.open(tmp_path / "w", fingerprint_of(config=turned))


def test_a_refusal_is_short_where_everything_differs(three_blocks):
    with pytest.raises(ValueError, match=r"holds another run \(([^;]+; ){6}and \d+ more\)"):
        WorkDir.open(three_blocks, {"model": {}, "data": {}, "options": {}})


def test_another_version_is_refused(three_blocks, monkeypatch):
    monkeypatch.setattr(resume, "versions", lambda: {**versions(), "torch": "1.0"})
    with pytest.raises(ValueError, match=r"versions.torch: .* in WORK_DIR, '1.0' now"):
        WorkDir.open(three_blocks, fingerprint_of())


def test_another_number_of_threads_only_warns(three_blocks, caplog):
    threads = _core.get_num_threads()
    _core.set_num_threads(threads + 1)
    try:
        now = fingerprint_of()
    finally:
        _core.set_num_threads(threads)
    with WorkDir.open(three_blocks, now) as work_dir:
        assert work_dir.finished == 3
    (message,) = caplog.messages
    assert f"machine.threads: [{threads}, " in message and f"[{threads + 1}, " in message
    caplog.clear()
    WorkDir.open(three_blocks, fingerprint_of()).close()
    assert not caplog.messages


# ---- the directory ----------------------------------------------------------------------------------------------


def test_a_new_directory_is_made_with_its_parents(tmp_path):
    path = tmp_path / "a" / "b"
    with WorkDir.open(path, fingerprint_of()) as work_dir:
        assert work_dir.finished == 0
    assert names(path) == ["fingerprint.json", "lock"]
    assert json.loads((path / "fingerprint.json").read_text()) == fingerprint_of()


def test_a_directory_of_something_else_is_refused_and_untouched(tmp_path):
    (tmp_path / "thesis.txt").write_text("text")
    with pytest.raises(ValueError, match=r"work_dir: got .*holds 'thesis.txt' and no fingerprint.json; expected a new"):
        WorkDir.open(tmp_path, fingerprint_of())
    assert names(tmp_path) == ["thesis.txt"]


def test_a_damaged_fingerprint_is_refused(three_blocks):
    for text in ("{", "3", '{"model": 3}', "[]"):
        (three_blocks / "fingerprint.json").write_text(text)
        with pytest.raises(ValueError, match=r"fingerprint.json is damaged|holds another run"):
            WorkDir.open(three_blocks, fingerprint_of())


def test_two_runs_do_not_share_a_directory(three_blocks):
    with (
        WorkDir.open(three_blocks, fingerprint_of()),
        pytest.raises(BlockingIOError, match=r"work_dir: got '.*work': another process uses it; .* another --work-dir"),
    ):
        WorkDir.open(three_blocks, fingerprint_of())
    WorkDir.open(three_blocks, fingerprint_of()).close()


def test_what_a_killed_writer_left_is_removed(tmp_path, three_blocks):
    before = names(three_blocks)
    for name in ("block-0003.safetensors.new", "fingerprint.json.new"):
        (three_blocks / name).write_bytes(b"half")
    with WorkDir.open(three_blocks, fingerprint_of()) as work_dir:
        assert work_dir.finished == 3 and names(three_blocks) == before
    first = tmp_path / "killed before its fingerprint"
    first.mkdir()
    for name in ("lock", "fingerprint.json.new"):
        (first / name).touch()
    WorkDir.open(first, fingerprint_of()).close()
    assert names(first) == ["fingerprint.json", "lock"]


# ---- blocks -----------------------------------------------------------------------------------------------------


def test_blocks_come_back_as_they_were(tmp_path):
    noise = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    saved = {
        "f32": noise,
        "nan": torch.tensor([float("nan"), -0.0, float("inf")]),
        "f16": noise.half(),
        "bf16": noise.bfloat16(),
        "int16": torch.arange(-4, 4, dtype=torch.int16),
        "bool": noise > 0,
        "transposed": noise.T,
        "row": noise[2],
        "parameter": torch.nn.Parameter(noise),
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, 4),
    }
    report = {"layers": [{"name": "ü", "relative_error": 0.1 + 0.2, "code_rate": None}]}
    with WorkDir.open(tmp_path / "work", fingerprint_of()) as work_dir:
        work_dir.save_block(0, saved, report)
        (work_dir.path / "block-0000.safetensors").rename(tmp_path / "copy")
        shutil.copy(tmp_path / "copy", work_dir.path / "block-0000.safetensors")
        loaded, again = work_dir.load_block(0)
        with open(work_dir.path / "block-0000.safetensors", "r+b") as file:  # a view of the file would change
            file.write(bytes(os.fstat(file.fileno()).st_size))
    assert again == report and loaded.keys() == saved.keys()
    for name, tensor in loaded.items():
        assert tensor.dtype == saved[name].dtype and tensor.shape == saved[name].shape and tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        raw = (x.detach().contiguous().reshape(-1).view(torch.uint8) for x in (tensor, saved[name]))
        assert torch.equal(*raw), name


def test_finished_blocks_are_found_again(three_blocks):
    with WorkDir.open(three_blocks, fingerprint_of()) as work_dir:
        assert work_dir.finished == 3
        for index in range(3):
            loaded, report = work_dir.load_block(index)
            assert torch.equal(loaded["norm"], tensors(index)["norm"]) and report == {"index": index}
        with pytest.raises(ValueError, match="index: got 4, expected 3"):
            work_dir.save_block(4, tensors(), {})
        work_dir.save_block(3, tensors(), {})
        assert work_dir.finished == 4


def truncate(file):
    os.truncate(file, os.stat(file).st_size - 3)


def empty(file):
    os.truncate(file, 0)


def no_metadata(file):
    from safetensors.torch import save_file

    save_file(tensors(1), file)


def other_block(file):
    """Whole and readable, and not what was written: the value of one tensor."""
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize("damage", [truncate, empty, no_metadata, other_block])
def test_a_damaged_block_and_the_later_ones_are_done_again(three_blocks, caplog, damage):
    damage(three_blocks / "block-0001.safetensors")
    with WorkDir.open(three_blocks, fingerprint_of()) as work_dir:
        assert work_dir.finished == 1
        assert [name for name in names(three_blocks) if name.startswith("block")] == ["block-0000.safetensors"]
        work_dir.save_block(1, tensors(1), {})
    (message,) = caplog.messages
    assert "block-0001.safetensors is damaged" in message and "done again" in message


def test_every_changed_byte_is_seen(three_blocks):
    file = three_blocks / "block-0002.safetensors"
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    used = len(data[:start].rstrip())  # the header ends in spaces
    with WorkDir.open(three_blocks, fingerprint_of()) as work_dir:
        for position in [*range(used), *range(start, len(data))]:
            file.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
            with pytest.raises(ValueError, match=r"block-0002.safetensors is damaged"):
                work_dir.load_block(2)


def test_a_gap_ends_the_finished_blocks(three_blocks):
    (three_blocks / "block-0001.safetensors").unlink()
    with WorkDir.open(three_blocks, fingerprint_of()) as work_dir:
        assert work_dir.finished == 1
    assert "block-0002.safetensors" not in names(three_blocks)


# ---- disks ------------------------------------------------------------------------------------------------------

USABLE = "finished blocks in it stay usable"


def check_still_usable(path):
    assert names(path) == [*(f"block-000{i}.safetensors" for i in range(3)), "fingerprint.json", "lock"]
    with WorkDir.open(path, fingerprint_of()) as work_dir:
        assert work_dir.finished == 3
        work_dir.save_block(3, tensors(), {})


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_refuses(three_blocks, monkeypatch, call, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    with WorkDir.open(three_blocks, fingerprint_of()) as work_dir:
        with monkeypatch.context() as patch:
            patch.setattr(os, call, refuse)
            said = f"work_dir: got '.*work': writing block-0003.safetensors: {os.strerror(code)}; .*{USABLE}"
            with pytest.raises(OSError, match=said) as caught:
                work_dir.save_block(3, tensors(), {})
        assert caught.value.errno == code and work_dir.finished == 3
    check_still_usable(three_blocks)


def test_a_file_that_the_system_cuts_off(three_blocks):
    """The kernel's own refusal in the middle of a file, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with WorkDir.open(three_blocks, fingerprint_of()) as work_dir:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # Python ignores its signal
        try:
            with pytest.raises(OSError, match=f"writing block-0003.safetensors: File too large; .*{USABLE}"):
                work_dir.save_block(3, {"codes": torch.zeros(200_000, dtype=torch.int8)}, {})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    check_still_usable(three_blocks)


def test_a_place_where_no_directory_can_be(tmp_path):
    (tmp_path / "file").touch()
    for path, said in ((tmp_path / "file" / "work", "Not a directory"), (tmp_path / "file", "File exists")):
        with pytest.raises(OSError, match=rf"work_dir: got '{path}': opening it: {said}; expected a directory"):
            WorkDir.open(path, fingerprint_of())


# ---- blocks of models -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_block_equals_the_quantized_one(tmp_path, dtype):
    model = tiny_llama(dtype=dtype, attention_bias=True)
    block, fresh = model.model.layers[0], copy.deepcopy(model.model.layers[0])
    for name, module in list(block.named_modules()):
        if isinstance(module, torch.nn.Linear) and "down" not in name:
            block.set_submodule(name, quantize_linear(module, torch.eye(module.in_features), CONFIG)[0])
    with torch.no_grad():
        block.input_layernorm.weight.mul_(1.5)  # as fine-tuning would
    with WorkDir.open(tmp_path / "work", fingerprint_of()) as work_dir:
        work_dir.save_block(0, block_state(block), {})
        loaded, _ = work_dir.load_block(0)

    layers = restore_block(fresh, loaded)
    assert len(layers) == 6 and all(fresh.get_submodule(name) is layer for name, layer in layers.items())
    assert all(isinstance(layer, QuantizedLinear) for layer in layers.values())
    assert isinstance(fresh.mlp.down_proj, torch.nn.Linear)
    want = dict(block.named_parameters())
    assert dict(fresh.named_parameters()).keys() == want.keys()
    for name, parameter in fresh.named_parameters():
        assert torch.equal(parameter, want[name]) and parameter.dtype == want[name].dtype, name
        assert parameter.requires_grad == want[name].requires_grad, name


def test_a_block_without_quantized_layers(tmp_path):
    block = tiny_llama().model.layers[0]
    before = copy.deepcopy(block.state_dict())
    with WorkDir.open(tmp_path / "work", fingerprint_of()) as work_dir:
        work_dir.save_block(0, {}, {"layers": []})
        loaded, report = work_dir.load_block(0)
    assert restore_block(block, loaded) == {} and report == {"layers": []}
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


# ---- kill -9 ----------------------------------------------------------------------------------------------------

BLOCKS, KILLS = 4, 20
IN_SAVING = ("write", "fsync", "after replace")


def test_a_killed_run_ends_as_an_uninterrupted_one(tmp_path):
    """Every result of runs that were killed, some twice, equals the uninterrupted one byte for byte."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, __file__, str(tmp_path)]
    script = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert script.returncode == 0, script.stderr
    result = json.loads(script.stdout.splitlines()[-1])
    assert result["random kills"] == KILLS and result["kills in saving"] == list(IN_SAVING)
    assert len(set(result["finished at the kill"])) >= 3  # before, between and after the blocks
    assert result["fine-tuned"] and result["files"] == 3 and result["results"] > len(IN_SAVING)
    assert result["different files"] == [] and result["blocks done twice"] == []


class _Runs:
    """Runs of the same command in children of this warm process, which end by themselves or by SIGKILL."""

    def __init__(self, directory):
        torch.set_num_threads(1)  # no thread, not even that of a progress bar, may hold a lock during a fork
        _core.set_num_threads(1)
        transformers.utils.logging.disable_progress_bar()
        self.directory = directory
        self.model, self.tokens = tiny_llama(num_hidden_layers=BLOCKS), random_tokens(8, 16)
        self.warm_up()
        self.result = {"random kills": 0, "kills in saving": [], "finished at the kill": [], "results": 0}
        self.result |= {"different files": [], "blocks done twice": []}
        started = time.perf_counter()
        self.run(None, directory / "uninterrupted")
        self.stage = (time.perf_counter() - started) / (BLOCKS + 1)  # seconds
        self.expected = self.files(directory / "uninterrupted")
        self.result["files"] = len(self.expected)
        self.result["fine-tuned"] = self.expected != self.files(directory / "warm")

    def warm_up(self):
        """Import what a run imports; without fine-tuning, because autograd refuses to work in a fork of its user."""
        model, config = copy.deepcopy(self.model), AqlmConfig.from_dict({**CONFIG.to_dict(), "finetune_epochs": 0})
        quantize_model(model, self.tokens, config)
        aqlm_c.save_quantized(model, None, self.directory / "warm")
        assert threading.active_count() == 1

    def run(self, work_dir, out, moment=None, prepare=lambda: None):
        """Quantize and write `out`; kill at `moment`, in blocks. Says whether the run was killed."""
        child = os.fork()
        if not child:
            try:
                signal.alarm(60)
                prepare()
                quantize_model(self.model, self.tokens, CONFIG, work_dir=work_dir)
                aqlm_c.save_quantized(self.model, None, out)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        ended = 0
        if moment is not None:
            while len(self.blocks(work_dir)) < int(moment) and not ended:
                time.sleep(0.001)
                ended, status = os.waitpid(child, os.WNOHANG)
            if not ended:
                time.sleep((moment % 1) * self.stage)
                os.kill(child, signal.SIGKILL)
        if not ended:
            _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        if code not in (0, -signal.SIGKILL):
            sys.exit(f"a run ended with {code}, work_dir={work_dir}")
        return code != 0

    def kill_at_random(self, rng):
        """One result of a run that is killed at one random moment or at several, one after another."""
        work_dir, out = (self.directory / f"{name}-{self.result['results']}" for name in ("work", "out"))
        finished = 0
        while self.result["random kills"] < KILLS and self.run(work_dir, out, rng.uniform(finished, BLOCKS + 1)):
            finished = len(self.blocks(work_dir))
            self.result["random kills"] += 1
            self.result["finished at the kill"].append(finished)
            if finished == BLOCKS or rng.random() < 0.4:
                break
        self.compare(work_dir, out)

    def kill_in_saving(self, where):
        """One result of a run that is killed while it saves its second block."""
        work_dir, out = (self.directory / f"{name}-{where}" for name in ("work", "out"))
        if self.run(work_dir, out, prepare=lambda: _kill_in_saving(where)):
            self.result["kills in saving"].append(where)
        self.compare(work_dir, out)

    def compare(self, work_dir, out):
        """Let the run end and compare its result; blocks that were finished must not be touched."""
        before = self.blocks(work_dir)
        if not out.exists():
            self.run(work_dir, out)
        after = self.blocks(work_dir)
        self.result["blocks done twice"] += [str(file) for file in before if before[file] != after.get(file)]
        files = self.files(out)
        both = self.expected.keys() | files.keys()
        self.result["different files"] += [name for name in both if files.get(name) != self.expected.get(name)]
        self.result["results"] += 1

    def blocks(self, work_dir):
        return {file: os.stat(file).st_mtime_ns for file in work_dir.glob("block-*.safetensors")}

    def files(self, out):
        return {str(file.relative_to(out)): file.read_bytes() for file in out.rglob("*") if file.is_file()}


def _kill_in_saving(where):
    """Let this process kill itself at a step of writing its third file, the second block."""
    fsync, replace = os.fsync, os.replace
    files = 0

    def kill(step):
        if files == 3 and where == step:
            os.kill(os.getpid(), signal.SIGKILL)

    def killing_fsync(file):
        nonlocal files
        files += 1
        if files == 3 and where == "write":
            os.ftruncate(file, os.fstat(file).st_size // 2)
        kill("write")
        fsync(file)
        kill("fsync")

    def killing_replace(source, target):
        replace(source, target)
        kill("after replace")

    os.fsync, os.replace = killing_fsync, killing_replace


if __name__ == "__main__":
    runs = _Runs(Path(sys.argv[1]))
    moments = random.Random(0)
    while runs.result["random kills"] < KILLS:
        runs.kill_at_random(moments)
    for step in IN_SAVING:
        runs.kill_in_saving(step)
    print(json.dumps(runs.result))
