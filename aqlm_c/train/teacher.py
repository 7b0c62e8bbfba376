"""The original's last hidden states for the sequences: computed when they are asked for, or kept."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import group
from ..model.logits import SplitModel
from ..model.probe import input_device


class Teacher:
    """The original model. sequences: token ids [n, length]. cache: as `FinetuneOptions.cache_teacher`. blocks: names of
    its blocks, whose memory is given back once all is kept. shared: whether it is `sharded`, so that all ranks have
    to run it equally often.

    What is kept is computed sequence by sequence, so that it does not depend on what was asked for together.
    """

    def __init__(
        self, model: Any, sequences: Tensor, cache: str = "none", blocks: Sequence[str] = (), shared: bool = False
    ) -> None:
        self.output, self.sequences, self.cache = SplitModel(model, whole=False), sequences, cache
        self._blocks, self._shared = list(blocks), shared
        self._kept: Tensor | None = None
        self._known = [False] * len(sequences)

    @contextlib.contextmanager
    def open(self) -> Iterator[Teacher]:
        """Keeps what is to be kept until the block is left."""
        with contextlib.ExitStack() as stack:
            if self.cache != "none":
                first = self._run([0])
                shape = (len(self.sequences), *first.shape[1:])
                if self.cache == "disk":
                    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="aqlm-c-"))
                    count = torch.Size(shape).numel()
                    kept = torch.from_file(f"{folder}/hidden", shared=True, size=count, dtype=first.dtype)
                    self._kept = kept.view(shape)
                else:
                    self._kept = torch.empty(shape, dtype=first.dtype)
            stack.callback(setattr, self, "_kept", None)
            yield self

    def fill(self, numbers: Sequence[int]) -> None:
        """Keep all that this rank will ask for, if anything is kept; the blocks then leave the device."""
        if self._kept is None:
            return
        most = max(group().gather(len(numbers)))
        for number in numbers:
            self.hidden([number])
        self.keep_up(most - len(numbers))
        model: Any = self.output.model
        for name in self._blocks:
            if self._shared:  # a copy, whose blocks nothing else has
                model.set_submodule(name, nn.Module())
            else:
                model.get_submodule(name).to("cpu")

    def keep_up(self, passes: int) -> None:
        """Run as often as other ranks do, of which one runs `passes` times more, where it takes all of them."""
        for _ in range(passes if self._shared else 0):
            self._run([0])

    @torch.no_grad()
    def hidden(self, numbers: list[int]) -> Tensor:
        """[len(numbers), length, width] of the sequences of these numbers."""
        if self._kept is None:
            return self._run(numbers)
        for number in numbers:
            if not self._known[number]:
                self._kept[number] = self._run([number])[0]
                self._known[number] = True
        return self._kept[numbers].to(input_device(self.output.model))

    @property
    def is_run(self) -> bool:
        """Whether `hidden` runs the model."""
        return self._kept is None

    @torch.no_grad()
    def states(self, ids: Tensor) -> Tensor:
        """[n, length, width] of sequences [n, length], by running the model."""
        return self.output.hidden(ids)

    def _run(self, numbers: list[int]) -> Tensor:
        return self.states(self.sequences[numbers])


def sharded(original: nn.Module, blocks: Sequence[str], device: torch.device) -> Any:
    """A copy of a model in CPU memory, without gradients, that runs on `device`: each rank has a share of each of
    `blocks`, which is whole while it runs (torch's FSDP2), and all else. All ranks run it at the same time.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (group().size,))
    own = {id(parameter): nn.Parameter(parameter.detach(), requires_grad=False) for parameter in original.parameters()}
    model = copy.deepcopy(original, own)  # the parameters' memory is the original's
    for name in blocks:
        block = model.get_submodule(name).to(device)
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
        block.register_forward_hook(_reshard)  # a block that no other is in would stay whole
    inside = tuple(f"{name}." for name in blocks)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not name.startswith(inside):
            tensor.data = tensor.data.to(device)
    return model


def _reshard(block: Any, _arguments: Any, _output: Any) -> None:
    block.reshard()


def moved_bytes(original: nn.Module, blocks: Sequence[str], shared: bool, kept: bool) -> int:
    """What the original will take of the device's memory beside what it takes: less than 0 where it goes from there.

    shared: it is `sharded`, from CPU memory; kept: its states are, and its blocks leave.
    """
    sizes = [sum(p.nbytes for p in original.get_submodule(name).parameters()) for name in blocks]
    if not shared:
        return -sum(sizes) if kept else 0
    whole = sum(parameter.nbytes for parameter in original.parameters())
    return whole - sum(sizes) + (0 if kept else sum(sizes) // group().size + max(sizes, default=0))
