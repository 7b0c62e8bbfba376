"""The discrete steps of PV-Tuning (arXiv 2405.14852): codes of a few groups change, towards where gradients lead.

Each layer has a buffer B, float32, that starts at the decoded weight Wq and is trained by the gradient to Wq. After a
step the groups with the largest |B - Wq| are encoded again to B. What is kept is B - Wq, not B: as codebooks and scales
are trained beside it, B has to follow what their steps do to Wq (else the two drift apart, and the model gets worse),
and of a buffer that follows the difference stays as it is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

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

_MOST_TOGETHER = 2**26  # weights of a batch, of more than one layer


class Batch(NamedTuple):
    """Layers of one shape, whose groups are chosen together: a GPU takes longer to launch work for one than to do it.

    codes [L, groups of a layer, K], as stored, and offsets [L, groups of a layer, g] are those of all L layers.
    """

    places: list[int]
    codes: Tensor
    offsets: Tensor


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
            if self._lean:
                weight.decoder.forget_index()
            if at_once and not held:
                weight.on_gradient = self._giving(place)
            else:
                weight.gradient = torch.zeros(weight.shape, dtype=kind, device=weight.codes.device)
        self.buffers = Buffers(self.weights, options, kind)
        self._batches = [self._batch(places) for places in self._alike()]
        for place in {*range(len(self.weights))} - {*self.buffers.own}:
            self.weights[place].own_codes()
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

    def _alike(self) -> list[list[int]]:
        """The places of this rank's buffers, those that are a batch together."""
        found: dict[tuple[object, ...], list[list[int]]] = {}
        for place in self.buffers.own:
            weight = self.weights[place]
            books, codes = weight.layer.codebooks, weight.codes
            lists = found.setdefault((codes.shape, codes.dtype, codes.device, books.shape, self._search[place]), [])
            if lists and (len(lists[-1]) + 1) * math.prod(weight.shape) <= _MOST_TOGETHER:
                lists[-1].append(place)
            else:
                lists.append([place])
        return [places for lists in found.values() for places in lists]

    def _batch(self, places: list[int]) -> Batch:
        """Of these, whose codes and buffers move there."""
        weights, buffers = [self.weights[place] for place in places], [self.buffers.own[place] for place in places]
        codes = torch.stack([weight.codes for weight in weights])
        offsets = torch.zeros(len(places), *weights[0].shape, dtype=torch.float32, device=codes.device)
        for weight, buffer, own_codes, offset in zip(weights, buffers, codes, offsets, strict=True):
            weight.own_codes(own_codes)
            buffer.move(offset)
        K, g = codes.shape[-1], weights[0].layer.in_group_size
        return Batch(places, codes.view(len(places), -1, K), offsets.view(len(places), -1, g))

    def _encode_each(self) -> None:
        for batch in self._batches:
            self._encode(batch)

    def _encode(self, batch: Batch) -> None:
        """Encode the groups of each layer that are farthest from its buffer."""
        n_layers, n_groups, K = batch.codes.shape
        count = round(self.options.pv_fraction * n_groups)
        if not count:
            return
        farthest = batch.offsets.square().sum(2).topk(count, sorted=False).indices.sort(1).values
        places = (farthest + n_groups * torch.arange(n_layers, device=farthest.device)[:, None]).flatten()
        before, distance = (
            all_groups.flatten(0, 1)[places].view(n_layers, count, -1) for all_groups in (batch.codes, batch.offsets)
        )
        after, moved = torch.empty_like(before), torch.empty_like(distance)
        most = torch.full((n_layers, 1), math.inf, device=farthest.device)
        for i, place in enumerate(batch.places):
            after[i], moved[i] = self._nearest(place, farthest[i], before[i], distance[i])
            if self.options.pv_trust_ratio:
                norm = self.weights[place].decoded(torch.float32).norm()
                most[i] = (self.options.pv_trust_ratio * norm).square()
        chosen = (after != before).any(2)
        if self.options.pv_trust_ratio:
            chosen &= _within(moved.square().sum(2), most)
        self._changed += chosen.sum()
        chosen = chosen[:, :, None]
        after, distance = torch.where(chosen, after, before), torch.where(chosen, distance - moved, distance)
        batch.codes.view(-1, K).index_copy_(0, places, after.flatten(0, 1))
        batch.offsets.flatten(0, 1).index_copy_(0, places, distance.flatten(0, 1))
        for place in batch.places:
            self.weights[place].decoder.index_anew()

    def _nearest(self, place: int, groups: Tensor, before: Tensor, distance: Tensor) -> tuple[Tensor, Tensor]:
        """Codes [n, K] of some groups of a layer, by their numbers [n], that are nearest to where they are now and
        distance [n, g] from there, and how far [n, g] the groups go with them. before: their codes now.
        """
        weight, K = self.weights[place], before.shape[1]
        nbits = weight.layer.nbits_per_codebook
        scales = weight.scales[groups // weight.codes.shape[1]]
        now = ops.decode_rows(before.view(-1, 1, K), weight.codebooks, scales)
        codes = verbs.encode_groups(
            torch.as_tensor(verbs.codes_from_disk(before.view(-1, 1, K), nbits)),
            now + distance,
            weight.codebooks.squeeze(2),
            scales.view(-1),
            *self._search[place],
        )
        after = torch.as_tensor(verbs.codes_to_disk(codes.view(-1, 1, K), nbits))
        return after.view(-1, K), ops.decode_rows(after, weight.codebooks, scales) - now

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
    """Which of these [L, n], the largest of each row first, come to no more than `most` [L, 1] together; the smallest
    are left out.
    """
    order = squares.argsort(dim=1, descending=True, stable=True)
    shares = (squares.gather(1, order) / most.clamp(min=1e-30)).clamp(max=2).double() * 2**40
    kept = shares.long().cumsum(1) <= 2**40  # of integers: sums of floats have no fixed order on a GPU
    return torch.empty_like(kept).scatter_(1, order, kept)
