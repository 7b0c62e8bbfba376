"""Where a model's tensors are while it is quantized: at home, and a few blocks at a time on the device that computes.

At home, in host memory, is mostly in files: transformers leaves the tensors of a checkpoint where they lie, mapped, so
that a model may be larger than memory. The blocks are the entries of the model's outermost lists of modules.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..io import mapped
from ..io.source import weight_files
from .blocks import is_norm_or_bias


class _Read(NamedTuple):
    """What was read ahead: a tensor, its values at home, which of its versions these were, and their copy there."""

    tensor: Tensor
    home: Tensor
    version: int
    there: Tensor


class Residence:
    """Brings blocks of a model to `device` and back; does nothing where the model is there anyway.

    files: mapped ones that the model lies in, whose pages are given back when a block is done with. moves: whether
    tensors are moved; None: if `device` is another one than the model's.

    A block that comes home is as it was where it is dense: the very tensors it had, however often it is used. What is
    new in it (the tensors of quantized layers) and what may have been trained (norms, biases) is copied. A context
    manager: at the end everything is at home.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        files: Iterable[str | os.PathLike[str]] | None = None,
        moves: bool | None = None,
    ) -> None:
        self.model, self.device = model, device
        self.home = next(model.parameters()).device
        self.moves = self.home != device if moves is None else moves
        self._pages = mapped.MappedFiles(weight_files(model) if files is None else files)
        self._at_home: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}  # by the id of what is on the device
        self._users: dict[int, set[int]] = {}  # the blocks, by id, that it is in
        self._blocks: list[nn.Module] | None = None
        self._uses: dict[int, int] = {}  # of a block, by its id
        self._sizes: dict[int, int] = {}  # bytes of a block as it came
        self._coming: dict[int, Future[dict[int, _Read]]] = {}
        self._reader: ThreadPoolExecutor | None = None
        self._stream: Any = torch.cuda.Stream(device) if self.moves and device.type == "cuda" else None

    def fetch(self, block: nn.Module) -> None:
        """Bring a block to the device; it stays there until it was left as often as fetched."""
        self._uses[id(block)] = self._uses.get(id(block), 0) + 1
        if self._uses[id(block)] > 1:
            return
        self._sizes[id(block)] = sum(tensor.nbytes for tensor in block.parameters())
        if not self.moves:
            return
        coming = self._coming.pop(id(block), None)
        found = coming.result() if coming is not None else {}
        if found and self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
        for tensor in self._tensors(block):
            self._users.setdefault(id(tensor), set()).add(id(block))
            if self._is_away(tensor):
                continue
            self._at_home[id(tensor)] = weakref.ref(tensor), tensor.data
            read = found.get(id(tensor))
            if read is None or not _is_same(read, tensor):  # a block that shares it has written to it meanwhile
                tensor.data = tensor.data.to(self.device, copy=True)
                continue
            if self._stream is not None:
                read.there.record_stream(torch.cuda.current_stream(self.device))
            tensor.data = read.there

    def leave(self, block: nn.Module) -> None:
        """The block is done with, for one `fetch` of it."""
        self._uses[id(block)] -= 1
        if self._uses[id(block)]:
            return
        del self._uses[id(block)]
        for tensor in list(self._tensors(block)) if self.moves else ():
            if not self._is_away(tensor):  # it has become a quantized layer's
                tensor.data = tensor.data.to(self.home)
                continue
            users = self._users[id(tensor)]
            users.discard(id(block))
            if not users:
                _, home = self._at_home.pop(id(tensor))
                tensor.data = tensor.data.to(self.home, copy=True) if is_norm_or_bias(tensor) else home
                del self._users[id(tensor)]
        self._forget(id(block))
        self._pages.copied(self._sizes.pop(id(block)))

    def read_ahead(self, block: nn.Module) -> None:
        """Begin to bring a block that will be fetched; it is read in a thread meanwhile."""
        if not self.moves or self._uses.get(id(block)) or id(block) in self._coming:
            return
        if self._reader is None:
            self._reader = ThreadPoolExecutor(1, "aqlm_c-read-ahead")
        tensors = (tensor for tensor in self._tensors(block) if not self._is_away(tensor))
        wanted = [(tensor, tensor.data, _version(tensor)) for tensor in tensors]  # now, not when the thread comes to it
        self._coming[id(block)] = self._reader.submit(self._read, wanted)

    @contextlib.contextmanager
    def using(self, *blocks: nn.Module) -> Iterator[None]:
        """`fetch` and `leave` around what is done with some blocks, or with `model`: all that is in no block."""
        fetched: list[nn.Module] = []
        try:
            for block in blocks:
                self.fetch(block)
                fetched.append(block)
            yield
        finally:
            for block in fetched:
                self.leave(block)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The model can run as a whole: each block comes for its calls."""
        blocks, handles = self.blocks(), []

        def before(number: int) -> Any:
            def hook(block: nn.Module, _: Any) -> None:
                self.fetch(block)
                if number + 1 < len(blocks):
                    self.read_ahead(blocks[number + 1])

            return hook

        def after(block: nn.Module, _: Any, __: Any) -> None:
            if id(block) in self._uses:
                self.leave(block)

        with self.using(self.model):
            try:
                for number, block in enumerate(blocks):
                    handles.append(block.register_forward_pre_hook(before(number), prepend=True))
                    handles.append(block.register_forward_hook(after, always_call=True))
                yield
            finally:
                for handle in handles:
                    handle.remove()
                self._drop_coming()

    def blocks(self) -> list[nn.Module]:
        """Entries of the outermost lists of modules, once each, until `settle` says which of them come and go."""
        if self._blocks is not None:
            return self._blocks
        lists = {name: module for name, module in self.model.named_modules() if isinstance(module, nn.ModuleList)}
        outer = [
            module
            for name, module in lists.items()
            if not any(name.startswith(f"{other}.") for other in lists if other != name)
        ]
        return list({id(block): block for entries in outer for block in entries}.values())

    def settle(self, blocks: Iterable[nn.Module]) -> None:
        """These are the model's blocks; all else is on the device while the model itself is used."""
        self._blocks = list(blocks)

    def done(self, n_bytes: int) -> None:
        """So many bytes of the model were read where they lie, and are done with for now."""
        self._pages.copied(n_bytes)

    def mapped_bytes(self) -> int:
        """Bytes of the model that lie in mapped files."""
        return mapped.mapped_bytes((parameter.data for parameter in self.model.parameters()), self._pages.files)

    def __enter__(self) -> Residence:
        return self

    def __exit__(self, *exception: object) -> None:
        self._drop_coming()
        for block in [block for block in [*self.blocks(), self.model] if id(block) in self._uses]:
            self._uses[id(block)] = 1
            self.leave(block)
        if self._reader is not None:
            self._reader.shutdown()
            self._reader = None

    def _tensors(self, block: nn.Module) -> Iterator[Tensor]:
        """Each tensor of a block once; of the model itself, those in no block."""
        others = {id(part) for each in self.blocks() for part in each.modules()} if block is self.model else set()
        seen: set[int] = set()
        for module in block.modules():
            for tensor in (*module._parameters.values(), *module._buffers.values()) if id(module) not in others else ():
                if tensor is not None and not tensor.is_meta and id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield tensor

    def _is_away(self, tensor: Tensor) -> bool:
        """Whether it is on the device and its values at home are known: another one may have had its id."""
        known = self._at_home.get(id(tensor))
        return known is not None and known[0]() is tensor

    def _forget(self, block: int) -> None:
        """Drop what a block had on the device and has no more: the dense weights of layers that were quantized."""
        for key, users in list(self._users.items()):
            if block in users:
                users.discard(block)
                if not users:
                    del self._users[key]
                    self._at_home.pop(key, None)

    def _read(self, wanted: list[tuple[Tensor, Tensor, int]]) -> dict[int, _Read]:
        with contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            found = {id(each[0]): _Read(*each, each[1].to(self.device, copy=True)) for each in wanted}
        if self._stream is not None:
            self._stream.synchronize()
        return found

    def _drop_coming(self) -> None:
        for coming in self._coming.values():
            with contextlib.suppress(Exception):  # nobody wants it any more
                coming.result()
        self._coming.clear()


def _is_same(read: _Read, tensor: Tensor) -> bool:
    """Whether what was read is what the tensor still is: `read` keeps its memory, so that nothing else comes there."""
    return read.tensor is tensor and read.home.data_ptr() == tensor.data_ptr() and read.version == _version(tensor)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def common_device(tensors: Sequence[Tensor]) -> torch.device | None:
    """The device that all of them are on; None if there is no such."""
    devices = {tensor.device for tensor in tensors}
    return devices.pop() if len(devices) == 1 else None
