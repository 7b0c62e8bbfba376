"""What a saved model keeps of the directory it came from: the files beside the weights, and the tensors that its class
does not read, such as heads that predict several tokens. Code and the weights themselves are not among them.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub

from ..errors import one_line

log = logging.getLogger("aqlm_c")

KEPT = re.compile(  # names of files
    r"(LICEN[SC]E|NOTICE|USE_POLICY)(\.\w+)?|(?!adapter|\w*quant)\w+_config\.json|chat_template\.(json|jinja)"
    r"|(tokenizer|special_tokens_map|added_tokens|vocab)\.json|(vocab|merges)\.txt|[\w-]+\.(model|tiktoken)"
)
BESIDE = ["*_config.json", "chat_template.*", "additional_chat_templates/*.jinja", "LICEN*", "NOTICE*", "USE_POLICY*"]
_TOKENIZER = re.compile(r"(tokenizer\w*|special_tokens_map|added_tokens|vocab)\.json|(vocab|merges)\.txt")
_TEMPLATES = "additional_chat_templates"


def source_directory(model: Any) -> Path | None:
    """The directory a transformers model was loaded from, in the cache of the hub too; None if there is none now."""
    config = model.config
    name = str(getattr(config, "name_or_path", "") or "")
    if not name:
        return None
    directory = Path(name)
    if not directory.is_dir():
        try:
            found = huggingface_hub.try_to_load_from_cache(
                name, "config.json", revision=getattr(config, "_commit_hash", None)
            )
        except ValueError:  # no name of the hub
            return None
        if not isinstance(found, str):
            return None
        directory = Path(found).parent
    try:
        fields = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return directory if isinstance(fields, dict) and fields.get("model_type") == config.model_type else None


def weight_files(model: Any) -> list[Path]:
    """The safetensors files of the directory that a model was loaded from; none if there is none now."""
    directory = source_directory(model)
    return [] if directory is None else sorted(directory.glob("*.safetensors"))


def keep_files(source: Path, directory: Path) -> None:
    """Copy to `directory`, a saved model, the files beside the weights that `source` has and it lacks."""
    try:
        paths = list(_files(source, (directory / "tokenizer_config.json").is_file()))
    except OSError as error:  # it went away
        log.warning("%s: its files are not kept: %s", source, one_line(error))
        return
    for path in paths:
        to = directory / path.relative_to(source)
        if to.exists():
            continue
        try:
            content = path.read_bytes()
        except OSError as error:
            log.warning("%s is not kept: %s", path, one_line(error))
            continue
        to.parent.mkdir(exist_ok=True)
        to.write_bytes(content)


def is_unread(model: Any) -> Callable[[str], bool]:
    """Whether a tensor of a model's source is one that its class is told to ignore, and belongs to no module it has.

    What a module it has computes for itself, such as a causal mask, is not among them.
    """
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None)
    patterns = list(patterns) if isinstance(patterns, (list, tuple, set)) else []
    ignored = re.compile("|".join(f"(?:{pattern})" for pattern in patterns) or r"(?!)").search
    modules = {name for name, _ in model.named_modules()}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."

    def unread(name: str) -> bool:
        parent = name.rpartition(".")[0]
        return ignored(name) is not None and not modules & {parent, prefix + parent, parent.removeprefix(prefix)}

    return unread


def _files(source: Path, has_tokenizer: bool) -> Iterator[Path]:
    """Regular files of `source` to keep; of a tokenizer none but its model, where one was saved."""
    for path in source.iterdir():
        known = KEPT.fullmatch(path.name) and not (has_tokenizer and _TOKENIZER.fullmatch(path.name))
        if known and _is_inside(path, source):
            yield path
    if (source / _TEMPLATES).is_dir():
        yield from (path for path in (source / _TEMPLATES).glob("*.jinja") if _is_inside(path, source))


def _is_inside(path: Path, source: Path) -> bool:
    """Whether it is a regular file in the directory, where links lead too: in a cache of the hub into its blobs."""
    real, places = path.resolve(), [source.resolve()]
    if source.parent.name == "snapshots":
        places.append(source.resolve().parents[1] / "blobs")
    return real.is_file() and any(real.is_relative_to(place) for place in places)
