"""Models, and the rows of sweeps, in one table: `aqlm-c compare`."""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .config import EvaluationOptions
from .errors import missing, wrong
from .files import read_json_object
from .recipe import read_yaml
from .report.comparison import Comparison, Row, averaged_rows
from .report.family import FAMILIES, Family
from .sweeps.rows import COMPLETE, read_rows, replaced
from .versions import versions

try:
    from .evaluate import evaluate_models
except ModuleNotFoundError as error:
    raise missing(error) from error

_KEPT = ("perplexity", "kl", "top1")


def compare(
    sources: Sequence[str | os.PathLike[str]],
    against: str | None = None,
    *,
    data: Mapping[str, str] | Sequence[str] = (),
    family: str | None = None,
    title: str = "Comparison",
    progress: Any = None,
    **options: Any,
) -> Comparison:
    """Compare models: names as `evaluate_models` takes them, and directories of `sweep`, whose complete rows are taken
    as they are, seeds averaged.

    against: the original. data: texts, or texts by name, on which models (not sweeps) are evaluated. family: of
    `FAMILIES`, or a YAML file of `Family.from_dict`, by which effective sizes are told, from the first text. options:
    of `EvaluationOptions`, and device. Raises ValueError for what is neither, and as `evaluate_models`.
    """
    found = family_of(family) if family is not None else None
    names = [os.fspath(source) for source in sources]
    if not names:
        raise wrong("models", names, "at least one model or directory of a sweep")
    sweeps = [name for name in names if is_sweep(name)]
    models = [name for name in names if name not in sweeps]
    _check_alike(sweeps, options if models else None)
    rows = averaged_rows(row for name in sweeps for row in rows_of_sweep(Path(name)))
    original, facts = None, _facts()
    if models:
        texts = dict(data) if isinstance(data, Mapping) else {Path(source).name: source for source in data}
        evaluation = evaluate_models(models, list(texts.values()), against, progress=progress, **options)
        named = {source: name for name, source in texts.items()}
        rows += [row_of_model(name, evaluation, named) for name in models]
        original = row_of_original(evaluation, named)
        facts["evaluation"] = {name: value for name, value in options.items() if value not in (None, ())}
    if not rows:
        raise wrong("models", names, "some with complete rows")
    if original is None:
        original = next(filter(None, (original_of_sweep(Path(name)) for name in sweeps)), None)
    return Comparison(rows, original, found, title, facts).complete()


def _check_alike(sweeps: Sequence[str], options: Mapping[str, Any] | None) -> None:
    """Raise ValueError for sweeps, and options of models, whose figures are not of the same windows of texts."""
    first: dict[str, Any] | None = None
    for name in sweeps:
        settings = read_json_object(Path(name) / "sweep.json").get("settings")
        evaluation = settings.get("evaluation") if isinstance(settings, dict) else None
        if not isinstance(settings, dict) or not isinstance(evaluation, dict):
            raise wrong("models", name, "a directory whose sweep.json is that of a sweep")
        own = {part: evaluation.get(part) for part in ("sequence_length", "windows", "bos")}
        asked = {part: (options or {}).get(part, getattr(EvaluationOptions, part)) for part in own}
        if options is not None and asked != own:
            raise wrong("models", name, f"a sweep evaluated as the models beside it, {asked}: it was {own}")
        own = {**own, "texts": settings.get("texts"), "model": settings.get("model")}
        if first is not None and own != first:
            raise wrong("models", name, f"a sweep of the same model, texts and windows as {sweeps[0]}")
        first = own


def write_comparison(comparison: Comparison, out: str | os.PathLike[str]) -> list[Path]:
    """compare.json, compare.html, compare.svg and compare.png in the directory `out`; each is complete or as it was.

    Raises ImportError, with its cure, where matplotlib is not installed: compare.json is there then.
    """
    import io

    place = Path(out)
    place.mkdir(parents=True, exist_ok=True)
    data = json.dumps(comparison.to_dict(), indent=2, allow_nan=False) + "\n"
    written = [replaced(place / "compare.json", data.encode())]
    image = io.BytesIO()
    comparison.figure().savefig(image, format="png", dpi=150)
    written.append(replaced(place / "compare.png", image.getvalue()))
    written.append(replaced(place / "compare.svg", comparison.svg().encode()))
    return [*written, replaced(place / "compare.html", comparison.page().encode())]


def family_of(name: str) -> Family:
    """The family of this name, or of a YAML file; ValueError for neither."""
    if name in FAMILIES:
        return FAMILIES[name]
    if not Path(name).is_file():
        raise wrong("family", name, f"{', '.join(FAMILIES)} or a YAML file")
    return Family.from_dict(read_yaml(Path(name)))


