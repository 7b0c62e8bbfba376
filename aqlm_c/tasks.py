"""Zero-shot tasks by lm-evaluation-harness, from local files or its own data sets.

A local file holds one item a line. Each is put as the harness's own task of that name puts it, and the harness asks and
scores: `acc` by the likelihood of the answers, `acc_norm` by that over their length in characters.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .config import EvaluationOptions
from .errors import one_line, require, wrong
from .files import irregular

log = logging.getLogger("aqlm_c")

_MOST_LINE = 2**20  # bytes of an item
_LETTERS = "ABCD"
_METRICS = ("acc", "acc_norm", "perplexity")


class Item(NamedTuple):
    """What a model is asked.

    text: what stands before the answers. choices: the answers, of which `target` is the right one's number. Where the
    sentence is the same after each choice (WinoGrande), text is the number, choices are beginnings and target is what
    follows. Without choices the target is the word to be said.
    """

    text: str | int
    choices: list[str] | None
    target: str | int


class Task(NamedTuple):
    """A task: its files without ".jsonl", how an object in them is asked, and what the harness calls it."""

    file: str
    item: Callable[[dict[str, Any]], Item]
    metrics: tuple[str, ...] = ("acc",)
    own_name: str = ""
    examples: str = ""  # file of worked ones


def _arc(fields: dict[str, Any]) -> Item:
    choices = fields["choices"]
    target = choices["label"].index(fields["answerKey"])
    return Item(f"Question: {fields['question']}\nAnswer:", choices["text"], target)


def _piqa(fields: dict[str, Any]) -> Item:
    return Item(f"Question: {fields['goal']}\nAnswer:", [fields["sol1"], fields["sol2"]], fields["label"])


def _winogrande(fields: dict[str, Any]) -> Item:
    before, _, after = fields["sentence"].partition("_")
    beginnings = [before + fields[name] for name in ("option1", "option2")]
    return Item(("1", "2").index(fields["answer"]), beginnings, after.strip())


def _hellaswag(fields: dict[str, Any]) -> Item:
    return Item(fields["query"], fields["choices"], fields["gold"])


def _lambada(fields: dict[str, Any]) -> Item:
    before, _, word = fields["text"].rpartition(" ")
    return Item(before, None, f" {word}")


def _boolq(fields: dict[str, Any]) -> Item:
    text = f"{fields['passage']}\nQuestion: {fields['question']}?\nAnswer:"
    return Item(text, ["no", "yes"], int(fields["answer"]))


def _mmlu(fields: dict[str, Any]) -> Item:
    """Of examples too; `_with_examples` puts the subject and them before it."""
    options = "".join(f"\n{letter}. {text}" for letter, text in zip(_LETTERS, fields["choices"], strict=True))
    return Item(f"{fields['question'].strip()}{options}\nAnswer:", list(_LETTERS), fields["answer"])


TASKS = {
    "arc_easy": Task("arc_easy_test", _arc, ("acc", "acc_norm")),
    "arc_challenge": Task("arc_challenge_test", _arc, ("acc", "acc_norm")),
    "piqa": Task("piqa_validation", _piqa, ("acc", "acc_norm")),
    "winogrande": Task("winogrande_xl_validation", _winogrande),
    "hellaswag": Task("hellaswag_validation", _hellaswag, ("acc", "acc_norm")),
    "lambada": Task("lambada_openai_test", _lambada, ("acc", "perplexity"), "lambada_openai"),
    "boolq": Task("boolq_validation", _boolq),
    "mmlu": Task("mmlu_test", _mmlu, ("acc",), "", "mmlu_dev"),
}


def read_items(name: str, directory: Path, limit: int | None = None, shots: int = 0) -> list[Item]:
    """The items of a task from its file in `directory`: all, or `limit` of them, evenly spaced.

    shots: worked examples of the same subject before each (MMLU). Raises ValueError naming the file, and the line of an
    object that is not an item.
    """
    task = TASKS[name]
    rows = _objects(directory / f"{task.file}.jsonl")
    examples = _objects(directory / f"{task.examples}.jsonl") if task.examples and shots else []
    items = [_item(task, *row) for row in rows]
    if task.examples:
        worked: dict[str, list[str]] = {}
        for row in examples:
            worked.setdefault(str(row[2].get("subject")), []).append(_worked(_item(task, *row)))
        items = [_with_examples(item, row, worked, shots) for item, row in zip(items, rows, strict=True)]
    if not items:
        raise wrong("task_data", str(directory / f"{task.file}.jsonl"), "a file with at least one item")
    count = min(limit or len(items), len(items))
    return [items[index * len(items) // count] for index in range(count)]


def _objects(path: Path) -> list[tuple[Path, int, dict[str, Any]]]:
    """(path, line, object) of each line that is not empty."""
    kind = irregular(path)
    if kind is not None or not path.is_file():
        raise ValueError(f"task_data: got {str(path)!r}: {kind or 'no such file'}, expected a regular file")
    found = []
    with open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(_MOST_LINE), b""), 1):
            if line.strip():
                try:
                    fields = json.loads(line) if len(line) < _MOST_LINE else None
                except (ValueError, RecursionError):
                    fields = None
                if not isinstance(fields, dict):
                    raise ValueError(f"task_data: got {str(path)!r}: line {number}: expected a JSON object")
                found.append((path, number, fields))
    return found


def _item(task: Task, path: Path, number: int, fields: dict[str, Any]) -> Item:
    try:
        item = task.item(fields)
        around = item.choices is not None and isinstance(item.target, str)  # WinoGrande
        gold, text = (item.text, item.target) if around else (item.target, item.text)
        texts = [text, *([gold] if item.choices is None else item.choices)]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("expected texts")
        if item.choices is not None and not (type(gold) is int and 0 <= gold < len(item.choices) > 1):
            raise ValueError(f"got {gold!r} as the right one of {len(item.choices)} answers")
        if any(not text.strip() for text in texts):
            raise ValueError("got a text that is empty")
        json.dumps(texts, ensure_ascii=False).encode()
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        reason = f"got no {error}" if isinstance(error, KeyError) else one_line(error)
        raise ValueError(
            f"task_data: got {str(path)!r}: line {number}: expected an item of its task: {reason}"
        ) from error
    return item


def _worked(item: Item) -> str:
    assert item.choices is not None and isinstance(item.target, int), "an item of MMLU"
    return f"{item.text} {item.choices[item.target]}\n\n"


def _with_examples(item: Item, row: tuple[Path, int, dict[str, Any]], worked: Mapping[str, list[str]], n: int) -> Item:
    path, number, fields = row
    subject = str(fields.get("subject"))
    before = worked.get(subject, [])[:n]
    if len(before) < n:
        raise ValueError(
            f"shots: got {n}, expected at most {len(before)}: examples of {subject!r}, the subject of line {number} of "
            f"{str(path)!r}"
        )
    title = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
    return item._replace(text=title + "".join(before) + str(item.text))


@dataclasses.dataclass
class Prepared:
    """Tasks with their items, which `run` asks any number of models; items is None where the harness has its own."""

    options: EvaluationOptions
    items: dict[str, list[Item] | None]

    def run(self, model_name: str, model: Any, tokenizer: Any, progress: Any) -> list[dict[str, Any]]:
        """A row for each task: "task", "items", "shots", "bos" (what texts begin with), metrics and standard errors.

        model_name: for what `progress` is told. Raises ValueError for a `bos` that the harness cannot have.
        """
        from .io.data import begins_texts

        begins = begins_texts(tokenizer)
        if self.options.bos == "always" and not begins:
            raise wrong(
                "bos", "always", "'auto' or 'never' with tasks: the tokenizer begins no text with BOS by itself"
            )
        bos = begins and self.options.bos != "never"
        rows = []
        with _quiet():
            language_model = _language_model(model, tokenizer, bos, self.options.batch_size, progress)
            for name, items in self.items.items():
                progress.on_phase(f"{model_name}: {name}")
                shots = self.options.shots if TASKS[name].examples else 0
                task = own_task(name, shots) if items is None else {name: local_task(name, items)}
                values = _values(_evaluated(language_model, task, None if items is not None else self.options.limit))
                row: dict[str, Any] = {"task": name, "items": 0, "shots": shots}
                row["bos"] = tokenizer.bos_token if bos else None
                rows.append(row | summary(values))
        return rows


def prepare(options: EvaluationOptions) -> Prepared | None:
    """The tasks of `options` with their items read; None without tasks.

    Raises ValueError for a name that is none, for options without tasks, for files that are missing or hold something
    else; ImportError where the harness is not installed.
    """
    names = list(options.tasks)
    if unknown := [name for name in names if name not in TASKS]:
        raise wrong("tasks", unknown[0], f"names among {', '.join(TASKS)}")
    if len(set(names)) < len(names):
        raise wrong("tasks", names, "each task once")
    if not names:
        for name in ("task_data", "limit", "shots"):
            if getattr(options, name):
                raise wrong(name, getattr(options, name), "tasks, too")
        return None
    if options.shots and not any(TASKS[name].examples for name in names):
        raise wrong("shots", options.shots, "0: of all tasks only mmlu has examples")
    items: dict[str, list[Item] | None] = dict.fromkeys(names)
    if options.task_data is not None:
        directory = Path(options.task_data)
        if not directory.is_dir():
            raise wrong("task_data", options.task_data, "a directory with a file for each task")
        items = {name: read_items(name, directory, options.limit, options.shots) for name in names}
    _harness("evaluator")
    if options.task_data is None:
        for name in names:
            own_task(name, options.shots if TASKS[name].examples else 0)
    return Prepared(options, items)


def summary(values: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Means and standard errors of the metrics, each with a value an item, and the number of "items".

    perplexity is exp(-mean) of log likelihoods, its standard error by the delta method.
    """
    row: dict[str, Any] = {}
    for metric in _METRICS:
        if metric not in values:
            continue
        n = len(values[metric])
        mean = sum(values[metric]) / n
        squares = sum((value - mean) ** 2 for value in values[metric])
        stderr = math.sqrt(squares / (n - 1) / n) if n > 1 else None
        if metric == "perplexity":
            mean = math.exp(min(-mean, 700.0))
            stderr = None if stderr is None else min(mean * stderr, sys.float_info.max)
        row |= {"items": n, metric: mean, f"{metric}_stderr": stderr}
    return row


