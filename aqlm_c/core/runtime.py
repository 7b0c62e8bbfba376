"""Threads and instruction set of the C core that quantizes; devices that models run on."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .. import _core
from ..errors import device_name, one_line, wrong
from ..units import binary_size

if TYPE_CHECKING:
    import torch

get_num_threads = _core.get_num_threads
get_isa = _core.get_isa


def set_threads(threads: int | None) -> None:
    """Set the threads of torch and of the C core; None leaves them as they are."""
    if threads is None:
        return
    import torch

    torch.set_num_threads(threads)
    _core.set_num_threads(threads)


def find_device(name: str, argument: str = "device") -> torch.device:
    """The device called "cpu", "cuda" or "cuda:N"; "auto" is the first GPU that our kernels can use, else the CPU.

    Raises ValueError, naming `argument`, for another name and for a GPU that is not there.
    """
    import torch

    from .extensions import has_cuda

    device_name(argument, name)
    count = torch.cuda.device_count()
    if name in ("cpu", "auto"):
        return torch.device("cuda" if name == "auto" and count and has_cuda else "cpu")
    if not count:
        raise ValueError(f"{argument}: got {name!r}, expected cpu or auto, since no CUDA device is visible")
    if int(name.partition(":")[2] or 0) >= count:
        raise wrong(argument, name, f"one of cuda:0 to cuda:{count - 1}")
    return torch.device(name)


def kind_of_device(device: torch.device) -> str:
    """What results depend on: "cpu", or the name of a GPU."""
    import torch

    return device.type if device.type != "cuda" else torch.cuda.get_device_name(device)


def synchronize(device: torch.device | None) -> None:
    """Wait for what a GPU still works on; nothing on a CPU."""
    import torch

    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def free_device_memory(device: torch.device) -> int:
    """Bytes of a GPU that this process can use: what is free, and what its tensors have and do not use."""
    import torch

    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + int(kept)


def _refused_memory(device: torch.device) -> int:
    """How often torch did not have the memory of a GPU that was asked for."""
    import torch

    return int(torch.cuda.memory_stats(device).get("num_ooms", 0))


@contextlib.contextmanager
def working_on(device: torch.device, limit: int | None) -> Iterator[None]:
    """A GPU is torch's current one, and tensors take no more than `limit` bytes there, None being all there are;
    ValueError where they would, naming device_memory_limit, or device where there is none.

    What its libraries hold beside tensors, some 100 MiB, is not counted.
    """
    import torch

    if device.type != "cuda":
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    if limit is not None:
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
    before = _refused_memory(device)
    try:
        with torch.cuda.device(device):
            yield
    except RuntimeError as error:
        if not isinstance(error, torch.cuda.OutOfMemoryError) and _refused_memory(device) == before:
            raise  # where our ops asked for it, torch's stable ABI knows no error but this
        name = "device" if limit is None else "device_memory_limit"
        raise ValueError(
            f"{name}: got {binary_size(limit or total)}, of which the work needs more than was estimated, "
            "expected more, shorter sequences, a smaller finetune_batch_size or less that is quantized at once "
            f"({one_line(error)[:200]})"
        ) from error
    finally:
        if limit is not None:
            torch.cuda.set_per_process_memory_fraction(1.0, device)


def peak_device_memory(device: torch.device) -> int:
    """Most bytes of tensors that a GPU has held for this process so far, those that are kept free among them; 0 on a
    CPU.
    """
    import torch

    return int(torch.cuda.max_memory_reserved(device)) if device.type == "cuda" else 0


def check_kernels(device: torch.device) -> None:
    """Raise ValueError for a GPU on which a quantized model cannot run, since this package was built without it."""
    from .extensions import has_cuda

    if device.type == "cuda" and not has_cuda:
        raise ValueError(
            f"device: got {str(device)!r}, expected cpu: aqlm_c was built without its kernels for GPUs; build it again "
            "where nvcc is found (CUDA_HOME)"
        )


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """The same bits in every run on one kind of device, of torch's attention on a GPU too."""
    import torch

    memory: Any = torch.utils.deterministic  # what is filled with NaN need not be
    asked, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled, memory.fill_uninitialized_memory = memory.fill_uninitialized_memory, False
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic")
            yield
    finally:
        torch.use_deterministic_algorithms(asked, warn_only=warned)
        memory.fill_uninitialized_memory = filled
