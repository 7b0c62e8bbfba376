"""H of a model's linears in a file: written once, and what a pipeline is given instead of a calibration."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..core import arrays
from ..core.hessian import Hessian
from ..distributed import group
from ..errors import one_line, wrong
from ..files import explained, hidden_name, irregular
from ..recipe import AqlmConfig
from ..units import megabytes
from .hessians import NO_POOLS, Pools, Spread, alone
from .sources import Chain, DataFree, LayerInputs, SequenceCalibration

SCHEMA = 1
_KEY = "aqlm_c"
_PER_LAYER, _AROUND = 1024, 65536  # bytes of the header, kept free for it until all is written


class StatisticsWriter:
    """Writes a safetensors file as its tensors come, so that one H is in memory at a time; it appears complete or not
    at all. A context manager: `finish` inside of it makes the file appear.

    path: of the file. layers: how many linears there will be at most.
    """

    def __init__(self, path: str | os.PathLike[str], layers: int) -> None:
        self.path = Path(path)
        self._temporary = self.path.with_name(hidden_name(self.path.name, f"{os.getpid()}.new"))
        self._room = _AROUND + _PER_LAYER * layers
        self._tensors: dict[str, dict[str, Any]] = {}
        self._keys: dict[int, str] = {}  # by the id of an H that is kept alive
        self._alive: list[Hessian] = []
        self.layers: dict[str, dict[str, Any]] = {}
        self._end = 0
        try:
            self._file = open(self._temporary, "xb")  # noqa: SIM115
            self._file.seek(8 + self._room)
        except OSError as error:
            raise self._explained(error) from None

    def add(self, hessians: Mapping[str, Hessian], tokens: Mapping[str, int]) -> None:
        """Write the H of the linears of one block, by name, each once however many share it."""
        self._keys.clear()
        self._alive = list(hessians.values())
        for name, hessian in hessians.items():
            key = self._keys.get(id(hessian))
            if key is None:
                key = self._keys[id(hessian)] = f"{name}.hessian"
                self._write(key, arrays.to_numpy(arrays.scaled(hessian.H, hessian.exponent)))
            self.layers[name] = {"tensor": key, "tokens": tokens[name]}
        self._alive = []

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Write the header, with `facts` and what each linear has, and give the file its name."""
        described = {"schema": SCHEMA, **facts, "layers": self.layers}
        header = json.dumps({"__metadata__": {"format": "pt", _KEY: json.dumps(described)}, **self._tensors}).encode()
        if len(header) > self._room:
            raise ValueError(f"statistics: got a header of {len(header)} bytes, expected at most {self._room}")
        try:
            self._file.seek(0)
            self._file.write(struct.pack("<Q", self._room) + header.ljust(self._room))
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._temporary, self.path)
        except OSError as error:
            raise self._explained(error) from None

    def _write(self, key: str, H: Any) -> None:
        data = memoryview(H.astype("<f4", copy=False)).cast("B")
        try:
            self._file.write(data)
        except OSError as error:
            raise self._explained(error) from None
        offsets = [self._end, self._end + len(data)]
        self._tensors[key] = {"dtype": "F32", "shape": list(H.shape), "data_offsets": offsets}
        self._end = offsets[1]

    def _explained(self, error: OSError) -> OSError:
        text = f"statistics: got {str(self.path)!r}, expected a file that can be written: {error.strerror or error}"
        return explained(error, text)

    def __enter__(self) -> StatisticsWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
        with contextlib.suppress(OSError):
            self._temporary.unlink(missing_ok=True)


