"""The original's last hidden states for the sequences: computed when they are asked for, or kept."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..model.logits import SplitModel
from ..model.probe import input_device


class Teacher:
    """The original model. sequences: token ids [n, length]. cache: as `FinetuneOptions.cache_teacher`.

    What is kept is computed sequence by sequence, so that it does not depend on what was asked for together.
    """

    def __init__(self, model: Any, sequences: Tensor, cache: str = "none") -> None:
        self.output, self.sequences, self.cache = SplitModel(model, whole=False), sequences, cache
        self._kept: Tensor | None = None
        self._known = [False] * len(sequences)

    @contextlib.contextmanager
    def open(self) -> Iterator[Teacher]:
        """Keeps what is to be kept until the block is left."""
        with contextlib.ExitStack() as stack:
            if self.cache != "none":
                shape = (len(self.sequences), *self._run([0]).shape[1:])
                dtype = self._run([0]).dtype
                if self.cache == "disk":
                    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="aqlm-c-"))
                    count = torch.Size(shape).numel()
                    kept = torch.from_file(f"{folder}/hidden", shared=True, size=count, dtype=dtype)
                    self._kept = kept.view(shape)
                else:
                    self._kept = torch.empty(shape, dtype=dtype)
            stack.callback(setattr, self, "_kept", None)
            yield self

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

    @torch.no_grad()
    def _run(self, numbers: list[int]) -> Tensor:
        return self.output.hidden(self.sequences[numbers])
