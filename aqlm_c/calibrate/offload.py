"""Activations of a device: kept there as far as there is room, else in host memory, else on disk."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections import Counter, deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .spill import SpilledTensors

_PORTABLE = 1  # cudaHostRegisterPortable: for every GPU


class Room:
    """What all activations of a run may take together: bytes on `device`, bytes of host memory (None: any number), and
    for the rest a directory.

    Host memory is page-locked, so that copies run beside the kernels; its buffers are used again from block to block,
    since locking takes longer than copying. A context manager: leaving it frees them.
    """

    def __init__(
        self,
        device: torch.device,
        device_bytes: int,
        host_bytes: int | None = None,
        directory: str | os.PathLike[str] | None = None,
    ) -> None:
        self.device, self.directory = device, directory
        self.device_left, self.host_left = device_bytes, host_bytes
        self._free: dict[int, list[Tensor]] = {}  # buffers, by their bytes
        self._locked: list[Tensor] = []
        self._locks = True  # until the system refuses
        on_gpu = device.type == "cuda"
        self.reading: Any = torch.cuda.Stream(device) if on_gpu else None
        self.writing: Any = torch.cuda.Stream(device) if on_gpu else None

    def take_on_device(self, n_bytes: int) -> bool:
        """Whether there is room on the device, which is then taken."""
        if n_bytes > self.device_left:
            return False
        self.device_left -= n_bytes
        return True

    def take_buffer(self, n_bytes: int) -> Tensor | None:
        """A buffer of host memory, uint8 [n_bytes]; None if there is no room."""
        if self._free.get(n_bytes):
            return self._free[n_bytes].pop()
        if self.host_left is not None:
            if n_bytes > self.host_left:
                return None
            self.host_left -= n_bytes
        buffer = torch.empty(n_bytes, dtype=torch.uint8)
        if self.device.type == "cuda" and n_bytes and self._locks:
            runtime: Any = torch.cuda.cudart()
            self._locks = int(runtime.cudaHostRegister(buffer.data_ptr(), n_bytes, _PORTABLE)) == 0
            if self._locks:
                self._locked.append(buffer)
            else:  # copies are slower; CUDA keeps the error for the next who asks
                with contextlib.suppress(RuntimeError):
                    torch.zeros(1, device=self.device)
        return buffer

    def holds(self, sizes: Iterable[int]) -> bool:
        """Whether tensors of so many bytes each would all be in memory, on the device or the host."""
        on_device, in_host = self.device_left, self.host_left
        free = Counter({n_bytes: len(buffers) for n_bytes, buffers in self._free.items()})
        for n_bytes in sizes:
            if n_bytes <= on_device:
                on_device -= n_bytes
            elif free[n_bytes]:
                free[n_bytes] -= 1
            elif in_host is not None:
                if n_bytes > in_host:
                    return False
                in_host -= n_bytes
        return True

    def give_buffer(self, buffer: Tensor) -> None:
        """Give a buffer back, for others."""
        self._free.setdefault(buffer.nbytes, []).append(buffer)

    def close(self) -> None:
        """Free the buffers; nothing may be kept in them any more."""
        if self._locked:
            torch.cuda.synchronize(self.device)
            runtime: Any = torch.cuda.cudart()
            for buffer in self._locked:
                runtime.cudaHostUnregister(buffer.data_ptr())
        self._locked.clear()
        self._free.clear()


@dataclasses.dataclass
class _InHost:
    """A tensor in host memory. Of a GPU: when it was written there, and when it was last read."""

    tensor: Tensor
    buffer: Tensor
    written: Any = None
    read: Any = None

    @property
    def nbytes(self) -> int:
        return self.buffer.nbytes


class OffloadedTensors:
    """A list of tensors of a device; what is read is there. The next of those that `expect` names, or the one after the
    last where they are read in order, is copied while this one is worked on.
    """

    def __init__(self, room: Room) -> None:
        self.room = room
        self._entries: list[Tensor | _InHost | int] = []  # int: place on disk
        self._shapes: list[torch.Size] = []
        self._disk: SpilledTensors | None = None
        self._coming: dict[int, tuple[Tensor, Any]] = {}  # with the event of its arrival
        self._order: deque[int] = deque()
        self._last = -1

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Tensor:
        entry = self._entries[index]
        tensor, arrived = self._coming.pop(index) if index in self._coming else self._copy(entry)
        if arrived is not None:
            stream = torch.cuda.current_stream(self.room.device)
            stream.wait_event(arrived)
            tensor.record_stream(stream)
        self._begin_next(index)
        return tensor

    def __setitem__(self, index: int, tensor: Tensor) -> None:
        self._coming.pop(index, None)
        entry, tensor = self._entries[index], tensor.detach()
        same = self._shapes[index] == tensor.shape
        if isinstance(entry, _InHost) and same and entry.tensor.dtype == tensor.dtype:
            self._write(entry, tensor)
        elif isinstance(entry, Tensor) and entry.nbytes == tensor.nbytes:
            self._entries[index] = tensor
        elif isinstance(entry, int) and self._disk is not None:
            self._disk[entry] = tensor
        else:
            self._release(entry)
            self._entries[index] = self._store(tensor)
        self._shapes[index] = tensor.shape

    def append(self, tensor: Tensor) -> None:
        self._entries.append(self._store(tensor.detach()))
        self._shapes.append(tensor.shape)

    def expect(self, order: Iterable[int]) -> None:
        """The tensors that will be read next, in this order."""
        self._order = deque(order)
        if self._order:
            self._begin(self._order[0])

    def prefetch(self, index: int) -> None:
        """A tensor is read soon: it begins to come."""
        self._begin(index)

    def shapes(self) -> list[torch.Size]:
        """Of the tensors, without reading them."""
        return list(self._shapes)

    def empty(self) -> OffloadedTensors:
        """A place for other tensors, in the same room."""
        return OffloadedTensors(self.room)

    def has_room(self) -> bool:
        """Whether others of the same sizes would be in memory too; false where some of these are not."""
        sizes = [entry.nbytes for entry in self._entries if not isinstance(entry, int)]
        return self._disk is None and self.room.holds(sizes)

    def clear(self) -> None:
        """Give the room back."""
        self._coming.clear()
        self._order.clear()
        if self.room.writing is not None:
            self.room.writing.synchronize()  # no buffer is given away that is still written
            self.room.reading.synchronize()
        for entry in self._entries:
            self._release(entry)
        self._entries.clear()
        self._shapes.clear()
        if self._disk is not None:
            self._disk.clear()
            self._disk = None

    def _store(self, tensor: Tensor) -> Tensor | _InHost | int:
        if self.room.take_on_device(tensor.nbytes):
            return tensor
        buffer = self.room.take_buffer(tensor.nbytes)
        if buffer is not None:
            entry = _InHost(buffer.view(tensor.dtype).view(tensor.shape), buffer)
            self._write(entry, tensor)
            return entry
        if self.room.directory is None:
            raise MemoryError(f"activations: got no room for {tensor.nbytes} bytes more, expected a directory")
        if self._disk is None:
            self._disk = SpilledTensors(self.room.directory)
        self._disk.append(tensor)
        return len(self._disk) - 1

    def _release(self, entry: Tensor | _InHost | int) -> None:
        if isinstance(entry, Tensor):
            self.room.device_left += entry.nbytes
        elif isinstance(entry, _InHost):
            self.room.give_buffer(entry.buffer)

    def _write(self, entry: _InHost, tensor: Tensor) -> None:
        stream = self.room.writing
        if stream is None:
            entry.tensor.copy_(tensor)
            return
        stream.wait_stream(torch.cuda.current_stream(self.room.device))
        if entry.read is not None:
            stream.wait_event(entry.read)
        with torch.cuda.stream(stream):
            entry.tensor.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)
        entry.written = stream.record_event()

    def _copy(self, entry: Tensor | _InHost | int) -> tuple[Tensor, Any]:
        """The tensor on the device and the event of its arrival there, None if it is there."""
        if isinstance(entry, Tensor):
            return entry, None
        if isinstance(entry, int):
            assert self._disk is not None, "it was written there"
            return self._disk[entry], None
        stream = self.room.reading
        if stream is None:
            return entry.tensor.clone(), None
        if entry.written is not None:
            stream.wait_event(entry.written)
        with torch.cuda.stream(stream):
            tensor = entry.tensor.to(self.room.device, non_blocking=True)
        entry.read = stream.record_event()
        return tensor, entry.read

    def _begin_next(self, index: int) -> None:
        while self._order:
            if self._order.popleft() == index:
                if self._order:
                    self._begin(self._order[0])
                break
        else:
            if index == self._last + 1 and index + 1 < len(self._entries):
                self._begin(index + 1)
        self._last = index

    def _begin(self, index: int) -> None:
        """Begin to copy a tensor; no more than two are underway."""
        if isinstance(self._entries[index], _InHost) and index not in self._coming:
            while len(self._coming) > 1:
                self._coming.pop(next(iter(self._coming)))
            self._coming[index] = self._copy(self._entries[index])
