"""Perplexity by the protocol of the GPTQ paper (arXiv 2210.17323), and how far a model is from its original."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .errors import missing

try:
    import torch
except ModuleNotFoundError as error:
    raise missing(error) from error

import numpy as np

from . import tasks as zero_shot
from .config import EvaluationOptions
from .core.runtime import find_device
from .errors import wrong
from .files import available_memory, read_json_object
from .io.checkpoint import read_directory
from .io.data import (
    BUNDLED,
    as_token_ids,
    begins_texts,
    check_source,
    check_token_ids,
    cut,
    sha256,
    source_names,
    token_stream,
    window_start,
)
from .model.logits import SplitModel, cross_entropy, kl_divergence, slices
from .model.positions import check_length
from .report.evaluation import Evaluation

log = logging.getLogger("aqlm_c")

_SLICE = 256  # positions whose logits are held in float32 at a time, at most
_MAX_LOSS = 700.0  # exp of a little more overflows
_ROOM = 0.5  # of free memory, for an original's hidden states

OnWindow = Callable[[int, int, float], None]


@torch.no_grad()
def perplexity(
    model: Any,
    input_ids: torch.Tensor,
    sequence_length: int = 2048,
    windows: int | None = None,
    progress: OnWindow | None = None,
    bos_token: int | None = None,
) -> dict[str, Any]:
    """Token perplexity of a causal language model over one stream of token ids [n].

    The stream is cut into windows of `sequence_length` that do not overlap (the first `windows` of them;
    None: all), each is one forward pass, and every token but a window's first is predicted: exp(sum over
    windows of (mean loss * sequence_length) / (number of windows * sequence_length)). With `bos_token` (what
    `window_start` gives) each window is that token and the next sequence_length - 1 of the stream.

    `progress(done, total, perplexity_so_far)` is called after each window. Returns `perplexity`, `perplexity_stderr`
    (its standard error over windows by the delta method: perplexity * standard deviation of the windows' mean losses /
    sqrt(windows); None of one window), `windows`, `sequence_length`, `tokens` (read) and `seconds`. Raises ValueError
    for a text shorter than what was asked for, for windows longer than the model has positions, for a token id that the
    model does not know and for a loss that is not finite or beyond 700.
    """
    cuts = windows_of(model, input_ids, sequence_length, windows, bos_token)
    check_length("sequence_length", sequence_length, model)
    started = time.perf_counter()
    split, losses = SplitModel(model.eval()), []
    for index, ids in enumerate(cuts):
        hidden = split.hidden(ids)
        losses.append(_mean_loss([_losses(split, hidden[part], ids, part) for part in _parts(split, hidden)], index))
        if progress is not None:
            progress(index + 1, len(cuts), math.exp(np.mean(losses)))
    return {**_perplexity("perplexity", losses), **_counts(cuts, started)}


class Recorded:
    """The hidden states of an original for the windows of one text, on the CPU: it need not run for each model.

    split: the original, of which `logits` is used alone.
    """

    @torch.no_grad()
    def __init__(self, split: SplitModel, cuts: torch.Tensor, progress: OnWindow | None = None) -> None:
        self.split = split
        self.states: list[torch.Tensor] = []
        for index, ids in enumerate(cuts):
            self.states.append(split.hidden(ids).cpu())
            if progress is not None:
                progress(index + 1, len(cuts), math.nan)

    def hidden(self, index: int, ids: torch.Tensor) -> torch.Tensor:
        return self.states[index]


class _Live:
    """An original that runs for each window."""

    def __init__(self, model: Any) -> None:
        self.split = SplitModel(model.eval())

    def hidden(self, index: int, ids: torch.Tensor) -> torch.Tensor:
        return self.split.hidden(ids)


@torch.no_grad()
def divergence(
    model: Any,
    original: Any,
    input_ids: torch.Tensor,
    sequence_length: int = 2048,
    windows: int | None = None,
    progress: OnWindow | None = None,
    bos_token: int | None = None,
) -> dict[str, Any]:
    """How far a causal language model is from its original, over the windows and positions of `perplexity`.

    original: a model with the same vocabulary, on any device, or what it `Recorded` of the same windows. Beside what
    `perplexity` returns: `kl`, the mean over tokens of KL(original || model) in nats, its `kl_stderr` over windows and
    its exact 99th percentile over tokens `kl_p99`; `top1`, the share of tokens for which both have the same likeliest
    one; `original_perplexity` with its `_stderr`; `perplexity_ratio`, over the original's, with the `_stderr` of the
    windows' differences. Logits are computed and compared some positions at a time. Raises ValueError as `perplexity`,
    for vocabularies of different sizes and for a KL that is not finite.
    """
    cuts = windows_of(model, input_ids, sequence_length, windows, bos_token)
    check_length("sequence_length", sequence_length, model)
    started = time.perf_counter()
    split, other = SplitModel(model.eval()), original if isinstance(original, Recorded) else _Live(original)
    if isinstance(original, Recorded) and [len(states) for states in original.states] != [sequence_length] * len(cuts):
        raise ValueError(
            f"original: got {len(original.states)} recorded windows, expected {len(cuts)} of the same length"
        )
    losses, originals, kls, agreements = [], [], [], []
    for index, ids in enumerate(cuts):
        parts = _compare(split, split.hidden(ids), other.split, other.hidden(index, ids), ids)
        loss, original_loss, divergences, agree = parts
        losses.append(_mean_loss(loss, index))
        originals.append(_mean_loss(original_loss, index, "original"))
        kls.append(torch.cat(divergences).cpu().numpy())
        agreements.append(sum(agree) / (len(ids) - 1))
        if not np.isfinite(kls[-1]).all():
            raise ValueError(f"model: the KL of window {index} is {kls[-1].max()}, expected a finite number")
        if progress is not None:
            progress(index + 1, len(cuts), math.exp(np.mean(losses)))
    kl, kl_stderr = _mean([window.mean(dtype=np.float64) for window in kls])
    return {
        **_perplexity("perplexity", losses),
        "kl": kl,
        "kl_stderr": kl_stderr,
        "kl_p99": float(np.quantile(np.concatenate(kls), 0.99)),
        "top1": float(np.mean(agreements)),
        **_perplexity("original_perplexity", originals),
        **_perplexity("perplexity_ratio", np.subtract(losses, originals)),
        **_counts(cuts, started),
    }


def _compare(
    split: SplitModel, hidden: torch.Tensor, other: SplitModel, states: torch.Tensor, ids: torch.Tensor
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor], list[int]]:
    """Losses of both, KL and agreements of one window, slice by slice."""
    losses, original_losses, kl, agree = [], [], [], []
    for part in _parts(split, hidden):
        logits, original = split.float_logits(hidden[part]), other.float_logits(states[part]).to(hidden.device)
        if logits.shape != original.shape:
            raise ValueError(f"model: got {logits.shape[1]} logits, expected {original.shape[1]} as the original has")
        targets = ids[part.start + 1 : part.stop + 1].to(logits.device)
        losses.append(cross_entropy(logits, targets))
        original_losses.append(cross_entropy(original, targets))
        agree.append(int((logits.argmax(-1) == original.argmax(-1)).sum()))
        kl.append(kl_divergence(original, logits))
    return losses, original_losses, kl, agree


def evaluate_models(
    models: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    data: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    against: str | os.PathLike[str] | None = None,
    *,
    device: str = "cpu",
    progress: Any = None,
    found: Evaluation | None = None,
    **options: Any,
) -> Evaluation:
    """Evaluate one or several models on texts and zero-shot tasks: what `aqlm-c evaluate` does.

    models, against: names that `load_model` takes, loaded one after another; against: the original that they are
    compared with. data: sources (`io.data`), each a text; none: the bundled text, unless there are tasks. options: of
    `EvaluationOptions`. progress: an object with `on_phase(name)` and `on_window(done, total, perplexity)`. found: what
    is filled and returned, row by row, so that an error in a later model leaves the rows of earlier ones.

    Raises ValueError for a model or a source that cannot be read, and for tokenizers or vocabularies that differ from
    the original's; what can be known before the work is refused before it.
    """
    chosen = EvaluationOptions(**options)
    names = source_names("models", models)
    if not names:
        raise wrong("models", names, "at least one")
    sources = source_names("data", data) or ([] if chosen.tasks else [BUNDLED])
    for source in sources:
        check_source(source)
    original = None if against is None else source_names("against", [against])[0]
    work = _Work(str(find_device(device)), chosen, progress or _Silent(), zero_shot.prepare(chosen))
    work.check(names, original)
    result = Evaluation(names) if found is None else found
    result.models, result.against, result.device = names, original, work.device
    result.dtype, result.bos = chosen.dtype, chosen.bos
    texts = work.original(original, sources, result) if original is not None else None
    for name in names:
        work.model(name, sources, texts, result)
    return result


class _Silent:
    def on_phase(self, name: str) -> None: ...
    def on_window(self, done: int, total: int, perplexity: float) -> None: ...


@dataclasses.dataclass
class _Text:
    """A source as token ids [n], with the token that its windows begin with, and what an original did on it."""

    source: str
    input_ids: torch.Tensor
    start: int | None
    bos: str | None
    sha256: str | None
    original: Any = None  # Recorded, or a model


@dataclasses.dataclass
class _Work:
    """What all models of an evaluation share."""

    device: str
    options: EvaluationOptions
    progress: Any
    tasks: zero_shot.Prepared | None

    def check(self, names: Sequence[str], original: str | None) -> None:
        """Raise ValueError for a model of several that is not there or damaged, or whose tokenizer is not the
        original's or lacks the BOS token that is asked for.
        """
        from .hf.models import load_tokenizer

        together = [*names, *([] if original is None else [original])]
        if len(together) == 1:
            return
        tokenizers = {name: load_tokenizer(name) for name in together}
        for name, tokenizer in tokenizers.items():
            window_start(tokenizer, self.options.bos)
            if Path(name).is_dir():
                read_directory(name)
        if original is None:
            return
        expected = tokenizers[original]
        size = _logits_on_disk(original)
        for name in names:
            check_same_words(name, tokenizers[name], original, expected)
            own = _logits_on_disk(name)
            if None not in (own, size) and own != size:
                raise ValueError(f"against: got {original!r} with {size} logits, expected {own} as {name!r} has")

    @contextlib.contextmanager
    def loaded(self, name: str) -> Iterator[tuple[Any, Any]]:
        """The model `name` and its tokenizer; a GPU's memory is free afterwards."""
        from .hf.models import load_model

        gc.collect()  # what an earlier one left
        self.progress.on_phase(f"load {name}")
        dtype = self.options.dtype if self.options.dtype == "auto" else getattr(torch, self.options.dtype)
        network, tokenizer, _ = load_model(name, dtype, self.device)
        yield network, tokenizer
        del network
        if self.device != "cpu":
            torch.cuda.empty_cache()

    def texts(self, sources: Sequence[str], tokenizer: Any) -> list[_Text]:
        limit = self.options.windows and self.options.windows * self.options.sequence_length
        found = []
        for source in sources:
            input_ids = token_stream(source, tokenizer, limit)
            start = window_start(tokenizer, self.options.bos, source)
            if start is None and begins_texts(tokenizer):
                log.warning("%s: windows are cut without %s, which begins texts", source, tokenizer.bos_token)
            bos = None if start is None else str(tokenizer.bos_token)
            found.append(_Text(source, input_ids, start, bos, sha256(source)))
        return found

    def original(self, name: str, sources: Sequence[str], result: Evaluation) -> list[_Text]:
        """The texts, with what the original did on them; where that has no room, with the original itself."""
        with self.loaded(name) as (network, tokenizer):
            texts = self.texts(sources, tokenizer)
            cuts = [self._cuts(network, text) for text in texts]
            if texts:
                check_length("sequence_length", self.options.sequence_length, network)
            self.run_tasks(name, network, tokenizer, result)
            split = SplitModel(network)
            if split.is_split and texts and has_room(split, cuts):
                for text, windows in zip(texts, cuts, strict=True):
                    self.progress.on_phase(f"{name} on {text.source}")
                    text.original = Recorded(split, windows, self.progress.on_window)
                split.release()
            else:
                for text in texts:
                    text.original = network
        return texts

    def _cuts(self, network: Any, text: _Text) -> torch.Tensor:
        with _named(text.source):
            return windows_of(network, text.input_ids, self.options.sequence_length, self.options.windows, text.start)

    def model(self, name: str, sources: Sequence[str], texts: list[_Text] | None, result: Evaluation) -> None:
        """Rows of one model, added to `result`."""
        length, windows = self.options.sequence_length, self.options.windows
        with self.loaded(name) as (network, tokenizer):
            chosen = self.texts(sources, tokenizer) if texts is None else texts
            for text in chosen:  # the last one's errors come before the first one's work
                self._cuts(network, text)
            for text in chosen:
                self.progress.on_phase(f"{name} on {text.source}")
                arguments = (text.input_ids, length, windows, self.progress.on_window, text.start)
                with _named(text.source):
                    if text.original is None:
                        row = perplexity(network, *arguments)
                    else:
                        row = divergence(network, text.original, *arguments)
                described = {"model": name, "data": text.source, "sha256": text.sha256, "bos": text.bos}
                result.results.append({**described, **row})
            self.run_tasks(name, network, tokenizer, result)

    def run_tasks(self, name: str, network: Any, tokenizer: Any, result: Evaluation) -> None:
        if self.tasks is not None:
            rows = self.tasks.run(name, network, tokenizer, self.progress)
            result.tasks += [{"model": name, **row} for row in rows]


