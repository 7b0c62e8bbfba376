"""The published AQLM layout in safetensors: the only module that knows tensor names on disk.

A quantized linear `P` is `P.codes` int8 (B <= 8) or int16 [out/og, in/g, K], holding the unsigned code
minus 2^B where it is >= 2^(B-1); `P.codebooks` [K, 2^B, og, g] and `P.scales` [out/og, 1, 1, 1] of a 16-bit
float; `P.bias` [out] if any. K, B, g and og stand in config.json under `quantization_config`.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import one_line, shown
from ..files import (
    clear_up,
    existing_parent,
    irregular,
    named_directory,
    place,
    read_json,
    set_aside,
    temporary_beside,
    try_place,
)
from ..format import WEIGHT, Format
from ..nn.linear import QuantizedLayer, check_code_range
from ..units import megabytes
from .source import is_unread, keep_files, source_directory

log = logging.getLogger("aqlm_c")

_SHARD = "model-{:05}-of-{:05}.safetensors"
_INDEX = "*.safetensors.index.json"
# What a model directory holds, of ours or others: with --overwrite nothing else is removed.
_MODEL_FILES = re.compile(
    r"\.gitattributes|README\.md|(LICEN[SC]E|NOTICE|USE_POLICY)[\w.-]*|run\.yaml|report\.json"
    r"|(\w+_config|config|tokenizer|special_tokens_map|added_tokens|vocab|chat_template)\.json"
    r"|[\w.-]+\.safetensors(\.index\.json)?|chat_template\.jinja|additional_chat_templates"
    r"|(vocab|merges)\.txt|[\w-]+\.(model|tiktoken)"
)
_FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def tensor_name(layer: str, part: str) -> str:
    """The name on disk of a tensor (`part`: of `WEIGHT`, or "bias") of the quantized layer called `layer`."""
    return f"{layer}.{part}"


def quantized_names(names: Iterable[str]) -> list[str]:
    """Names of the quantized layers among names of tensors."""
    return [name.removesuffix(".codes") for name in names if name.endswith(".codes")]


def is_quantized_part(name: str) -> bool:
    """Whether a tensor has the name of a quantized layer's codes, codebooks or scales."""
    return name.rpartition(".")[2] in WEIGHT


class StoredTensor(NamedTuple):
    """A tensor as the header of a safetensors file describes it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def quantized_linears(model: torch.nn.Module) -> Iterator[tuple[str, QuantizedLayer]]:
    """(name, module) of every quantized linear and embedding of `model`, in order."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, QuantizedLayer))


def unquantized_parameters(model: torch.nn.Module) -> list[str]:
    """Names of the parameters outside quantized linears: config.json's `linear_weights_not_to_quantize`.

    Tied parameters appear under each of their names, so that a tied output embedding is never replaced.
    """
    prefixes = tuple(f"{name}." for name, _ in quantized_linears(model))
    return [name for name, _ in model.named_parameters(remove_duplicate=False) if not name.startswith(prefixes)]


def read_headers(files: Iterable[str | os.PathLike[str]]) -> dict[str, StoredTensor]:
    """Names, dtypes and shapes of the tensors in safetensors files, without their data.

    Raises ValueError naming the file that is not safetensors, is truncated or has a damaged header, or the
    tensor that two files have or that is not where an index of these files says.
    """
    paths = list(map(Path, files))
    tensors: dict[str, StoredTensor] = {}
    for file in paths:
        if file.suffix != ".safetensors":
            raise ValueError(f"{file}: expected a .safetensors file")
        if kind := irregular(file):
            raise ValueError(f"{file}: got {kind}, expected a regular file")
        try:
            with safe_open(file, framework="pt") as stored:
                for name in stored.keys():  # noqa: SIM118  (a safe_open cannot be iterated)
                    if name in tensors:
                        raise ValueError(f"{name} in {file}: unexpected, {tensors[name].file.name} has it too")
                    tensor = stored.get_slice(name)
                    tensors[name] = StoredTensor(file, tensor.get_dtype(), tuple(tensor.get_shape()))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: expected a complete safetensors file, found: {error}") from None
    if [file.name for file in paths] != ["model.safetensors"]:
        for index in {path for folder in {file.parent for file in paths} for path in folder.glob(_INDEX)}:
            _check_index(index, paths, tensors)
    return tensors


