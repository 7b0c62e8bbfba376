"""The discrete steps of PV-Tuning (arXiv 2405.14852): codes of a few groups change, towards where gradients lead.

Each layer has a buffer B, float32, that starts at the decoded weight Wq and is trained by the gradient to Wq. After a
step the groups with the largest |B - Wq| are encoded again to B. What is kept is B - Wq, not B: as codebooks and scales
are trained beside it, B has to follow what their steps do to Wq (else the two drift apart, and the model gets worse),
and of a buffer that follows the difference stays as it is.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..config import AqlmOptions, FinetuneOptions
from ..core import verbs
from ..errors import one_line
from ..methods.aqlm import search_options
from ..nn import ops
from .student import TunedWeight

log = logging.getLogger("aqlm_c")

_EPS = 1e-12  # of Adam: gradients to single weights are small


@dataclasses.dataclass
class Changes:
    """What discrete steps did: groups that have other codes, of all that there are."""

    changed: int = 0
    groups: int = 0

    @property
    def fraction(self) -> float:
        return self.changed / max(1, self.groups)


class _Replayed:
    """What a function launches on a GPU, all of it without asking for a result: as a CUDA graph from its second call
    on. A discrete step is thousands of short kernels, whose launches took three times as long as they did.
    """

    def __init__(self, run: Callable[[], None], device: torch.device) -> None:
        self._run, self._calls = run, 0
        self._graph = torch.cuda.CUDAGraph() if device.type == "cuda" else None

    def __call__(self) -> None:
        self._calls += 1
        if self._graph is None or self._calls == 1:
            return self._run()
        if self._calls == 2:
            try:
                with torch.cuda.graph(self._graph):
                    self._run()
            except RuntimeError as error:  # slower, not wrong: of what is recorded nothing has run
                log.warning("codes are changed without a CUDA graph: %s", one_line(error))
                self._graph = None
                return self._run()
        self._graph.replay()


class CodeTuning:
    """Codes of `weights` in training; their gradients are gathered in `TunedWeight.gradient`.

    Raises ValueError naming a layer whose codes cannot be searched.
    """

    def __init__(self, weights: Sequence[TunedWeight], options: FinetuneOptions) -> None:
        self.weights, self.options = list(weights), options
        self.offsets: list[nn.Parameter] = []  # B - Wq [out, in]
        self._search: list[tuple[int, bool]] = []
        self._rates: list[float] = []
        for weight in self.weights:
            format = weight.layer.format
            if format.out_group_size != 1:
                raise ValueError(
                    f"pv: got {weight.names[0]} of {format.scheme}, expected an out_group_size of 1 to search its codes"
                )
            self._search.append(search_options(format, AqlmOptions(beam_size=options.pv_beam_size)))
            weight.own_codes()
            dense = weight.decoded(torch.float32)
            self._rates.append(options.pv_learning_rate * float(dense.square().mean().sqrt()))
            weight.gradient = torch.zeros_like(dense)
            self.offsets.append(nn.Parameter(torch.zeros_like(dense)))
            self.offsets[-1].grad = weight.gradient
        groups = [{"params": [offset], "lr": rate} for offset, rate in zip(self.offsets, self._rates, strict=True)]
        betas = (options.pv_beta1, options.pv_beta2)
        fused = bool(groups) and self.offsets[0].device.type == "cuda"
        self.optimizer = torch.optim.Adam(groups, betas=betas, eps=_EPS, fused=fused or None)
        self.looked_at = self.codes()
        self.refused = 0  # codes that were undone
        device = weights[0].codes.device if weights else torch.device("cpu")
        self._changed, self._groups = torch.zeros((), dtype=torch.int64, device=device), 0
        self._encode_all = _Replayed(self._encode_each, device)

    def settle(self, divisor: float) -> None:
        """Divide the gradients, of which `Student.settle` has made use, by what they are sums over."""
        for weight in self.weights:
            assert weight.gradient is not None
            weight.gradient.div_(divisor)

    @torch.no_grad()
    def leave(self) -> None:
        """Buffers that do not follow: before codebooks and scales change."""
        for weight, offset in zip(self.weights, self.offsets, strict=True):
            if not self.options.pv_follow:
                offset.add_(weight.decoded(torch.float32))

    @torch.no_grad()
    def step(self, rate: float, changes: bool) -> None:
        """A step of Adam for the buffers and, if `changes`, of codes towards them; then no gradients are left.

        rate: of the schedule. Codebooks and scales have made theirs.
        """
        if not self.options.pv_follow:
            for weight, offset in zip(self.weights, self.offsets, strict=True):
                offset.sub_(weight.decoded(torch.float32))
        for group, own in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = own * rate
        self.optimizer.step()
        self._groups += sum(weight.codes.shape[0] * weight.codes.shape[1] for weight in self.weights)
        if changes:
            self._encode_all()
        for weight in self.weights:
            assert weight.gradient is not None
            weight.gradient.zero_()

    def _encode_each(self) -> None:
        for weight, offset, search in zip(self.weights, self.offsets, self._search, strict=True):
            self._encode(weight, offset.detach(), search)

    def _encode(self, weight: TunedWeight, offset: Tensor, search: tuple[int, bool]) -> None:
        """Encode the groups that are farthest from the buffer."""
        options, (out, groups, K) = self.options, weight.codes.shape
        g, nbits = weight.layer.in_group_size, weight.layer.nbits_per_codebook
        of_groups, of_codes = offset.view(-1, g), weight.codes.view(-1, K)
        count = round(options.pv_fraction * out * groups)
        if not count:
            return
        farthest = of_groups.square().sum(1).topk(count, sorted=False).indices.sort().values
        scales = weight.scales[farthest // groups]
        before, distance = of_codes[farthest], of_groups[farthest]
        now = ops.decode_rows(before.view(-1, 1, K), weight.codebooks, scales)
        codes = verbs.encode_groups(
            torch.as_tensor(verbs.codes_from_disk(before.view(-1, 1, K), nbits)),
            now + distance,
            weight.codebooks.squeeze(2),
            scales.view(-1),
            *search,
        )
        after = torch.as_tensor(verbs.codes_to_disk(codes.view(-1, 1, K), nbits))
        moved = ops.decode_rows(after, weight.codebooks, scales) - now
        after = after.view(-1, K)
        chosen = (after != before).any(1)
        if options.pv_trust_ratio:
            most = (options.pv_trust_ratio * weight.decoded(torch.float32).norm()).square()
            chosen &= _within(moved.square().sum(1), most)
        chosen = chosen[:, None]
        of_codes.index_copy_(0, farthest, torch.where(chosen, after, before))
        of_groups.index_copy_(0, farthest, torch.where(chosen, distance - moved, distance))
        weight.decoder.index_anew()
        self._changed += chosen.sum()

    def codes(self) -> list[Tensor]:
        """A copy of all."""
        return [weight.codes.clone() for weight in self.weights]

    @property
    def changes(self) -> Changes:
        """Since the last look."""
        return Changes(int(self._changed), self._groups)

    @changes.setter
    def changes(self, changes: Changes) -> None:
        self._groups = changes.groups
        self._changed.fill_(changes.changed)

    def look(self) -> None:
        """Codes are found good: they are what `undo` goes back to."""
        self.looked_at, self.changes = self.codes(), Changes()

    @torch.no_grad()
    def undo(self) -> list[Tensor]:
        """Go back to the codes of the last look; the codes that there were, for `take`."""
        codes = self.codes()
        self.take(self.looked_at)
        return codes

    @torch.no_grad()
    def forget(self, codes: Iterable[Tensor]) -> None:
        """The buffers of groups whose codes were undone, `codes` being what these were, start anew at the weight."""
        for weight, offset, undone in zip(self.weights, self.offsets, codes, strict=True):
            same = (weight.codes == undone).all(-1, keepdim=True)
            offset.view(*same.shape[:2], -1).mul_(same)
            self.refused += int(same.numel() - same.sum())

    def take(self, codes: Sequence[Tensor]) -> None:
        for weight, one in zip(self.weights, codes, strict=True):
            weight.set_codes(one)

    def state(self) -> dict[str, Tensor]:
        """What goes on from one process to another."""
        found = {}
        for i, offset in enumerate(self.offsets):
            found[f"pv.{i}.offset"] = offset.detach()
            found |= {f"pv.{i}.{name}": value for name, value in self.optimizer.state[offset].items()}
            found[f"pv.{i}.looked_at"] = self.looked_at[i]
        return found

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        for i, offset in enumerate(self.offsets):
            offset.copy_(state[f"pv.{i}.offset"])
            load_moments(self.optimizer, offset, f"pv.{i}.", state)
        self.looked_at = [state[f"pv.{i}.looked_at"].to(weight.codes.device) for i, weight in enumerate(self.weights)]


def _within(squares: Tensor, most: Tensor) -> Tensor:
    """Which of these, the largest first, come to no more than `most` together; the smallest are left out."""
    order = squares.argsort(descending=True, stable=True)
    shares = (squares[order] / most.clamp(min=1e-30)).clamp(max=2).double() * 2**40
    kept = torch.empty_like(order, dtype=torch.bool)
    kept[order] = shares.long().cumsum(0) <= 2**40  # of integers: sums of floats have no fixed order on a GPU
    return kept


def load_moments(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, prefix: str, state: Mapping[str, Tensor]
) -> None:
    """The state of Adam for a parameter, of tensors by name; step stays where Adam has it."""
    for name in ("step", "exp_avg", "exp_avg_sq"):
        value = state.get(prefix + name)
        if value is not None:
            on_cpu = name == "step" and not optimizer.param_groups[0].get("fused")
            optimizer.state[parameter][name] = value.clone() if on_cpu else value.to(parameter.device, copy=True)
