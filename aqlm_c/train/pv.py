"""The discrete steps of PV-Tuning (arXiv 2405.14852): codes of a few groups change, towards where gradients lead.

Each layer has a buffer B, float32, that starts at the decoded weight Wq and is trained by the gradient to Wq. After a
step the groups with the largest |B - Wq| are encoded again to B. What is kept is B - Wq, not B: as codebooks and scales
are trained beside it, B has to follow what their steps do to Wq (else the two drift apart, and the model gets worse),
and of a buffer that follows the difference stays as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..config import AqlmOptions, FinetuneOptions
from ..core import verbs
from ..methods.aqlm import search_options
from ..nn import ops
from .student import TunedWeight

_EPS = 1e-12  # of Adam: gradients to single weights are small


@dataclasses.dataclass
class Changes:
    """What discrete steps did: groups that have other codes, of all that there are."""

    changed: int = 0
    groups: int = 0

    @property
    def fraction(self) -> float:
        return self.changed / max(1, self.groups)


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
            dense = weight.decoded(torch.float32)
            self._rates.append(options.pv_learning_rate * float(dense.square().mean().sqrt()))
            weight.gradient = torch.zeros_like(dense)
            self.offsets.append(nn.Parameter(torch.zeros_like(dense)))
            self.offsets[-1].grad = weight.gradient
        groups = [{"params": [offset], "lr": rate} for offset, rate in zip(self.offsets, self._rates, strict=True)]
        betas = (options.pv_beta1, options.pv_beta2)
        fused = bool(groups) and self.offsets[0].device.type == "cuda"
        self.optimizer = torch.optim.Adam(groups, betas=betas, eps=_EPS, fused=fused or None)
        self.looked_at = [weight.codes for weight in self.weights]
        self.refused = 0  # codes that were undone

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
    def step(self, rate: float, changes: bool) -> Changes:
        """A step of Adam for the buffers and, if `changes`, of codes towards them; then no gradients are left.

        rate: of the schedule. Codebooks and scales have made theirs.
        """
        found = Changes()
        if not self.options.pv_follow:
            for weight, offset in zip(self.weights, self.offsets, strict=True):
                offset.sub_(weight.decoded(torch.float32))
        for group, own in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = own * rate
        self.optimizer.step()
        for weight, offset, search in zip(self.weights, self.offsets, self._search, strict=True):
            found.groups += weight.codes.shape[0] * weight.codes.shape[1]
            if changes:
                found.changed += self._encode(weight, offset, search)
            assert weight.gradient is not None
            weight.gradient.zero_()
        return found

    def _encode(self, weight: TunedWeight, offset: Tensor, search: tuple[int, bool]) -> int:
        """Encode the groups that are farthest from the buffer; how many have other codes."""
        options, (out, groups, K) = self.options, weight.codes.shape
        g, nbits = weight.layer.in_group_size, weight.layer.nbits_per_codebook
        of_groups = offset.view(-1, g)
        count = round(options.pv_fraction * out * groups)
        if not count:
            return 0
        farthest = of_groups.square().sum(1).topk(count, sorted=False).indices.sort().values
        rows = farthest // groups
        scales = weight.scales[rows]
        before = weight.codes.view(-1, K)[farthest]
        now = ops.decode_rows(before.view(-1, 1, K), weight.codebooks, scales)
        codes = verbs.encode_groups(
            torch.as_tensor(verbs.codes_from_disk(before.view(-1, 1, K), nbits)),
            now + of_groups[farthest],
            weight.codebooks.squeeze(2),
            scales.view(-1),
            *search,
        )
        after = torch.as_tensor(verbs.codes_to_disk(codes.view(-1, 1, K), nbits))
        moved = ops.decode_rows(after, weight.codebooks, scales) - now
        square = moved.square().sum(1)
        chosen = (after.view(-1, K) != before).any(1)
        if options.pv_trust_ratio:
            chosen &= _within(square, (options.pv_trust_ratio * weight.decoded(torch.float32).norm()).square())
        places = chosen.nonzero().view(-1)
        if not len(places):
            return 0
        new = weight.codes.clone()
        new.view(-1, K)[farthest[places]] = after.view(-1, K)[places]
        of_groups[farthest[places]] -= moved[places]
        weight.set_codes(new)
        return len(places)

    def look(self) -> None:
        """Codes are found good: they are what `undo` goes back to."""
        self.looked_at = [weight.codes for weight in self.weights]

    @torch.no_grad()
    def undo(self) -> list[Tensor]:
        """Go back to the codes of the last look; the codes that there were, for `take`."""
        codes = [weight.codes for weight in self.weights]
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
            if one is not weight.codes:
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