def read_directory(directory: str | os.PathLike[str]) -> dict[str, StoredTensor]:
    """`read_headers` of the safetensors files that a model in `directory` is loaded from.

    These are model.safetensors, else the shards that an index names, else all. Raises ValueError, too, naming a
    shard that is not there.
    """
    directory = Path(directory)
    if (directory / "model.safetensors").exists():
        return read_headers([directory / "model.safetensors"])
    files = set()
    for index in directory.glob(_INDEX):
        files |= set(_read_index(index).values())
        if missing := sorted(file for file in files if not file.exists()):
            raise ValueError(f"{missing[0]}: missing, but {index.name} names it")
    return read_headers(sorted(files or directory.glob("*.safetensors")))


def _check_index(index: Path, files: Iterable[Path], tensors: Mapping[str, StoredTensor]) -> None:
    """Raise ValueError naming a tensor that is not where `index` says, unless that is of other files."""
    places = _read_index(index)
    if set(places.values()) != set(files):
        return
    for name in sorted(places.keys() | tensors.keys()):
        found = tensors[name].file if name in tensors else None
        if places.get(name) != found:
            place = places[name].name if name in places else "no file"
            raise ValueError(f"{name} in {index}: {place}, expected {found.name if found else 'no such tensor'}")


def _read_index(index: Path) -> dict[str, Path]:
    """The file of each tensor, as an index has it."""
    try:
        shards = {str(name): Path(shard) for name, shard in read_json(index)["weight_map"].items()}
    except (KeyError, AttributeError, TypeError):
        raise ValueError(f"{index}: expected a JSON object with 'weight_map'") from None
    for shard in set(shards.values()):
        if shard.is_absolute() or ".." in shard.parts or not shard.name:
            raise ValueError(f"{index}: got {shown(str(shard))}, expected names of files in this directory")
    return {name: index.parent / shard for name, shard in shards.items()}


def check_stored_layer(
    name: str, tensors: Mapping[str, StoredTensor], format: Format, layer: torch.nn.Linear | torch.nn.Embedding
) -> torch.dtype:
    """Check the stored tensors of the quantized `layer` called `name`; returns the dtype of its codebooks.

    Raises ValueError naming the tensor, its file, and the dtype or shape that was expected.
    """
    out_features, in_features = layer.weight.shape
    format.check_layer(name, out_features, in_features)
    dtypes_of = {"codes": ("I8" if format.code_itemsize == 1 else "I16",)}
    shapes = format.shapes(out_features, in_features)
    if getattr(layer, "bias", None) is not None:
        shapes["bias"] = (out_features,)
    for part, shape in shapes.items():
        dtypes = dtypes_of.get(part, tuple(_FLOATS))
        tensor = tensors.get(tensor_name(name, part))
        if tensor is None:
            raise ValueError(f"{name}.{part}: missing from the checkpoint")
        if tensor.dtype not in dtypes or tensor.shape != shape:
            raise ValueError(
                f"{name}.{part} in {tensor.file}: got {tensor.dtype} {list(tensor.shape)}, "
                f"expected {' or '.join(dtypes)} {list(shape)} for {format.scheme}"
            )
    books, scales = (tensors[tensor_name(name, part)] for part in ("codebooks", "scales"))
    if books.dtype != scales.dtype:
        raise ValueError(
            f"{name}.scales in {scales.file}: got {scales.dtype}, expected {books.dtype} as of its codebooks"
        )
    return _FLOATS[books.dtype]


