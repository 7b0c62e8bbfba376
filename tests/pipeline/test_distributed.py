"""Several ranks give what one process gives, and none of them hangs. Runs are those of `support/ranks.py`."""

import json
import os
import re
import selectors
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from aqlm_c import distributed
from aqlm_c.calibrate import activations
from aqlm_c.calibrate.hessians import HessianSums
from aqlm_c.pipeline.estimate import Rates
from aqlm_c.pipeline.resume import begun_batch_size
from aqlm_c.pipeline.spread import spread_layers
from aqlm_c.recipe import AqlmConfig
from aqlm_c.train.block import shuffled

RANKS = Path(__file__).parents[1] / "support" / "ranks.py"
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SECONDS = 10  # in which no rank is left when one has ended

pytestmark = pytest.mark.skipif(
    not (hasattr(os, "fork") and torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="needs fork and gloo",
)


@pytest.fixture(scope="module")
def runs():
    """What came of each run, by name."""
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    names = ("sums", "same_bits", "resumed", "command_line", "killed")
    result = subprocess.run([sys.executable, RANKS, *names], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def the_one_line(end, rank):
    (line,) = end["lines"][rank].splitlines()
    assert line.startswith("aqlm-c: ")
    return line


def test_sums_go_in_pieces_and_are_those_of_one_process(runs):
    end = runs["sums"]
    assert end["codes"] == [0, 0] and end["lines"] == ["", ""]
    assert all(len(found) == 60 and all(found) for found in end["found"])


@pytest.mark.parametrize("name", ["tuned", "tied", "experts", "corrected", "without data"])
def test_the_bits_do_not_depend_on_the_number_of_ranks(runs, name):
    by_size = runs["same_bits"][name]
    (alone,) = by_size["1"]
    assert alone["ranks"] is None and alone["layers"] >= 14
    assert bool(alone["improved"]) == (name != "without data")
    for size, ranks in by_size.items():
        for one in ranks:
            assert (one["state"], one["report"]) == (alone["state"], alone["report"]), size
            assert size == "1" or one["ranks"] == int(size)


@pytest.mark.parametrize("how", ["2 1", "1 2"])
def test_a_run_goes_on_with_another_number_of_ranks(runs, how):
    first, then = how.split()
    found = runs["resumed"][how]
    assert found["end"]["codes"] == [0] * int(then)
    for after in found["after"]:
        assert (after["state"], after["report"]) == (found["before"]["state"], found["before"]["report"])
    assert found["after"][0]["resumed"] == [int(first)]
    assert found["after"][0]["ranks"] == (None if then == "1" else int(then))


def test_only_the_first_rank_speaks_and_writes(runs):
    found = runs["command_line"]
    assert found["two"]["codes"] == [0, 0] and found["one"] | {"seconds": 0} == {
        "codes": [0],
        "lines": [""],
        "seconds": 0,
    }
    assert "held-out output error" in found["two"]["lines"][0] and [
        found["two"]["lines"][1],
        *found["one"]["lines"],
    ] == ["", ""]
    assert found["same"] and found["report"] == 2


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("options", r"ranks: got other values on 0 and 1 \(seed: 0 and 7\), expected the same run"),
        (
            "data",
            r"ranks: got other values on 0 and 1 \(data.tokens: '[0-9a-f]+\.\.\. and '.*\), expected the same run",
        ),
        ("exists", r"OUT: got '.*two', which exists, expected a new path, or overwrite"),
        ("many", r"ranks: got 3 for 4 sequences in batches of 2, expected at most 2: a batch each"),
    ],
)
def test_refusals_come_before_the_work_and_end_all_ranks(runs, what, said):
    found = runs["command_line"][what]
    assert set(found["codes"]) <= {1, 2} and 2 in found["codes"] and not found.get("out")
    line, *others = found["lines"]
    assert re.match(rf"(load \.\.\.\n)?aqlm-c: (rank \d of \d stopped: )?{said}.*\n$", line), line
    assert not any(others), others


def test_the_same_wrong_argument_is_one_line(runs):
    found = runs["command_line"]["usage"]
    assert found["codes"] == [2, 2]
    assert found["lines"] == ["aqlm-c: beam_size: got -1, expected an integer in 0..64\n", ""]


