"""Threads and instruction set of the C core that quantizes."""

from __future__ import annotations

from .. import _core

get_num_threads = _core.get_num_threads
get_isa = _core.get_isa


def set_threads(threads: int | None) -> None:
    """Set the threads of torch and of the C core; None leaves them as they are."""
    if threads is None:
        return
    import torch

    torch.set_num_threads(threads)
    _core.set_num_threads(threads)
