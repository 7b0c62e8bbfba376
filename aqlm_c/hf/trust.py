"""What a model's files may make transformers do, looked at before it reads them: no code is run, no kernel fetched, no
file that never ends is opened, no model of endless layers is built.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import one_line, shown
from ..files import MOST_BYTES, irregular
from ..units import binary_size

_MOST_OF_ONE = 512  # layers, experts: so many are not too many, however few tensors there are
_COUNT = re.compile(r"(?:^|[_.])(?:layers?|blocks?|experts?|depth|heads?|(?:block|expert|head)_count)$")
_TEXT = {".json": MOST_BYTES, ".jinja": 2**20, ".txt": 8 * MOST_BYTES, ".model": 8 * MOST_BYTES}  # bytes by suffix
_LARGE = {"tokenizer.json": 8 * MOST_BYTES, "vocab.json": 8 * MOST_BYTES}
_ASKS_FOR_CODE = "it needs code that comes with it (auto_map), which is never run: expected a model of transformers"


def check_directory(directory: Path) -> None:
    """Raise ValueError, naming the file, unless all that loading may read in a directory is regular and bounded."""
    for folder in (directory, directory / "additional_chat_templates"):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            kind = irregular(path)
            if kind == "a directory":
                continue
            if kind is not None:
                raise ValueError(f"{path}: got {kind}, expected a regular file")
            most = _LARGE.get(path.name) or _TEXT.get(path.suffix)
            if most is not None and path.exists() and path.stat().st_size > most:
                raise ValueError(
                    f"{path}: got {binary_size(path.stat().st_size)}, expected at most {binary_size(most)}"
                )


def check_config(fields: Mapping[str, Any], where: str | os.PathLike[str], n_tensors: int | None = None) -> bool:
    """Raise ValueError for fields of a config.json, that of `where`, that name a kernel repository, or more layers or
    experts than there are tensors. True if they ask for flash attention, which transformers may fetch.
    """
    flash = False
    for name, value in _named(fields):
        if "implementation" in name:
            texts = list(_texts(value))
            if repositories := [text for text in texts if "/" in text]:
                raise ValueError(
                    f"{name} in {where}: got {shown(repositories[0])}, a repository of code, which is never run: "
                    "expected 'eager' or 'sdpa'"
                )
            flash = flash or any("flash" in text or "|" in text for text in texts)
    if n_tensors is not None:
        check_counts(fields, where, n_tensors)
    return flash


def config_of(where: str | os.PathLike[str], **options: Any) -> Any:
    """The config of a model that asks for flash attention, asking for that of torch."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(where, **{**options, "trust_remote_code": False})
    config._attn_implementation = None
    return config


def check_counts(fields: Mapping[str, Any], where: str | os.PathLike[str], n_tensors: int) -> None:
    """Raise ValueError for a number of layers, experts or heads in `fields` that so few tensors cannot be."""
    limit = max(n_tensors, _MOST_OF_ONE)
    for name, value in _named(fields):
        if type(value) is int and value > limit and _COUNT.search(name):
            raise ValueError(
                f"{name} in {where}: got {shown(value)}, expected at most {limit}: it has {n_tensors} tensors"
            )


def reason(error: BaseException) -> str:
    """Why a model cannot be loaded, on one line, of whatever transformers raised."""
    return _ASKS_FOR_CODE if "trust_remote_code" in str(error) else one_line(error)[:300]


def _named(value: Any) -> Iterator[tuple[str, Any]]:
    """(name, value) of all fields of JSON objects in `value`, however deep."""
    stack = [value]
    while stack:
        value = stack.pop()
        if isinstance(value, Mapping):
            yield from ((str(name), inner) for name, inner in value.items())
            stack += value.values()
        elif isinstance(value, (list, tuple)):
            stack += value


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    else:
        yield from (text for _, inner in _named({"": value}) for text in ([inner] if isinstance(inner, str) else []))
        if isinstance(value, (list, tuple)):
            yield from (text for text in value if isinstance(text, str))
