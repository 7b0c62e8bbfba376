"""report.json and run.yaml of a quantized model: kept while it is loaded, written where `save_pretrained` saves it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from .names import locals_of

FILES = ("report.json", "run.yaml")
_MOST = 64 << 20  # bytes


def read(checkpoint_files: Iterable[str | os.PathLike[str]]) -> dict[str, bytes]:
    """The files of a run that lie beside those of a checkpoint, by name."""
    found = {}
    for folder in {Path(file).parent for file in checkpoint_files}:
        for name in FILES:
            path = folder / name
            if path.is_file() and path.stat().st_size <= _MOST:
                found[name] = path.read_bytes()
    return found


def write(files: Mapping[str, bytes]) -> None:
    """Write them where the calling `save_pretrained` is saving a model, unless there are others."""
    saving = locals_of("save_pretrained", "save_directory")
    if saving is None or not saving.get("is_main_process", True) or saving.get("_hf_peft_config_loaded"):
        return  # an adapter alone is saved
    folder = Path(saving["save_directory"])
    for name, content in files.items():
        if folder.is_dir() and not (folder / name).exists():
            (folder / name).write_bytes(content)
