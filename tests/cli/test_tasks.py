"""Zero-shot tasks: items from local files, what is wrong with them, and the harness where it is installed."""

import importlib.util
import json
import math
import sys

import pytest
import torch
from tiny import BYTES, byte_tokenizer, tiny_llama

from aqlm_c import evaluate_models, tasks
from aqlm_c.cli.main import main
from aqlm_c.config import EvaluationOptions
from aqlm_c.tasks import Item, read_items, summary

ARC = {"question": "Which?", "choices": {"text": ["one", "two", "three"], "label": ["A", "B", "C"]}, "answerKey": "B"}
OBJECTS = {
    "arc_easy_test": [ARC],
    "arc_challenge_test": [ARC],
    "piqa_validation": [{"goal": "Do it", "sol1": "so", "sol2": "or so", "label": 1}],
    "winogrande_xl_validation": [{"sentence": "As _ fell, it broke.", "option1": "he", "option2": "it", "answer": "2"}],
    "hellaswag_validation": [{"ind": 0, "query": "A man", "choices": ["sits.", "runs off.", "is", "x"], "gold": 3}],
    "lambada_openai_test": [{"text": "it was the last word"}],
    "boolq_validation": [{"passage": "It is.", "question": "is it", "answer": True}],
    "mmlu_test": [{"question": " What? ", "subject": "high_art", "choices": ["a", "b", "c", "d"], "answer": 2}],
    "mmlu_dev": [{"question": "Who?", "subject": "high_art", "choices": ["e", "f", "g", "h"], "answer": 0}],
}
ART = "The following are multiple choice questions (with answers) about high art.\n\n"
ITEMS = {
    "arc_easy": Item("Question: Which?\nAnswer:", ["one", "two", "three"], 1),
    "arc_challenge": Item("Question: Which?\nAnswer:", ["one", "two", "three"], 1),
    "piqa": Item("Question: Do it\nAnswer:", ["so", "or so"], 1),
    "winogrande": Item(1, ["As he", "As it"], "fell, it broke."),
    "hellaswag": Item("A man", ["sits.", "runs off.", "is", "x"], 3),
    "lambada": Item("it was the last", None, " word"),
    "boolq": Item("It is.\nQuestion: is it?\nAnswer:", ["no", "yes"], 1),
    "mmlu": Item(f"{ART}What?\nA. a\nB. b\nC. c\nD. d\nAnswer:", ["A", "B", "C", "D"], 2),
}
needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "tasks"
    path.mkdir()
    for name, objects in OBJECTS.items():
        (path / f"{name}.jsonl").write_text("\n".join(json.dumps(each) for each in objects * 5) + "\n\n")
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama(vocab_size=BYTES, max_position_embeddings=512).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("name", ITEMS)
def test_items_are_asked_as_the_harness_asks_them(folder, name):
    assert read_items(name, folder) == [ITEMS[name]] * 5
    assert tasks.TASKS.keys() == ITEMS.keys()


def test_worked_examples_come_first(folder):
    (item,) = read_items("mmlu", folder, 1, shots=1)
    assert item.text == f"{ART}Who?\nA. e\nB. f\nC. g\nD. h\nAnswer: A\n\nWhat?\nA. a\nB. b\nC. c\nD. d\nAnswer:"
    (folder / "mmlu_dev.jsonl").write_text("")
    with pytest.raises(ValueError, match="shots: got 2, expected at most 0: examples of 'high_art'"):
        read_items("mmlu", folder, shots=2)


def test_a_limit_takes_items_evenly(tmp_path):
    objects = [{"text": f"it was {n} words"} for n in range(10)]
    (tmp_path / "lambada_openai_test.jsonl").write_text("\n".join(map(json.dumps, objects)))
    assert [item.text for item in read_items("lambada", tmp_path, 4)] == [f"it was {n}" for n in (0, 2, 5, 7)]
    assert len(read_items("lambada", tmp_path, 99)) == 10