@contextlib.contextmanager
def _named(source: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"data: got {source!r}: {error}") from error


def check_same_words(name: str, tokenizer: Any, original: str, expected: Any) -> None:
    """Raise ValueError unless two tokenizers have the same words under the same numbers."""
    words, others = tokenizer.get_vocab(), expected.get_vocab()
    if words == others:
        return
    word = min(word for word in {*words, *others} if words.get(word) != others.get(word))
    numbers = [vocabulary.get(word, "none") for vocabulary in (words, others)]
    raise ValueError(
        f"against: got {original!r}, expected a model with the tokenizer of {name!r}: {len(others)} words are not the "
        f"same {len(words)}, such as {word!r}, number {numbers[1]} there and {numbers[0]} here"
    )


def _logits_on_disk(name: str) -> int | None:
    """How many words the config.json in a directory says the model has; None where there is none that says it."""
    config = Path(name) / "config.json"
    if not config.is_file():
        return None
    fields = read_json_object(config)
    text = fields.get("text_config")
    size = fields.get("vocab_size", text.get("vocab_size") if isinstance(text, dict) else None)
    return size if type(size) is int else None


@torch.no_grad()
def has_room(split: SplitModel, cuts: Sequence[torch.Tensor]) -> bool:
    """Whether the hidden states of all these windows fit into memory beside the models."""
    state = split.hidden(cuts[0][0, :2])
    tokens = sum(windows.numel() for windows in cuts)
    free = available_memory()
    return free is None or tokens * state[0].numel() * state.element_size() <= _ROOM * free


