"""The discrete steps of PV-Tuning (arXiv 2405.14852): codes of a few groups change, towards where gradients lead.

Each layer has a buffer B, float32, that starts at the decoded weight Wq and is trained by the gradient to Wq. After a
step the groups with the largest |B - Wq| are encoded again to B. What is kept is B - Wq, not B: as codebooks and scales
are trained beside it, B has to follow what their steps do to Wq (else the two drift apart, and the model gets worse),
and of a buffer that follows the difference stays as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..config import AqlmOptions, FinetuneOptions
from ..core import verbs
from ..distributed import group
from ..methods.aqlm import search_options
from ..nn import ops
from .buffers import Buffers
from .replay import Replayed
from .student import TunedWeight


@dataclasses.dataclass
class Changes:
    """What discrete steps did: groups that have other codes, of all that there are."""

    changed: int = 0
    groups: int = 0

    @property
    def fraction(self) -> float:
        return self.changed / max(1, self.groups)


class CodeTuning:
    """Codes of `weights` in training. dtype: of activations. at_once: each step has one pass on each rank, so that a
    buffer makes its step as soon as the gradient is there, unless `held`: when all are; else gradients are summed.

    Of several ranks the one that has a layer's buffer encodes its groups and sends the codes to the others. Raises
    ValueError naming a layer whose codes cannot be searched.
    """

    def __init__(
        self,
        weights: Sequence[TunedWeight],
        options: FinetuneOptions,
        dtype: torch.dtype = torch.float32,
        at_once: bool = False,
        held: bool = False,
    ) -> None:
        self.weights, self.options, self._lean = list(weights), options, options.pv_states == "8bit"
        self._search: list[tuple[int, bool]] = []
        kind = dtype if at_once else torch.float32  # of gradients
        for place, weight in enumerate(self.weights):
            format = weight.layer.format
            if format.out_group_size != 1:
                raise ValueError(
                    f"pv: got {weight.names[0]} of {format.scheme}, expected an out_group_size of 1 to search its codes"
                )
            self._search.append(search_options(format, AqlmOptions(beam_size=options.pv_beam_size)))
            weight.own_codes()
            if self._lean:
                weight.decoder.forget_index()
            if at_once and not held:
                weight.on_gradient = self._giving(place)
            else:
                weight.gradient = torch.zeros(weight.shape, dtype=kind, device=weight.codes.device)
        self.buffers = Buffers(self.weights, options, kind)
        self.looked_at = self.codes()
        self.refused = 0  # codes that were undone, of this rank's layers
        device = weights[0].codes.device if weights else torch.device("cpu")
        self._changed, self._groups = torch.zeros((), dtype=torch.int64, device=device), 0
        self._encode_all: Callable[[], None] = self._encode_each
        if not self._lean:  # where launches count, and a graph's own memory does not
            self._encode_all = Replayed("codes are changed", self._encode_each, device)

    def _giving(self, place: int) -> Callable[[Tensor], None]:
        return lambda gradient: self.buffers.give(place, gradient)

    def begin(self, number: int, divisor: float, rate: float) -> None:
        """Before the passes of step `number`, from 1 on, whose gradients are sums over `divisor` positions; rate: of
        the schedule.
        """
        self.buffers.begin(number, divisor, rate)

    @torch.no_grad()
    def settle(self) -> None:
        """All gradients are there: those of codebooks and scales are found, and buffers make their steps."""
        for place, weight in reversed(list(enumerate(self.weights))):
            weight.end_pass()
            if weight.gradient is not None:
                self.buffers.give(place, weight.gradient)
        self.buffers.finish()
        for weight in self.weights:
            if weight.gradient is not None:
                weight.gradient.zero_()

    @torch.no_grad()
    def leave(self) -> None:
        """Buffers that do not follow: before codebooks and scales make their steps."""
        for weight, offset in self._own() if not self.options.pv_follow else ():
            offset.add_(weight.decoded(torch.float32))

    @torch.no_grad()
    def step(self, changes: bool) -> None:
        """A step of codes towards buffers, if `changes`. Codebooks and scales have made theirs."""
        for weight, offset in self._own() if not self.options.pv_follow else ():
            offset.sub_(weight.decoded(torch.float32))
        self._groups += sum(weight.codes.shape[0] * weight.codes.shape[1] for weight in self.weights)
        if not changes:
            return
        self._encode_all()
        if group().size > 1:
            for place, weight in enumerate(self.weights):
                group().copy_from([weight.codes], self.buffers.owner[place])
                if place not in self.buffers.own:
                    weight.decoder.index_anew()

    def _own(self) -> list[tuple[TunedWeight, Tensor]]:
        """This rank's weights and their buffers."""
        return [(self.weights[place], own.offset) for place, own in self.buffers.own.items()]

    def _encode_each(self) -> None:
        for place, own in self.buffers.own.items():
            self._encode(self.weights[place], own.offset, self._search[place])

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
        return [weight.codes.to("cpu" if self._lean else weight.codes.device, copy=True) for weight in self.weights]

    @property
    def changes(self) -> Changes:
        """Since the last look, on all ranks."""
        return Changes(sum(group().gather(int(self._changed))), self._groups)

    @changes.setter
    def changes(self, changes: Changes) -> None:
        self._groups = changes.groups
        self._changed.fill_(changes.changed if group().first else 0)

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
    def forget(self, codes: Sequence[Tensor]) -> None:
        """The buffers of groups whose codes were undone, `codes` being what these were, start anew at the weight."""
        for place, own in self.buffers.own.items():
            weight = self.weights[place]
            same = (weight.codes == codes[place].to(weight.codes.device)).all(-1, keepdim=True)
            own.offset.view(*same.shape[:2], -1).mul_(same)
            self.refused += int(same.numel() - same.sum())

    def take(self, codes: Iterable[Tensor]) -> None:
        for weight, one in zip(self.weights, codes, strict=True):
            weight.set_codes(one)

    def state(self) -> dict[str, Tensor]:
        """What goes on from one process to another, on the first rank, to which the others send their share."""
        found = self.buffers.state("pv")
        return found | {f"pv.{place}.looked_at": codes for place, codes in enumerate(self.looked_at)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Of the state of any number of ranks."""
        self.buffers.load("pv", state)
        kept = [codes.device for codes in self.looked_at]
        self.looked_at = [state[f"pv.{place}.looked_at"].to(device) for place, device in enumerate(kept)]


def _within(squares: Tensor, most: Tensor) -> Tensor:
    """Which of these, the largest first, come to no more than `most` together; the smallest are left out."""
    order = squares.argsort(descending=True, stable=True)
    shares = (squares[order] / most.clamp(min=1e-30)).clamp(max=2).double() * 2**40
    kept = torch.empty_like(order, dtype=torch.bool)
    kept[order] = shares.long().cumsum(0) <= 2**40  # of integers: sums of floats have no fixed order on a GPU
    return kept
