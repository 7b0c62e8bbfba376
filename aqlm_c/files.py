"""Files and directories that appear by rename only: absent, as they were, or complete."""

from __future__ import annotations

import errno
import json
import os
import platform
import resource
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .units import binary_size


def write_json(path: str | os.PathLike[str], fields: Mapping[str, Any]) -> None:
    """Write `fields` as JSON through a temporary file beside `path`, which is never half written."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(fields, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; ValueError naming the file for anything else."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: got {type(fields).__name__}, expected a JSON object")
    return fields


def existing_parent(path: Path) -> Path:
    """The nearest directory above `path` that exists (or a file that is in the way)."""
    return next(parent for parent in path.absolute().parents if os.path.lexists(parent))


def temporary_beside(path: Path, which: str, pid: int | str) -> Path:
    """Where process `pid` of this machine keeps what becomes `path` ("new") or what was there ("old")."""
    return existing_parent(path) / f".{path.name}.{which}-{platform.node()}-{pid}"


def clear_up(path: Path) -> None:
    """Remove what killed processes of this machine left beside `path`; a `path` that was set aside comes back."""
    parent = existing_parent(path)
    beside = [] if not os.access(parent, os.W_OK | os.X_OK) or not parent.is_dir() else list(parent.iterdir())
    for which in ("old", "new"):
        start = temporary_beside(path, which, "").name
        for left in beside:
            pid = left.name.removeprefix(start)
            if left.name.startswith(start) and pid.isdigit() and (int(pid) == os.getpid() or not _runs(int(pid))):
                if which == "old" and not path.exists():
                    os.rename(left, path)
                else:
                    shutil.rmtree(left, ignore_errors=True)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # there, but not ours
        pass
    return True


def check_free_space(directory: str | os.PathLike[str], n_bytes: int, what: str) -> None:
    """Raise OSError (ENOSPC) unless the disk of `directory`, which need not exist yet, has space for `n_bytes`."""
    existing = Path(directory).absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < n_bytes:
        raise OSError(
            errno.ENOSPC,
            f"{directory}: got {binary_size(free)} free on this disk, expected {binary_size(n_bytes)} for {what}",
        )


def temporary_directory() -> str:
    """Where large temporary files go: /tmp itself is memory on many systems."""
    return "/var/tmp" if "TMPDIR" not in os.environ and os.access("/var/tmp", os.W_OK) else tempfile.gettempdir()


def peak_memory() -> int:
    """Most bytes that this process has held in memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def resident_memory() -> int:
    """Bytes that this process holds in memory now; where the system does not tell, the most it ever held."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak_memory()
    return pages * os.sysconf("SC_PAGE_SIZE")
