"""Who runs which trial: nobody runs one twice, and those of workers that end are run again."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from aqlm_c.sweeps.rows import COMPLETE, RowFile, read_rows
from aqlm_c.sweeps.space import Space
from aqlm_c.sweeps.store import masked, open_store

DYING = """
import os, signal, sys
from pathlib import Path
from aqlm_c.sweeps.space import Space
from aqlm_c.sweeps.store import open_store
store = open_store(Space.from_file(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
for number, trial in enumerate(store.trials()):
    if number == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
    store.finish(trial, {"state": "complete", "perplexity": 1.0, "bits": 2.0})
"""
ROW = {"state": COMPLETE, "perplexity": 1.0, "bits": 2.0}


@pytest.fixture(params=["files", "journal", "postgres"])
def storage(request, tmp_path):
    """What a space says of its storage, by kind."""
    if request.param == "files":
        return None
    pytest.importorskip("optuna", reason="Optuna is not installed")
    return f"journal:{tmp_path / 'journal'}" if request.param == "journal" else request.getfixturevalue("postgres")


def of(fields, storage, **more):
    study = {"study": f"{os.getpid()}-{time.time_ns()}", "storage": storage, "lease": 1.0} if storage else {}
    return {**fields, **study, **more}


def run_out(store):
    done = []
    for trial in store.trials():
        done.append(trial)
        store.finish(trial, ROW)
    return done


def die(path, out, name, after):
    code = subprocess.run([sys.executable, "-c", DYING, path, out, name, str(after)], timeout=120).returncode
    assert code == -signal.SIGKILL


def test_a_trial_of_a_worker_that_was_killed_is_run_by_another(fields, write, tmp_path, storage):
    path = write(of(fields, storage))
    die(path, tmp_path, "dying", 1)
    store = open_store(Space.from_file(path), tmp_path, "living")
    try:
        assert len(store.rows()) == 1
        done = run_out(store)
        assert len(done) == 3 and sorted(trial.attempt for trial in done) == [1, 1, 2]
        rows = store.rows()
        assert sorted(row["trial"] for row in rows) == [0, 1, 2, 3]
        assert run_out(store) == []
    finally:
        store.close()
    assert {row["state"] for row in rows} == {COMPLETE}


def test_a_trial_that_ends_its_workers_is_given_up(fields, write, tmp_path, storage):
    fields["space"] = {"scheme": ["1x4g8"]}
    path = write(of(fields, storage, attempts=2))
    for name in "ab":
        die(path, tmp_path, name, 0)
    store = open_store(Space.from_file(path), tmp_path, "c")
    try:
        assert run_out(store) == []
        (row,) = store.rows() if storage is None else waited(store)
    finally:
        store.close()
    assert row["state"] == "failed" and "2 times" in row["error"]


def waited(store):
    for _ in range(100):
        if rows := store.rows():
            return rows
        time.sleep(0.1)
    return []


def test_two_workers_run_each_trial_once(fields, write, tmp_path, storage):
    fields["space"] = {"seed": list(range(12))}
    space = Space.from_file(write(of(fields, storage)))
    done = {"a": [], "b": []}

    def work(name):
        store = open_store(space, tmp_path, name)
        for trial in store.trials():
            done[name].append(trial.number)
            time.sleep(0.02)
            store.finish(trial, ROW)
        store.close()

    threads = [threading.Thread(target=work, args=(name,)) for name in done]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert sorted(done["a"] + done["b"]) == list(range(12)) and all(done.values())


@pytest.mark.parametrize("sampler", ["tpe", "random", "nsga2"])
def test_a_study_draws_as_many_trials_as_asked_for(fields, tmp_path, sampler):
    pytest.importorskip("optuna", reason="Optuna is not installed")
    fields["space"] = {
        "relative_damp": {"low": 1e-4, "high": 0.1, "log": True},
        "ldl_passes": {"low": 1, "high": 3},
        "rules": [None, {"down_proj": "2x6g8"}],
    }
    space = Space.from_dict({**fields, "trials": 5, "sampler": sampler})
    store = open_store(space, tmp_path, "a")
    done = []
    for trial in store.trials():
        done.append(trial.point)
        store.finish(trial, {**ROW, "perplexity": trial.point["relative_damp"]})
    assert len(done) == 5 and len({point["relative_damp"] for point in done}) == 5
    assert all(1e-4 <= p["relative_damp"] <= 0.1 and p["ldl_passes"] in (1, 2, 3) for p in done)
    assert all(p["rules"] in (None, {"down_proj": "2x6g8"}) for p in done)
    assert len(store.rows()) == 5 and run_out(store) == []
    store.close()
    more = open_store(Space.from_dict({**fields, "trials": 7, "sampler": sampler}), tmp_path, "b")
    assert len(run_out(more)) == 2
    more.close()


def test_a_study_of_other_settings_is_refused(fields, tmp_path):
    pytest.importorskip("optuna", reason="Optuna is not installed")
    fields["storage"] = f"journal:{tmp_path / 'journal'}"
    open_store(Space.from_dict(fields), tmp_path, "a").close()
    with pytest.raises(ValueError, match=r"storage: got .* other settings: options"):
        open_store(Space.from_dict({**fields, "options": {"samples": 3}}), tmp_path, "a")


def test_optuna_that_is_not_installed_has_a_cure(fields, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r"optuna: .* pip install 'aqlm-c\[sweep\]'"):
        open_store(Space.from_dict({**fields, "storage": "journal:x"}), tmp_path, "a")


def test_a_database_that_is_away_is_one_line_without_its_password(fields, tmp_path):
    pytest.importorskip("optuna", reason="Optuna is not installed")
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    url = "postgresql://me:secret@127.0.0.1:1/db?connect_timeout=2"
    with pytest.raises(ValueError, match=r"storage: got 'postgresql://me:\*\*\*@127") as caught:
        open_store(Space.from_dict({**fields, "storage": url}), tmp_path, "a")
    assert "secret" not in str(caught.value)
    assert masked("sqlite:///x.db") == "sqlite:///x.db"
    with pytest.raises(ValueError, match=r"storage: got .*'some text'"):
        open_store(Space.from_dict({**fields, "storage": "some text"}), tmp_path, "a")


def test_what_a_killed_process_wrote_of_a_row_is_cut_off(tmp_path):
    path = tmp_path / "a.jsonl"
    with RowFile(path) as file:
        file.add({"key": "a", "trial": 0, "state": COMPLETE})
        with pytest.raises(ValueError, match=r"a.jsonl.* no other process"), RowFile(path) as other:
            other.open()
    with open(path, "a") as file:
        file.write('{"key": "b", "tri')
    assert [row["key"] for row in read_rows(tmp_path)] == ["a"]
    with RowFile(path) as file:
        file.add({"key": "c", "trial": 1, "state": COMPLETE})
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["a", "c"]
    path.write_text("{}\n")
    with pytest.raises(ValueError, match=r"a.jsonl: line 1: no row of a sweep"):
        read_rows(tmp_path)