class Statistics:
    """A file of `collect_hessians`. store: a directory in which runs keep what they find of single layers, and take it
    from where nothing has changed that it depends on (`pipeline.reuse`).

    facts: "schema", "model" (class, dtype, weights: a SHA-256), "data" (input_ids: SHA-256 of the token ids, sequences,
    sequence_length, and where known sources and bos), "layers" (by the linear's name its tensor and tokens), "date",
    "versions". Raises ValueError naming the file where it is none.
    """

    def __init__(self, path: str | os.PathLike[str], store: str | os.PathLike[str] | None = None) -> None:
        self.path, self.store = os.fspath(path), store
        if kind := irregular(self.path):
            raise self._wrong(f"is {kind}")
        try:
            with safe_open(self.path, framework="pt") as stored:
                keys, described = set(stored.keys()), (stored.metadata() or {}).get(_KEY)
        except FileNotFoundError:
            raise wrong("statistics", self.path, "a file of aqlm-c hessians: no such file") from None
        except (SafetensorError, OSError) as error:
            raise self._wrong(one_line(error)) from None
        self.facts = self._read(described)
        self._layers: dict[str, dict[str, Any]] = self.facts["layers"]
        if missing := sorted({layer["tensor"] for layer in self._layers.values()} - keys):
            raise self._wrong(f"has no tensor {missing[0]}")

    def _read(self, described: str | None) -> dict[str, Any]:
        try:
            facts: dict[str, Any] = json.loads(described or "")
            schema = facts["schema"]
            if schema != SCHEMA:
                raise self._wrong(f"is of schema {schema!r}, not {SCHEMA}")
            for part, names in (("model", ("dtype", "weights")), ("data", ("input_ids", "sequences"))):
                for name in names:
                    _ = facts[part][name]
            layers = facts["layers"].items()
            facts["layers"] = {n: {"tensor": str(one["tensor"]), "tokens": int(one["tokens"])} for n, one in layers}
            return facts
        except (TypeError, KeyError, AttributeError, RecursionError):
            raise self._wrong("says not what it is of") from None
        except ValueError as error:
            raise error if str(error).startswith("statistics:") else self._wrong("says not what it is of") from None

    def _wrong(self, what: str) -> ValueError:
        return wrong("statistics", self.path, f"a file of aqlm-c hessians: it {what}")

    @property
    def digest(self) -> str:
        """SHA-256, in hex, of `facts`, the time at which the file was made among them."""
        return hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()

    @property
    def sequences(self) -> int:
        """Of the calibration."""
        return int(self.facts["data"]["sequences"])

    @property
    def tokens(self) -> int:
        """Of the calibration."""
        return self.sequences * int(self.facts["data"]["sequence_length"])

    def describe(self) -> str:
        """In a line, such as "H of 211 linears, 121 tensors of 402.7 MB, over 65,536 tokens"."""
        tensors, size = len({layer["tensor"] for layer in self._layers.values()}), os.path.getsize(self.path)
        return f"H of {len(self._layers)} linears, {tensors} tensors, {megabytes(size)}, over {self.tokens:,} tokens"

    def check_model(self, facts: Mapping[str, Any]) -> None:
        """Raise ValueError unless the file is of the model with these facts (`pipeline.collect.facts_of_model`)."""
        of = self.facts["model"]
        if of["dtype"] != facts["dtype"]:
            raise wrong("statistics", self.path, f"H of the model in {facts['dtype']}: it was in {of['dtype']}")
        if {**of, "name": None} != {**facts, "name": None}:
            named = f", {of['name']}" if of.get("name") else ""
            raise wrong("statistics", self.path, f"H of this model: it is of another one{named}, whose weights differ")

    def check_tokens(self, input_ids: str) -> None:
        """Raise ValueError unless the file is of token ids with this SHA-256."""
        data = self.facts["data"]
        if data["input_ids"] != input_ids:
            size = f"{data['sequences']} x {data.get('sequence_length')} of {', '.join(data.get('sources', ())) or '?'}"
            raise wrong("statistics", self.path, f"H of these calibration tokens: it is of others, {size}")

    def hessians(self, linears: Mapping[str, int], device: torch.device | None) -> dict[str, Hessian]:
        """H of linears, by name, on the device; linears that share one share it here. linears: their in_features.

        Raises ValueError for one that the file has none of, or one of another size.
        """
        found: dict[str, Hessian] = {}
        shared: dict[str, Hessian] = {}
        with safe_open(self.path, framework="pt") as stored:
            for name, width in linears.items():
                key = self.tensor_of(name)
                if key not in shared:
                    H = stored.get_tensor(key)
                    if list(H.shape) != [width, width] or H.dtype != torch.float32:
                        raise self._wrong(f"has {key} as {H.dtype} {list(H.shape)}, not float32 [{width}, {width}]")
                    shared[key] = Hessian(arrays.of_tensor(H.clone() if device is None else H.to(device)))
                found[name] = shared[key]
        return found

    def tensor_of(self, name: str) -> str:
        """What the H of a linear is called in the file."""
        if name not in self._layers:
            raise wrong("statistics", self.path, f"H of {name} too: it has those of {len(self._layers)} other linears")
        return self._layers[name]["tensor"]

    def inputs(
        self, linears: Mapping[str, int], device: torch.device | None, spread: Spread, kept: Any = None
    ) -> LayerInputs:
        """What a pipeline is given of linears; of several ranks each reads those of its own."""
        ranks = dict(spread({name: (self.tensor_of(name),) for name in linears}))
        own = {name: width for name, width in linears.items() if ranks.get(name, group().rank) == group().rank}
        tokens = {name: self._layers[name]["tokens"] for name in linears}
        return LayerInputs(self.hessians(own, device), ranks, tokens, outputs=kept)


