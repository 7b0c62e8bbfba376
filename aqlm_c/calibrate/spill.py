"""Activations on disk, where memory does not hold them."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable

import torch


class SpilledTensors:
    """A list of tensors kept in a file of `directory`: reading one gives a new tensor with the bits that were written.

    The file has no name (it is removed as soon as it is open), so that its space is free again however the
    process ends. Raises OSError naming the directory if it cannot be written or is full.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = directory
        self._entries: list[tuple[int, torch.Size, torch.dtype, torch.device]] = []  # where in the file, what
        self._end = 0
        try:
            self._file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115
        except OSError as error:
            raise self._failed(error) from None

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> torch.Tensor:
        offset, shape, dtype, device = self._entries[index]
        tensor = torch.empty(shape, dtype=dtype)  # aligned as every tensor, so that products give the same bits
        self._transfer(self._file.readinto, offset, tensor)
        return tensor.to(device)

    def __setitem__(self, index: int, tensor: torch.Tensor) -> None:
        offset, shape, dtype, _ = self._entries[index]
        if tensor.nbytes > math.prod(shape) * dtype.itemsize:
            offset = self._end
        self._entries[index] = self._write(offset, tensor)

    def shapes(self) -> list[torch.Size]:
        """Of the tensors, without reading them."""
        return [shape for _, shape, _, _ in self._entries]

    def empty(self) -> SpilledTensors:
        """A place for other tensors, in the same directory."""
        return SpilledTensors(self.directory)

    def append(self, tensor: torch.Tensor) -> None:
        self._entries.append(self._write(self._end, tensor))

    def clear(self) -> None:
        """Give the space back; nothing can be stored any more."""
        self._entries.clear()
        self._file.close()

    def _write(self, offset: int, tensor: torch.Tensor) -> tuple[int, torch.Size, torch.dtype, torch.device]:
        try:
            self._transfer(self._file.write, offset, tensor.detach().to("cpu").contiguous())
        except OSError as error:
            raise self._failed(error) from None
        self._end = max(self._end, offset + tensor.nbytes)
        return offset, tensor.shape, tensor.dtype, tensor.device

    def _transfer(self, call: Callable[[memoryview], int], offset: int, tensor: torch.Tensor) -> None:
        view = tensor.view(-1).view(torch.uint8).numpy().data
        self._file.seek(offset)
        while view:  # one call moves 2 GiB at most
            moved = call(view)
            if not moved:
                raise OSError(f"{self.directory}: the activations ended early")
            view = view[moved:]

    def _failed(self, error: OSError) -> OSError:
        return OSError(error.errno, f"{self.directory}: cannot keep activations here: {error.strerror}")