def _harness(module: str) -> Any:
    return require(f"lm_eval.{module}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The harness says errors alone."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def local_task(name: str, items: Sequence[Item]) -> Any:
    """The harness's task object for items of ours."""
    import datasets
    import pyarrow

    # Without a fingerprint `datasets` pickles the table for one, which fails with some pairs of pyarrow and pandas.
    table = pyarrow.Table.from_pylist([item._asdict() for item in items])
    rows = datasets.Dataset(table, fingerprint=f"aqlm_c-{name}")
    several = items[0].choices is not None
    metrics = [
        {"metric": metric, "aggregation": "perplexity" if word else "mean", "higher_is_better": not word}
        for metric in TASKS[name].metrics
        for word in [metric == "perplexity"]
    ]
    config = {
        "task": name,
        "custom_dataset": lambda **_: {"test": rows},
        "test_split": "test",
        "output_type": "multiple_choice" if several else "loglikelihood",
        "doc_to_text": lambda row: row["text"],
        "doc_to_target": lambda row: row["target"],
        "target_delimiter": " " if several else "",
        "metric_list": metrics,
    }
    if several:
        config["doc_to_choice"] = lambda row: row["choices"]
    return _harness("api.task").ConfigurableTask(config=config)


def own_task(name: str, shots: int) -> Any:
    """The harness's own task, whose data it fetches."""
    try:
        with _quiet():
            found = _harness("tasks").get_task_dict([TASKS[name].own_name or name])
    except ImportError:
        raise
    except Exception as error:  # of the hub, of the network
        raise ValueError(
            f"tasks: got {name!r}, whose data cannot be fetched ({one_line(error)[:300]}), expected task_data, too"
        ) from error
    for task in _tasks_of(found):
        task.set_config(key="num_fewshot", value=shots)
    return found


def _tasks_of(found: Any) -> Iterator[Any]:
    """Tasks in groups of groups."""
    for value in found.values():
        if isinstance(value, Mapping):
            yield from _tasks_of(value)
        else:
            yield value


def _evaluated(language_model: Any, task: Any, limit: int | None) -> Any:
    try:
        return _harness("evaluator").evaluate(language_model, task, limit=limit, bootstrap_iters=0, log_samples=True)
    except Exception as error:  # of a model's code
        if isinstance(error, (ValueError, MemoryError, RuntimeError)):
            raise
        raise ValueError(f"tasks: the harness fails: {type(error).__name__}: {one_line(error)[:300]}") from error


def _values(results: Mapping[str, Any]) -> dict[str, list[float]]:
    """Of all samples of a result, by metric."""
    samples = [sample for rows in results["samples"].values() for sample in rows]
    return {
        metric: [float(sample[metric]) for sample in samples]
        for metric in _METRICS
        if samples and all(metric in sample for sample in samples)
    }


def _language_model(model: Any, tokenizer: Any, bos: bool, batch_size: int, progress: Any) -> Any:
    """A model as the harness asks it; `progress` is told of sequences."""
    harness: Any = _harness("models.huggingface").HFLM

    class Told(harness):
        total = done = 0

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **options: Any) -> Any:
            self.total, self.done = len(requests), 0
            return super()._loglikelihood_tokens(requests, disable_tqdm=True, **options)

        def _model_call(self, inps: Any, *arguments: Any, **options: Any) -> Any:
            logits = super()._model_call(inps, *arguments, **options)
            self.done = min(self.done + len(inps), self.total)
            progress.on_window(self.done, self.total, math.nan)
            return logits

    return Told(
        pretrained=model,
        tokenizer=copy.deepcopy(tokenizer),  # which gets a token for padding
        batch_size=batch_size,
        add_bos_token=bos,
    )
