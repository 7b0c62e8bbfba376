"""One quantization run, from MODEL to OUT. Imports neither torch nor transformers until `run`."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .config import FinetuneOptions
from .distributed import device_of_rank, group
from .errors import wrong
from .files import peak_memory
from .recipe import Resolved, RunConfig, options_of, yaml_text
from .report.allocation import Allocation, check_plot
from .report.report import QuantizationReport
from .units import megabytes

if TYPE_CHECKING:
    from .calibrate.statistics import Statistics
    from .hf.models import ModelSource


_OF_A_RANK = {"model", "out", "data", "statistics", "work_dir", "threads", "memory_limit", "device_memory_limit"}
_OF_A_RANK |= {"overwrite"}  # what may be another there


class Shared(NamedTuple):
    """What a run need not make itself, since others made it. sequences: token ids [n, length] of the calibration, None
    where nothing is to run on them. data: `io.data.provenance` of them. statistics: the open file of
    `config.statistics`.
    """

    sequences: Any
    data: dict[str, Any]
    statistics: Statistics | None = None


def run(
    config: RunConfig,
    progress: Any = None,
    loaded: tuple[Any, Any, ModelSource] | None = None,
    shared: Shared | None = None,
    plot: str | os.PathLike[str] | None = None,
) -> QuantizationReport:
    """Quantize `config.model` and save it as the directory `config.out`, with run.yaml and report.json.

    run.yaml is the resolved configuration, which `from_file` reads; report.json is the report with that
    configuration, hashes of the data and versions. `progress`: see `Progress`. `loaded` is what
    `load_model` returned for `config.model`, if that is done already; its model is quantized in place. shared: what
    others made of the data of `config`. Where schemes are chosen for a size, run.yaml has what was chosen in place of
    the size; `plot`: a .png, .svg or .pdf file to draw.
    Raises ValueError for what is wrong in the configuration, model or data, before the work starts where that
    can be seen; OSError where a file cannot be written. `out` is then as it was. Of several
    ranks (`distributed`) all do the work, and the first alone writes.
    """
    resolved = config.resolve()
    group().check_same({name: value for name, value in resolved.fields.items() if name not in _OF_A_RANK})
    sources = _check(config, resolved, plot)
    from .core.runtime import check_kernels, set_threads
    from .hf.models import load_model
    from .io.checkpoint import check_tokenizer
    from .pipeline.progress import Progress
    from .quantize import quantize_model

    started = time.perf_counter()
    set_threads(config.threads)
    check_kernels(device_of_rank(config.device))
    progress = progress or Progress()
    if loaded is None:
        progress.on_phase("load")
        loaded = load_model(config.model, "auto", "cpu", True)
    model, tokenizer, origin = loaded
    sequences, data = shared[:2] if shared else _read_data(config, resolved, sources, tokenizer)
    if tokenizer is not None and group().first:
        check_tokenizer(tokenizer, config.out)
    seconds = time.perf_counter() - started
    allocation = None
    if config.size is not None:
        allocation = _allocate(config, resolved, model, sequences, progress)
        resolved = resolved.with_schemes(allocation.options)
    report = quantize_model(
        *(model, sequences, resolved.config),
        layers=config.layers,
        progress=progress,
        batch_size=config.batch_size,
        work_dir=config.work_dir,
        statistics=shared.statistics if shared else config.statistics,
        memory_limit=config.memory_limit,
        device=config.device,
        device_memory_limit=config.device_memory_limit,
    )
    report.phases = {"load": seconds, **report.phases}
    if allocation is not None:
        report.allocation = allocation.to_dict()
        report.phases["allocate"] = allocation.seconds
    if config.tune is not None:
        _tune(config, report, loaded, progress)
    report.data, report.model, report.note = data, origin.name, origin.note
    used = {"data": sources, "threads": report.threads, "batch_size": report.plan.get("batch_size")}
    report.config |= resolved.fields | used
    if group().first:
        progress.on_phase("save")
        if allocation is not None and plot is not None:
            allocation.plot(plot)
        _save(config, report, loaded, resolved)
    return report


def _check(config: RunConfig, resolved: Resolved, plot: str | os.PathLike[str] | None) -> list[str]:
    """Raise for what can be seen to be wrong before the work; the sources of the data."""
    resolved.config.check_searchable()
    if config.tune is not None and resolved.config.is_dense:
        raise wrong("tune", config.tune, f"none: solver={resolved.config.solver!r} makes no AQLM checkpoint to tune")
    if config.size is not None:
        from .allocation.choose import check_candidates

        if config.statistics:
            raise wrong("statistics", config.statistics, "none beside bits or target_size, which need text")
        if resolved.config.is_dense:
            raise wrong("solver", resolved.config.solver, "one that makes AQLM checkpoints, beside bits or target_size")
        check_candidates(config.size, resolved.config)
    if plot is not None:
        if config.size is None:
            raise wrong("plot", str(plot), "bits or target_size beside it: it shows where the bits went")
        check_plot(plot)
    from .io.checkpoint import check_output
    from .io.data import BUNDLED, check_source

    sources = config.data or [BUNDLED]
    if config.statistics and not config.data and not resolved.config.tuning.finetune_epochs:
        sources = []  # the file says what it is of
    needed = {
        "MODEL": config.model,
        "STATISTICS": config.statistics or "",
        "WORK_DIR": config.work_dir or "",
        **{f"DATA {n}": name for n, name in enumerate(sources, 1)},
    }
    if group().first:
        check_output(config.out, config.overwrite, needed)
    if config.work_dir and Path(config.work_dir).resolve().is_relative_to(Path(config.out).resolve()):
        raise wrong("work_dir", config.work_dir, f"a folder outside of OUT={str(config.out)!r}")
    for source in sources:
        check_source(source)
    return sources


def _read_data(config: RunConfig, resolved: Resolved, sources: list[str], tokenizer: Any) -> tuple[Any, dict[str, Any]]:
    """The calibration sequences, None where nothing is to run on them, and what a report keeps of the data, as it was
    read: the work may take days.
    """
    from .calibrate.statistics import Statistics
    from .io.data import common_start, load_sequences, provenance

    statistics = Statistics(config.statistics) if config.statistics else None
    if statistics is not None and not sources:
        return None, dict(statistics.facts["data"])
    drawn, seed = resolved.calibration, resolved.config.seed
    options = (drawn.samples, drawn.sequence_length, drawn.shuffle, seed, drawn.bos)
    sequences: Any = load_sequences(sources, tokenizer, *options)
    data = provenance(sources, sequences, common_start(sequences, tokenizer))
    if statistics is not None:
        statistics.check_tokens(data["input_ids"])
        if not resolved.config.tuning.finetune_epochs:
            sequences = None
    return sequences, data


def _allocate(config: RunConfig, resolved: Resolved, model: Any, sequences: Any, progress: Any) -> Allocation:
    """The schemes that the first rank chooses, or those that it chose when this run began."""
    from .allocation.choose import choose_schemes
    from .pipeline.resume import WorkDir, choice_facts

    size = config.size
    assert size is not None, "schemes are chosen for a size"

    def choose() -> dict[str, Any]:
        progress.on_phase("allocate")
        options = {"layers": config.layers, "device": config.device, "progress": progress}
        return choose_schemes(model, sequences, resolved.config, **options, **dataclasses.asdict(size)).to_dict()

    found = None
    if group().first:
        found = (
            choose()
            if config.work_dir is None
            else WorkDir.kept_choice(
                config.work_dir, choice_facts(model, sequences, resolved.config, config.layers, size), choose
            )
        )
    allocation = Allocation.from_dict(group().broadcast(found))
    progress.on_allocation(allocation)
    return allocation


def _tune(config: RunConfig, report: QuantizationReport, loaded: tuple[Any, Any, ModelSource], progress: Any) -> None:
    """Tune the quantized model against its original, which is loaded again."""
    from .finetune import FinetuneRun, finetune_model, tuning_sequences
    from .hf.models import load_model

    started = time.perf_counter()
    progress.on_phase("load")
    model, tokenizer, _ = loaded
    original, _, _ = load_model(config.model)
    options = options_of(FinetuneOptions, {"seed": config.seed, **(config.tune or {})})
    drawn = {"data": config.data, "sequence_length": config.sequence_length, "bos": config.bos}
    run = FinetuneRun("", config.model, "", **drawn, options=options)  # type: ignore[arg-type]
    sequences = tuning_sequences(run, original, tokenizer, progress)
    work_dir = Path(config.work_dir) / "finetune" if config.work_dir else None
    tuned = finetune_model(
        model, original, sequences, options, device=config.device, progress=progress, work_dir=work_dir
    )
    report.finetune = tuned.to_dict()
    report.phases["tune"] = time.perf_counter() - started


def _save(
    config: RunConfig, report: QuantizationReport, loaded: tuple[Any, Any, ModelSource], resolved: Resolved
) -> None:
    from .hf.card import model_card
    from .hf.models import saved_sizes
    from .io.checkpoint import unread_text, write_quantized

    model, tokenizer, origin = loaded
    started = time.perf_counter()
    fields = {name: report.config[name] for name in resolved.fields}  # as they were used

    def files(directory: Path) -> Mapping[str, str]:
        report.sizes = saved_sizes(model, directory)
        report.note = " ".join(
            filter(None, (report.note, _dense_text(report, resolved), unread_text(model, directory)))
        )
        if origin.total_bytes:
            report.sizes["original_bytes"] = origin.total_bytes
            report.sizes["original_embedding_bytes"] = origin.embedding_bytes
        report.peak_memory_bytes = peak_memory()
        report.phases["save"] = time.perf_counter() - started
        return {
            "README.md": model_card(model, report.to_dict(), origin.path),
            "run.yaml": _comments(report) + yaml_text(fields),
            "report.json": json.dumps(report.to_dict(), indent=2, allow_nan=False) + "\n",
        }

    write_quantized(model, tokenizer, config.out, overwrite=config.overwrite, extra_files=files)


def _dense_text(report: QuantizationReport, resolved: Resolved) -> str:
    """What a checkpoint of dense weights is, as a sentence; "" for one of codes."""
    if not resolved.config.is_dense:
        return ""
    return (
        "Saved as dense weights, which any program loads: the values that the codes of "
        f"{resolved.config.solver} decode to. A file of these codes would take {megabytes(report.stored_bytes)}."
    )


def _comments(report: QuantizationReport) -> str:
    lines = [
        ", ".join(f"{name} {version}" for name, version in report.versions.items()),
        *(f"SHA-256 of {source}: {digest}" for source, digest in report.data.get("sources", {}).items() if digest),
        f"SHA-256 of the calibration tokens: {report.data['input_ids']}",
    ]
    return "".join(f"# {' '.join(line.split())}\n" for line in lines)
