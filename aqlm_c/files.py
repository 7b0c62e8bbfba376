"""Files that are read: regular and bounded. Those that are written: absent, as they were, or complete."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import resource
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import is_text, shown, wrong
from .units import binary_size

MOST_BYTES = 32 * 2**20  # of a file of options or facts that is read as a whole
_DESCRIPTOR = re.compile(r"/(?:dev|proc/(?:self|thread-self))/fd/(\d+)")
_MOST_LINKS = 40
_PATIENCE = 10.0  # seconds until a named pipe must have a reader
_LONG_NAME = 150  # bytes: with what is added it must stay below the 255 of most file systems


# ---- reading ----------------------------------------------------------------------------------------------------


def irregular(path: str | os.PathLike[str]) -> str | None:
    """What `path`, links followed, is where it is there and no regular file: "a directory", "a named pipe", ..."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return None
    if stat.S_ISREG(mode):
        return None
    kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """The text of a regular file of at most `most` bytes; ValueError naming the file for anything else."""
    if kind := irregular(path):
        raise ValueError(f"{path}: got {kind}, expected a regular file")
    with open(path, "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"{path}: got more than {binary_size(most)}, expected less")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def read_json(path: Path, most: int = MOST_BYTES) -> Any:
    """What the JSON in a regular file stands for; ValueError naming the file that holds none."""
    text = read_text(path, most)
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{path}: not JSON: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; ValueError naming the file for anything else."""
    fields = read_json(path)
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: got {type(fields).__name__}, expected a JSON object")
    return fields


# ---- writing ----------------------------------------------------------------------------------------------------


class JsonFile:
    """Where a JSON object will be written, tried before the work whose result it is; a context manager.

    A regular file, links resolved, is replaced by rename (in place where its folder is read-only); a pipe, a terminal
    or another device is opened at once; /dev/stdout, /dev/fd/N and links to them are the process's own descriptors.
    Raises ValueError naming `name` for a path that cannot be written.
    """

    def __init__(self, name: str, path: str | os.PathLike[str]) -> None:
        self._name, self._path = name, os.fspath(path)
        self._descriptor: int | None = None
        self._target: Path | None = None
        self._in_place = False
        try:
            self._open()
        except OSError as error:
            self.close()
            raise wrong(name, self._path, f"a file that can be written: {error.strerror or error}") from None

    def write(self, fields: Mapping[str, Any]) -> None:
        """Write `fields`; ValueError for NaN or Inf, before anything is written; OSError on a full disk, for one."""
        data = (json.dumps(fields, indent=2, allow_nan=False) + "\n").encode()
        try:
            if self._descriptor is not None:
                sys.stdout.flush()  # it may be the same file
                descriptor, self._descriptor = self._descriptor, None
                with open(descriptor, "wb") as file:
                    file.write(data)
            elif self._in_place:
                with open(self._found(), "r+b") as file:
                    file.write(data)
                    file.truncate()
            else:
                self._replace(data)
        except OSError as error:
            text = f"{self._name}: got {shown(self._path)}, which cannot be written: {error.strerror or error}"
            raise explained(error, text) from None

    def close(self) -> None:
        """Give up what was opened, if nothing was written."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> JsonFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _open(self) -> None:
        number = _own_descriptor(self._path)
        if number is not None:
            if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
                raise OSError(errno.EBADF, "it is open for reading alone")
            self._descriptor = os.dup(number)
            return
        kind = irregular(self._path)
        if kind == "a directory" or (kind == "a device" and stat.S_ISBLK(os.stat(self._path).st_mode)):
            raise wrong(self._name, self._path, f"a file in a directory that exists, not {kind}")
        if kind is not None:
            self._descriptor = _open_now(self._path)
            return
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.stat(self._path)  # else: links in a circle, a name that is too long
        self._target = Path(os.path.realpath(self._path))
        if not self._target.name or not self._target.parent.is_dir():
            raise wrong(self._name, self._path, "a file in a directory that exists")
        try:
            with open(self._temporary(), "xb"):
                pass
            os.unlink(self._temporary())
        except OSError:
            if not os.access(self._target, os.W_OK):
                raise
            self._in_place = True

    def _found(self) -> Path:
        assert self._target is not None, "a regular file"
        return self._target

    def _temporary(self) -> Path:
        return self._found().with_name(hidden_name(self._found().name, f"{os.getpid()}.tmp"))

    def _replace(self, data: bytes) -> None:
        temporary, target = self._temporary(), self._found()
        try:
            temporary.write_bytes(data)
            if target.exists():
                temporary.chmod(stat.S_IMODE(target.stat().st_mode))
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], fields: Mapping[str, Any]) -> None:
    """Write `fields` as JSON to a file, which is never half written, or to what else `JsonFile` takes."""
    with JsonFile("path", path) as file:
        file.write(fields)


