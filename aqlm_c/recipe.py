"""What to quantize to and how, for one model or a run: one schema for the command line, YAML files and Python.

Imports neither torch nor NumPy before a method is named.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .config import CalibrationOptions, FinetuneOptions, MethodOptions, SizeOptions, TargetOptions, TuningOptions
from .errors import device_name, int_between, is_text, require, wrong
from .files import read_text
from .format import AUTO, DENSE, Format, Rules
from .format import FIELDS as FORMAT_FIELDS
from .methods import DEFAULT, METHODS, get_method, method_name
from .units import parse_size

_MOST_YAML, _MOST_VALUES, _MOST_DEPTH = 2**20, 20_000, 200  # of a file of options: bytes, values, brackets

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
PRESETS["tuned"] = {"tune": {"pv": True}}


def quantizer_options(preset: str) -> dict[str, Any]:
    """What a preset sets of `AqlmConfig`."""
    return {name: value for name, value in PRESETS[preset].items() if name not in ("samples", "tune")}


@dataclasses.dataclass(frozen=True)
class AqlmConfig:
    """What to quantize to and how: a format, other formats by layer, a method with its options, block fine-tuning.

    embeddings: of the input embedding and the output layer, where no rule fits: a scheme, "dense", or "auto", which is
    4 bits where they would be more than a tenth of the quantized model's bytes (`model.embeddings`). solver: the
    method's name, of `aqlm_c.methods.METHODS`. options: of the class that this method has; None: its defaults. target:
    what layers and blocks are drawn to.
    gaussian_reference: whether each layer's error is compared with that of Gaussian weights, which needs the
    eigenvalues of every H. seed: of everything random. `from_scheme` takes all options by name.

    Raises ValueError naming the field, its value and what was expected.
    """

    format: Format = Format()
    rules: Rules = Rules()
    embeddings: str = AUTO
    solver: str = DEFAULT
    options: MethodOptions = None  # type: ignore[assignment]  # never None once it is made
    tuning: TuningOptions = TuningOptions()
    seed: int = 0
    gaussian_reference: bool = True
    target: TargetOptions = TargetOptions()

    def __post_init__(self) -> None:
        if not isinstance(self.rules, Rules):
            object.__setattr__(self, "rules", Rules(self.rules))
        if self.embeddings not in (AUTO, DENSE):
            try:
                Format.parse(self.embeddings)
            except ValueError as error:
                raise wrong("embeddings", self.embeddings, f"{AUTO!r}, {DENSE!r} or a scheme: {error}") from None
        object.__setattr__(self, "solver", method_name(self.solver))
        kind = get_method(self.solver).options_type
        if self.options is None:
            object.__setattr__(self, "options", kind())
        elif type(self.options) is not kind:
            raise wrong("options", self.options, f"{kind.__name__}, of solver={self.solver!r}")
        int_between("seed", self.seed, 0, 2**63 - 1)
        if not isinstance(self.gaussian_reference, bool):
            raise wrong("gaussian_reference", self.gaussian_reference, "true or false")

    @classmethod
    def from_scheme(cls, scheme: str, **options: Any) -> AqlmConfig:
        """The config of a scheme string (`Format.parse`) and any options by name: rules, solver (also: method), the
        method's, those of `TuningOptions` and `TargetOptions`, seed. None is the default. Raises ValueError for a name
        that is no option.
        """
        return cls.from_dict({**Format.parse(scheme).to_dict(), **options})

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> AqlmConfig:
        """The config with these fields, as `to_dict` gives them; raises ValueError for a name that is not a field."""
        fields = named_solver(fields)
        given = {name: value for name, value in fields.items() if value is not None}
        solver = given.get("solver", DEFAULT)
        kind = get_method(solver).options_type
        whole = {"embeddings": AUTO, "seed": 0, "gaussian_reference": True}
        others = [*_names(TuningOptions), *_names(TargetOptions), *whole]
        known = [*FORMAT_FIELDS, "rules", "solver", *_names(kind), *others]
        if unknown := sorted(set(fields) - set(known)):
            raise ValueError(
                f"unknown option {unknown[0]!r} with solver={solver!r}: expected one of {', '.join(known)}"
            )

        def chosen(kind: type) -> Any:
            return kind(**{name: given[name] for name in _names(kind) if name in given})

        return cls(
            chosen(Format),
            Rules(given.get("rules")),
            solver=solver,
            options=chosen(kind),
            tuning=chosen(TuningOptions),
            target=chosen(TargetOptions),
            **{name: given.get(name, default) for name, default in whole.items()},
        )

    @classmethod
    def of(cls, config: Any) -> AqlmConfig:
        """The config that is meant by one, a scheme's text, a `Format`, or the `AqlmConfig` of `aqlm_c.hf`.

        Raises ValueError for anything else.
        """
        if isinstance(config, str):
            return cls.from_scheme(config)
        if isinstance(config, Format):
            return cls(config)
        if not isinstance(config, cls) and hasattr(config, "quantization"):  # that of transformers, which we do not see
            config = config.quantization()
        if not isinstance(config, cls):
            raise wrong("config", config, "a scheme such as '2x8g8' or an AqlmConfig")
        return config

    @property
    def quant_method(self) -> str:
        """As transformers asks for it: `from_pretrained(..., quantization_config=config)` quantizes without data."""
        return "aqlm_c" if self.rules else "aqlm"

    def replace(self, **fields: Any) -> AqlmConfig:
        """The config with other values of these fields, by their names in `to_dict`."""
        return type(self).from_dict({**self.to_dict(), **fields})

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, flat; `from_dict` reads it back. Those of `TargetOptions` only where they are not the
        default, gaussian_reference, which changes no result, only where it is off.
        """
        return {
            **self.format.to_dict(),
            "rules": self.rules.to_dict(),
            "embeddings": self.embeddings,
            "solver": self.solver,
            **dataclasses.asdict(self.options),
            **dataclasses.asdict(self.tuning),
            **self.target.changed(),
            "seed": self.seed,
            **({} if self.gaussian_reference else {"gaussian_reference": False}),
        }

    @property
    def scheme(self) -> str:
        """The format as a string, such as "2x8g8"."""
        return self.format.scheme

    @property
    def is_dense(self) -> bool:
        """Whether the method's results are dense weights, no AQLM checkpoint."""
        return get_method(self.solver).is_dense(self.options)

    def without_tuning(self) -> AqlmConfig:
        """The config without block fine-tuning where the method gives nothing that it may train; else itself."""
        if (get_method(self.solver).tunable and not self.is_dense) or not self.tuning.finetune_epochs:
            return self
        return self.replace(finetune_epochs=0)

    def format_for(self, name: str) -> Format | None:
        """The format of the layer `name`, by the rules or else the common one; None if it stays dense."""
        return self.rules.format_for(name, self.format)

    def check_searchable(self) -> None:
        """Raise ValueError for a format, of `rules` too, that the method cannot quantize to."""
        own = [] if self.embeddings in (AUTO, DENSE) else [Format.parse(self.embeddings)]
        for format in (*self.rules.formats(), *own, self.format):
            get_method(self.solver).check(format, self.options)


