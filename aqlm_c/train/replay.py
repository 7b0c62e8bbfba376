"""Work on a GPU that is recorded once and replayed, as a CUDA graph: launching takes longer than short kernels do."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..errors import one_line

log = logging.getLogger("aqlm_c")


@contextlib.contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """What runs inside is on a stream that graphs can be recorded on, also of backward passes: gradients arrive on the
    stream on which a parameter was first used.
    """
    before = torch.cuda.current_stream(device)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(before)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        before.wait_stream(stream)
        stream.synchronize()  # memory of one stream may be given out again on the other


class Replayed:
    """What a function launches on a GPU, all of it without asking for a result: as a CUDA graph from its second call
    on, or once `record` was called after the first one. Where that cannot be recorded it is launched as before, after
    `forget`, which is to undo what the attempt left behind outside of the GPU. pool: of another one's memory, which
    never runs at the same time.
    """

    def __init__(
        self,
        what: str,
        run: Callable[[], None],
        device: torch.device,
        forget: Callable[[], None] | None = None,
        pool: Replayed | None = None,
    ) -> None:
        self._what, self._run, self._forget, self._calls = what, run, forget, 0
        self._pool = pool
        self._graph = torch.cuda.CUDAGraph() if device.type == "cuda" else None

    def __call__(self) -> None:
        self._calls += 1
        if self._graph is None or self._calls == 1:
            return self._run()
        if self._calls == 2:
            self.record()
        if self._graph is None:
            return self._run()
        self._graph.replay()

    def record(self) -> bool:
        """Whether it is replayed from now on."""
        self._calls = max(self._calls, 2)
        if self._graph is None:
            return False
        stream = torch.cuda.current_stream()
        own = None if stream == torch.cuda.default_stream() else stream
        shared = self._pool._graph if self._pool is not None else None
        try:
            with torch.cuda.graph(self._graph, pool=shared.pool() if shared is not None else None, stream=own):
                self._run()
        except RuntimeError as error:  # slower, not wrong: of what is recorded nothing has run
            log.info("%s without a CUDA graph: %s", self._what, one_line(error))
            self._graph = None
            if self._forget is not None:
                self._forget()
        return self._graph is not None


class ReplayedPass:
    """A function of some tensors, of the shapes and dtypes of `inputs`, that returns one number, float64. One call of
    it, whose effects `forget` undoes, is made here; `works`: whether it is replayed then.
    """

    def __init__(
        self,
        run: Callable[..., Tensor],
        inputs: tuple[Tensor, ...],
        device: torch.device,
        forget: Callable[[], None],
        pool: ReplayedPass | None = None,
    ) -> None:
        self._inputs = tuple(one.to(device, copy=True) for one in inputs)
        self._found = torch.zeros((), dtype=torch.float64, device=device)

        def once() -> None:
            self._found.copy_(run(*self._inputs))

        shared = None if pool is None else pool._replayed
        self._replayed: Replayed = Replayed("passes are made", once, device, forget, shared)
        self._replayed()
        forget()
        self.works = self._replayed.record()

    def takes(self, inputs: tuple[Tensor, ...]) -> bool:
        """Whether inputs have the shapes and dtypes that were recorded."""
        return [(x.shape, x.dtype) for x in inputs] == [(x.shape, x.dtype) for x in self._inputs]

    def __call__(self, *inputs: Tensor) -> Tensor:
        for place, one in zip(self._inputs, inputs, strict=True):
            place.copy_(one if one.is_cuda else one.pin_memory(), non_blocking=True)
        self._replayed()
        return self._found.clone()