def windows_of(
    model: Any, input_ids: torch.Tensor, sequence_length: int, windows: int | None, bos_token: int | None
) -> torch.Tensor:
    """The windows [n, sequence_length] of a stream of token ids, checked, but for the model's positions.

    Arguments and ValueError as of `perplexity`.
    """
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"model: got {type(model).__name__}, expected a transformers model, as load_model gives it")
    stream = as_token_ids("input_ids", input_ids, "token ids [n], as token_stream gives them").reshape(-1)
    if sequence_length < 2:
        raise ValueError(f"sequence_length: got {sequence_length}, expected at least 2")
    if windows is not None and windows < 1:
        raise ValueError(f"windows: got {windows}, expected at least 1")
    cuts = cut(stream[None].long(), sequence_length, bos_token)
    if len(cuts) < (windows or 1):
        begun = bos_token is not None and stream.numel() > 0 and int(stream[0]) == bos_token
        needed = (windows or 1) * (sequence_length - (bos_token is not None)) + begun
        raise ValueError(
            f"input_ids: {stream.numel()} tokens, expected at least {needed} "
            f"for windows={windows or 1} of sequence_length={sequence_length}"
        )
    cuts = cuts[: windows or len(cuts)]
    check_token_ids("input_ids", cuts, model)
    return cuts