@pytest.mark.parametrize(
    ("name", "file", "line", "message"),
    [
        ("piqa", "piqa_validation", "{", "line 2: expected a JSON object"),
        ("piqa", "piqa_validation", "[1]", "line 2: expected a JSON object"),
        ("piqa", "piqa_validation", '{"goal": "x", "sol1": "y", "sol2": "z"}', "line 2: .*got no 'label'"),
        ("piqa", "piqa_validation", '{"goal": "x", "sol1": "y", "sol2": "z", "label": 2}', "line 2: .*got 2 as"),
        ("piqa", "piqa_validation", '{"goal": "x", "sol1": "y", "sol2": "z", "label": true}', "line 2: .*got True"),
        ("piqa", "piqa_validation", '{"goal": "x", "sol1": 3, "sol2": "z", "label": 1}', "line 2: "),
        ("piqa", "piqa_validation", '{"goal": "x", "sol1": "\\ud800", "sol2": "z", "label": 1}', "line 2: "),
        ("arc_easy", "arc_easy_test", json.dumps({**ARC, "answerKey": "D"}), "line 2: expected an item"),
        ("arc_easy", "arc_easy_test", json.dumps({**ARC, "choices": 3}), "line 2: expected an item"),
        ("winogrande", "winogrande_xl_validation", json.dumps({**OBJECTS["winogrande_xl_validation"][0],
         "sentence": "no gap"}), "line 2: .*empty"),
        ("lambada", "lambada_openai_test", '{"text": "word"}', "line 2: .*empty"),
        ("hellaswag", "hellaswag_validation", '{"query": "x", "choices": ["a"], "gold": 0}', "line 2: "),
        ("mmlu", "mmlu_test", '{"question": "x", "choices": ["a"], "subject": "s", "answer": 0}', "line 2: "),
    ],
)  # fmt: skip
def test_errors_name_file_and_line(folder, name, file, line, message):
    path = folder / f"{file}.jsonl"
    path.write_text(f"{path.read_text().splitlines()[0]}\n{line}\n")
    with pytest.raises(ValueError, match=rf"task_data: got '{path}': {message}"):
        read_items(name, folder)


def test_summary():
    found = summary({"acc": [1, 0, 1, 1], "perplexity": [-1.0, -2.0, -3.0, -2.0]})
    assert (found["items"], found["acc"], found["acc_stderr"]) == (4, 0.75, 0.25)
    assert found["perplexity"] == pytest.approx(math.exp(2))
    assert found["perplexity_stderr"] == pytest.approx(math.exp(2) * math.sqrt(2 / 3 / 4))
    assert summary({"acc": [1]})["acc_stderr"] is None


