"""What a sweep tries: SPACE.yaml as a strict schema, whose every point is checked before any work."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import EvaluationOptions
from ..errors import int_between, wrong
from ..recipe import FIELDS, RunConfig, check_names, named_solver, option_types, options_of, read_yaml

OBJECTIVES = ("perplexity", "kl", "bits", "bytes", "seconds")  # all of them the lower the better
KEEP = ("none", "best", "all")
SAMPLERS = ("tpe", "random", "nsga2")
_OF_THE_SWEEP = ("model", "out", "work_dir", "overwrite", "threads", "device", "statistics")
_MOST_POINTS = 100_000
_RANGE = {"low": "float", "high": "float", "step": "float | None", "log": "bool"}

Point = dict[str, Any]  # values by the option's name


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from low to high, both possible; integers where the option is one. step: between them. log: drawn evenly
    by their logarithm.

    Raises ValueError naming what is wrong.
    """

    name: str
    low: float
    high: float
    step: float | None = None
    log: bool = False
    whole: bool = False

    def __post_init__(self) -> None:
        for part in ("low", "high", "step"):
            value = getattr(self, part)
            number = type(value) is int or (type(value) is float and math.isfinite(value) and not self.whole)
            if not number and not (part == "step" and value is None):
                raise wrong(f"space.{self.name}.{part}", value, "an integer" if self.whole else "a number")
        if not isinstance(self.log, bool):
            raise wrong(f"space.{self.name}.log", self.log, "true or false")
        if not self.low < self.high:
            raise wrong(f"space.{self.name}.high", self.high, f"more than low, {self.low}")
        if self.step is not None and (self.step <= 0 or self.log):
            raise wrong(f"space.{self.name}.step", self.step, "a number above 0, and none with log")
        if self.log and self.low <= 0:
            raise wrong(f"space.{self.name}.low", self.low, "more than 0 with log")

    @classmethod
    def read(cls, name: str, fields: Mapping[str, Any], types: Mapping[str, str]) -> Range:
        """Of an option's mapping in `space`."""
        kinds = types[name].split(" | ")
        if not {"int", "float"} & set(kinds):
            raise wrong(f"space.{name}", fields, f"a value or a list of values: {name} is no number")
        _named(f"space.{name}", fields, _RANGE)
        for part in ("low", "high"):
            if part not in fields:
                raise wrong(f"space.{name}", fields, f"{part} too")
        return cls(name, **{part: _number(value) for part, value in fields.items()}, whole="float" not in kinds)