@pytest.mark.parametrize("number", range(3))
def test_when_one_rank_ends_all_do_and_the_run_goes_on(runs, number):
    found = runs["killed"][number]
    who, end = found["who"], found["end"]
    other, killed = 1 - who, found["how"] == 9
    assert end["codes"][who] == (-9 if killed else 130) and end["codes"][other] == 1
    assert end["seconds"] < SECONDS
    said = "was lost" if killed else "(stopped: Ctrl-C|was lost)"  # by itself, or by its own watch
    assert re.match(rf"aqlm-c: rank {who} of 2 {said}; finished blocks are kept in ", the_one_line(end, other))
    assert found["again"]["codes"] == [0, 0] and found["again"]["lines"] == ["", ""] and found["same"]


# ---- without processes ------------------------------------------------------------------------------------------


@pytest.fixture
def watches():
    """Those of two ranks of one machine, not started; what each says of the other, as (rank, text), or waits."""
    said, made = [], []
    for rank, end in enumerate(socket.socketpair()):
        watch = distributed._Watch(rank, 2, {1 - rank: end}, lambda text, rank=rank: said.append((rank, text)))
        watch.speaks, watch.wait = rank == 0, lambda _, rank=rank: said.append((rank, "waits"))
        made.append(watch)
    yield (*made, said)
    for watch in made:
        watch.close()
        for peer in watch.peers.values():
            peer.close()


def hear(watch):
    with selectors.DefaultSelector() as selector:
        for rank, peer in watch.peers.items():
            selector.register(peer, selectors.EVENT_READ, rank)
        watch._read(1 - watch.rank, selector)


def test_of_a_refusal_that_both_ranks_find_the_first_speaks(watches):
    first, second, said = watches
    second.tell("no")
    first.tell("no")  # before it has heard of the other's
    hear(first)
    assert not second.is_answered(0)
    hear(second)
    assert said == [] and second.is_answered(0)  # whose line is then not shown


def test_of_a_refusal_that_one_rank_hears_of_first_one_speaks(watches):
    first, second, said = watches
    second.tell("no")
    hear(first)
    assert said == [(0, "rank 1 of 2 stopped: no")]
    hear(second)
    assert second.is_answered(0)
    first.tell("no")  # its own, meanwhile: it waits for the end that has begun
    assert said[1:] == [(0, "waits")]


def test_a_rank_that_hears_the_first_ones_refusal_says_nothing(watches):
    first, second, said = watches
    first.tell("no")
    hear(second)
    second.tell("no")
    assert said == [(1, ""), (1, "waits")]


def test_a_rank_whose_first_is_gone_speaks(watches):
    first, second, said = watches
    first.peers[1].close()
    second.tell("no")
    hear(second)
    assert not second.is_answered(60) and said == []  # its own line


def test_a_lost_first_rank_is_told_by_the_others(watches):
    first, second, said = watches
    first.peers[1].close()
    hear(second)
    assert said == [(1, "rank 0 of 2 was lost")]


@pytest.fixture
def environment(monkeypatch):
    """Sets torchrun's variables, those that are given."""

    def put(**values):
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return put


def test_without_the_variables_nothing_is_imported():
    code = "import sys; from aqlm_c import distributed\nwith distributed.started() as group: assert group.size == 1\n"
    code += "assert group.gather(3) == [3] and 'torch' not in sys.modules"
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: got 'two', expected an integer in 1..4096"),
        ({"WORLD_SIZE": "2"}, "MASTER_ADDR: missing, expected that of rank 0, since WORLD_SIZE is 2"),
        (
            {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1", "RANK": "2"},
            "RANK: got 2, expected an integer in 0..1",
        ),
        (
            {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
            "RANK: got '', expected an integer in 0..1",
        ),
    ],
)
def test_variables_that_are_wrong_are_named(environment, values, said):
    environment(**values)
    with pytest.raises(ValueError, match=re.escape(said)):
        distributed.environment()