def test_what_is_refused_before_a_model_is_loaded(folder, model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("aqlm_c.hf.models.load_model", lambda *_: pytest.fail("a model was loaded"))
    (folder / "piqa_validation.jsonl").unlink()
    data = ("--task-data", str(folder))
    for words, *arguments in (
        ("tasks: got 'nosuch', expected names among arc_easy", "--tasks", "arc_easy,nosuch", *data),
        ("tasks: got '', expected names among", "--tasks", "", *data),
        ("expected each task once", "--tasks", "boolq, boolq", *data),
        ("no such file, expected a regular file", "--tasks", "piqa", *data),
        ("task_data: got './nosuch', expected a directory", "--tasks", "boolq", "--task-data", "./nosuch"),
        (f"task_data: got {str(folder)!r}, expected tasks, too", *data),
        ("limit: got 3, expected tasks, too", "--limit", "3"),
        ("shots: got 2, expected 0: of all tasks only mmlu has examples", "--tasks", "boolq", "--shots", "2", *data),
    ):
        assert main(["evaluate", model, *arguments]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert words in line and "not expected:" not in line
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["evaluate", model, "--tasks", "boolq", *data]) == 2
    assert (
        "lm_eval: got none that is installed here, expected one: pip install 'aqlm-c[eval]'" in capsys.readouterr().err
    )


@needs_harness
def test_the_harness_scores_them(folder, model, tmp_path, capsys):
    report = tmp_path / "t.json"
    names = ",".join(ITEMS)
    arguments = ["evaluate", model, "--against", model, "--tasks", names, "--task-data", str(folder), "--limit", "3"]
    assert main([*arguments, "--json", str(report)]) == 0
    out, written = capsys.readouterr().out, json.loads(report.read_text())
    assert written["results"] == [] and len(written["tasks"]) == 16 and "arc_easy" in out
    for row in written["tasks"]:
        assert row["items"] == 3 and row["acc"] in (0, 1) and row["acc_stderr"] == 0 and row["bos"] is None
    assert written["tasks"][:8] == written["tasks"][8:]  # the original's and the model's, one model here
    from aqlm_c import load_model

    network, tokenizer, _ = load_model(model)
    for row, (name, item) in zip(written["tasks"], ITEMS.items(), strict=False):
        assert row["task"] == name
        pairs = [(item.text, f" {choice}") for choice in item.choices or []] or [(item.text, item.target)]
        if name == "winogrande":
            pairs = [(choice, f" {item.target}") for choice in item.choices]
        likelihoods = [likelihood(network, tokenizer, *pair) for pair in pairs]
        if item.choices is None:
            assert row["perplexity"] == pytest.approx(math.exp(-likelihoods[0]), rel=1e-3)
            continue
        gold = item.text if name == "winogrande" else item.target
        assert row["acc"] == (max(range(len(pairs)), key=likelihoods.__getitem__) == gold)
        if "acc_norm" in row:
            normed = [value / len(choice) for value, choice in zip(likelihoods, item.choices, strict=True)]
            assert row["acc_norm"] == (max(range(len(pairs)), key=normed.__getitem__) == gold)


def likelihood(model, tokenizer, context, answer):
    before, ids = (torch.tensor(tokenizer(text)["input_ids"]) for text in (context, context + answer))
    with torch.no_grad():
        log_p = model(ids[None]).logits[0].log_softmax(-1)
    return log_p[len(before) - 1 : -1].gather(1, ids[len(before) :, None]).sum().item()


@needs_harness
def test_the_harness_asks_the_same(folder, model, monkeypatch):
    """Its own tasks, given the same objects as data sets, put them into the same words and give the same scores."""
    import datasets

    kinds = {"arc": "arc_easy_test", "piqa": "piqa_validation", "winogrande": "winogrande_xl_validation"}
    kinds["lambada"] = "lambada_openai_test"

    def load(path, name=None, **_):
        objects = next(OBJECTS[file] for kind, file in kinds.items() if kind in path)
        rows = datasets.Dataset.from_list(objects * 5)
        return {"train": rows, "validation": rows, "test": rows}

    monkeypatch.setattr(datasets, "load_dataset", load)
    names = ("arc_easy", "piqa", "winogrande", "lambada")
    own = evaluate_models(model, tasks=names, limit=3).tasks
    assert own == evaluate_models(model, tasks=names, task_data=str(folder), limit=3).tasks
    for name in names:
        (theirs,) = tasks.own_task(name, 0).values()
        ours = tasks.local_task(name, read_items(name, folder))
        for task in (theirs, ours):
            task.build_all_requests(limit=5, rank=0, world_size=1)
        assert [each.args for each in ours.instances] == [each.args for each in theirs.instances]


@needs_harness
def test_bos_that_the_tokenizer_does_not_add_is_refused(folder, model):
    with pytest.raises(ValueError, match="bos: got 'always'"):
        evaluate_models(model, tasks=("boolq",), task_data=str(folder), bos="always")


def test_options_are_checked():
    with pytest.raises(ValueError, match="batch_size: got 0"):
        EvaluationOptions(batch_size=0)