def is_sweep(name: str) -> bool:
    """Whether a directory is that of a sweep."""
    return (Path(name) / "sweep.json").is_file() and (Path(name) / "rows").is_dir()


def rows_of_sweep(directory: Path) -> list[Row]:
    """A row for each complete trial and foreign model; trials that differ in the seed alone have one name."""
    rows = [row for row in read_rows(directory / "rows") if row["state"] == COMPLETE]
    return [_row_of_trial(row) for row in rows]


def _row_of_trial(row: Row) -> Row:
    params = {name: value for name, value in (row.get("params") or {}).items() if name != "seed"}
    config = row.get("config") or {}
    method = str(config.get("method") or config.get("solver") or "original")
    texts = [value if isinstance(value, str) else f"{name}={json.dumps(value)}" for name, value in params.items()]
    name = " ".join(texts) or str(config.get("scheme") or "trial")
    if row.get("foreign") is not None:
        name = method = Path(row["foreign"]).name
    scores = {text: {n: score[n] for n in _KEPT if n in score} for text, score in (row.get("scores") or {}).items()}
    tasks = {task["task"]: task["acc"] for task in row.get("tasks") or () if "acc" in task}
    figures = {figure: row.get(figure) for figure in ("bits", "effective_bits", "bytes", "seconds")}
    return {"name": name, "method": method, "scheme": config.get("scheme"), "scores": scores, "tasks": tasks, **figures}


def original_of_sweep(directory: Path) -> Row | None:
    """The original's perplexities, which trials' scores say."""
    for row in read_rows(directory / "rows"):
        found = {
            text: {"perplexity": score["original_perplexity"]}
            for text, score in (row.get("scores") or {}).items()
            if "original_perplexity" in score
        }
        if found and row["state"] == COMPLETE:
            return {"name": "original", "method": "original", "scores": found}
    return None


def row_of_model(name: str, evaluation: Any, texts: Mapping[str, str]) -> Row:
    """Of one that was evaluated; its sizes by what lies in its directory."""
    scores = {
        texts.get(row["data"], row["data"]): {figure: row[figure] for figure in _KEPT if figure in row}
        for row in evaluation.results
        if row["model"] == name
    }
    tasks = {row["task"]: row["acc"] for row in evaluation.tasks if row["model"] == name and "acc" in row}
    return {"name": Path(name).name or name, "method": "model", "scores": scores, "tasks": tasks, **_sizes(name)}


def row_of_original(evaluation: Any, texts: Mapping[str, str]) -> Row | None:
    """Of the one that others were compared with."""
    if evaluation.against is None or not evaluation.results:
        return None
    first = evaluation.results[0]["model"]
    scores = {
        texts.get(row["data"], row["data"]): {"perplexity": row["original_perplexity"]}
        for row in evaluation.results
        if row["model"] == first
    }
    tasks = {row["task"]: row["acc"] for row in evaluation.tasks if row["model"] == evaluation.against and "acc" in row}
    name = f"original {Path(evaluation.against).name}"
    return {"name": name, "method": "original", "scores": scores, "tasks": tasks, **_sizes(evaluation.against)}


def _sizes(name: str) -> dict[str, Any]:
    """Method, scheme, bits and bytes, as far as they are known."""
    path = Path(name)
    if path.is_file():
        return {"bytes": path.stat().st_size}
    if not path.is_dir():
        return {}
    from .inspection import inspect_model

    found = inspect_model(path)
    sizes: dict[str, Any] = {"effective_bits": found.effective_bits, "bytes": found.total_bytes, "scheme": found.scheme}
    sizes["bits"] = found.bits_per_weight
    if (path / "report.json").is_file():  # which knows bits of what lies there as a dense weight
        report = read_json_object(path / "report.json")
        config = report.get("config") if isinstance(report.get("config"), dict) else {}
        sizes |= {figure: report[figure] for figure in ("bits_per_weight",) if isinstance(report.get(figure), float)}
        sizes["bits"] = sizes.pop("bits_per_weight", sizes["bits"])
        method = (config or {}).get("method") or (config or {}).get("solver")
        sizes |= {"method": str(method)} if method else {}
    return sizes


def _facts() -> dict[str, Any]:
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    command = " ".join(["aqlm-c", *sys.argv[1:]]) if Path(sys.argv[0]).name in ("aqlm-c", "__main__.py") else "Python"
    return {"date": now, "command": command, "machine": platform.machine(), "versions": versions()}
