"""Tunes a whole quantized model against its original: in memory, and from directory to directory."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import missing

try:
    import torch
except ModuleNotFoundError as error:
    raise missing(error) from error

from .config import CalibrationOptions, FinetuneOptions, TuningOptions
from .core.runtime import kind_of_device, peak_device_memory, working_on
from .distributed import device_of_rank, group
from .errors import int_between, wrong
from .files import peak_memory, read_json_object
from .io import data as texts
from .model.blocks import find_blocks
from .model.logits import SplitModel
from .pipeline.placement import Placement
from .pipeline.progress import FinetuneProgress
from .pipeline.resume import WorkDir, begun_states, facts_of
from .recipe import options_of
from .report.finetune import FinetuneReport
from .train.cost import estimate
from .train.distill import Distiller
from .train.sampling import sample_sequences
from .train.student import Student
from .train.teacher import Teacher, moved_bytes, sharded
from .versions import versions

__all__ = ["FinetuneOptions", "FinetuneProgress", "FinetuneRun", "finetune_directory", "finetune_model"]

SELF = "self:"  # a source: text of the original itself, so many tokens
_ROOM = 1.05  # of tokens that are read, over those that are asked for


def finetune_model(
    model: Any,
    original: Any,
    sequences: torch.Tensor,
    options: FinetuneOptions | Mapping[str, Any] | None = None,
    *,
    device: str | torch.device | None = None,
    progress: Any = None,
    work_dir: str | os.PathLike[str] | None = None,
) -> FinetuneReport:
    """Tune a quantized transformers model, in place, so that it predicts what the model `original` predicts.

    The loss is KL(original || model) of every next token in `sequences`, token ids [n, length], int64. Codebooks,
    scales, norms and biases are trained and, with `pv`, codes (`config.FinetuneOptions`; a mapping of its fields will
    do); the state with the lowest loss on held-out sequences is kept. device: "cpu", "cuda", "cuda:N" or "auto"; None:
    where `model` is. Both models run there, and are then where they were. work_dir: a directory that keeps the state
    every `save_interval` steps; the same call with the same directory goes on from there, to the same bits on the same
    kind of device. progress: see `FinetuneProgress`. Of several ranks (`distributed`) each runs a part of every step.

    Raises ValueError, before any work, for a model without quantized layers, models of different vocabularies, token
    ids that are too few or outside of these, codes that cannot be searched, a `work_dir` of another run; and for a loss
    that is not finite. OSError if `work_dir` cannot be written; the state in it stays usable.
    """
    chosen = options if isinstance(options, FinetuneOptions) else options_of(FinetuneOptions, options or {})
    progress = progress or FinetuneProgress()
    for name, one in (("model", model), ("original", original)):
        if not isinstance(one, torch.nn.Module):
            raise ValueError(f"{name}: got {type(one).__name__}, expected a transformers model, as load_model gives it")
    sequences = texts.check_sequences(model, sequences, TuningOptions())
    texts.check_token_ids("sequences", sequences, original)
    place, homes = Placement(device).find(model), [next(one.parameters()).device for one in (model, original)]
    places = [place, torch.device("cpu") if _is_sharded(chosen) else place]
    training = [module for one in (model, original) for module in one.modules() if module.training]
    with contextlib.ExitStack() as stack:
        stack.enter_context(working_on(place, None))
        for one, home, there in zip((model, original), homes, places, strict=True):
            stack.callback(one.to, home)
            one.eval().to(there)
        stack.callback(_train, training)
        return _tune(model, original, sequences, chosen, progress, work_dir)


def _is_sharded(options: FinetuneOptions) -> bool:
    return options.shard_original and group().size > 1


def _train(modules: Sequence[torch.nn.Module]) -> None:
    for module in modules:
        module.training = True


def _tune(
    model: Any,
    original: Any,
    sequences: torch.Tensor,
    options: FinetuneOptions,
    progress: Any,
    work_dir: str | os.PathLike[str] | None,
) -> FinetuneReport:
    device = next(model.parameters()).device
    shared, kept = _is_sharded(options), options.cache_teacher != "none"
    names = find_blocks(original)[1].names if shared or kept else []
    if options.pv_states == "auto" and work_dir is not None:
        begun = group().broadcast(begun_states(work_dir) if group().first else None)
        options = dataclasses.replace(options, pv_states=begun or "auto")
    expected = estimate(model, sequences, options, device, moved_bytes(original, names, shared, kept))
    options = dataclasses.replace(options, pv_states=expected.states)
    progress.on_estimate(expected)
    asked = [parameter for parameter in original.parameters() if parameter.requires_grad]
    original.requires_grad_(False)
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: [parameter.requires_grad_() for parameter in asked])
        running = sharded(original, names, device) if shared else original
        output = SplitModel(model, whole=False)
        teacher = Teacher(running, sequences, options.cache_teacher, names, shared)
        if output.vocabulary != teacher.output.vocabulary:
            raise ValueError(
                f"original: got a vocabulary of {teacher.output.vocabulary}, expected {output.vocabulary}, as the "
                "quantized model has"
            )
        blocks = []
        if expected.checkpointing:
            blocks = [model.get_submodule(name) for name in names or find_blocks(original)[1].names]
        store, state = None, None
        if work_dir is not None or group().size > 1:  # else nothing asks for the hashes of two models
            facts = facts_of(model, sequences, {**dataclasses.asdict(options), "micro_batch_size": expected.micro})
            facts["original"] = {"weights": facts_of(original, sequences, {})["model"]["weights"]}
            facts["options"]["device"] = kind_of_device(device)
            store, state = _open(stack, work_dir, facts)
        if state is not None:
            progress.on_resumed_step(state[1]["step"])
        stack.enter_context(teacher.open())
        student = Student(model, options, blocks)
        distiller = Distiller(student, output, teacher, sequences, options, expected, progress)
        progress.on_phase("tune")
        report = distiller.run(state, store.save_state if store else None)
    report.gradient_checkpointing = expected.checkpointing
    report.device, report.ranks, report.versions = kind_of_device(device), group().size, versions()
    report.peak_memory_bytes, report.peak_device_memory_bytes = peak_memory(), peak_device_memory(device)
    report.original = str(getattr(original.config, "_name_or_path", ""))
    return report


State = tuple[Mapping[str, torch.Tensor], Mapping[str, Any]]


def _open(
    stack: contextlib.ExitStack, work_dir: str | os.PathLike[str] | None, facts: dict[str, Any]
) -> tuple[WorkDir | None, State | None]:
    """The work directory, which only the first rank sees, and the state in it, which all get; before it, that all ranks
    are of the same run.
    """
    ranks = group()
    parts = {part: fields for part, fields in facts.items() if part != "machine"}
    ranks.check_same({f"{part}.{name}": value for part, fields in parts.items() for name, value in fields.items()})
    if work_dir is None:
        return None, None
    facts["machine"]["ranks"] = ranks.size
    store = stack.enter_context(WorkDir.open(work_dir, facts)) if ranks.first else None
    state = store.load_state() if store else None
    if not ranks.broadcast(state is not None):
        return store, None
    tensors, found = state or ({}, {})
    sent = ranks.broadcast_arrays(tensors, 0, "cpu")
    return store, ({name: torch.as_tensor(tensor) for name, tensor in sent.items()}, ranks.broadcast(found))


@dataclasses.dataclass
class FinetuneRun:
    """What to tune, against what, on which text. quantized: a directory of `aqlm-c quantize` or another AQLM model.
    original: as MODEL of `aqlm-c quantize`. out: directory to write. data: sources as in `load_sequences`, none: the
    bundled text; "self:N": N tokens that the original itself samples. samples: sequences, spread evenly over the
    sources; None: what they hold, as far as it is needed. work_dir, device: as in `finetune_model`. overwrite: replace
    `out` if it is a model.

    Raises ValueError naming the field, its value and what was expected.
    """

    quantized: str
    original: str
    out: str
    data: list[str] = dataclasses.field(default_factory=list)
    samples: int | None = None
    sequence_length: int = 1024
    shuffle: bool = False
    bos: str = "auto"
    threads: int | None = None
    device: str = "auto"
    work_dir: str | None = None
    overwrite: bool = False
    options: FinetuneOptions = dataclasses.field(default_factory=FinetuneOptions)

    def __post_init__(self) -> None:
        for name in ("quantized", "original", "out"):
            setattr(self, name, os.fspath(getattr(self, name)))
        CalibrationOptions(self.samples or 1, self.sequence_length, self.shuffle, self.bos)
        if self.samples is not None:
            int_between("samples", self.samples, 2)
        self.data = self.data or [texts.BUNDLED]
        for source in self.data:
            if source.startswith(SELF):
                _own_tokens(source)
            else:
                texts.check_source(source)


def _own_tokens(source: str) -> int:
    count = source.removeprefix(SELF).replace("_", "")
    if not (count.isdecimal() and 0 < int(count) < 2**40):
        raise wrong("data", source, "self:N, N tokens that the original is to make, such as self:4000000")
    return int(count)


def tuning_sequences(run: FinetuneRun, original: Any, tokenizer: Any, progress: Any) -> torch.Tensor:
    """The token ids [n, length] that a run is tuned on, int64, held-out ones among them.

    Raises ValueError as `load_sequences` does.
    """
    options, length = run.options, run.sequence_length
    made = [source for source in run.data if source.startswith(SELF)]
    read = [source for source in run.data if source not in made]
    parts = []
    for source in made:
        progress.on_phase(f"sample {source}")
        starts = _starts(original, tokenizer)
        parts.append(sample_sequences(original, _own_tokens(source), length, starts, options.seed))
    if read and run.samples is not None:
        bos = run.bos
        parts.append(texts.load_sequences(read, tokenizer, run.samples, length, run.shuffle, options.seed, bos))
        return torch.cat(parts)
    needed = options.steps * options.batch_size + options.most_held_out
    parts += _read(read, tokenizer, needed, run, progress)
    sequences = torch.cat(parts)
    texts.warn_of_starts("sequences", sequences, tokenizer)
    return sequences


def _read(sources: Sequence[str], tokenizer: Any, needed: int, run: FinetuneRun, progress: Any) -> list[torch.Tensor]:
    """`needed` sequences of these, as many of each; what short ones lack, the others give if they can."""
    found, length = list[torch.Tensor](), run.sequence_length
    for source in sources:
        progress.on_phase(f"read {source}")
        stream = texts.token_stream(source, tokenizer, int(_ROOM * length * needed), whole=False)
        windows = texts.cut(stream[None], length, texts.window_start(tokenizer, run.bos, source))
        if not len(windows):
            raise ValueError(
                f"data: got {source!r}: {stream.numel()} tokens, expected at least {length}, those of a sequence"
            )
        found.append(windows)
    left, shares = needed, dict[int, int]()
    for place, i in enumerate(sorted(range(len(found)), key=lambda i: len(found[i]))):
        shares[i] = min(len(found[i]), -(-left // (len(found) - place)))
        left -= shares[i]
    return [windows[: shares[i]] for i, windows in enumerate(found)]


def _starts(original: Any, tokenizer: Any) -> torch.Tensor:
    """Tokens that texts of the original's own begin with: that of its tokenizer, or else any that is a word's."""
    if tokenizer is None:
        return torch.arange(original.get_input_embeddings().num_embeddings)
    if texts.begins_texts(tokenizer):
        return torch.tensor([tokenizer.bos_token_id])
    special = set(tokenizer.all_special_ids)
    size = min(len(tokenizer), original.get_input_embeddings().weight.shape[0])
    return torch.tensor([token for token in range(size) if token not in special])


def finetune_directory(run: FinetuneRun, progress: Any = None) -> FinetuneReport:
    """Tune `run.quantized` against `run.original` and save it as the directory `run.out`, whose report.json is that of
    the quantized model with the report under "finetune".

    Raises ValueError for what is wrong in the run, a model or the data, before the work starts where that can be seen;
    OSError where a file cannot be written. Of several ranks (`distributed`) the first alone writes.
    """
    from .core.runtime import check_kernels, set_threads
    from .hf.models import load_model
    from .io.checkpoint import check_output

    progress = progress or FinetuneProgress()
    needed = {"QUANTIZED": run.quantized, "ORIGINAL": run.original, "WORK_DIR": run.work_dir or ""}
    needed |= {f"DATA {n}": name for n, name in enumerate(run.data, 1)}
    if group().first:
        check_output(run.out, run.overwrite, needed)
    if run.work_dir and Path(run.work_dir).resolve().is_relative_to(Path(run.out).resolve()):
        raise wrong("work_dir", run.work_dir, f"a folder outside of OUT={run.out!r}")
    set_threads(run.threads)
    place = device_of_rank(run.device)
    check_kernels(place)
    progress.on_phase("load")
    model, tokenizer, source = load_model(run.quantized, "auto", str(place))
    if not source.quantized:
        raise ValueError(f"QUANTIZED: got {run.quantized!r}, expected a model with AQLM layers")
    original, _, origin = load_model(run.original, "auto", "cpu" if _is_sharded(run.options) else str(place))
    sequences = tuning_sequences(run, original, tokenizer, progress)
    data = texts.provenance(run.data, sequences, texts.common_start(sequences, tokenizer) if tokenizer else None)
    report = finetune_model(model, original, sequences, run.options, progress=progress, work_dir=run.work_dir)
    report.data, report.original = data, origin.name
    if group().first:
        progress.on_phase("save")
        _save(run, model, tokenizer, report)
    return report


def _save(run: FinetuneRun, model: Any, tokenizer: Any, report: FinetuneReport) -> None:
    from .hf.card import model_card
    from .hf.models import saved_sizes
    from .io.checkpoint import write_quantized

    own = Path(run.quantized) / "report.json"
    merged = read_json_object(own) if own.is_file() else {}
    merged.pop("perplexity", None)  # of the model before
    merged["finetune"] = report.to_dict()

    def files(directory: Path) -> Mapping[str, str]:
        merged["sizes"] = {**merged.get("sizes", {}), **saved_sizes(model, directory)}
        source = run.original if os.path.isdir(run.original) else None
        return {
            "README.md": model_card(model, merged, source),
            "report.json": json.dumps(merged, indent=2, allow_nan=False) + "\n",
        }

    write_quantized(model, tokenizer, run.out, overwrite=run.overwrite, extra_files=files)