def named_solver(fields: Mapping[str, Any]) -> dict[str, Any]:
    """`fields` with `method`, the other name of `solver`, by that one; ValueError where both are given."""
    if fields.get("method") is not None and fields.get("solver") is not None:
        raise wrong("method", fields["method"], "no solver beside it: they are one option")
    return {"solver" if name == "method" else name: value for name, value in fields.items()}


def _names(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def option_types() -> dict[str, str]:
    """Annotation by name of every option of `AqlmConfig` but the format's, those of all methods among them."""
    types = {"rules": "dict[str, str]", "embeddings": "str", "solver": "str", "gaussian_reference": "bool"}
    for kind in [*(get_method(name).options_type for name in METHODS), TuningOptions, TargetOptions]:
        types |= {field.name: str(field.type) for field in dataclasses.fields(kind)}
    return {**types, "seed": "int"}


class Resolved(NamedTuple):
    """A run whose every option has a value. fields: all by name, flat, as report.json and run.yaml keep them."""

    config: AqlmConfig
    calibration: CalibrationOptions
    fields: dict[str, Any]

    def with_schemes(self, options: Mapping[str, Any]) -> Resolved:
        """The run with schemes that were chosen: scheme, rules and embeddings, as `AqlmConfig` has them; no size."""
        config = self.config.replace(**Format.parse(options["scheme"]).to_dict(), **_without(options, "scheme"))
        return self._replace(config=config, fields={**self.fields, **dict.fromkeys(SIZE_FIELDS), **options})


@dataclasses.dataclass
class RunConfig:
    """What to quantize, to what and how; None takes an option from the preset or its default.

    model: directory, hub name, .gguf file or "smollm2". out: directory to write. data: sources as in `load_sequences`,
    none: the bundled text. threads: all cores if None. layers: regular expression, only linears whose name it finds.
    work_dir: directory that keeps finished blocks, for the same run to go on from. memory_limit: bytes, or text such as
    "8GiB". device: that quantizes, "cpu", "cuda", "cuda:N" or "auto", which is the first GPU that our kernels can use,
    else the CPU. device_memory_limit: of its memory. batch_size: sequences in one forward pass at most, if not as many
    as memory likes. overwrite: replace `out` if it is a model. tune: tune the whole model against the original at the
    end, on the same sources: options of `FinetuneOptions` by name; None: not at all. statistics: file of H that
    `aqlm-c hessians` wrote; nothing is calibrated then, and blocks are fine-tuned only where finetune_epochs is given,
    on the data that the file is of. bits, target_size, candidates: choose a scheme for each layer for a size, see
    `SizeOptions`; `scheme` has no say then. samples, sequence_length, shuffle, bos: see `CalibrationOptions`; rules,
    embeddings, solver, seed: see `AqlmConfig`; beam_size to relative_damp: see `AqlmOptions`; finetune_*: see
    `TuningOptions`; sequential to fisher_share: see `TargetOptions`.
    options: by name, those of a method that has others.

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
    _: dataclasses.KW_ONLY
    bos: str = "auto"
    batch_size: int | None = None
    device: str = "auto"
    device_memory_limit: int | str | None = None
    tune: dict[str, Any] | None = None
    statistics: str | None = None
    bits: float | None = None
    target_size: int | str | None = None
    candidates: list[str] | None = None
    rules: dict[str, str] | None = None
    embeddings: str | None = None
    solver: str | None = None
    beam_size: int | None = None
    relative_mse_tolerance: float | None = None
    init_max_iter: int | None = None
    ldl_passes: int | None = None
    max_sweeps: int | None = None
    cg_steps: int | None = None
    adam_steps: int | None = None
    adam_learning_rate: float | None = None
    relative_damp: float | None = None
    finetune_epochs: int | None = None
    finetune_batch_size: int | None = None
    finetune_learning_rate: float | None = None
    finetune_lookahead: int | None = None
    finetune_patience: int | None = None
    finetune_held_out: float | None = None
    finetune_search: int | None = None
    sequential: bool | None = None
    error_correction: float | None = None
    error_correction_damp: float | None = None
    error_correction_skip: str | None = None
    finetune_target: str | None = None
    tune_remaining: int | None = None
    tune_remaining_learning_rate: float | None = None
    fisher_share: float | None = None
    gaussian_reference: bool | None = None
    seed: int | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            setattr(self, field.name, _typed(field.name, str(field.type), getattr(self, field.name)))
        if self.preset not in PRESETS:
            raise wrong("preset", self.preset, f"one of {', '.join(PRESETS)}")
        if self.threads is not None:
            int_between("threads", self.threads, 1, 1024)
        for name in ("memory_limit", "device_memory_limit"):
            if getattr(self, name) is not None:
                setattr(self, name, parse_size(name, getattr(self, name)))
        if self.batch_size is not None:
            int_between("batch_size", self.batch_size, 1)
        device_name("device", self.device)
        preset = PRESETS[self.preset].get("tune")
        if preset is not None or self.tune is not None:
            self.tune = {**(preset or {}), **(self.tune or {})}
            options = options_of(FinetuneOptions, self.tune)
            self.tune = {name: getattr(options, name) for name in self.tune}
        self._calibration()
        _ = self.size  # which is refused here, before any work

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> RunConfig:
        """The run of these fields by name, also of options that only one method has; ValueError for an unknown one."""
        fields = named_solver(fields)
        own = {name: value for name, value in fields.items() if name in FIELDS}
        others = {name: value for name, value in fields.items() if name not in FIELDS}
        types = option_types() if others else {}
        check_names(others, {**dict.fromkeys(FIELDS), **types})
        typed = {name: _typed(name, types[name], value) for name, value in others.items()}
        options = _typed("options", FIELDS["options"], own.get("options") or {})
        return cls(**{**own, "options": {**options, **typed}})

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], **explicit: Any) -> RunConfig:
        """The run that a YAML file describes, a mapping of the fields' names; `explicit` ones win over the file.

        An explicit preset replaces all that presets set, also where the file gives it; so does an explicit solver
        with what has another default for each solver. Raises ValueError naming
        the file and what is wrong in it, OSError if it cannot be read.
        """
        explicit, fields = named_solver(explicit), named_solver(read_yaml(Path(path)))
        try:
            cls.from_fields(fields)
        except ValueError as error:
            raise ValueError(f"config: got {str(path)!r}: {error}") from None
        replaced = set(PRESET_FIELDS if "preset" in explicit else []) | (
            _by_solver() if "solver" in explicit else set()
        )
        fields = {name: value for name, value in fields.items() if name not in replaced}
        return cls.from_fields({**fields, **explicit})

    def resolve(self) -> Resolved:
        """The run with the preset's and the method's values in place of None.

        Raises ValueError for a value that is out of range and for what is missing.
        """
        for name, what in (("model", "a directory, a hub name, a .gguf file or smollm2"), ("out", "a directory")):
            if not getattr(self, name):
                raise ValueError(f"{name.upper()}: missing, expected {what}, as an argument or in the config file")
        fields = {name: getattr(self, name) for name in FIELDS if name != "options"}
        given = {name: fields.pop(name) for name in OPTION_FIELDS}
        solver = self.solver or DEFAULT
        kind = get_method(solver).options_type
        preset = {name: value for name, value in PRESETS[self.preset].items() if name not in kind.fixed}
        known = {*_names(kind), *_names(TuningOptions), *_names(TargetOptions)}
        chosen = {name: value for name, value in preset.items() if name in known}
        chosen |= {name: value for name, value in {**given, **self.options}.items() if value is not None}
        if self.statistics and self.finetune_epochs is None:  # which no preset asks for here
            chosen["finetune_epochs"] = 0
        config = AqlmConfig.from_scheme(self.scheme, **chosen).without_tuning()
        if self.statistics:
            config.target.check_without_inputs()
        calibration = self._calibration()
        fields |= dataclasses.asdict(calibration)
        fields["gaussian_reference"] = config.gaussian_reference
        fields |= dataclasses.asdict(config.target)
        return Resolved(config, calibration, {**fields, **_without_format(config)})

    def to_yaml(self) -> str:
        """The fields that are set, as text that `from_file` reads."""
        fields = {name: getattr(self, name) for name in FIELDS if name != "options"}
        return yaml_text({**fields, **self.options})

    @property
    def size(self) -> SizeOptions | None:
        """What schemes are chosen for; None: `scheme` and `rules` say them."""
        if self.bits is None and self.target_size is None:
            if self.candidates is not None:
                raise wrong("candidates", self.candidates, "bits or target_size beside them")
            return None
        candidates = SizeOptions.candidates if self.candidates is None else tuple(self.candidates)
        return SizeOptions(self.bits, self.target_size, candidates)

    def _calibration(self) -> CalibrationOptions:
        samples = PRESETS[self.preset].get("samples") if self.samples is None else self.samples
        default = CalibrationOptions.samples
        return CalibrationOptions(default if samples is None else samples, self.sequence_length, self.shuffle, self.bos)


FIELDS: dict[str, str] = {field.name: str(field.type) for field in dataclasses.fields(RunConfig)}
OPTION_FIELDS = list(FIELDS)[list(FIELDS).index("rules") : -1]  # those of AqlmConfig
SIZE_FIELDS = ("bits", "target_size", "candidates")
PRESET_FIELDS = sorted({name for preset in PRESETS.values() for name in preset})


def _by_solver() -> set[str]:
    """Names of the options whose default differs between methods."""
    defaults: dict[str, set[Any]] = {}
    for solver in METHODS:
        for field in dataclasses.fields(get_method(solver).options_type):
            defaults.setdefault(field.name, set()).add(field.default)
    return {name for name, values in defaults.items() if len(values) > 1}


def _without(fields: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}


def _without_format(config: AqlmConfig) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name not in FORMAT_FIELDS}


def parse_pair(option: str, text: str) -> tuple[str, str]:
    """Name and value of "name=value", the text of `option`."""
    name, equals, value = text.partition("=")
    if not equals:
        raise wrong(option, text, "name=value")
    return name, value


def parse_option(text: str) -> tuple[str, Any]:
    """Name and value of "name=value" for an option of `AqlmConfig`, typed as its field."""
    name, value = parse_pair("--set", text)
    types = option_types()
    check_names([name], types)
    return name, _typed(name, types[name], value)


def options_of(kind: Any, fields: Mapping[str, Any]) -> Any:
    """The options of the dataclass `kind` with these fields by name, text read as the field's type; None is left out.

    Raises ValueError for a name that is no field, and as `kind` does.
    """
    types = {field.name: str(field.type) for field in dataclasses.fields(kind)}
    check_names(fields, types)
    return kind(**{name: _typed(name, types[name], value) for name, value in fields.items() if value is not None})


def parse_rule(text: str) -> tuple[str, str]:
    """Pattern and scheme of "regex=scheme" for `Rules`, which checks them."""
    pattern, equals, scheme = text.rpartition("=")
    if not (equals and pattern and scheme):
        raise wrong("--rule", text, "regex=scheme, such as 'mlp.down_proj=3x8g8' or 'lm_head=4x8g8'")
    return pattern, scheme


def check_names(names: Iterable[Any], known: Mapping[str, Any]) -> None:
    """Raise ValueError for the first name that is not `known`, with the nearest one that is."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}"
            raise ValueError(f"unknown option {name!r}: {hint}")


_READ: dict[str, Any] = {"int": int, "float": float, "bool": {"true": True, "false": False}.__getitem__, "str": str}
_MEANS = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "text", "list[str]": "texts"}
_MEANS |= {"dict[str, str]": "a mapping of texts to texts", "dict[str, Any]": "a mapping of options' names to values"}


