"""One quantization run, from MODEL to OUT: the same options for the command line, a YAML file and Python.

`RunConfig` is the schema; `run` does the work. Imports neither torch nor transformers until `run`.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import DEFAULTS_BY_SOLVER, FORMAT, AqlmConfig, int_between
from .report import QuantizationReport, peak_memory

if TYPE_CHECKING:
    from .models import ModelSource

# Named sets of the options whose default in RunConfig is None.
PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"finetune_epochs": 0, "ldl_passes": 6, "max_sweeps": 8, "relative_mse_tolerance": 0.005},
    "balanced": {},
    "best": {
        "ldl_passes": 14,
        "max_sweeps": 16,
        "relative_mse_tolerance": 0.002,
        "finetune_epochs": 6,
        "finetune_lookahead": 3,
    },
}

_SOLVER_FIELDS = [field for field in dataclasses.fields(AqlmConfig) if field.name not in FORMAT]
_DEFAULTS = {"samples": 64, **{field.name: field.default for field in _SOLVER_FIELDS}}  # of what is None
_UNITS = {"": 1, "B": 1} | {f"{p}B": 1000 ** (i + 1) for i, p in enumerate("KMGT")}
_UNITS |= {f"{p}iB": 1024 ** (i + 1) for i, p in enumerate("KMGT")}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) *([A-Za-z]*)")

_SolverOptions = dataclasses.make_dataclass(
    "_SolverOptions",
    [(field.name, f"{field.type.removesuffix(' | None')} | None", None) for field in _SOLVER_FIELDS],
    kw_only=True,
)


@dataclasses.dataclass
class RunConfig(_SolverOptions):
    """What to quantize, to what and how. Besides the fields below it has every option of `AqlmConfig` but the
    format's, which `scheme` says; None takes an option from the preset.

    model: directory, hub name, .gguf file or "smollm2". out: directory to write. data: sources as in
    `load_sequences`, none: the bundled text. samples: calibration sequences (64), of sequence_length tokens;
    shuffle draws them at random. threads: all cores if None. layers: regular expression, only linears whose
    name it finds. work_dir: directory that keeps finished blocks, for the same run to go on from.
    memory_limit: bytes, or text such as "8GiB". overwrite: replace `out` if it is a model.

    Raises ValueError naming the field, its value and what was expected.
    """

    model: str = ""
    out: str = ""
    scheme: str = "2x8g8"
    preset: str = "balanced"
    data: list[str] = dataclasses.field(default_factory=list)
    samples: int | None = None
    sequence_length: int = 1024
    shuffle: bool = False
    threads: int | None = None
    layers: str | None = None
    work_dir: str | None = None
    memory_limit: int | str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            setattr(self, field.name, _typed(field.name, field.type, getattr(self, field.name)))
        if self.preset not in PRESETS:
            raise ValueError(f"preset={self.preset!r}: expected one of {', '.join(PRESETS)}")
        if self.threads is not None:
            int_between("threads", self.threads, 1, 1024)
        if self.samples is not None:
            int_between("samples", self.samples, 1)
        int_between("sequence_length", self.sequence_length, 2)
        if self.memory_limit is not None:
            self.memory_limit = parse_size("memory_limit", self.memory_limit)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], **explicit: Any) -> RunConfig:
        """The run that a YAML file describes, a mapping of the fields' names; `explicit` ones win over the file.

        An explicit preset replaces all that presets set, also where the file gives it; so does an explicit solver
        with what has another default for each solver. Raises ValueError naming
        the file and what is wrong in it, OSError if it cannot be read.
        """
        fields = _read_yaml(Path(path))
        try:
            check_names(fields, FIELDS)
            cls(**fields)
        except ValueError as error:
            raise ValueError(f"config={str(path)!r}: {error}") from None
        replaced = (PRESET_FIELDS if "preset" in explicit else []) + (BY_SOLVER if "solver" in explicit else [])
        fields = {name: value for name, value in fields.items() if name not in replaced}
        return cls(**{**fields, **explicit})

    def resolve(self) -> tuple[AqlmConfig, dict[str, Any]]:
        """The options of the solver and all fields of the run with the preset's values in place of None.

        Raises ValueError for a value that is out of range and for what is missing.
        """
        for name, what in (("model", "a directory, a hub name, a .gguf file or smollm2"), ("out", "a directory")):
            if not getattr(self, name):
                raise ValueError(f"{name.upper()}: missing, expected {what}, as an argument or in the config file")
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(RunConfig)}
        chosen = {**_DEFAULTS, **PRESETS[self.preset]}
        if self.solver == "paper":  # the reference's own values
            chosen |= dict.fromkeys(BY_SOLVER)
        resolved = {name: chosen.get(name) if value is None else value for name, value in given.items()}
        solver = {field.name: resolved.pop(field.name) for field in _SOLVER_FIELDS}
        config = AqlmConfig.from_scheme(self.scheme, **solver)
        return config, {**resolved, **{name: getattr(config, name) for name in solver}}

    def to_yaml(self) -> str:
        """The fields that are set, as text that `from_file` reads."""
        return _yaml_text({field.name: getattr(self, field.name) for field in dataclasses.fields(self)})


BY_SOLVER = list(DEFAULTS_BY_SOLVER)
FIELDS = {field.name: field.type for field in dataclasses.fields(RunConfig)}
PRESET_FIELDS = sorted({name for preset in PRESETS.values() for name in preset})


def parse_size(name: str, size: int | str) -> int:
    """Bytes of an int or of a text such as "8GiB" or "500 MB"; ValueError naming `name` for anything else."""
    match = _SIZE.fullmatch(str(size).strip())
    if isinstance(size, bool) or match is None or match[2] not in _UNITS or float(match[1]) <= 0:
        raise ValueError(f"{name}={size!r}: expected a number of bytes, or one with KB MB GB TB KiB MiB GiB TiB")
    return int(float(match[1]) * _UNITS[match[2]])


def parse_option(text: str) -> tuple[str, Any]:
    """Name and value of "name=value" for an option of `AqlmConfig`, typed as its field."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set={text!r}: expected name=value")
    types = {field.name: field.type for field in _SOLVER_FIELDS}
    check_names([name], types)
    return name, _typed(name, types[name], value)