class StoredHessians(DataFree):
    """A calibration that is a file: nothing runs, and nothing can be fine-tuned."""

    def __init__(self, statistics: Statistics, device: torch.device | None = None) -> None:
        super().__init__(device)
        self.statistics = statistics

    def of_block(
        self,
        index: int,
        block: torch.nn.Module,
        linears: Mapping[str, torch.nn.Linear],
        outputs: bool,
        spread: Spread = alone,
        pools: Pools = NO_POOLS,
        original: torch.nn.Module | None = None,
    ) -> LayerInputs:
        return self.statistics.inputs(_widths(linears), self._device, spread)

    def of_output(self, model: Any, name: str, spread: Spread = alone, chain: Chain | None = None) -> LayerInputs:
        width = model.get_submodule(name).weight.shape[1]
        return self.statistics.inputs({name: width}, self._device, spread)


class TunedStoredHessians(SequenceCalibration):
    """H of a file, and sequences that run through the model for block fine-tuning alone."""

    def __init__(
        self,
        statistics: Statistics,
        sequences: torch.Tensor,
        config: AqlmConfig,
        batch_size: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(sequences, config, batch_size, device)
        self.statistics, self.device = statistics, device

    def of_block(
        self,
        index: int,
        block: torch.nn.Module,
        linears: Mapping[str, torch.nn.Linear],
        outputs: bool,
        spread: Spread = alone,
        pools: Pools = NO_POOLS,
        original: torch.nn.Module | None = None,
    ) -> LayerInputs:
        inputs = self.inputs_of(index)
        kept = inputs.outputs(index, block) if outputs else None
        try:
            return self.statistics.inputs(_widths(linears), self.device, spread, kept)
        except BaseException:
            if kept is not None:
                kept.close()
            raise

    def pools(self, index: int, block: torch.nn.Module, linears: Mapping[str, torch.nn.Linear]) -> Pools:
        return NO_POOLS

    def of_output(self, model: Any, name: str, spread: Spread = alone, chain: Chain | None = None) -> LayerInputs:
        width = model.get_submodule(name).weight.shape[1]
        return self.statistics.inputs({name: width}, self.device, spread)


def _widths(linears: Mapping[str, torch.nn.Linear]) -> dict[str, int]:
    return {name: linear.in_features for name, linear in linears.items()}