@dataclasses.dataclass(frozen=True)
class Space:
    """A sweep. model: as in `RunConfig`. options: of all runs. parts: of the space, whose union is tried: by option a
    tuple of values or a `Range`. texts: sources by name, on which models are evaluated, by `evaluation`. objectives: of
    `OBJECTIVES`; the first one says what is best. trials: of a space with ranges. storage: None, an Optuna URL, or a
    journal file. study: its name there. statistics: whether runs share H of the original model. proxy_blocks: only the
    first so many blocks are quantized. foreign: models of others, evaluated too. keep: which quantized models stay on
    disk, of `KEEP`. attempts: how often a trial is begun whose worker ends. lease: seconds after which a worker that
    says nothing is one that ended.
    """

    model: str
    parts: tuple[dict[str, Any], ...]
    options: dict[str, Any]
    texts: dict[str, str]
    evaluation: EvaluationOptions
    objectives: tuple[str, ...] = ("perplexity",)
    trials: int | None = None
    storage: str | None = None
    study: str = "sweep"
    sampler: str = "tpe"
    statistics: bool = True
    proxy_blocks: int | None = None
    foreign: tuple[str, ...] = ()
    keep: str = "none"
    attempts: int = 3
    lease: float = 60.0
    seed: int = 0
    original: dict[str, Any] = dataclasses.field(default_factory=dict)  # as it was read

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Space:
        """The sweep of a YAML file; ValueError naming the file and the key."""
        try:
            return cls.from_dict(read_yaml(Path(path)))
        except ValueError as error:
            text = str(error)
            raise ValueError(text if text.startswith("config: ") else f"{os.fspath(path)}: {text}") from None

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Space:
        """The sweep of these fields, as in the file (docs/sweeps.md); every value in it is checked.

        Raises ValueError for a key that is none, naming it, and for a point that is no run.
        """
        _named("", fields, dict.fromkeys(_KEYS))
        if not isinstance(fields.get("model"), str) or not fields["model"]:
            raise wrong("model", fields.get("model"), "a directory, a hub name, a .gguf file or smollm2")
        types = {**FIELDS, **option_types()}
        texts, evaluation = _evaluation(fields.get("evaluation"))
        options = named_solver(_mapping("options", fields.get("options")))
        _check_options("options", options, types)
        settings = {name: fields[name] for name in _SIMPLE if name in fields}
        for name in ("objectives", "foreign"):
            if name in settings:
                settings[name] = tuple(_texts(name, settings[name]))
        parts = tuple(_part(part, types) for part in _parts(fields.get("space")))
        space = cls(fields["model"], parts, options, texts, evaluation, **settings, original=dict(fields))
        space._check()
        return space

    @property
    def has_ranges(self) -> bool:
        """Whether Optuna chooses the points."""
        return any(isinstance(values, Range) for part in self.parts for values in part.values())

    def points(self) -> list[Point]:
        """All points of a grid, each once, in order."""
        found: dict[str, Point] = {}
        for part in self.parts:
            for values in itertools.product(*part.values()):
                point = dict(zip(part, values, strict=True))
                found.setdefault(key_of(point), point)
        return list(found.values())

    @property
    def count(self) -> int:
        """Trials that there are to be."""
        return self.trials if self.trials is not None else len(self.points())

    def samples(self, most: int) -> list[Point]:
        """At most so many points, evenly spread or drawn, to tell what the others are like."""
        if not self.has_ranges:
            points = self.points()
            step = max(1, -(-len(points) // most))
            return points[::step]
        generator, (part,) = random.Random(self.seed), self.parts
        return [
            {name: _drawn(values, generator) for name, values in part.items()} for _ in range(min(most, self.count))
        ]

    def config(self, point: Point, out: str, **of_run: Any) -> RunConfig:
        """The run of a point. of_run: other fields of it, such as device."""
        fields = {**self.options, **point}
        given = {name: value for name, value in {**fields, **of_run}.items() if value is not None}
        return RunConfig.from_fields({**given, "model": self.model, "out": out})

    def settings(self) -> dict[str, Any]:
        """What all rows have in common: those of other settings are not compared with them."""
        evaluation = {name: value for name, value in dataclasses.asdict(self.evaluation).items() if name != "task_data"}
        return {
            "model": os.path.basename(self.model.rstrip("/")),
            "options": self.options,
            "evaluation": {**json.loads(json.dumps(evaluation)), "texts": sorted(self.texts)},
            "statistics": self.statistics,
            "proxy_blocks": self.proxy_blocks,
        }

    def shown(self) -> dict[str, Any]:
        """As it was read, ready for JSON, without a storage's password."""
        fields = json.loads(json.dumps(self.original, default=str))
        return {**fields, "storage": masked(self.storage)} if self.storage else fields

    def _check(self) -> None:
        if not self.objectives or len(set(self.objectives)) < len(self.objectives):
            raise wrong("objectives", list(self.objectives), "one or several, each once")
        for name in self.objectives:
            if name not in OBJECTIVES:
                raise wrong("objectives", name, f"one of {', '.join(OBJECTIVES)}")
        if not self.texts and {"perplexity", "kl"} & set(self.objectives):
            raise wrong("evaluation.data", {}, "a text at least, for perplexity and kl")
        for name, known in (("keep", KEEP), ("sampler", SAMPLERS)):
            if getattr(self, name) not in known:
                raise wrong(name, getattr(self, name), f"one of {', '.join(known)}")
        if not isinstance(self.statistics, bool):
            raise wrong("statistics", self.statistics, "true or false")
        for name in ("storage", "study"):
            if not isinstance(getattr(self, name), (str, type(None))) or getattr(self, name) == "":
                raise wrong(name, getattr(self, name), "text")
        if self.proxy_blocks is not None:
            int_between("proxy_blocks", self.proxy_blocks, 1)
            if "layers" in self.options or any("layers" in part for part in self.parts):
                raise wrong("proxy_blocks", self.proxy_blocks, "none with layers, which it sets")
        int_between("attempts", self.attempts, 1)
        int_between("seed", self.seed, 0)
        if type(self.lease) not in (int, float) or not 0.5 <= self.lease <= 86400:
            raise wrong("lease", self.lease, "seconds, 0.5 at least")
        self._check_points()

    def _check_points(self) -> None:
        if self.has_ranges:
            if len(self.parts) > 1:
                raise wrong("space", f"{len(self.parts)} parts", "one with ranges: a list of parts is for grids")
            if self.trials is None:
                raise wrong("trials", None, "a number of trials, since the space has ranges")
            int_between("trials", self.trials, 1)
        elif self.trials is not None:
            raise wrong("trials", self.trials, "none: a grid has as many as there are points")
        count = sum(math.prod(len(v) for v in part.values() if isinstance(v, tuple)) for part in self.parts)
        if count > _MOST_POINTS:
            raise wrong("space", f"{count} points", f"at most {_MOST_POINTS}")
        if not self.has_ranges:
            for point in self.points():
                self._check_point(point)
            return
        (part,) = self.parts
        ends = [{n: (v.low, v.high) if isinstance(v, Range) else v for n, v in part.items()}]
        longest = max(len(values) for values in ends[0].values())
        for index in range(longest):  # each value and both ends of each range, in some point
            self._check_point({name: values[index % len(values)] for name, values in ends[0].items()})

    def _check_point(self, point: Point) -> None:
        try:
            config = self.config(point, "out", statistics="file" if self.statistics else None)
            config.resolve().config.check_searchable()
        except ValueError as error:
            raise ValueError(f"space: the point {json.dumps(point)}: {error}") from None


_SIMPLE = [field.name for field in dataclasses.fields(Space)][5:-1]
_KEYS = ["model", "options", "space", "evaluation", *_SIMPLE]


def key_of(point: Mapping[str, Any]) -> str:
    """A point as text that is the same wherever it is made."""
    return json.dumps(point, sort_keys=True)


def masked(where: str) -> str:
    """A URL without its password."""
    return re.sub(r"(://[^:/@]*):[^@]*@", r"\1:***@", where)


def digest_of(key: str) -> str:
    """A short name of a point for files."""
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def _named(where: str, fields: Any, known: Mapping[str, Any]) -> None:
    try:
        check_names(fields, known)
    except ValueError as error:
        raise ValueError(f"{where}: {error}" if where else str(error)) from None


def _mapping(name: str, value: Any) -> dict[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise wrong(name, value, "a mapping of names to values")
    return dict(value or {})


def _texts(name: str, value: Any) -> list[str]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, (list, tuple)) or not all(isinstance(item, str) for item in values):
        raise wrong(name, value, "a text or a list of texts")
    return list(values)


def _evaluation(value: Any) -> tuple[dict[str, str], EvaluationOptions]:
    fields = _mapping("evaluation", value)
    data = fields.pop("data", None)
    if isinstance(data, Mapping):
        texts = {str(name): source for name, source in data.items()}
    else:
        texts = {Path(source).name: source for source in _texts("evaluation.data", data or [])}
        if len(texts) < len(data or []) and not isinstance(data, str):
            raise wrong("evaluation.data", data, "files of different names, or a mapping of names to files")
    if not all(isinstance(source, str) for source in texts.values()):
        raise wrong("evaluation.data", data, "sources by name")
    types = {field.name: None for field in dataclasses.fields(EvaluationOptions) if field.name != "dtype"}
    _named("evaluation", fields, {**types, "data": None})
    tasks = tuple(_texts("evaluation.tasks", fields.pop("tasks", [])))
    options: EvaluationOptions = options_of(EvaluationOptions, fields)
    return texts, dataclasses.replace(options, tasks=tasks)


def _parts(value: Any) -> list[Any]:
    parts = value if isinstance(value, list) else [value]
    if not parts or not all(isinstance(part, Mapping) and part for part in parts):
        raise wrong("space", value, "a mapping of options to lists or ranges, or a list of such")
    return parts


def _part(fields: Mapping[str, Any], types: Mapping[str, str]) -> dict[str, Any]:
    fields = named_solver(fields)
    _check_options("space", fields, types)
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, Mapping) and "dict" not in types[name]:
            found[name] = Range.read(name, value, types)
        elif isinstance(value, list):
            if not value:
                raise wrong(f"space.{name}", value, "at least one value")
            found[name] = tuple(value)
        else:
            found[name] = (value,)
    return found


def _check_options(where: str, fields: Mapping[str, Any], types: Mapping[str, str]) -> None:
    _named(where, fields, {name: kind for name, kind in types.items() if name not in (*_OF_THE_SWEEP, "options")})


def _number(value: Any) -> Any:
    """YAML takes 1e-3 for text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _drawn(values: Any, generator: random.Random) -> Any:
    if isinstance(values, tuple):
        return generator.choice(values)
    low, high = (math.log(end) if values.log else end for end in (values.low, values.high))
    value = generator.uniform(low, high)
    value = math.exp(value) if values.log else value
    if values.step is not None:
        value = values.low + round((value - values.low) / values.step) * values.step
    return min(max(round(value), values.low), values.high) if values.whole else min(value, values.high)