def parse_rule(text: str) -> tuple[str, str]:
    """Pattern and scheme of "regex=scheme" for `AqlmConfig.rules`, which checks them."""
    pattern, equals, scheme = text.rpartition("=")
    if not (equals and pattern and scheme):
        raise ValueError(f"--rule={text!r}: expected regex=scheme, such as 'mlp.down_proj=3x8g8' or 'lm_head=4x8g8'")
    return pattern, scheme


def check_names(names: Iterable[Any], known: Mapping[str, Any]) -> None:
    """Raise ValueError for the first name that is not `known`, with the nearest one that is."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}"
            raise ValueError(f"unknown option {name!r}: {hint}")


def set_threads(threads: int | None) -> None:
    """Set the threads of torch and of the C core; None leaves them as they are."""
    if threads is None:
        return
    import torch

    from . import _core

    torch.set_num_threads(threads)
    _core.set_num_threads(threads)


def run(
    config: RunConfig, progress: Any = None, loaded: tuple[Any, Any, ModelSource] | None = None
) -> QuantizationReport:
    """Quantize `config.model` and save it as the directory `config.out`, with run.yaml and report.json.

    run.yaml is the resolved configuration, which `from_file` reads; report.json is the report with that
    configuration, hashes of the data and versions. `progress`: see `quantize.Progress`. `loaded` is what
    `load_model` returned for `config.model`, if that is done already; its model is quantized in place.
    Raises ValueError for what is wrong in the configuration, model or data, before the work starts where that
    can be seen; OSError where a file cannot be written. `out` is then as it was.
    """
    aqlm, resolved = config.resolve()
    aqlm.check_searchable()
    from .checkpoint import check_output, save_quantized

    check_output(config.out, config.overwrite)
    if config.work_dir and Path(config.work_dir).resolve().is_relative_to(Path(config.out).resolve()):
        raise ValueError(f"work_dir={config.work_dir!r}: expected a folder outside of OUT={str(config.out)!r}")
    from .data import BUNDLED, check_source, load_sequences, provenance
    from .hf.card import model_card

    sources = config.data or [BUNDLED]
    for source in sources:
        check_source(source)
    started = time.perf_counter()
    set_threads(config.threads)

    from .models import load_model, saved_sizes
    from .quantize import Progress, quantize_model

    progress = progress or Progress()
    if loaded is None:
        progress.on_phase("load")
        loaded = load_model(config.model)
    model, tokenizer, origin = loaded
    sequences = load_sequences(
        sources, tokenizer, resolved["samples"], config.sequence_length, config.shuffle, aqlm.seed
    )
    seconds = time.perf_counter() - started
    report = quantize_model(
        *(model, sequences, aqlm),
        layers=config.layers,
        progress=progress,
        work_dir=config.work_dir,
        memory_limit=config.memory_limit,
    )
    report.phases = {"load": seconds, **report.phases}
    report.data = provenance(sources, sequences)
    report.model, report.note = origin.name, origin.note
    resolved |= {"data": sources, "threads": report.threads}
    report.config |= resolved
    progress.on_phase("save")
    started = time.perf_counter()

    def files(directory: Path) -> dict[str, str]:
        report.sizes = saved_sizes(model, directory)
        if origin.total_bytes:
            report.sizes["original_bytes"] = origin.total_bytes
            report.sizes["original_embedding_bytes"] = origin.embedding_bytes
        report.peak_memory_bytes = peak_memory()
        report.phases["save"] = time.perf_counter() - started
        return {
            "README.md": model_card(model, report.to_dict(), origin.path),
            "run.yaml": _comments(report) + _yaml_text(resolved),
            "report.json": json.dumps(report.to_dict(), indent=2, allow_nan=False) + "\n",
        }

    save_quantized(model, tokenizer, config.out, overwrite=config.overwrite, extra_files=files)
    return report


def _comments(report: QuantizationReport) -> str:
    lines = [
        ", ".join(f"{name} {version}" for name, version in report.versions.items()),
        *(f"SHA-256 of {source}: {digest}" for source, digest in report.data["sources"].items() if digest),
        f"SHA-256 of the calibration tokens: {report.data['input_ids']}",
    ]
    return "".join(f"# {' '.join(line.split())}\n" for line in lines)


_READ = {"int": int, "float": float, "bool": {"true": True, "false": False}.__getitem__, "str": str}
_MEANS = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "text", "list[str]": "texts"}
_MEANS["dict[str, str]"] = "a mapping of texts to texts"


def _typed(name: str, kind: str, value: Any) -> Any:
    """`value` as the annotation `kind` asks; text that reads as a number is one (YAML takes 1e-4 for text)."""
    kinds = kind.split(" | ")
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    if "list[str]" in kinds and isinstance(value, (str, list, tuple)):
        return [_typed(name, "str", item) for item in ([value] if isinstance(value, str) else value)]
    if "dict[str, str]" in kinds and isinstance(value, dict):
        return {_typed(name, "str", key): _typed(name, "str", item) for key, item in value.items()}
    if type(value).__name__ in kinds or (value is None and "None" in kinds):
        return value
    try:
        if isinstance(value, str) or (type(value) is int and kinds[0] == "float"):
            return _READ[kinds[0]](value)
    except (ValueError, KeyError):
        pass
    raise ValueError(f"{name}={value!r}: expected {_MEANS[kinds[0]]}")


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"config={str(path)!r}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"config={str(path)!r}: not YAML: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"config={str(path)!r}: {type(fields).__name__}, expected a mapping such as 'scheme: 2x8g8'")
    return fields


def _yaml_text(fields: Mapping[str, Any]) -> str:
    """`overwrite` is left out: it permits one run to replace OUT, and no later one."""
    import yaml

    kept = {name: value for name, value in fields.items() if value is not None and name != "overwrite"}
    return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
