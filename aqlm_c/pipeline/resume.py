"""Runs that can be killed and go on: a directory with one safetensors file a finished block and a fingerprint.

A file appears under its name only when it is complete and on the disk, so whatever is there can be used. The
directory belongs to one run: model, data, options, seed and versions must be those it was begun with.

Activations are not stored: on resuming, a finished block is run again, from its dense weights as the first time, which
keeps a work directory at 1 MB per block of SmolLM2 instead of 75.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file

from ..config import PV_STATES, SizeOptions
from ..core import runtime
from ..errors import one_line, shown
from ..files import irregular
from ..format import Format
from ..io.checkpoint import quantized_linears, quantized_names, tensor_name
from ..model.blocks import is_norm_or_bias
from ..nn.embedding import quantized_class
from ..nn.linear import QuantizedLayer
from ..recipe import AqlmConfig
from ..versions import versions

try:
    import fcntl
except ImportError:  # not POSIX: nothing keeps two processes apart
    fcntl = None  # type: ignore[assignment]  # to mypy the name is a module

log = logging.getLogger("aqlm_c")

_FINGERPRINT, _LOCK, _TEMPORARY, _STATE = "fingerprint.json", "lock", ".new", "state.safetensors"
_CHOICE = "schemes.json"
_OURS_BEFORE_THE_FINGERPRINT = {_LOCK, _FINGERPRINT + _TEMPORARY, _CHOICE, _CHOICE + _TEMPORARY}
_BLOCK = re.compile(r"block-(\d{4,})\.safetensors")
_SHOWN = 6  # differences in a message
_AT_A_TIME = 16  # tensors that are hashed
_VERSIONS = ("aqlm_c", "numpy", "torch", "transformers")
_PLACE = ("_name_or_path", "transformers_version")  # of a model's config: say nothing about what it computes
_HASHES = {
    ("model", "weights"): "model: its weights differ",
    ("original", "weights"): "original: its weights differ",
    ("data", "tokens"): "data: the calibration tokens differ",
}


def fingerprint(
    model: Any,
    sequences: torch.Tensor,
    config: AqlmConfig,
    layers: str | None,
    on_read: Callable[[int], None] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """What the bits of a run's result depend on, ready for JSON: `WorkDir.open` compares it part by part.

    Parts "model" (a transformers model: class, config, attention, SHA-256 of all parameters and buffers), "data" (of
    the token ids [n, length]), "options" (every field of `config`, `layers` and `options`, such as the batch size and
    the kind of device) and "versions" must be equal. "machine" (threads, torch's instruction set) may move the last
    bits and only warns; aqlm_c's own instruction set moves none. on_read: is told of so many bytes of the model that
    were read.
    """
    fields_of = {name: value for name, value in config.to_dict().items() if name != "gaussian_reference"}
    chosen = {**fields_of, "rules": [*map(list, config.rules.items())], "layers": layers, **options}
    return facts_of(model, sequences, chosen, on_read)


def choice_facts(
    model: Any, sequences: torch.Tensor, config: AqlmConfig, layers: str | None, size: SizeOptions
) -> dict[str, Any]:
    """`facts_of` a run whose schemes are chosen for a size."""
    rules = [*map(list, config.rules.items())]
    chosen = {**config.to_dict(), "rules": rules, "layers": layers, **dataclasses.asdict(size)}
    return facts_of(model, sequences, chosen)


def facts_of(
    model: Any,
    sequences: torch.Tensor,
    options: Mapping[str, Any],
    on_read: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """`fingerprint` of a run that is not one of quantization, whose options are those given."""
    fields = json.loads(model.config.to_json_string(use_diff=False))
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {
        "model": {
            **{name: value for name, value in fields.items() if name not in _PLACE},
            "class": type(model).__name__,
            "attention": getattr(model.config, "_attn_implementation", None),
            "weights": _sha256_of_many(tensors, on_read),
        },
        "data": {"shape": list(sequences.shape), "tokens": sha256_of([("tokens", sequences.long())])},
        "options": dict(options),
        "versions": {name: versions().get(name) for name in _VERSIONS},
        "machine": {
            "threads": [runtime.get_num_threads(), torch.get_num_threads()],
            "instructions": torch.backends.cpu.get_cpu_capability(),
        },
    }


class WorkDir:
    """The directory of one run, locked while open; use it in a `with` statement or call `close`.

    finished: number of finished blocks, 0 .. finished - 1 of the model.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.finished = 0
        self._lock: Any = None

    @classmethod
    def open(cls, path: str | os.PathLike[str], fingerprint: Mapping[str, Any]) -> WorkDir:
        """Make the directory, or check that the one that is there belongs to the run of `fingerprint`.

        A damaged block is removed with those after it, and a warning. Raises ValueError, saying what differs,
        for the directory of another run, and for one that is not empty and holds no run; BlockingIOError if
        another process uses it; OSError if it cannot be made, read or written.
        """
        work_dir = cls(path)
        try:
            work_dir._take()
            work_dir._compare(json.loads(json.dumps(fingerprint)))
            work_dir._check_blocks()
        except BaseException:
            work_dir.close()
            raise
        return work_dir

    def save_block(self, index: int, tensors: Mapping[str, torch.Tensor], report: Mapping[str, Any]) -> None:
        """Write block `index` = `finished`: its tensors, and a report that JSON can hold.

        Raises OSError, on a full disk for example; the finished blocks stay, and nothing of this one.
        """
        if index != self.finished:
            raise ValueError(f"index: got {index}, expected {self.finished}, blocks are finished in order")
        owned = {  # safetensors refuses views and tensors that share memory
            name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        }
        facts = {"sha256": sha256_of(sorted(owned.items()), report), "report": report}
        self._write(_block_name(index), save(owned, {"aqlm_c": json.dumps(facts)}))
        self.finished += 1

    def save_state(self, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        """Replace the state that a run goes on from: tensors, and what JSON can hold.

        Raises OSError, on a full disk for example; the state before it stays usable.
        """
        owned = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        stored = {"sha256": _sha256_of_many(sorted(owned.items()), None), "facts": facts}
        temporary = self.path / (_STATE + _TEMPORARY)
        with self._explained("writing", _STATE):
            try:
                save_file(owned, temporary, {"aqlm_c": json.dumps(stored)})
                with open(temporary, "rb+") as file:
                    os.fsync(file.fileno())
                os.replace(temporary, self.path / _STATE)
            except BaseException as error:
                with contextlib.suppress(OSError):
                    temporary.unlink()
                if isinstance(error, SafetensorError):  # a full disk, for one
                    raise OSError(str(error)) from None
                raise

    def load_state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """The last state, as saved; None where there is none, and, with a warning, where it is damaged."""
        path = self.path / _STATE
        self._check_regular(_STATE)
        if not path.exists():
            return None
        try:
            with self._explained("reading", _STATE), safe_open(path, framework="pt") as stored:
                tensors = {name: stored.get_tensor(name).clone() for name in sorted(stored.keys())}
                found = json.loads(stored.metadata()["aqlm_c"])
            if found["sha256"] == _sha256_of_many(sorted(tensors.items()), None):
                return tensors, dict(found["facts"])
            reason = "its SHA-256 differs from the one written with it"
        except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            reason = one_line(error)
        log.warning("work_dir: got %r: %s is damaged: %s; the run begins anew", str(self.path), _STATE, reason)
        return None

    def load_block(self, index: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """(tensors, report) of a finished block, as saved; the tensors are contiguous, in CPU memory of their own.

        Raises ValueError for a damaged file, OSError for one that cannot be read.
        """
        path = self.path / _block_name(index)
        damaged = f"work_dir: got {str(self.path)!r}: {path.name} is damaged"
        try:
            self._check_regular(path.name)
            with self._explained("reading", path.name), safe_open(path, framework="pt") as stored:
                tensors = {name: stored.get_tensor(name).clone() for name in sorted(stored.keys())}
                facts = json.loads(stored.metadata()["aqlm_c"])
            sha256, report = facts["sha256"], facts["report"]
        except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{damaged}: {error}") from error
        if sha256 != sha256_of(tensors.items(), report):
            raise ValueError(f"{damaged}: its SHA-256 differs from the one written with it")
        return tensors, report

    def close(self) -> None:
        """Give the directory free; a process that ends in any way does so too."""
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> WorkDir:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _take(self) -> None:
        """Make the directory or see that it is ours, lock it, and remove what a killed writer left."""
        with self._explained("opening", "it"):
            self.path.mkdir(parents=True, exist_ok=True)
            foreign = sorted({path.name for path in self.path.iterdir()} - _OURS_BEFORE_THE_FINGERPRINT)
            if foreign and _FINGERPRINT not in foreign:  # before anything is written into it
                raise ValueError(
                    f"work_dir: got {str(self.path)!r}: holds {foreign[0]!r} and no {_FINGERPRINT}; "
                    "expected a new or an empty directory, or that of an earlier run"
                )
            self._check_regular(_LOCK)
            self._lock = open(self.path / _LOCK, "ab")  # noqa: SIM115  (open as long as the run)
        if fcntl is None:
            log.warning("work_dir=%r: no file locks here: let no other process use it", str(self.path))
        else:
            try:
                with self._explained("locking", "it"):
                    fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BlockingIOError(
                    f"work_dir: got {str(self.path)!r}: another process uses it; expected a free one: "
                    "wait until that run ends, or pass another --work-dir"
                ) from None
        with self._explained("cleaning", "it"):
            for path in self.path.glob(f"*{_TEMPORARY}"):
                if path.name.startswith(("block-", _FINGERPRINT, _STATE, _CHOICE)):
                    path.unlink()

    @classmethod
    def kept_choice(
        cls, path: str | os.PathLike[str], facts: Mapping[str, Any], choose: Callable[[], Mapping[str, Any]]
    ) -> dict[str, Any]:
        """What `choose` returned when the run of these `facts` (`facts_of`) began, so that it goes on with the same
        schemes; called and kept, ready for JSON, in a new directory. Raises as `open` does.
        """
        work_dir, now = cls(path), json.loads(json.dumps(facts))
        try:
            work_dir._take()
            work_dir._check_regular(_CHOICE)
            stored = work_dir.path / _CHOICE
            if not stored.exists() and (work_dir.path / _FINGERPRINT).exists():
                work_dir._refuse(["schemes were not chosen for a size"])
            if stored.exists():
                return work_dir._choice_of(stored, now)
            found = dict(choose())
            work_dir._write(_CHOICE, json.dumps({"facts": now, "choice": found}, indent=1).encode())
            return found
        finally:
            work_dir.close()

    def _choice_of(self, stored: Path, now: Mapping[str, Any]) -> dict[str, Any]:
        with self._explained("reading", _CHOICE):
            text = stored.read_bytes()
        try:
            begun = json.loads(text)
            facts, choice = {part: dict(fields) for part, fields in begun["facts"].items()}, dict(begun["choice"])
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
            raise ValueError(
                f"work_dir: got {str(self.path)!r}: {_CHOICE} is damaged; expected JSON: pass another --work-dir"
            ) from None
        self._refuse(list(_differences(facts, now, (facts.keys() | now.keys()) - {"machine"})))
        return choice

    def _refuse(self, differences: list[str]) -> None:
        """Raise ValueError if there are any."""
        if len(differences) > _SHOWN:
            differences[_SHOWN:] = [f"and {len(differences) - _SHOWN} more"]
        if differences:
            raise ValueError(
                f"work_dir: got {str(self.path)!r}: holds another run ({'; '.join(differences)}); "
                "expected the same model, data, options and versions: use those, or pass another --work-dir"
            )

    def _compare(self, now: Mapping[str, Any]) -> None:
        """Write the fingerprint of a new directory; refuse the directory of another run."""
        path = self.path / _FINGERPRINT
        self._check_regular(_FINGERPRINT)
        with self._explained("reading", _FINGERPRINT):
            stored = path.read_bytes() if path.exists() else None
        if stored is None:
            self._write(_FINGERPRINT, json.dumps(now, indent=2).encode())
            return
        try:
            begun = {part: dict(fields) for part, fields in json.loads(stored).items()}
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise ValueError(
                f"work_dir: got {str(self.path)!r}: {_FINGERPRINT} is damaged; expected JSON: pass another --work-dir"
            ) from None
        self._refuse(list(_differences(begun, now, (begun.keys() | now.keys()) - {"machine"})))
        for difference in _differences(begun, now, {"machine"}):
            log.warning("work_dir=%r: %s: the last bits of the result may differ", str(self.path), difference)

    def _check_blocks(self) -> None:
        """Count the finished blocks; remove what follows a damaged or a missing one."""
        while (self.path / _block_name(self.finished)).exists():
            try:
                self.load_block(self.finished)
            except ValueError as error:
                log.warning("%s; this block and those after it are done again", error)
                break
            self.finished += 1
        with self._explained("cleaning", "it"):
            for path in self.path.iterdir():
                if (match := _BLOCK.fullmatch(path.name)) and int(match[1]) >= self.finished:
                    path.unlink()

    def _check_regular(self, name: str) -> None:
        if kind := irregular(self.path / name):
            raise ValueError(f"work_dir: got {str(self.path)!r}: {name} is {kind}, expected a regular file")

    def _write(self, name: str, data: bytes) -> None:
        """Write a file that is either complete and on the disk or not there."""
        temporary = self.path / (name + _TEMPORARY)
        with self._explained("writing", name):
            try:
                with open(temporary, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, self.path / name)
            except BaseException:
                with contextlib.suppress(OSError):
                    temporary.unlink()
                raise

    @contextlib.contextmanager
    def _explained(self, doing: str, name: str) -> Iterator[None]:
        """An OSError says where and what now."""
        try:
            yield
        except OSError as error:
            explained = type(error)(
                f"work_dir: got {str(self.path)!r}: {doing} {name}: {error.strerror or error}; expected a directory to "
                "read and write, with free space; finished blocks in it stay usable: cure this and run the same command"
            )
            explained.errno = error.errno
            raise explained from error


def begun_batch_size(path: str | os.PathLike[str]) -> int | None:
    """The batch size of the run that a directory holds; None where it holds none that can be read."""
    size = _begun(path, "batch_size")
    return size if type(size) is int and size > 0 else None


def begun_states(path: str | os.PathLike[str]) -> str | None:
    """The same of the moments of a tuning run's buffers, one of `config.PV_STATES`."""
    states = _begun(path, "pv_states")
    return states if states in PV_STATES else None


def _begun(path: str | os.PathLike[str], option: str) -> Any:
    file = Path(path) / _FINGERPRINT
    if irregular(file):
        return None
    try:
        return json.loads(file.read_bytes())["options"][option]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):  # `WorkDir.open` says what is wrong
        return None


def block_state(
    block: torch.nn.Module, replaced: Iterable[str] = (), quantized_only: bool = False
) -> dict[str, torch.Tensor]:
    """What quantization changes in a block, for `WorkDir.save_block`: the tensors of its quantized layers, of the dense
    ones that it `replaced` and, unless `quantized_only`, norms and biases, by their name in the block; they are the
    block's own, no copies.
    """
    quantized = tuple(f"{name}." for name in (*(name for name, _ in quantized_linears(block)), *replaced))
    named = block.named_parameters()
    return {
        name: p.detach()
        for name, p in named
        if name.startswith(quantized) or (is_norm_or_bias(p) and not quantized_only)
    }


def restore_block(block: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, QuantizedLayer]:
    """Give `block` the state `tensors` that `block_state` had of its quantized self.

    A linear or an embedding whose codes are among them is quantized, in the format that its codebooks have; the block
    takes over the tensors, on the device that it is on. Returns the new layers by their name in the block. No tensors
    at all: a block in which nothing was quantized.
    """
    if not tensors:
        return {}
    device = next(block.parameters()).device
    layers: dict[str, QuantizedLayer] = {}
    for name in quantized_names(tensors):
        codebooks = tensors[tensor_name(name, "codebooks")]
        dense = block.get_submodule(name)
        layers[name] = quantized_class(dense).empty(dense, Format.of_codebooks(codebooks.shape), codebooks.dtype)
        block.set_submodule(name, layers[name])
    found = block.load_state_dict({name: t.to(device) for name, t in tensors.items()}, strict=False, assign=True)
    if found.unexpected_keys:
        raise ValueError(f"tensors: got {found.unexpected_keys[0]!r}, expected names of the block's own")
    for layer in layers.values():
        for parameter in layer.parameters():  # as in a layer that was quantized in this process
            parameter.requires_grad_(parameter.is_floating_point())
    return layers


def _block_name(index: int) -> str:
    return f"block-{index:04d}.safetensors"


def _sha256_of_many(tensors: Sequence[tuple[str, torch.Tensor]], on_read: Callable[[int], None] | None) -> str:
    """Of the hashes of each tensor, in order: of several at a time, since a large model takes minutes otherwise."""
    digest = hashlib.sha256()
    with ThreadPoolExecutor(min(8, torch.get_num_threads())) as pool:
        for begin in range(0, len(tensors), _AT_A_TIME):
            part = tensors[begin : begin + _AT_A_TIME]
            for one in pool.map(lambda named: sha256_of([named]), part):
                digest.update(one.encode())
            if on_read is not None:
                on_read(sum(tensor.nbytes for _, tensor in part))
    return digest.hexdigest()


def sha256_of(tensors: Iterable[tuple[str, torch.Tensor]], report: Mapping[str, Any] | None = None) -> str:
    """Of `report` as JSON and of names, dtypes, shapes and bytes of tensors."""
    digest = hashlib.sha256(f"{json.dumps(report)}\n".encode())
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _differences(
    begun: Mapping[str, Mapping[str, Any]], now: Mapping[str, Mapping[str, Any]], parts: Iterable[str]
) -> Iterator[str]:
    """What differs between two fingerprints in these parts, for people."""
    for part in sorted(parts):
        old, new = begun.get(part, {}), now.get(part, {})
        for name in dict.fromkeys((*old, *new)):
            if old.get(name) != new.get(name):
                label = name if part == "options" else f"{part}.{name}"
                plain = f"{label}: {shown(old.get(name))} in WORK_DIR, {shown(new.get(name))} now"
                yield _HASHES.get((part, name), plain)
