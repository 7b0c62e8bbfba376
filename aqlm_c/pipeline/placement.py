"""Where a run works, and how much memory it may take there."""

from __future__ import annotations

import dataclasses
from typing import Any, TypedDict

import torch

from ..core.runtime import check_kernels
from ..distributed import device_of_rank
from ..model.residence import common_device
from ..units import parse_size


class Placing(TypedDict, total=False):
    """Options of `quantize_model`: the fields of `Placement`."""

    device: str | torch.device | None
    memory_limit: int | str | None
    device_memory_limit: int | str | None


@dataclasses.dataclass(frozen=True)
class Placement:
    """device: that computes, "cpu", "cuda", "cuda:N" or "auto"; None: where the model is. Limits: bytes, or text such
    as "8GiB", of host memory and of the device's.
    """

    device: str | torch.device | None = None
    memory_limit: int | str | None = None
    device_memory_limit: int | str | None = None

    def __post_init__(self) -> None:
        _ = self.limits  # which are refused here, before any work

    @property
    def limits(self) -> tuple[int | None, int | None]:
        """Bytes of host memory and of the device's."""
        host, device = self.memory_limit, self.device_memory_limit
        return (
            None if host is None else parse_size("memory_limit", host),
            None if device is None else parse_size("device_memory_limit", device),
        )

    def find(self, model: Any) -> torch.device:
        """The device, with its number; raises ValueError for one that is not there or for which there are no kernels,
        and for a model that does not lie on one device.
        """
        own = common_device([parameter.data for parameter in model.parameters()])
        if own is None or own.type not in ("cpu", "cuda"):
            found = sorted({str(parameter.device) for parameter in model.parameters()})
            raise ValueError(f"model: got one on {', '.join(found)}, expected cpu, or a GPU, for all of it")
        device = own if self.device is None else device_of_rank(str(self.device))
        check_kernels(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        return device
