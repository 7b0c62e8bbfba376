"""The KL divergence of two models and its gradients, slice by slice of positions: logits are never whole."""

from __future__ import annotations

import torch
from torch import Tensor

from ..model.logits import SplitModel, kl_and_gradient, slices


def sliced_kl(student: SplitModel, teacher: SplitModel, hidden: Tensor, targets: Tensor, gradient: bool) -> Tensor:
    """The sum over positions of KL(teacher || student), float64, of last hidden states [..., width] of both; gradient:
    to the student's hidden states and to whatever its output layer trains, as `backward` of this sum would add it.
    """
    found = torch.zeros((), dtype=torch.float64, device=hidden.device)
    own, other = hidden.detach().flatten(0, -2), targets.detach().flatten(0, -2)
    given = torch.empty_like(own) if gradient else None
    for place in slices(len(own), student.vocabulary, own.device):
        part = own[place]
        with torch.set_grad_enabled(gradient):
            part.requires_grad_(gradient)
            logits = student.logits(part)
        with torch.no_grad():
            original = teacher.logits(other[place]).to(logits.device)
        kl, to_logits = kl_and_gradient(original, logits.detach())
        found += kl.double().sum()
        if given is not None:
            logits.backward(to_logits.to(logits.dtype))
            assert part.grad is not None
            given[place] = part.grad
    if given is not None:
        hidden.backward(given.view_as(hidden))
    return found