def check_values(
    name: str, linear: QuantizedLayer, stored: Mapping[str, tuple[str, StoredTensor]] | None = None
) -> None:
    """Raise ValueError naming the tensor: codes beyond the codebook, codebooks or scales not finite.

    `stored`, by names in the model: name and place of a tensor in its file, where those on the meta device (of an
    offloaded layer) are read; without, they are left out.
    """
    for part in WEIGHT:
        value, label = getattr(linear, part), tensor_name(name, part)
        if part == "codes" and linear.nbits_per_codebook in (8, 16):  # they fill their dtype
            continue
        if value.is_meta:
            if not stored or label not in stored:
                continue
            key, tensor = stored[label]
            label = f"{key} in {tensor.file}"
            with safe_open(tensor.file, framework="pt") as file:
                value = file.get_tensor(key)
        if part == "codes":
            check_code_range(value, linear.nbits_per_codebook, label)
        elif not torch.isfinite(value).all():
            raise ValueError(f"{label}: got NaN or Inf, expected finite values")


def stored_linears(tensors: Mapping[str, StoredTensor]) -> dict[str, dict[str, StoredTensor]]:
    """The quantized linears among stored tensors: for each name its tensors by part ("codes", "scales", ...)."""
    linears: dict[str, dict[str, StoredTensor]] = {name: {} for name in quantized_names(tensors)}
    for name, tensor in tensors.items():
        linear, _, part = name.rpartition(".")
        if linear in linears:
            linears[linear][part] = tensor
    return linears


def check_stored_values(tensors: Mapping[str, StoredTensor]) -> None:
    """Read every tensor, one at a time, and raise as `check_values` does; dense ones must be finite too.

    How many bits codes have is what the shape of their codebooks says, which `check_stored_layer` has checked.
    """
    for name, tensor in tensors.items():
        with safe_open(tensor.file, framework="pt") as stored:
            value = stored.get_tensor(name)
        books = tensors.get(f"{name.removesuffix('.codes')}.codebooks")
        if books and name.endswith(".codes"):
            check_code_range(value, books.shape[1].bit_length() - 1, f"{name} in {tensor.file}")
        elif tensor.dtype in _FLOATS and not torch.isfinite(value).all():
            raise ValueError(f"{name} in {tensor.file}: got NaN or Inf, expected finite values")


def check_dense_dtype(name: str, tensor: StoredTensor) -> None:
    """Raise ValueError unless a dense parameter is stored as a float that models load."""
    if tensor.dtype not in _FLOATS:
        raise ValueError(f"{name} in {tensor.file}: got {tensor.dtype}, expected {' or '.join(_FLOATS)}")


def check_output(
    out_dir: str | os.PathLike[str],
    overwrite: bool = False,
    needed: Mapping[str, str | os.PathLike[str]] | None = None,
) -> None:
    """Raise unless `save_quantized` may write `out_dir`: call it before the work starts.

    FileExistsError if it exists; even with `overwrite` only an empty directory is replaced, or one with a config.json
    that holds nothing but files of a model: neither foreign ones nor a path of `needed`, by what they are called (the
    model that is read, its data). PermissionError if the directory it would be made in is not one, or may not be
    written; OSError if a directory cannot appear there; ValueError for the root of a file system.
    """
    out = named_directory("OUT", out_dir)
    clear_up(out)
    _check_replaceable(out, overwrite, needed or {})
    parent = existing_parent(out)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(
            f"OUT: got {shown(str(out))}, expected {str(parent)!r} to be a directory that can be written"
        )
    try_place("OUT", out)


def _check_replaceable(out: Path, overwrite: bool, needed: Mapping[str, str | os.PathLike[str]]) -> None:
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise FileExistsError(f"OUT: got {shown(str(out))}, which exists, expected a new path, or overwrite")
    if not out.is_dir() or out.is_symlink() or (any(out.iterdir()) and not (out / "config.json").is_file()):
        raise FileExistsError(f"OUT: got {shown(str(out))}, expected a model directory (with config.json) to overwrite")
    if inside := next(_not_replaced(out, needed), None):
        raise FileExistsError(
            f"OUT: got {shown(str(out))}, which holds {inside}: expected a directory with files of a model alone "
            "to overwrite, or a new path"
        )


