"""Estimates of time, memory and disk: before a run, and corrected after each block under a fake clock."""

import errno
import math
import random
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from tiny import random_tokens, tiny_llama

from aqlm_c.calibrate.activations import capture
from aqlm_c.calibrate.hessians import HessianSums
from aqlm_c.files import available_memory, check_free_space, resident_memory, same_disk
from aqlm_c.model.blocks import find_blocks, quantizable_linears
from aqlm_c.pipeline import estimate
from aqlm_c.pipeline.estimate import Estimate, Estimator, MemoryPlan, Rates, Work, plan_memory
from aqlm_c.recipe import AqlmConfig
from aqlm_c.units import binary_size, duration


def llama(hidden=576, wide=1536, kv=192):
    """Shapes of the linears of a Llama block."""
    attention = {"q_proj": (hidden, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, hidden)}
    mlp = {"gate_proj": (wide, hidden), "up_proj": (wide, hidden), "down_proj": (hidden, wide)}
    return {f"self_attn.{n}": s for n, s in attention.items()} | {f"mlp.{n}": s for n, s in mlp.items()}


def work(shapes=None, config=None, **fields):
    shapes = llama() if shapes is None else shapes
    sizes = {"tokens": 65536, "sequence_length": 1024, "hidden_size": 576, "config": config or AqlmConfig()}
    return Work.from_shapes(shapes, **{**sizes, **fields})


# ---- time -------------------------------------------------------------------------------------------------------


def test_the_default_rates_are_those_of_the_measured_run():
    measured = {"calibrate": 67, "hessian": 62, "quantize": 350, "reference": 9, "propagate": 77}
    predicted = work(config=AqlmConfig.from_scheme("2x8g8", finetune_epochs=0, ldl_passes=6, max_sweeps=8)).seconds(
        Rates()
    )
    assert predicted.keys() == measured.keys()
    for phase, seconds in measured.items():
        assert 30 * predicted[phase] == pytest.approx(seconds, rel=0.15), phase
    tuned = work(config=AqlmConfig.from_scheme("2x8g8", finetune_lookahead=1, finetune_epochs=3)).seconds(Rates())[
        "finetune"
    ]
    assert 30 * tuned == pytest.approx(1183, rel=0.15)


def test_embeddings_say_nothing_about_its_blocks():
    now = 0.0
    estimator = Estimator([work(), *[work()] * 4], clock=lambda: now)
    before = estimator.estimate().seconds_left
    now = 1e4
    estimator.finish_block(0, alike=False)
    assert estimator.estimate().seconds_left == pytest.approx(0.8 * before)
    now = 2e4
    estimator.finish_block(1)
    assert estimator.estimate().seconds_left == pytest.approx(3e4)


def test_inputs_are_those_that_the_block_shows_when_it_runs():
    model = tiny_llama()
    prefix, blocks = find_blocks(model)
    linears = {n: model.get_submodule(n) for n in quantizable_linears(f"{prefix}.0", blocks[0], None, AqlmConfig())}
    sums = HessianSums(linears)
    sums.gather(capture(model, blocks, random_tokens(2, 8)), 0, blocks[0])
    seen = sorted(linears[name].in_features for name in set(sums.leader.values()))
    shapes = {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}
    assert sorted(work(shapes).inputs) == seen == [32, 32, 32, 64]


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({}, {"finetune_epochs": 9}),
        ({}, {"max_sweeps": 20}),
        ({}, {"ldl_passes": 20}),
        ({}, {"finetune_search": 2}),
        ({}, {"solver": "paper"}),
        ({"finetune_epochs": 0}, {}),
    ],
)
def test_options_that_cost(less, more):
    times = [sum(work(config=AqlmConfig.from_dict(options)).seconds(Rates()).values()) for options in (less, more)]
    assert times[0] < times[1]