def _typed(name: str, kind: str, value: Any) -> Any:
    """`value` as the annotation `kind` asks; text that reads as a number is one (YAML takes 1e-4 for text)."""
    kinds = kind.split(" | ")
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    if "list[str]" in kinds and isinstance(value, (str, list, tuple)):
        return [_typed(name, "str", item) for item in ([value] if isinstance(value, str) else value)]
    if "dict[str, str]" in kinds and isinstance(value, Mapping):
        return {_typed(name, "str", key): _typed(name, "str", item) for key, item in value.items()}
    if "dict[str, Any]" in kinds and isinstance(value, Mapping):
        return {_typed(name, "str", key): item for key, item in value.items()}
    if isinstance(value, str) and not is_text(value):
        raise wrong(name, value, "text of whole characters, in UTF-8")
    if type(value).__name__ in kinds or (value is None and "None" in kinds):
        return value
    try:
        if isinstance(value, str) or (type(value) is int and kinds[0] == "float"):
            return _READ[kinds[0]](value)
    except (ValueError, KeyError):
        pass
    raise wrong(name, value, _MEANS[kinds[0]])


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; ValueError naming the file, as config, for anything else or too much."""
    yaml = require("yaml")
    loader = yaml.SafeLoader
    try:
        text = read_text(path, _MOST_YAML)
        if _depth(text) > _MOST_DEPTH:  # PyYAML would take seconds to stop at it
            raise RecursionError
        node = yaml.compose(text, Loader=loader)
        if _n_values(node) > _MOST_VALUES:
            raise ValueError(f"more than {_MOST_VALUES} values, what is referred to (*) counted each time")
        fields = None if node is None else loader("").construct_document(node)
    except FileNotFoundError:
        raise ValueError(f"config: got {str(path)!r}: no such file") from None
    except RecursionError:
        raise ValueError(f"config: got {str(path)!r}: not YAML: nested too deeply") from None
    except yaml.YAMLError as error:
        raise ValueError(f"config: got {str(path)!r}: not YAML: {error}") from None
    except OSError:
        raise
    except Exception as error:  # a date that is none, an integer of thousands of digits: of many types
        raise ValueError(f"config: got {str(path)!r}: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(
            f"config: got {str(path)!r}: got {type(fields).__name__}, expected a mapping such as 'scheme: 2x8g8'"
        )
    return fields


def _depth(text: str) -> int:
    """How deep brackets are in each other, at most, those in quotes too."""
    depth = most = 0
    for bracket in re.findall(r"[][{}]", text):
        depth += 1 if bracket in "[{" else -1
        most = max(most, depth)
    return most


def _n_values(node: Any, known: dict[int, int] | None = None) -> int:
    """Values that a YAML node stands for, each time that it is referred to; more than any limit if it holds itself."""
    known = {} if known is None else known
    if id(node) not in known:
        known[id(node)] = _MOST_VALUES + 1  # while it is counted
        values = node.value if node is not None and isinstance(node.value, list) else []
        parts = [part for value in values for part in (value if isinstance(value, tuple) else (value,))]
        known[id(node)] = 1 + sum(_n_values(part, known) for part in parts)
    return known[id(node)]


def yaml_text(fields: Mapping[str, Any]) -> str:
    """`overwrite` is left out: it permits one run to replace OUT, and no later one."""
    yaml = require("yaml")
    kept = {name: value for name, value in fields.items() if value is not None and name != "overwrite"}
    text: str = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
    return text