def _not_replaced(out: Path, needed: Mapping[str, str | os.PathLike[str]]) -> Iterator[str]:
    """What in the directory `out` must not be removed."""
    for name, path in {**needed, "the current directory": os.curdir}.items():
        if os.path.exists(path) and Path(path).resolve().is_relative_to(out.resolve()):
            yield name if path == os.curdir else f"{name} at {shown(str(path))}"
    yield from (f"{shown(path)}, no file of a model" for path in foreign_files(out))


def foreign_files(directory: Path) -> Iterator[str]:
    """Names of what in a model directory is no file of a model."""
    for folder in (directory, directory / "additional_chat_templates"):
        for path in folder.iterdir() if folder.is_dir() else ():
            known = _MODEL_FILES.fullmatch(path.name) and path.is_dir() == (path.name == "additional_chat_templates")
            if not known and not (folder != directory and path.suffix == ".jinja"):
                yield path.name


def save_quantized(
    model: Any,
    tokenizer: Any,
    out_dir: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    extra_files: Callable[[Path], Mapping[str, str]] | None = None,
) -> None:
    """Write a quantized transformers model and its tokenizer as one directory.

    Everything is written to a temporary directory beside `out_dir` (or beside the first of its parents that
    is missing) that takes its name at the end, so `out_dir` is either absent, the old one, or complete. From the
    directory that the model was loaded from it gets the files beside the weights too (`io.source`), and the tensors
    that the model's class does not read.
    `tokenizer` may be None. `extra_files` is called with that directory when the model lies in it and gives
    names and texts of files to add. Raises what `check_output` does; ValueError if the model has no quantized
    linear; OSError if a file cannot be written. A model that lies on the disk is never removed: if what comes after it
    fails (the tokenizer, the new name), it is kept beside `out_dir`, and the error says where.
    """
    check_output(out_dir, overwrite)
    if next(quantized_linears(model), None) is None:
        raise ValueError("model: got no quantized layer, expected a model of quantize_model")
    write_quantized(model, tokenizer, out_dir, overwrite=overwrite, extra_files=extra_files)


def write_quantized(
    model: Any,
    tokenizer: Any,
    out_dir: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    extra_files: Callable[[Path], Mapping[str, str]] | None = None,
) -> None:
    """`save_quantized` after the work: where `out_dir` has meanwhile become no place for it, the model is kept too."""
    out = named_directory("OUT", out_dir)
    new = temporary_beside(out, "new", os.getpid())
    written = False
    try:
        new.mkdir()
        model.save_pretrained(new)
        written = True
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        _keep_source(model, new)
        for name, text in (extra_files(new) if extra_files else {}).items():
            (new / name).write_text(text, encoding="utf-8")
        for file in filter(Path.is_file, new.rglob("*")):  # safetensors makes its files private
            file.chmod((new / "config.json").stat().st_mode)
        _check_replaceable(out, overwrite, {})  # it may have appeared or changed
        place(new, out)
    except BaseException as error:
        if written:
            _keep(new, out, error)
        shutil.rmtree(new, ignore_errors=True)
        if isinstance(error, SafetensorError):  # a full disk, for one
            raise OSError(f"OUT: got {str(out)!r}, which cannot be written: {error}") from None
        raise


def _keep(new: Path, out: Path, error: BaseException) -> None:
    """Keep the directory of a model that is written, and raise `error` with its path."""
    kept = set_aside(new, out)
    if not isinstance(error, Exception):  # Ctrl-C: the error has its own line
        log.warning("OUT: the quantized model is kept in %s", kept)
        raise error
    kind = ValueError if isinstance(error, ValueError) else OSError
    text = f"OUT: got {shown(str(out))}: {one_line(error)}; the quantized model is kept in {str(kept)!r}"
    raise kind(text) from error