def _own_descriptor(path: str) -> int | None:
    """The number of this process's descriptor that a path names, itself or by links; None for any other path."""
    for _ in range(_MOST_LINKS):
        path = os.path.abspath(path)
        if match := _DESCRIPTOR.fullmatch(path.replace(f"/proc/{os.getpid()}/", "/proc/self/")):
            return int(match[1])
        if not os.path.islink(path):
            return None
        path = os.path.join(os.path.dirname(path), os.readlink(path))
    return None


def _open_now(path: str) -> int:
    """A descriptor that writes to a pipe or a device. A pipe without a reader would block, and after the work."""
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
            os.set_blocking(descriptor, True)
            return descriptor
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            if time.monotonic() > until:
                raise OSError(errno.ENXIO, "nobody reads from it") from None
            time.sleep(0.05)


def explained(error: OSError, text: str) -> OSError:
    """An error of the same type and number that says `text`."""
    found = type(error)(text)
    found.errno = error.errno
    return found


def hidden_name(name: str, end: str) -> str:
    """ ".name.end", or, where no file system would take that, a part of the name and its hash."""
    encoded = os.fsencode(name)
    if len(encoded) > _LONG_NAME:
        name = f"{encoded[: _LONG_NAME // 2].decode(errors='ignore')}~{hashlib.sha256(encoded).hexdigest()[:16]}"
    return f".{name}.{end}"


# ---- directories that appear by rename ----------------------------------------------------------------------------


def existing_parent(path: Path) -> Path:
    """The nearest directory above `path` that exists (or a file that is in the way)."""
    return next(parent for parent in path.absolute().parents if os.path.lexists(parent))


def temporary_beside(path: Path, which: str, pid: int | str) -> Path:
    """Where process `pid` of this machine keeps what becomes `path` ("new") or what was there ("old")."""
    return existing_parent(path) / hidden_name(path.name, f"{which}-{platform.node()}-{pid}")


def clear_up(path: Path) -> None:
    """Remove what killed processes of this machine left beside `path`; a `path` that was set aside comes back."""
    parent = existing_parent(path)
    beside = [] if not os.access(parent, os.W_OK | os.X_OK) or not parent.is_dir() else list(parent.iterdir())
    for which in ("old", "new"):
        start = temporary_beside(path, which, "0").name.removesuffix("0")
        for left in beside:
            pid = left.name.removeprefix(start)
            if left.name.startswith(start) and pid.isdigit() and (int(pid) == os.getpid() or not _runs(int(pid))):
                if which == "old" and not path.exists():
                    os.rename(left, path)
                else:
                    shutil.rmtree(left, ignore_errors=True)


def named_directory(name: str, path: str | os.PathLike[str]) -> Path:
    """`path` as one that is absolute and ends in a name; ValueError, naming `name`, for the root of a file system."""
    found = Path(path).absolute() if Path(path).name not in ("", "..") else Path(path).resolve()
    if not found.name or "\0" in str(found) or not is_text(str(found)):
        raise wrong(name, str(path), "a directory that can be made")
    return found


def try_place(name: str, path: Path) -> None:
    """Make a directory where `place` will need one, and set what is at `path` aside and put it back.

    Raises OSError naming `name`: a folder that cannot be written, a mount point, a name that is too long.
    """
    new, old = (temporary_beside(path, which, os.getpid()) for which in ("new", "old"))
    try:
        _check_lengths(new.parent, path)
        new.mkdir()
        try:
            (new / "config.json").write_bytes(b" ")
        finally:
            shutil.rmtree(new, ignore_errors=True)
        if path.exists():
            os.rename(path, old)
            os.rename(old, path)
    except OSError as error:
        what = "a new path, or a directory that can be replaced (a mount point cannot: give a folder in it)"
        if error.errno != errno.EBUSY:
            what = "a path where a directory can be made"
        raise explained(error, f"{name}: got {shown(str(path))}, expected {what}: {error.strerror or error}") from None