class Machine:
    """Takes its own time for each phase: other speeds than the rates', other counts, fixed costs, and noise."""

    def __init__(self, slow, seed):
        self.now, self.phases, self.slow, self.random = 0.0, {}, slow, random.Random(seed)

    def clock(self):
        return self.now

    def run(self, block):
        tokens, weights, config = block.tokens, block.weights, block.config
        forward = tokens * (2 * weights + 3 * block.sequence_length * block.hidden_size) / 150e9
        layers = block.layers
        seconds = {"propagate": forward * (2 if config.tuning.finetune_epochs else 1)}
        if layers:
            seconds["calibrate"] = 0.8 * forward
            seconds["hessian"] = tokens * sum(n * n for n in block.inputs) / 40e9
            products = 15 + (2 * config.options.adam_steps if config.solver == "paper" else 0)
            search = sum(
                out * n / config.format.in_group_size * 4e-6 + products * out * n * n / 90e9 for out, n in layers
            )
            seconds["quantize"] = (config.options.ldl_passes + 0.9 * config.options.max_sweeps) * search + 0.3
            seconds["reference"] = sum(n**3 for n in block.inputs) / 30e9
            epochs = config.tuning.finetune_epochs
            seconds["finetune"] = 5 * forward * (epochs - self.random.randint(0, epochs // 6))  # may stop early
        for phase, plain in seconds.items():
            took = plain * self.slow.get(phase, 1.0) * self.random.uniform(0.9, 1.1)
            self.phases[phase] = self.phases.get(phase, 0.0) + took
            self.now += took
        self.now += 0.05 * sum(seconds.values())  # saving and all that no phase counts


PROBED = Rates(product=500e9, gemm=110e9, group=3e-6)  # a short probe's view of that machine

SMALL, LARGE = llama(), llama(1024, 2816, 512)
ONLY_MLP = {name: shape for name, shape in LARGE.items() if "mlp" in name}
RUNS = {
    "equal": [SMALL] * 12,
    "growing": [SMALL, SMALL, SMALL, LARGE, LARGE, LARGE, SMALL, LARGE],
    "some linears only": [SMALL, ONLY_MLP, SMALL, {}, ONLY_MLP, LARGE, {}, SMALL],
}
OPTIONS = {
    "default": {},
    "not tuned": {"finetune_epochs": 0},
    "paper": {"solver": "paper", "ldl_passes": 0, "finetune_epochs": 2},
    "3x8g8, long": {"num_codebooks": 3, "max_sweeps": 30, "finetune_epochs": 8},
}
SPEEDS = {
    "as measured": {},
    "slow products": {"propagate": 5, "calibrate": 5, "finetune": 5},
    "slow search": {"quantize": 6},
}


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("run", RUNS)
def test_within_20_percent_from_the_second_block_on(run, options, speed):
    config = AqlmConfig.from_dict(OPTIONS[options])
    widths = [max((n for _, n in shapes.values()), default=1536) for shapes in RUNS[run]]
    works = [
        work(shapes, config, hidden_size=1024 if wide == 2816 else 576, weights=None if shapes else 3_500_000)
        for shapes, wide in zip(RUNS[run], widths, strict=True)
    ]
    for seed in range(5):
        machine = Machine(SPEEDS[speed], seed)
        estimator = Estimator(works, rates=PROBED, clock=machine.clock)
        machine.now = 17.0  # spent before the start
        machine.phases["calibrate"] = 17.0
        estimator.start(machine.phases)
        totals, lefts, times = [], [], []
        for index, block in enumerate(works):
            machine.run(block)
            estimator.finish_block(index, machine.phases)
            found = estimator.estimate()
            assert (found.done, found.n_blocks) == (index + 1, len(works))
            totals.append(found.seconds_total)
            lefts.append(found.seconds_left)
            times.append(machine.now)
        actual = machine.now - 17.0
        for total in totals:
            assert total == pytest.approx(actual, rel=0.2)
        for left, at in zip(lefts[:-1], times[:-1], strict=True):
            assert left == pytest.approx(machine.now - at, rel=0.35, abs=0.1 * actual)
        assert lefts[-1] == 0 and totals[-1] == pytest.approx(actual, rel=1e-9)


def test_blocks_without_phases_correct_the_whole():
    machine = Machine(dict.fromkeys(("propagate", "calibrate", "finetune", "quantize", "hessian"), 7.0), 0)
    works = [work()] * 8
    estimator = Estimator(works, clock=machine.clock)
    first = estimator.estimate().seconds_total
    for index, block in enumerate(works):
        machine.run(block)
        estimator.finish_block(index)
        if index == 0:
            second = estimator.estimate().seconds_total
    assert first < 0.5 * machine.now  # seven times slower than thought
    assert second == pytest.approx(machine.now, rel=0.2)


def test_what_is_left_falls_within_a_block():
    now = [0.0]
    estimator = Estimator([work()] * 2, clock=lambda: now[0])
    whole = estimator.estimate()
    assert whole.seconds_left == whole.seconds_total and whole.done == 0
    now[0] = 5.0
    assert estimator.estimate().seconds_left == pytest.approx(whole.seconds_left - 5)
    now[0] = 10 * whole.seconds_total  # far over: at least the second block is still to come
    assert estimator.estimate().seconds_left == pytest.approx(whole.seconds_left / 2)


def test_resumed_blocks_cost_a_propagation_only():
    works = [work()] * 6
    fresh, resumed = Estimator(works).estimate(), Estimator(works, resumed=4).estimate()
    propagate = works[0].seconds(Rates())["propagate"]
    assert resumed.seconds_left == pytest.approx(fresh.seconds_left / 3 + 4 * propagate, rel=1e-3)
    now = [0.0]
    estimator = Estimator(works, resumed=4, clock=lambda: now[0])
    for index in range(4):
        now[0] += 2 * propagate
        estimator.finish_block(index, {"resume": now[0]})  # whatever it is called
    rest = sum(works[0].seconds(Rates()).values()) + propagate  # propagation is seen to be twice as slow
    assert estimator.estimate().seconds_left == pytest.approx(2 * rest)


@pytest.mark.parametrize("scheme", ["2x8g8", "1x12g8", "3x4g16"])
def test_rates_are_measured_in_a_moment(scheme):
    rates = Rates.measure(AqlmConfig.from_scheme(scheme), "float32")
    for rate in (rates.product, rates.gemm):
        assert 1e8 < rate < 1e14
    assert 1e-9 < rates.group < 1e-2


# ---- memory and disk --------------------------------------------------------------------------------------------

GIB = 2**30


def test_memory_counts_streams_and_the_phase_that_needs_most():
    plain, tuned = work(config=AqlmConfig.from_scheme("2x8g8", finetune_epochs=0)), work()
    assert plain.activations() == 65536 * 576 * 2
    assert tuned.activations() == 3 * plain.activations()  # and what its outputs should be, twice
    assert plain.memory() > sum(n * n for n in plain.inputs) * 20
    assert tuned.memory() > plain.memory()
    whole = work(heads=9).memory() - tuned.memory()  # attention that keeps its scores
    assert whole >= AqlmConfig().tuning.finetune_batch_size * 9 * 1024 * 1024 * 6


def test_stored_bytes_are_those_of_the_true_bits():
    for scheme in ("2x8g8", "1x16g8"):
        config = AqlmConfig.from_scheme(scheme)
        bits = sum(config.format.bits_per_weight(*shape) * math.prod(shape) for shape in llama().values())
        assert work(config=config).stored() == pytest.approx(bits / 8, rel=1e-12)


def test_activations_go_to_disk_only_under_a_limit_that_needs_it(tmp_path):
    works = [work(tokens=2**22)] * 4
    stored = sum(block.stored() for block in works)
    free = plan_memory(None, works, resident=GIB, other_bytes=7)
    assert not free.on_disk and free.directory is None
    assert free.disk_bytes == stored + 7
    assert free.memory_bytes == GIB + works[0].memory() + works[0].activations()
    assert plan_memory(free.memory_bytes, works, resident=GIB, other_bytes=7) == free
    tight = plan_memory(free.memory_bytes - 1, works, resident=GIB, work_dir=tmp_path)
    assert tight.on_disk and tight.directory == tmp_path
    assert tight.memory_bytes < free.memory_bytes - 0.9 * works[0].activations()
    assert tight.disk_bytes == 2 * stored + works[0].activations()


def test_a_limit_that_is_too_small_says_what_is_needed():
    works = [work()]
    with pytest.raises(ValueError, match="memory_limit: got 1073741824") as caught:
        plan_memory(GIB, works, resident=GIB)
    needed = int(str(caught.value).partition("at least ")[2].split()[0])
    assert plan_memory(needed, works, resident=GIB).on_disk
    with pytest.raises(ValueError, match=rf"expected at least {needed}"):
        plan_memory(needed - 1, works, resident=GIB)


def test_a_disk_that_is_too_small_stops_before_the_work(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2 * GIB, 2 * GIB - 1000, 1000))
    works = [work()] * 4
    with pytest.raises(OSError, match=r"0 MiB free on this disk, expected 4 MiB for finished blocks") as caught:
        plan_memory(None, works, resident=GIB, work_dir=tmp_path / "new")
    assert caught.value.errno == errno.ENOSPC and str(tmp_path / "new") in str(caught.value)
    plan_memory(None, works, resident=GIB, work_dir=tmp_path, resumed=4)  # all of it is written already
    plan_memory(None, works, resident=GIB)
    check_free_space(tmp_path, 1000, "OUT")


@pytest.mark.parametrize("ranks", [1, 4])
def test_ranks_of_a_machine_share_its_disk(ranks, tmp_path, monkeypatch):
    work_dir, others, works = tmp_path / "work", tmp_path / "temporary", [work()] * 4
    stored, activations = sum(each.stored() for each in works), works[0].activations()
    disks = {"work": 1, "temporary": 1}
    monkeypatch.setattr(estimate, "local_size", lambda: ranks)
    monkeypatch.setattr(estimate, "temporary_directory", lambda: str(others))
    monkeypatch.setattr(estimate, "same_disk", lambda one, other: disks[one.name] == disks[Path(other).name])
    asked = []
    monkeypatch.setattr(
        estimate, "check_free_space", lambda directory, n_bytes, what: asked.append((directory, n_bytes))
    )
    limit = GIB + works[0].memory() + activations - 1
    assert plan_memory(limit, works, resident=GIB).disk_bytes == stored + activations  # of one rank
    plan_memory(limit, works, resident=GIB, work_dir=work_dir)
    disks["work"] = 2
    plan_memory(limit, works, resident=GIB, work_dir=work_dir)
    alone = (work_dir, stored + activations)
    assert asked == [(others, ranks * activations), (work_dir, stored + ranks * activations), alone]


def test_directories_on_one_disk(tmp_path):
    assert same_disk(tmp_path, tmp_path / "not" / "there") and not same_disk(tmp_path, "/proc")


def test_available_memory_is_what_machine_and_control_groups_leave(tmp_path):
    def write(**files):
        for name, text in files.items():
            path = tmp_path.joinpath(*name.split("__"))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def group(directory, limit, used, inactive):
        place = tmp_path / directory
        place.mkdir(parents=True, exist_ok=True)
        sizes = {"memory.max": limit, "memory.current": used, "memory.stat": f"anon 5\ninactive_file {inactive}\n"}
        for name, value in sizes.items():
            (place / name).write_text(f"{value}\n")

    assert available_memory(tmp_path) is None
    write(proc__meminfo="MemTotal: 4000 kB\nMemFree: 100 kB\nMemAvailable: 3000 kB\n")
    assert available_memory(tmp_path) == 3000 * 1024
    group("sys/fs/cgroup", 2_000_000, 1_500_000, 400_000)  # as a container sees its own
    assert available_memory(tmp_path) == 900_000
    group("sys/fs/cgroup", "max", 1_500_000, 0)
    assert available_memory(tmp_path) == 3000 * 1024
    (tmp_path / "sys/fs/cgroup/memory.max").unlink()  # that of a machine has none
    write(proc__self__cgroup="0::/user.slice/run.scope\n")
    group("sys/fs/cgroup/user.slice", 1_000_000, 800_000, 100_000)
    group("sys/fs/cgroup/user.slice/run.scope", "max", 700_000, 0)
    assert available_memory(tmp_path) == 300_000
    group("sys/fs/cgroup/user.slice/run.scope", 600_000, 700_000, 50_000)
    assert available_memory(tmp_path) == 0
    shutil.rmtree(tmp_path / "sys")
    write(proc__self__cgroup="5:cpu,cpuacct:/elsewhere\n4:memory:/box\n0::/\nno line\n")
    for name, value in (("limit", 10**6), ("usage", 900_000)):
        write(**{f"sys__fs__cgroup__memory__box__memory.{name}_in_bytes": f"{value}\n"})
    assert available_memory(tmp_path) == 100_000
    write(**{"sys__fs__cgroup__memory__box__memory.stat": "inactive_file 7\ntotal_inactive_file 50000\n"})
    assert available_memory(tmp_path) == 150_000


def test_resident_memory_grows_with_what_is_held():
    before = resident_memory()
    held = torch.ones(2**26)
    assert resident_memory() - before > 0.9 * held.nbytes


def test_one_line_for_people():
    found = Estimate(1920, 1920, int(1.4 * GIB), int(0.13 * GIB), 30, 0)
    assert found.describe() == "about 32 min, 1.4 GiB of memory, 0.1 GiB on disk"
    found = Estimate(1920, 600, int(1.4 * GIB), int(0.13 * GIB), 30, 20)
    assert found.describe().startswith("about 10 min left of 32 min, 1.4 GiB")
    plan = MemoryPlan(GIB, 27 * 2**20, False, None)
    assert Estimator([work()], plan).estimate().describe().endswith("1.0 GiB of memory, 27 MiB on disk")
    spans = [duration(seconds) for seconds in (45, 1920, 11520, 216000)]
    assert spans == ["45 s", "32 min", "3.2 h", "2.5 days"]
    assert binary_size(3 * GIB) == "3.0 GiB"


def test_smaller_batches_need_less_memory():
    whole = work().memory()
    assert work(batch_size=4).memory() == whole
    assert work(batch_size=1).memory() < whole