def check_tokenizer(tokenizer: Any, out_dir: str | os.PathLike[str]) -> None:
    """Raise OSError unless the tokenizer can be saved where `save_quantized` will do it: call it before the work."""
    new = temporary_beside(named_directory("OUT", out_dir), "new", os.getpid())
    try:
        new.mkdir()
        tokenizer.save_pretrained(new)
    except Exception as error:  # tokenizers raises Exception itself
        raise OSError(f"OUT: got {shown(str(out_dir))}: the tokenizer cannot be saved: {one_line(error)}") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def disk_sizes(directory: str | os.PathLike[str], embeddings: Iterable[str]) -> tuple[int, int]:
    """(bytes of all safetensors files in `directory`, bytes of the tensors named in `embeddings`)."""
    tensors = read_directory(directory)
    total = sum(file.stat().st_size for file in {tensor.file for tensor in tensors.values()})
    return total, sum(n_bytes(tensors[name]) for name in set(embeddings) & set(tensors))


def n_bytes(tensor: StoredTensor) -> int:
    """Bytes of a tensor's values."""
    bits = int("".join(filter(str.isdigit, tensor.dtype.split("_")[0])) or 8)  # F16 -> 16, F8_E4M3 -> 8, BOOL -> 8
    return bits // 8 * math.prod(tensor.shape)


def stored_bytes(tensors: Mapping[str, tuple[tuple[int, ...], int]], total: int) -> int:
    """Bytes that tensors, name -> (shape, bytes of an element), take in safetensors files of `total` bytes, at most:
    their values and what the header says of them.
    """
    text = '"%s":{"dtype":"BF16","shape":%s,"data_offsets":[%d,%d]},'
    return sum(
        itemsize * math.prod(shape) + len(text % (name, str(list(shape)).replace(" ", ""), total, total))
        for name, (shape, itemsize) in tensors.items()
    )


def quantized_bytes(layer: str, format: Format, shape: tuple[int, int], total: int) -> int:
    """`stored_bytes` of the quantized layer of this name and shape [out, in]."""
    sizes = {"codes": format.code_itemsize, "codebooks": 2, "scales": 2}
    shapes = format.shapes(*shape)
    return stored_bytes({tensor_name(layer, part): (shapes[part], sizes[part]) for part in WEIGHT}, total)


def unread_text(model: Any, directory: str | os.PathLike[str]) -> str:
    """What of a model's directory its class does not read, as a sentence for the report; "" if it reads all."""
    unread = is_unread(model)
    sizes = {name: n_bytes(tensor) for name, tensor in read_directory(directory).items() if unread(name)}
    if not sizes:
        return ""
    return (
        f"{len(sizes)} tensors of the original that the model's class does not read, such as {min(sizes)}, are kept as "
        f"they are ({megabytes(sum(sizes.values()))})."
    )


def _keep_source(model: Any, directory: Path) -> None:
    """Add to `directory`, where `model` was saved, what lies beside the weights it was loaded from."""
    source = source_directory(model)
    if source is None:
        return
    keep_files(source, directory)
    unread = is_unread(model)
    try:
        saved = read_directory(directory)
        tensors = {
            name: tensor for name, tensor in read_directory(source).items() if unread(name) and name not in saved
        }
    except (OSError, ValueError) as error:  # changed since it was loaded
        log.warning("what the model's class does not read is not kept: %s", error)
        return
    if tensors:
        _add_shard(directory, tensors)
        log.warning("%s", unread_text(model, directory))


def _add_shard(directory: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Store `tensors`, as they lie in their files, as one more shard of the model in `directory`."""
    index = directory / "model.safetensors.index.json"
    places = {name: tensor.file.name for name, tensor in read_directory(directory).items()}
    shards = sorted(set(places.values()))
    last = _SHARD.format(len(shards) + 1, len(shards) + 1)
    renamed = {shard: _SHARD.format(number, len(shards) + 1) for number, shard in enumerate(shards, 1)}
    values = {}
    for name, tensor in tensors.items():
        with safe_open(tensor.file, framework="pt") as file:
            values[name] = file.get_tensor(name)
    save_file(values, directory / last, metadata={"format": "pt"})
    for shard, name in renamed.items():
        os.rename(directory / shard, directory / name)
    weight_map = {name: renamed[shard] for name, shard in places.items()} | dict.fromkeys(tensors, last)
    index.unlink(missing_ok=True)
    total = sum(map(n_bytes, read_headers(directory / name for name in (*renamed.values(), last)).values()))
    fields = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    index.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
