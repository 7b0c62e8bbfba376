"""Runs trials: the original is loaded once, with what it says of the texts; tokens, H and layers are shared."""

from __future__ import annotations

import contextlib
import copy
import datetime
import fcntl
import gc
import logging
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import tasks as zero_shot
from ..calibrate.statistics import Statistics
from ..core.runtime import find_device, kind_of_device
from ..errors import one_line, wrong
from ..evaluate import Recorded, check_same_words, divergence, has_room, windows_of
from ..hf.models import load_model
from ..io import data as texts
from ..model.blocks import find_blocks
from ..model.logits import SplitModel
from ..model.positions import check_length
from ..pipeline.progress import Progress
from ..recipe import RunConfig
from ..run import Shared, run
from ..statistics import collect_hessians
from ..versions import versions
from .rows import COMPLETE, Row, averaged, failed_row
from .space import Point, Space

log = logging.getLogger("aqlm_c")

_NOT_QUANTIZING = ("load", "save")  # phases
_KEPT = ("perplexity", "perplexity_stderr", "kl", "kl_p99", "top1", "original_perplexity")


class Text(NamedTuple):
    """One to evaluate on: token ids [n], the token that windows begin with, and what the original did on it."""

    input_ids: torch.Tensor
    start: int | None
    sha256: str | None
    original: Any  # Recorded, or the model