def test_each_rank_has_the_device_of_its_number(environment, monkeypatch):
    environment(WORLD_SIZE="3", MASTER_ADDR="localhost", MASTER_PORT="1", RANK="2", LOCAL_RANK="2")
    assert distributed.device_of_rank("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match=r"--device: got 'cuda:1' with WORLD_SIZE=3, expected cuda, cpu or auto"):
        distributed.device_of_rank("cuda:1", "--device")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"LOCAL_RANK: got 2, expected less than 2, the CUDA devices"):
        distributed.device_of_rank("cuda", "--device")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: None)
    assert distributed.device_of_rank("cuda", "--device") == torch.device("cuda:2")


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_layers_go_to_ranks_by_cost_and_with_those_of_their_inputs(kind):
    rates = Rates.of_kind(torch.device(kind))
    config = AqlmConfig.from_scheme("2x8g8")
    shapes = {"q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096)}
    shapes |= {"gate": (14336, 4096), "up": (14336, 4096), "down": (4096, 14336)}
    shared = {"q": "x", "k": "x", "v": "x", "o": "y", "gate": "z", "up": "z", "down": "w"}
    layers = {name: (config.format, shape, config) for name, shape in shapes.items()}
    assert set(spread_layers(layers, shared, 1, rates).values()) == {0}
    two = spread_layers(layers, shared, 2, rates)
    assert list(two) == list(shapes) and set(two.values()) == {0, 1} and two == spread_layers(layers, shared, 2, rates)
    assert two["gate"] == two["up"] != two["down"] and len({two[name] for name in "qkv"}) == 1
    assert len(set(spread_layers(layers, shared, 7, rates).values())) == 7


def test_layers_are_weighed_as_the_device_takes_them():
    """A wide layer costs a CPU less than a deep one, whose products with H take most of its time, and a GPU more."""
    config = AqlmConfig.from_scheme("2x8g8")
    shapes = {"deep": (8192, 14336), "wide": (80000, 4096), "small": (1024, 4096)}
    layers = {name: (config.format, shape, config) for name, shape in shapes.items()}
    cpu, gpu = (
        spread_layers(layers, {name: name for name in shapes}, 2, Rates.of_kind(torch.device(kind)))
        for kind in ("cpu", "cuda")
    )
    assert cpu["small"] == cpu["wide"] != cpu["deep"] and gpu["small"] == gpu["deep"] != gpu["wide"]


def test_each_step_takes_batches_of_all_ranks():
    batches, generator = list(range(0, 44, 2)), torch.Generator().manual_seed(3)
    order = shuffled(batches, 4, generator)
    assert sorted(order) == batches and order != shuffled(batches, 4, generator)
    for step in range(0, 20, 4):
        assert [sum(batch < end for batch in order[step : step + 4]) for end in (22, 44)] == [2, 4]
    drawn = torch.randperm(len(batches), generator=torch.Generator().manual_seed(3)).tolist()
    assert shuffled(batches, 1, torch.Generator().manual_seed(3)) == [batches[i] for i in drawn]


@pytest.mark.parametrize(
    ("ranks", "gpu", "asked", "epochs", "size"),
    [
        (1, False, None, 1, 4),
        (2, False, None, 1, 4),
        (2, True, None, 1, 2),
        (4, True, None, 1, 1),
        (2, True, 4, 1, 4),
        (2, True, None, 0, 16),
        (8, False, None, 0, 4),
    ],
)
def test_each_rank_has_a_batch_and_on_gpus_a_part_of_each_step(monkeypatch, ranks, gpu, asked, epochs, size):
    several = distributed.Group()
    several.size = ranks
    monkeypatch.setattr(activations, "group", lambda: several)
    monkeypatch.setattr(activations, "tokens_per_batch", lambda device: 65536 if gpu else 8192)
    tuning = AqlmConfig.from_scheme("2x8g8", finetune_epochs=epochs).tuning
    device = torch.device("cuda" if gpu else "cpu")
    assert activations.batch_size_for(torch.zeros(32, 1024), tuning, asked, device) == size


def test_a_work_directory_keeps_the_batch_size(tmp_path):
    assert begun_batch_size(tmp_path / "new") is None
    for text, size in (('{"options": {"batch_size": 3}}', 3), ('{"options": {"batch_size": "3"}}', None), ("{", None)):
        (tmp_path / "fingerprint.json").write_text(text)
        assert begun_batch_size(tmp_path) == size


def test_the_sum_of_parts_is_the_sum_in_float32():
    """H of one process and of parts that are added: float64 differs in some last bits, float32 does not."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 128, 192), dtype=np.float32)
    linear = torch.nn.Linear(192, 8)

    def sums(batches):
        found = HessianSums({"linear": linear})
        for batch in batches:
            found._add("linear", torch.from_numpy(batch))
        return found.sums["linear"]

    whole, parts = sums(x), sums(x[:17]) + sums(x[17:])
    np.testing.assert_array_equal(whole.astype(np.float32), parts.astype(np.float32))