def place(new: Path, path: Path) -> None:
    """Give the finished directory `new` its name `path`; what is there goes, and comes back if that fails (OSError)."""
    old = temporary_beside(path, "old", os.getpid())
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        os.rename(path, old)
    try:
        os.rename(new, path)
    except BaseException:
        if old.exists() and not path.exists():
            os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def set_aside(new: Path, path: Path) -> Path:
    """Where a finished directory that could not be placed at `path` is kept: under a name that nothing clears up."""
    for number in range(1, 1000):
        kept = new.with_name(hidden_name(path.name, f"finished-{number}").removeprefix("."))
        if not os.path.lexists(kept):
            try:
                os.rename(new, kept)
            except OSError:
                break
            return kept
    return new


def _check_lengths(parent: Path, path: Path) -> None:
    for part in path.relative_to(parent).parts:
        if len(os.fsencode(part)) > os.pathconf(parent, "PC_NAME_MAX"):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    if len(os.fsencode(path)) + 256 > max(1024, os.pathconf(parent, "PC_PATH_MAX")):  # and the names of the files in it
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))


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
    free = shutil.disk_usage(_existing(directory)).free
    if free < n_bytes:
        raise OSError(
            errno.ENOSPC,
            f"{directory}: got {binary_size(free)} free on this disk, expected {binary_size(n_bytes)} for {what}",
        )


def same_disk(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Whether two directories, which need not exist yet, are on one disk."""
    return _existing(one).stat().st_dev == _existing(other).stat().st_dev


def _existing(directory: str | os.PathLike[str]) -> Path:
    """The directory, or the first one above it that exists."""
    existing = Path(directory).absolute()
    while not existing.exists():
        existing = existing.parent
    return existing


def temporary_directory() -> str:
    """Where large temporary files go: /tmp itself is memory on many systems."""
    return "/var/tmp" if "TMPDIR" not in os.environ and os.access("/var/tmp", os.W_OK) else tempfile.gettempdir()


def peak_memory() -> int:
    """Most bytes that this process has held in memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def available_memory(root: str | os.PathLike[str] = "/") -> int | None:
    """Bytes of memory that this process could still take without swapping; None where the system does not tell.

    The least of what the machine has and what control groups leave (version 2 or 1; all that this process is in, as far
    as they are seen from here). Pages of files that can be dropped are free. root: of the file system.
    """
    found = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path(root, "proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    groups = Path(root, "sys/fs/cgroup")
    for version, top, of_controllers in ((2, groups, ""), (1, groups / "memory", "memory")):
        for directory in _control_groups(Path(root, "proc/self/cgroup"), top, of_controllers):
            with contextlib.suppress(OSError, ValueError):  # "max" is no limit
                found.append(_left_in_group(directory, version))
    return max(0, min(found)) if found else None


def _control_groups(own: Path, top: Path, controller: str) -> Iterator[Path]:
    """Directories of the control groups of this process under `top`, from that on down, which is a container's own."""
    yield top
    lines = []
    with contextlib.suppress(OSError, ValueError):
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if controller in controllers.split(",") and ".." not in Path(path).parts:
            for part in Path(path.strip("/")).parts:
                top = top / part
                yield top


def _left_in_group(directory: Path, version: int) -> int:
    """Bytes that a control group leaves to take; ValueError and OSError where it sets no limit."""
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    limit, used = (int((directory / name).read_text()) for name in names)
    name = b"inactive_file" if version == 2 else b"total_inactive_file"
    with contextlib.suppress(OSError):
        counts = re.search(rb"(?m)^%s (\d+)$" % name, (directory / "memory.stat").read_bytes())
        used -= int(counts[1]) if counts else 0
    return limit - used


def resident_memory() -> int:
    """Bytes that this process holds in memory now; where the system does not tell, the most it ever held."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak_memory()
    return pages * os.sysconf("SC_PAGE_SIZE")
