"""Memory of mapped files. transformers leaves a checkpoint's tensors where they lie, in files that are mapped, and
their pages are in memory once they are read. A tensor that is copied out of such a file, packed, quantized or to
another dtype, would be in memory twice for as long as any other tensor lies in it, since the mapping lives that long.
Pages are therefore given back: without that, SmolLM2 at 2x8g8 in bfloat16 took 1.57 times its checkpoint to load, 2.25
times where float16 was cast, and a model could not be larger than memory while it is quantized.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import os
import sys
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

_MADV_DONTNEED = 4  # of Linux
_LEAST, _PARTS, _MOST = 16 << 20, 16, 1 << 30


class MappedFiles:
    """The files that a model's tensors are read from, of which 16 MiB or a sixteenth, and 1 GiB at most, may be in
    memory though it is not needed any more.
    """

    def __init__(self, files: Iterable[str | os.PathLike[str]]) -> None:
        self.files = list(files)
        self._most = min(_MOST, max(_LEAST, sum(map(os.path.getsize, self.files)) // _PARTS))
        self._copied = 0

    def copied(self, n_bytes: int) -> None:
        """So many bytes of the files are in memory as a copy, too, or were read and are done with."""
        self._copied += n_bytes
        if self.files and self._copied >= self._most:
            give_back(self.files)
            self._copied = 0

    def cast(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """A copy in another dtype."""
        if tensor.ndim == 0:
            return tensor.to(dtype)
        result = torch.empty_like(tensor, dtype=dtype)
        rows = max(1, self._most * len(tensor) // max(1, tensor.nbytes))
        for to, part in zip(result.split(rows), tensor.split(rows), strict=True):
            to.copy_(part)
            self.copied(part.nbytes)
        return result


def give_back(files: Iterable[str | os.PathLike[str]] = ()) -> None:
    """Give back the pages of mapped `files`, to be read again where tensors still lie in them, and what malloc keeps.

    That is safe where nobody wrote to the mapping, since what is used again is read again. One that was ever written to
    stays as it is, and so does everything on other systems than Linux.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.PyDLL(None)  # holds the GIL, so that nobody unmaps a file meanwhile
    paths = {os.path.realpath(file) for file in files}
    for begin, end in list(_unwritten(paths)):
        libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_DONTNEED)
    if hasattr(libc, "malloc_trim"):  # glibc
        libc.malloc_trim(ctypes.c_size_t(0))


def mapped_bytes(tensors: Iterable[Tensor], files: Iterable[str | os.PathLike[str]]) -> int:
    """Bytes of the tensors that lie in mapped `files`, and in no other memory."""
    if not sys.platform.startswith("linux"):
        return 0
    paths = {os.path.realpath(file) for file in files}
    ranges = sorted(_unwritten(paths)) if paths else []
    begins = [begin for begin, _ in ranges]

    def is_mapped(tensor: Tensor) -> bool:
        place = bisect.bisect_right(begins, tensor.data_ptr()) - 1
        return place >= 0 and tensor.data_ptr() < ranges[place][1]

    return sum(tensor.nbytes for tensor in tensors if tensor.device.type == "cpu" and is_mapped(tensor))


def _unwritten(paths: set[str]) -> Iterator[tuple[int, int]]:
    """Addresses of this process's mappings of `paths` that hold no page but the file's own."""
    place: tuple[int, int] | None = None
    with contextlib.suppress(OSError), open("/proc/self/smaps", "rb") as smaps:
        for line in smaps:
            first, *fields = line.rstrip(b"\n").split(maxsplit=5)
            if not first.endswith(b":"):  # of a mapping: addresses, permissions, offset, device, inode and path
                found = len(fields) == 5 and os.fsdecode(fields[4]) in paths
                begin, _, end = first.partition(b"-")
                place = (int(begin, 16), int(end, 16)) if found else None
            elif place and first == b"Anonymous:" and fields[0] == b"0":
                yield place