def _parts(split: SplitModel, hidden: torch.Tensor) -> Iterator[slice]:
    """Runs of the positions that have a next token, whose logits are held at a time."""
    return slices(len(hidden) - 1, split.vocabulary or hidden.shape[1], hidden.device, _SLICE)


def _losses(split: SplitModel, hidden: torch.Tensor, ids: torch.Tensor, part: slice) -> torch.Tensor:
    logits = split.float_logits(hidden)
    return cross_entropy(logits, ids[part.start + 1 : part.stop + 1].to(logits.device))


def _mean_loss(losses: Sequence[torch.Tensor], index: int, who: str = "model") -> float:
    """Mean negative log likelihood of a window's tokens but the first; ValueError if its exponential is no number."""
    loss = torch.cat(list(losses)).double().mean().item()
    if not loss < _MAX_LOSS:
        raise ValueError(f"{who}: the loss of window {index} is {loss}, expected a number below {_MAX_LOSS:g}")
    return loss


def _mean(values: Any) -> tuple[float, float | None]:
    """Mean and its standard error, None of one value."""
    n = len(values)
    return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(n)) if n > 1 else None


def _perplexity(name: str, losses: Any) -> dict[str, float | None]:
    """exp of the mean loss, and its standard error by the delta method, under `name` and `name`_stderr."""
    mean, stderr = _mean(losses)
    value = math.exp(mean)
    return {name: value, f"{name}_stderr": None if stderr is None else min(value * stderr, sys.float_info.max)}


def _counts(cuts: torch.Tensor, started: float) -> dict[str, Any]:
    count, length = cuts.shape
    seconds = time.perf_counter() - started
    return {"windows": count, "sequence_length": length, "tokens": count * length, "seconds": seconds}