class Bench:
    """The original of a sweep, and what is made of it.

    device: where it and the trials are. threads: of each run. Raises ValueError for a model or text that cannot be
    read.
    """

    def __init__(
        self, space: Space, out: Path, device: str = "auto", threads: int | None = None, progress: Any = None
    ) -> None:
        self.space, self.out, self.threads = space, out, threads
        self.device = str(find_device(device))
        self.progress = progress or Progress()
        self.progress.on_phase("load")
        self.original, self.tokenizer, self.source = load_model(space.model, "auto", self.device, True)
        self.tasks = zero_shot.prepare(space.evaluation)
        self.layers = self._layers()
        self.texts = {name: self._text(source) for name, source in space.texts.items()}
        self._drawn: dict[tuple[Any, ...], tuple[torch.Tensor, dict[str, Any]]] = {}

    def _layers(self) -> str | None:
        """Of which layers trials are; None: all."""
        if self.space.proxy_blocks is None:
            return None
        _, blocks = find_blocks(self.original)
        names = blocks.names[: self.space.proxy_blocks]
        if len(blocks) <= self.space.proxy_blocks:
            raise wrong("proxy_blocks", self.space.proxy_blocks, f"fewer than the model's {len(blocks)} blocks")
        return f"^({'|'.join(map(re.escape, names))})\\."

    @torch.no_grad()
    def _text(self, source: str) -> Text:
        chosen = self.space.evaluation
        texts.check_source(source)
        limit = chosen.windows and chosen.windows * chosen.sequence_length
        ids = texts.token_stream(source, self.tokenizer, limit)
        start = texts.window_start(self.tokenizer, chosen.bos, source)
        check_length("evaluation.sequence_length", chosen.sequence_length, self.original)
        cuts = windows_of(self.original, ids, chosen.sequence_length, chosen.windows, start)
        split, known = SplitModel(self.original), self.original
        if split.is_split and has_room(split, [cuts]):
            self.progress.on_phase(f"original on {Path(source).name}")
            known = Recorded(split, cuts, getattr(self.progress, "on_window", None))
        return Text(ids, start, texts.sha256(source), known)

    def facts(self) -> dict[str, Any]:
        """What makes rows comparable, beside the space's settings: hashes of the texts."""
        return {"texts": {name: text.sha256 for name, text in self.texts.items()}}

    def config(self, point: Point, out: str) -> RunConfig:
        """The run of a point, as a trial has it but for its statistics."""
        of_run: dict[str, Any] = {"device": self.device, "threads": self.threads, "layers": self.layers}
        return self.space.config(point, out, **of_run)

    def run(self, point: Point, number: int) -> Row:
        """The row of a trial; of one that is wrong, the error."""
        models = self.out / "models"
        models.mkdir(exist_ok=True)
        out = models / f"{number:05d}"
        shutil.rmtree(out, ignore_errors=True)  # of a worker that ended
        started = time.perf_counter()
        try:
            row = self._run(point, out)
        except (ValueError, ArithmeticError) as error:
            shutil.rmtree(out, ignore_errors=True)
            row = failed_row(one_line(error))
        finally:
            gc.collect()
            if self.device != "cpu":
                torch.cuda.empty_cache()
        if self.space.keep == "none":
            shutil.rmtree(out, ignore_errors=True)
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        return {**row, "whole_seconds": time.perf_counter() - started, "date": now, "versions": versions()}

    def _run(self, point: Point, out: Path) -> Row:
        config, shared = self._shared(point, out)
        model = sharing_copy(self.original)
        report = run(config, Quiet(self.progress), (model, self.tokenizer, self.source), shared)
        resolved = config.resolve().fields
        seconds = sum(value for name, value in report.phases.items() if name not in _NOT_QUANTIZING)
        row: Row = {
            "state": COMPLETE,
            "seconds": seconds,
            "phases": report.phases,
            "bits": report.bits_per_weight,
            "effective_bits": report.effective_bits,
            "bytes": report.sizes.get("quantized_bytes"),
            "config": {name: value for name, value in resolved.items() if value is not None},
            "device": kind_of_device(torch.device(self.device)),
            **self.evaluated("trial", model, self.tokenizer),
        }
        return row

    def _shared(self, point: Point, out: Path) -> tuple[RunConfig, Shared]:
        """The run of a trial, with tokens, H and layers of others."""
        config = self.config(point, str(out))
        ids, data = self._sequences(config)
        if not self.space.statistics:
            return config, Shared(ids, data)
        path = self._statistics(ids, data)
        store = None if "seconds" in self.space.objectives else self.out / "layers"
        config = RunConfig.from_fields({**_fields(config), "statistics": str(path)})
        tuned = config.resolve().config.tuning.finetune_epochs > 0
        return config, Shared(ids if tuned else None, data, Statistics(path, store))

    def _sequences(self, config: RunConfig) -> tuple[torch.Tensor, dict[str, Any]]:
        """The calibration tokens of a run, which runs with the same choice share."""
        resolved = config.resolve()
        drawn, seed = resolved.calibration, resolved.config.seed if config.shuffle else 0
        sources = tuple(config.data) or (texts.BUNDLED,)
        options = (drawn.samples, drawn.sequence_length, drawn.shuffle, seed, drawn.bos)
        key = (sources, *options)
        if key not in self._drawn:
            for source in sources:
                texts.check_source(source)
            ids = texts.load_sequences(list(sources), self.tokenizer, *options)
            start = texts.common_start(ids, self.tokenizer)
            self._drawn[key] = ids, texts.provenance(sources, ids, start)
        return self._drawn[key]

    def _statistics(self, ids: torch.Tensor, data: dict[str, Any]) -> Path:
        """The file of H of these tokens, which the first worker that needs it makes while others wait."""
        directory = self.out / "statistics"
        directory.mkdir(exist_ok=True)
        suffix = "" if self.space.proxy_blocks is None else f"-{self.space.proxy_blocks}"
        path = directory / f"{data['input_ids'][:24]}{suffix}.safetensors"
        with locked(directory / f"{path.name}.lock"):
            if not path.exists():
                self.progress.on_phase("hessians")
                model = sharing_copy(self.original)
                collect_hessians(model, ids, path.absolute(), layers=self.layers, data=data)
        return path.absolute()

    def evaluated(self, name: str, model: Any, tokenizer: Any) -> Row:
        """Scores of a model by text, their averages, and rows of tasks."""
        chosen, scores = self.space.evaluation, dict[str, Any]()
        model.to(self.device)
        for text_name, text in self.texts.items():
            self.progress.on_phase(f"{name} on {text_name}")
            options = (chosen.sequence_length, chosen.windows, getattr(self.progress, "on_window", None), text.start)
            found = divergence(model, text.original, text.input_ids, *options)
            scores[text_name] = {figure: found[figure] for figure in _KEPT if figure in found}
        row: Row = {"scores": scores, **averaged(scores)}
        if self.tasks is not None:
            row["tasks"] = self.tasks.run(name, model, tokenizer, self.progress)
        return row

    def foreign(self, name: str) -> Row:
        """The row of a model of others: a GGUF file, a GPTQ checkpoint, a dense model, or one of ours."""
        row: Row = {"key": f"foreign: {name}", "trial": None, "foreign": name, "params": {}}
        try:
            self.progress.on_phase(f"load {Path(name).name}")
            model, tokenizer, source = load_model(name, "auto", self.device)
            check_same_words(name, tokenizer, self.space.model, self.tokenizer)
            row |= {"state": COMPLETE, **self.evaluated(Path(name).name, model, tokenizer)}
            parameters = sum(p.numel() for p in model.parameters() if p.is_floating_point())
            size, known = source.total_bytes, source.total_bytes > 0 and not source.quantized
            row |= {"bytes": size or None, "effective_bits": 8 * size / parameters if known else None}
        except (ValueError, ImportError, ArithmeticError) as error:
            row |= failed_row(one_line(error))
        return row


def _fields(config: RunConfig) -> dict[str, Any]:
    """Those of a run that are set."""
    return {name: value for name, value in vars(config).items() if value is not None}


class Quiet:
    """The progress of a run inside of a sweep: phases alone."""

    def __init__(self, progress: Any) -> None:
        self._progress = progress

    def on_block(self, index: int, name: str) -> None:
        """A step begins."""
        self._progress.on_phase(name)

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time is here."""
    with open(path, "a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def sharing_copy(model: Any) -> Any:
    """A copy of a model that shares the memory of its matrices, to which quantizing does not write; norms and biases,
    which tuning trains, are copied.
    """
    memo: dict[int, Any] = {}
    for tensor in model.parameters():
        shared = tensor.detach() if tensor.squeeze().ndim > 1 else tensor.detach().clone()
        memo[id(tensor)] = torch.nn.Parameter(shared, requires_grad=tensor.requires_grad)
    return copy.deepcopy(model, memo)
