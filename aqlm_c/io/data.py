"""Text and token readers: calibration samples and evaluation streams.

A source is a string: a file (.txt, .jsonl with a text, a conversation or an instruction a line (`chat`), .npy or
.safetensors of token ids), or the name of a data set for the `datasets` library, `name[,config][:split]` (split
"train" if left out), such as "Salesforce/wikitext,wikitext-2-raw-v1:test". Documents of one source are separated by a
blank line and tokenised as one text, as GPTQ (arXiv 2210.17323) and AQLM (arXiv 2401.06118) do, so that a window does
not depend on how the text was cut into documents; what a chat template ended is followed by the next one at once.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config import BOS, TuningOptions
from ..errors import int_between, is_text, one_line, wrong
from ..files import irregular
from ..model.positions import check_length
from .chat import EXPECTED, Document, document_of

log = logging.getLogger("aqlm_c")

# The default text: 465 kB of English documentation that every CPython carries.
BUNDLED = "pydoc_data.topics"
FILE_TYPES = (".txt", ".jsonl", ".npy", ".safetensors")

_MOST_LINE = 64 * 2**20  # bytes of a line of .jsonl
_PART = 2**16  # characters of a text that is tokenised in parts
_CHARS = 16  # of a token, at most on average
_SHUFFLE_BUFFER = 10_000  # documents of a streamed data set among which --shuffle draws the next one


def load_sequences(
    sources: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    tokenizer: Any,
    samples: int,
    sequence_length: int,
    shuffle: bool = False,
    seed: int = 0,
    bos: str = "auto",
) -> torch.Tensor:
    """Calibration sequences: int64 [samples, sequence_length] token ids.

    The samples are spread evenly over `sources`, one or several (none: the bundled text), the remainder going to the
    first ones: non-overlapping windows, in order from the start of each source, or with `shuffle` drawn without
    replacement from all of its windows by a generator seeded with `seed`. A two-dimensional array of token ids is cut
    row by row. With `bos` (`window_start`) every sequence begins with the tokenizer's BOS token; a warning says where
    some do and some do not. Raises ValueError naming the source if it cannot be read or is too short, or for a `bos`
    that the tokenizer does not have.
    """
    sources = source_names("sources", sources) or [BUNDLED]
    if samples < len(sources):
        raise ValueError(f"samples: got {samples}, expected at least one for each of the {len(sources)} data sources")
    if sequence_length < 2:
        raise ValueError(f"sequence_length: got {sequence_length}, expected at least 2 tokens")
    for name, value in (("samples", samples), ("sequence_length", sequence_length)):
        int_between(name, value, 1)
    share, rest = divmod(samples, len(sources))
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for index, source in enumerate(sources):
        wanted = share + (index < rest)
        start = window_start(tokenizer, bos, source)
        limit = None if shuffle and not _is_dataset(source) else wanted * sequence_length
        rows = _read(source, tokenizer, limit, seed if shuffle else None)
        windows = cut(rows, sequence_length, start)
        if len(windows) < wanted:
            raise ValueError(
                f"data: got {source!r}: {rows.numel()} tokens hold {len(windows)} sequences of {sequence_length}, "
                f"expected {wanted} ({wanted * sequence_length} tokens)"
            )
        order = torch.randperm(len(windows), generator=generator) if shuffle else torch.arange(wanted)
        parts.append(windows[order[:wanted]])
    sequences = torch.cat(parts)
    warn_of_starts("calibration sequences", sequences, tokenizer)
    return sequences


def window_start(tokenizer: Any, bos: str, source: str = "") -> int | None:
    """The token that every window of `source` begins with; None: windows are cut out of the stream as it is.

    bos: of `BOS`. "auto": the tokenizer's BOS token, if it begins texts with it; token ids in files stay as they are.
    Raises ValueError for another `bos`, and for "always" with a tokenizer that has no such token.
    """
    if bos not in BOS:
        raise wrong("bos", bos, f"one of {', '.join(BOS)}")
    token = getattr(tokenizer, "bos_token_id", None)
    if bos == "always":
        if token is None:
            raise wrong("bos", bos, "'auto' or 'never', since the tokenizer has no BOS token")
        return token
    return token if bos == "auto" and not _is_token_file(source) and begins_texts(tokenizer) else None


def begins_texts(tokenizer: Any) -> bool:
    """Whether the tokenizer begins texts with its BOS token by itself."""
    token = getattr(tokenizer, "bos_token_id", None)
    return token is not None and list(tokenizer("a", verbose=False)["input_ids"][:1]) == [token]


def cut(rows: torch.Tensor, sequence_length: int, start: int | None = None) -> torch.Tensor:
    """Windows [n, sequence_length] of rows [m, k] of token ids, one after another; with `start` each is that token and
    the next sequence_length - 1 of the row, whose own first token is left out if it is `start` too.
    """
    if start is None:
        usable = rows.shape[1] // sequence_length
        return rows[:, : usable * sequence_length].reshape(-1, sequence_length)
    if rows.shape[1] and (rows[:, 0] == start).all():
        rows = rows[:, 1:]
    windows = cut(rows, sequence_length - 1)
    return torch.cat([windows.new_full((len(windows), 1), start), windows], dim=1)


def common_start(sequences: torch.Tensor, tokenizer: Any) -> str | None:
    """The BOS token that all sequences [n, length] begin with, as text, for reports; None if they do not."""
    token = getattr(tokenizer, "bos_token_id", None)
    return str(tokenizer.bos_token) if token is not None and bool((sequences[:, 0] == token).all()) else None


def warn_of_starts(what: str, sequences: torch.Tensor, tokenizer: Any) -> None:
    """A warning if not all begin with the token that the tokenizer begins texts with."""
    if begins_texts(tokenizer):
        begun = int((sequences[:, 0] == tokenizer.bos_token_id).sum())
        if begun < len(sequences):
            log.warning(
                "%d of %d %s begin with %s, as texts of this tokenizer do; bos=always: all",
                *(begun, len(sequences), what, tokenizer.bos_token),
            )


def source_names(name: str, sources: Any) -> list[str]:
    """One source or several as texts, for the argument `name`; ValueError for what is neither text nor path."""
    several = [sources] if isinstance(sources, (str, os.PathLike)) else sources
    if not (isinstance(several, (list, tuple)) and all(isinstance(each, (str, os.PathLike)) for each in several)):
        got = type(sources).__name__ if hasattr(sources, "shape") else sources  # not all numbers of an array
        raise wrong(name, got, "a source or a list of them, each a text or a path")
    return list(map(os.fspath, several))


def token_stream(
    source: str | os.PathLike[str], tokenizer: Any, limit: int | None = None, whole: bool = True
) -> torch.Tensor:
    """The source as one stream: int64 [n] token ids, the first `limit` of them if given. whole: those of the text as a
    whole; else of parts of it, tokenised side by side, which differ at most where two parts meet.

    Raises ValueError naming the source if it cannot be read.
    """
    (source,) = source_names("source", [source])
    if whole or _is_token_file(source):
        return _read(source, tokenizer, limit).reshape(-1)[:limit]
    check_source(source)
    return _read_parts(source, tokenizer, limit)


def check_source(source: str) -> None:
    """Raise ValueError if `source` is a file that is missing or of an unknown type; reads nothing."""
    path = Path(source)
    if not source or "\0" in source or not is_text(source):
        raise wrong("data", source, f"a file of type {' '.join(FILE_TYPES)}, or the name of a data set")
    kind = irregular(path)
    if kind == "a directory" and path.suffix in FILE_TYPES:
        raise ValueError(f"data: got {source!r}: is a directory, expected a {path.suffix} file")
    if kind is not None and kind != "a directory":
        raise ValueError(f"data: got {source!r}: is {kind}, expected a regular file of type {' '.join(FILE_TYPES)}")
    if path.is_file() and path.suffix not in FILE_TYPES:
        raise ValueError(f"data: got {source!r}, expected a file of type {' '.join(FILE_TYPES)}")
    if _is_dataset(source):  # whose name may be that of a local directory
        path = Path(_dataset_name(source)[0])
    is_path = path.suffix in FILE_TYPES or source.startswith((".", "/", "~")) or source.count("/") > 1
    if is_path and not path.exists():
        raise ValueError(f"data: got {source!r}: no such file")


def as_token_ids(name: str, given: Any, expected: str) -> torch.Tensor:
    """A tensor of the argument `name`; ValueError for what is none, and for floats."""
    try:
        tensor = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name}: got {type(given).__name__}, expected {expected}") from None
    if tensor.dtype == torch.bool or tensor.is_floating_point() or tensor.is_complex():
        raise ValueError(f"{name}: got {tensor.dtype} {list(tensor.shape)}, expected {expected}")
    return tensor


def check_token_ids(name: str, input_ids: torch.Tensor, model: Any) -> None:
    """Raise ValueError, naming the argument `name`, unless `model` has an embedding for every id of a tensor."""
    vocabulary = model.get_input_embeddings().num_embeddings
    low, high = (int(token) for token in input_ids.aminmax())
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"{name}: token id {low if low < 0 else high}, expected 0..{vocabulary - 1}: "
            "were they tokenised for another model?"
        )


def check_sequences(model: Any, sequences: torch.Tensor, tuning: TuningOptions) -> torch.Tensor:
    """`sequences` as int64 [n, length]; ValueError for what calibration and `tuning` cannot take."""
    sequences = as_token_ids("sequences", sequences, "token ids [n, length], as load_sequences gives them")
    if sequences.ndim != 2 or not sequences.numel():
        raise ValueError(
            f"sequences: got {sequences.dtype} {list(sequences.shape)}, expected token ids [n, length], at least one"
        )
    if tuning.finetune_epochs and len(sequences) < 2:
        raise ValueError("sequences: got 1, expected at least 2: fine-tuning trains on some and validates on others")
    check_token_ids("sequences", sequences, model)
    check_length("sequences", sequences.shape[1], model)
    return sequences.long()


def sha256(source: str) -> str | None:
    """Hex digest of a file's bytes or of the bundled text; None for a data set, known by its tokens only."""
    if source == BUNDLED:
        return hashlib.sha256("\n\n".join(_bundled()).encode()).hexdigest()
    if _is_dataset(source):
        return None
    digest = hashlib.sha256()
    with open(source, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def provenance(sources: Sequence[str], input_ids: torch.Tensor, start: str | None = None) -> dict[str, Any]:
    """What a report keeps of the data: SHA-256 of each source and of the token ids (int64, little-endian), and the
    token that all sequences begin with, if one was put there.
    """
    return {
        **({} if start is None else {"bos": start}),
        "sources": {source: sha256(source) for source in (list(sources) or [BUNDLED])},
        "input_ids": tokens_digest(input_ids),
    }


def tokens_digest(input_ids: torch.Tensor) -> str:
    """SHA-256, in hex, of token ids as int64, little-endian."""
    ids = input_ids.cpu().numpy().astype("<i8", copy=False)
    return hashlib.sha256(np.ascontiguousarray(ids).data).hexdigest()


def _is_token_file(source: str) -> bool:
    return Path(source).suffix in (".npy", ".safetensors")


def _is_dataset(source: str) -> bool:
    return source != BUNDLED and Path(source).suffix not in FILE_TYPES


def _dataset_name(source: str) -> tuple[str, str, str]:
    """(name, config, split) of "name[,config][:split]", empty where left out."""
    name, _, split = source.partition(":")
    name, _, config = name.partition(",")
    return name, config, split


def _read(source: str, tokenizer: Any, limit: int | None, shuffle_seed: int | None = None) -> torch.Tensor:
    """Token ids int64 [rows, n]; text is one row, of which `limit` tokens (or a few more) are enough."""
    check_source(source)
    if _is_token_file(source):
        return _token_ids(source, tokenizer)
    # No more text is tokenised than the limit asks for. Twice the limit must come out of a text that was
    # cut, because tokens near the cut may differ from those of the whole text.
    per_token = _CHARS
    while True:
        max_chars = None if limit is None else per_token * limit
        text, cut = _text(_documents(source, tokenizer, shuffle_seed, max_chars), max_chars)
        ids = tokenizer(text, verbose=False)["input_ids"]
        if limit is None or not cut or len(ids) >= 2 * limit:
            return torch.tensor(ids[:limit] if cut else ids, dtype=torch.int64)[None]
        per_token *= 4


def _read_parts(source: str, tokenizer: Any, limit: int | None) -> torch.Tensor:
    """Token ids int64 [n] of parts of the text; no more of these are tokenised than the limit asks for."""
    max_chars = None if limit is None else _CHARS * limit
    text, _ = _text(_documents(source, tokenizer, None, max_chars), max_chars)
    found, size, parts = list[torch.Tensor](), 0, _parts(text)
    while limit is None or size < limit:
        some = list(itertools.islice(parts, 256 if limit is None else 1 + (limit - size) * 4 // _PART))
        if not some:
            break
        for ids in tokenizer(some, verbose=False, add_special_tokens=False)["input_ids"]:
            found.append(torch.tensor(ids, dtype=torch.int64))
            size += len(ids)
    return torch.cat(found)[:limit] if found else torch.zeros(0, dtype=torch.int64)


def _parts(text: str) -> Iterator[str]:
    """The text in parts of `_PART` characters at most, cut before a blank line, a line or a word if there is one."""
    begin = 0
    while begin < len(text):
        end = begin + _PART
        if end < len(text):
            cuts = (text.rfind(mark, begin + 1, end) for mark in ("\n\n", "\n", " "))
            end = next((cut for cut in cuts if cut > begin), end)
        yield text[begin:end]
        begin = end


def _text(documents: Iterable[Document], max_chars: int | None) -> tuple[str, bool]:
    """Documents with blank lines between them, cut after max_chars characters; and whether anything was cut."""
    parts, size, between = [], 0, ""
    for document in documents:
        parts += [between, document.text]
        size += len(document.text) + 2
        if max_chars is not None and size > max_chars:
            return "".join(parts)[:max_chars], True
        between = "" if document.ended else "\n\n"
    return "".join(parts), False


def _documents(source: str, tokenizer: Any, shuffle_seed: int | None, max_chars: int | None) -> Iterator[Document]:
    if source == BUNDLED:
        return map(Document, _bundled())
    suffix = Path(source).suffix
    if suffix == ".txt":
        return map(Document, _text_file(source, max_chars))
    return _jsonl(source, tokenizer) if suffix == ".jsonl" else map(Document, _dataset(source, shuffle_seed))


def _bundled() -> list[str]:
    from pydoc_data import topics

    return [topics.topics[name] for name in sorted(topics.topics)]


def _text_file(path: str, max_chars: int | None) -> Iterator[str]:
    """The text of a file, or as much of it as has more than `max_chars` characters."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(-1 if max_chars is None else max_chars + 2)
    except UnicodeDecodeError as error:
        where = f" at byte {error.start}" if max_chars is None else ""  # else of what was read last
        raise ValueError(f"data: got {path!r}: not UTF-8 text ({error.reason}{where})") from error
    yield text.removeprefix("\ufeff")  # a byte order mark, which is no text


def _jsonl(path: str, tokenizer: Any) -> Iterator[Document]:
    first = True
    with open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(_MOST_LINE), b""), 1):
            if not line.strip():
                continue
            if len(line) == _MOST_LINE:
                raise ValueError(f"data: got {path!r}: line {number}: longer than {_MOST_LINE >> 20} MiB")
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError):
                raise ValueError(f"data: got {path!r}: line {number}: expected {EXPECTED}") from None
            try:
                document = document_of(fields, tokenizer)
            except ValueError as error:
                raise ValueError(f"data: got {path!r}: line {number}: {error}") from error
            if first and document.ended and begins_texts(tokenizer):  # which would put a second BOS before this one
                document = document._replace(text=document.text.removeprefix(tokenizer.bos_token))
            first = False
            yield document


def _dataset(source: str, shuffle_seed: int | None) -> Iterator[str]:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"data: got {source!r}: no such file, and a data set needs `datasets`: pip install 'aqlm-c[hf]'"
        ) from error
    name, config, split = _dataset_name(source)
    known = inspect.signature(datasets.load_dataset).parameters  # datasets 4 has no scripts any more
    trust = {"trust_remote_code": False} if "trust_remote_code" in known else {}
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True, **trust)
        if shuffle_seed is not None:
            rows = rows.shuffle(seed=shuffle_seed, buffer_size=_SHUFFLE_BUFFER)
        first = next(iter(rows))
    except Exception as error:  # of many types: hub, network, script, split, empty
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"data: got {source!r}: no such file, and no data set could be read: {reason}") from error
    if not isinstance(first.get("text"), str):
        raise ValueError(f'data: got {source!r}: columns {sorted(first)}, expected a string column "text"')
    return _texts(source, rows)


def _texts(source: str, rows: Iterable[Any]) -> Iterator[str]:
    """The texts of a data set, whose later rows may fail as well as its first one."""
    try:
        for row in rows:
            if not isinstance(row.get("text"), str):
                raise wrong("text", row.get("text"), "a string in every row")
            yield row["text"]
    except Exception as error:  # of many types, as above
        raise ValueError(f"data: got {source!r}: a row cannot be read: {one_line(error)[:300]}") from error


def _token_ids(path: str, tokenizer: Any) -> torch.Tensor:
    try:
        if path.endswith(".npy"):
            ids = np.load(path, mmap_mode="r", allow_pickle=False)  # no memory for more than there is in the file
            if not isinstance(ids, np.ndarray):
                raise TypeError("an archive of arrays, expected one array")
        else:
            from safetensors.numpy import load_file

            ids = load_file(path).get("input_ids")
    except Exception as error:  # ValueError, EOFError, OSError, SafetensorError: all mean a damaged file
        raise ValueError(f"data: got {path!r}: not a readable {Path(path).suffix} file: {one_line(error)}") from error
    if ids is None:
        raise ValueError(f'data: got {path!r}, expected a tensor named "input_ids"')
    if ids.ndim not in (1, 2) or ids.dtype.kind not in "iu":
        raise ValueError(
            f"data: got {path!r}: {ids.dtype} {list(ids.shape)}, expected integer token ids [n] or [rows, n]"
        )
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < len(tokenizer):
        raise ValueError(f"data: got {path!r}: token ids {ids.min()}..{ids.max()}, expected 0..{len(tokenizer) - 1}")
    return torch.from_numpy(np.atleast_2d(ids).astype(np.int64))
