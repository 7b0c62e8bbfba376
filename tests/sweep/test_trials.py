"""A whole sweep on a tiny model: rows, what is shared, two workers of which one is killed, and the command line."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from command import main_in_time
from safetensors.torch import load_file

import aqlm_c
from aqlm_c.recipe import RunConfig
from aqlm_c.run import run
from aqlm_c.sweeps import worker
from aqlm_c.sweeps.rows import read_rows
from aqlm_c.sweeps.space import Space
from aqlm_c.sweeps.study import sweep


def tensors(path):
    return load_file(Path(path) / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_grid_is_run_once_and_its_best_is_replayed(fields, tmp_path, monkeypatch):
    result = sweep({**fields, "keep": "best"}, tmp_path)
    assert result.complete and len(result.rows) == 4 and not [row for row in result.rows if row["state"] != "complete"]
    assert result.best["perplexity"] == min(row["perplexity"] for row in result.rows)
    lines = table(tmp_path / "trials.csv")
    assert [line["option.scheme"] for line in lines] == ["1x4g8", "1x4g8", "2x4g8", "2x4g8"]
    assert float(lines[0]["perplexity"]) == result.rows[0]["perplexity"]

    monkeypatch.setattr(worker, "run", lambda *_: pytest.fail("a trial is run again"))
    again = sweep({**fields, "keep": "best"}, tmp_path)
    assert [row["perplexity"] for row in again.rows] == [row["perplexity"] for row in result.rows]
    monkeypatch.undo()

    (kept,) = (tmp_path / "models").iterdir()
    assert int(kept.name) == result.best["trial"]
    replayed = RunConfig.from_file(tmp_path / "best.yaml")
    run(replayed)
    assert same(tensors(kept), tensors(tmp_path / "best"))
    report = json.loads((tmp_path / "best" / "report.json").read_text())
    assert report["bits_per_weight"] == result.best["bits"]


def test_a_trial_is_what_the_command_line_makes_of_its_options(fields, tmp_path):
    fields |= {"statistics": False, "keep": "all", "space": {"scheme": ["2x4g8"], "finetune_epochs": [1]}}
    (row,) = sweep(fields, tmp_path).rows
    run(RunConfig.from_fields({**fields["options"], **row["params"], "model": fields["model"], "out": tmp_path / "q"}))
    assert same(tensors(tmp_path / "models" / "00000"), tensors(tmp_path / "q"))
    source = {"sequence_length": 64, "windows": 4}
    found = aqlm_c.evaluate_models(tmp_path / "q", "pydoc_data.topics", fields["model"], **source).results[0]
    assert row["scores"]["pydoc_data.topics"]["perplexity"] == pytest.approx(found["perplexity"], rel=1e-6)
    assert row["kl"] == pytest.approx(found["kl"], rel=1e-4)
    report = json.loads((tmp_path / "q" / "report.json").read_text())
    assert row["bytes"] == report["sizes"]["quantized_bytes"]


def test_the_original_is_as_it_was_after_trials_that_tune(fields, tmp_path):
    fields["space"] = {"finetune_epochs": [1, 0], "scheme": ["2x4g8"]}
    space = Space.from_dict(fields)
    bench = worker.Bench(space, tmp_path, "cpu")
    before = {name: tensor.clone() for name, tensor in bench.original.state_dict().items()}
    rows = [bench.run(point, number) for number, point in enumerate(space.points())]
    assert all(torch.equal(tensor, before[name]) for name, tensor in bench.original.state_dict().items())
    assert rows[0]["perplexity"] != rows[1]["perplexity"]
    assert len(list((tmp_path / "statistics").glob("*.safetensors"))) == 1


def test_h_and_layers_are_made_once(fields, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(worker, "collect_hessians", lambda *a, **k: made.append(1) or collect(*a, **k))
    collect = aqlm_c.collect_hessians
    fields["space"] = {"rules": [None, {"down_proj": "2x6g8"}], "samples": [8, 4]}
    sweep(fields, tmp_path)
    assert len(made) == 2  # one for each number of samples
    assert len(list((tmp_path / "layers").iterdir())) == 2 * (14 + 2)
    monkeypatch.undo()
    sweep({**fields, "objectives": ["seconds"]}, tmp_path / "timed")
    assert not (tmp_path / "timed" / "layers").exists()


def test_a_wrong_trial_is_a_row_and_the_others_go_on(fields, tmp_path):
    fields["space"] = {"samples": [8, 10**6]}
    result = sweep(fields, tmp_path)
    assert result.complete and [row["state"] for row in result.rows] == ["complete", "failed"]
    assert "pydoc_data.topics" in result.rows[1]["error"] and not list((tmp_path / "models").iterdir())


def test_a_proxy_quantizes_the_first_blocks_and_its_best_is_of_all(fields, tmp_path):
    fields["space"] = {"scheme": ["2x4g8"]}
    (row,) = sweep({**fields, "proxy_blocks": 1}, tmp_path).rows
    assert re.search(r"layers.*0", row["config"]["layers"])
    whole = RunConfig.from_file(tmp_path / "best.yaml")
    assert whole.layers is None and whole.statistics is None
    assert len(run(whole).layers) == 14
    with pytest.raises(ValueError, match="proxy_blocks: got 2, expected fewer than the model's 2"):
        sweep({**fields, "proxy_blocks": 2}, tmp_path / "b")


def test_models_of_others_are_rows(fields, tmp_path):
    fields["space"] = {"scheme": ["2x4g8"]}
    result = sweep({**fields, "foreign": [fields["model"], "no/such"]}, tmp_path)
    rows = {row["foreign"]: row for row in result.rows if "foreign" in row}
    assert rows[fields["model"]]["kl"] == pytest.approx(0, abs=1e-7) and rows[fields["model"]]["bytes"] > 0
    assert rows["no/such"]["state"] == "failed" and result.complete and result.best["trial"] == 0


def test_rows_of_other_settings_are_refused(fields, tmp_path):
    fields["space"] = {"scheme": ["2x4g8"]}
    sweep(fields, tmp_path)
    fields["evaluation"]["windows"] = 5
    with pytest.raises(ValueError, match=r"out: got .* expected rows of the same settings.*evaluation"):
        sweep(fields, tmp_path)


def test_array_jobs_divide_a_grid(fields, write, tmp_path):
    path = write(fields)
    for index in (1, 0):
        command = ("sweep", path, "--out", tmp_path, "--index", index, "--of", 2, "--quiet", "--device", "cpu")
        assert main_in_time(*command) == 0
        assert len(read_rows(tmp_path / "rows")) == (2 if index else 4)
    names = sorted(path.name for path in (tmp_path / "rows").iterdir())
    assert names == ["worker-0-of-2.jsonl", "worker-1-of-2.jsonl"]
    assert len(table(tmp_path / "trials.csv")) == 4


def test_a_dry_run_says_what_it_would_take_and_writes_nothing(fields, write, tmp_path, capsys):
    assert main_in_time("sweep", write(fields), "--out", tmp_path / "o", "--dry-run", "--json", tmp_path / "j") == 0
    said, found = capsys.readouterr().out, json.loads((tmp_path / "j").read_text())
    assert "trials: 4, 0 of them done" in said and "disk: about" in said and not (tmp_path / "o").exists()
    assert found["trials"] == 4 and found["seconds"] > 0 and found["statistics"] == 1
    sweep({**fields, "keep": "all"}, tmp_path / "o")
    (file,) = (tmp_path / "o" / "statistics").glob("*.safetensors")
    assert found["bytes"] >= 0.5 * (file.stat().st_size - 80000)


def test_a_wrong_space_is_one_line(write, fields, tmp_path, capsys):
    assert main_in_time("sweep", write({**fields, "spaec": {}}), "--out", tmp_path / "o") == 2
    assert "did you mean 'space'" in capsys.readouterr().err and not (tmp_path / "o").exists()
    assert main_in_time("sweep", write(fields), "--out", tmp_path / "o", "--index", 3) == 2
    assert "--of" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["journal", pytest.param("postgres", marks=pytest.mark.slow)])
def test_a_sweep_of_two_workers_survives_the_kill_of_one(fields, write, tmp_path, kind, request):
    pytest.importorskip("optuna", reason="Optuna is not installed")
    storage = f"journal:{tmp_path / 'journal'}" if kind == "journal" else request.getfixturevalue("postgres")
    fields["space"] = {"scheme": ["1x4g8", "2x4g8", "1x6g8"], "seed": [0, 1, 2, 3], "max_sweeps": [1, 2]}
    study = {"storage": storage, "study": f"{os.getpid()}-{time.time_ns()}", "lease": 3.0}
    path, out = write({**fields, **study}), tmp_path / "o"
    command = [sys.executable, "-m", "aqlm_c", "sweep", path, "--out", out, "--workers", "2", "--device", "cpu"]
    process = subprocess.Popen([*command, "--json", tmp_path / "result.json"], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not (out / "rows" / "worker-1.jsonl").is_file():
            time.sleep(0.05)
        assert (out / "rows" / "worker-1.jsonl").is_file(), "worker 1 did not begin"
        (victim,) = [pid for pid in children(process.pid) if "--worker 1 " in pid[1]]
        time.sleep(0.3)  # it is inside of a trial by now
        os.kill(victim[0], signal.SIGKILL)
        assert process.wait(240) == 0
    finally:
        if process.poll() is None:
            process.kill()
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["complete"] and sorted(row["trial"] for row in result["rows"]) == list(range(24))
    assert {row["state"] for row in result["rows"]} == {"complete"}
    assert sum(row["worker"] == "worker-0" for row in result["rows"]) >= 12
    assert len(table(out / "trials.csv")) == 24


def children(parent):
    """(process, its command) of the processes that `parent` has started."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "stat").read_text().rpartition(")")[2].split()
            command = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if int(words[1]) == parent:
            found.append((int(path.name), command))
    return found
