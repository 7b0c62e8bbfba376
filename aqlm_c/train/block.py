"""Block fine-tuning (AQLM, arXiv 2401.06118, section 3.4): the quantized block's output is drawn to the original's.

The original block and the quantized one are given the same activations, those of the model quantized so far. The
outputs are compared as they leave the block and, again, after `finetune_lookahead` more blocks, which are still the
original's: what these make of an error says how much it matters. Trained weights are dense, decoded in C at every step;
gradients to codebooks and scales come back through C.

Measured on SmolLM2 at 2x8g8, codes held, 5 epochs: perplexity 43.1, and 45.8 where outputs were compared with the
activations of the original model instead. More epochs did not help (20: 42.3), comparing after more blocks did (after
one more 41.4, after three 40.0).
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..calibrate.activations import Activations
from ..distributed import group
from ..nn import ops
from ..nn.linear import QuantizedLinear
from ..recipe import AqlmConfig
from ..report.layers import BlockReport

log = logging.getLogger("aqlm_c")

_BETAS = (0.9, 0.95)
_SMALL = 0.1  # of a tensor's rms: the least size that a single weight of a norm is given
_OTHERS = 1 / 7  # rate of scales, norms and biases over that of codebooks (measured)

Search = Callable[[str, Tensor, Tensor, Tensor], "Tensor | None"]


def held_out_batches(n_batches: int, share: float) -> list[int]:
    """Numbers of the batches that validate: about `share` of them, at least one, spread evenly."""
    count = min(max(1, round(share * n_batches)), n_batches - 1)
    return [(2 * i + 1) * n_batches // (2 * count) for i in range(count)]


def gradient_scale(hidden: Tensor) -> float:
    """What the loss of a batch `hidden` is multiplied by: Adam does not see it, but float16 gradients would vanish."""
    return 2.0 ** math.floor(math.log2(hidden.numel() / 64)) if hidden.dtype == torch.float16 else 1.0


def finetune_block(
    name: str,
    index: int,
    blocks: Sequence[nn.Module],
    quantized: Mapping[str, QuantizedLinear],
    inputs: Activations,
    targets: Activations,
    config: AqlmConfig,
    search: Search | None = None,
) -> BlockReport:
    """Train codebooks, scales, norms and biases of `blocks[index]` with Adam; the best state is kept in place.

    name: the block's, for the report. blocks: the model's; in the one that is trained, dense linears stand at the
    names of `quantized`, its quantized layers by their name in it. inputs: the block's. targets: the original
    block's outputs for these. search: gives new codes for (name, codes, codebooks float32, scales float32) of a
    layer, all as in `QuantizedLinear`; None where the method has none.

    What is tuned for is the mean of the relative errors at both outputs. Epochs end early after `finetune_patience` of
    them without a better state: one with a lower held-out mean and an error at the block's own output that is not
    above the start's. All errors are of values rounded to the layers' dtype: those that are saved.

    Of several ranks each has some of the batches, those of the first rank first. Gradients and errors of each batch are
    told to all ranks and added there in the order of one process, so that all have the same state.

    Raises ValueError for NaN or Inf in the block's outputs.
    """
    with inputs.empty() as ahead:
        return _Tuner(index, blocks, quantized, inputs, targets, ahead, config).run(name, search)


def _above_zero(square: Tensor) -> Tensor:
    """Of outputs that are zero everywhere too: an error is then what it is, not NaN."""
    return square.clamp(min=1e-30)


class _Trained:
    """A tensor in training, as start + size * change, so that Adam's steps are relative to size (where that is zero, it
    stays).
    """

    def __init__(
        self, parameter: nn.Parameter, rate: float, *, common_size: bool = False, zeros_stay: bool = False
    ) -> None:
        self.parameter, self.rate = parameter, rate
        self.start = parameter.detach().to(torch.float32, copy=True)
        rms = self.start.square().mean().sqrt()
        self.size = rms if common_size else self.start.abs().clamp(min=_SMALL * rms)
        if zeros_stay:
            self.size = self.size * (self.start != 0)
        self.change = torch.zeros_like(self.start).requires_grad_()

    def value(self, rounded: bool) -> Tensor:
        value = self.start + self.size * self.change
        return value.to(self.parameter.dtype).float() if rounded else value

    @torch.no_grad()
    def store(self) -> None:
        self.parameter.copy_(self.value(False))


class _Tuner:
    def __init__(
        self,
        index: int,
        blocks: Sequence[nn.Module],
        quantized: Mapping[str, QuantizedLinear],
        inputs: Activations,
        targets: Activations,
        ahead: Activations,
        config: AqlmConfig,
    ) -> None:
        self.index, self.block, self.quantized = index, blocks[index], quantized
        tuning = self.tuning = config.tuning
        self.ahead = list(blocks[index + 1 : index + 1 + tuning.finetune_lookahead])
        self.inputs, self.seed = inputs, config.seed
        self.codes = {name: layer.codes.detach() for name, layer in quantized.items()}
        rate = tuning.finetune_learning_rate
        layers = quantized.items()
        self.codebooks = {name: _Trained(layer.codebooks, rate, common_size=True) for name, layer in layers}
        self.scales = {name: _Trained(layer.scales, rate * _OTHERS, zeros_stay=True) for name, layer in layers}
        biases = ((name, layer.bias) for name, layer in layers)
        kept = {f"{name}.bias": bias for name, bias in biases if bias is not None}  # the dense layers have copies
        dense = {f"{name}.weight" for name in quantized}
        self.others = {  # norms and biases; matrices that were not quantized stay
            name: _Trained(kept.get(name, parameter), rate * _OTHERS)
            for name, parameter in self.block.named_parameters()
            if name not in dense and parameter.is_floating_point() and parameter.squeeze().ndim <= 1
        }
        sizes = group().gather(inputs.batch_sizes())
        ends = list(itertools.accumulate(map(len, sizes), initial=0))
        self.of_ranks = [range(*pair) for pair in itertools.pairwise(ends)]  # numbers of their batches
        self.own = self.of_ranks[group().rank]
        self.sequences = [size for there in sizes for size in there]
        n_batches = len(self.sequences)
        self.gradient_scale = group().broadcast(gradient_scale(inputs.hidden[0]))
        self.held_out = held_out_batches(n_batches, tuning.finetune_held_out)
        self.training = [batch for batch in range(n_batches) if batch not in self.held_out]
        self.probe = self.training[: len(self.held_out)]  # shows the error on what is trained on
        self.goals = [targets, ahead] if self.ahead else [targets]
        for batch in range(len(self.own) if self.ahead else 0):
            ahead.hidden.append(self._look_ahead(batch, targets.hidden[batch]).detach())

    @property
    def trained(self) -> list[_Trained]:
        return [*self.codebooks.values(), *self.scales.values(), *self.others.values()]

    def run(self, name: str, search: Search | None) -> BlockReport:
        started = time.perf_counter()
        tuning, trained = self.tuning, self.trained
        self.ceiling, self.best = self._error(self.held_out)
        training_before, training = self._error(self.probe)
        if not math.isfinite(self.ceiling + self.best + training):
            after = f" or of the {len(self.ahead)} after it" if self.ahead else ""
            raise ValueError(f"{name}: got NaN or Inf in the output of this block{after}, expected finite values")
        report = BlockReport(
            name,
            training_before=training_before,
            held_out_before=self.ceiling,
            history=[(training, self.best)],
        )
        self._keep()
        for round_ in range(1 + (tuning.finetune_search if search else 0)):
            if round_ and search:
                better = self._search_again(search)
                if better is None:
                    break
                report.searched += better
            since_best = 0
            groups = [{"params": [tensor.change], "lr": tensor.rate} for tensor in trained]
            optimizer = torch.optim.Adam(groups, betas=_BETAS)
            for _ in range(tuning.finetune_epochs):
                training = self._epoch(optimizer, report.epochs)
                own, held_out = self._error(self.held_out)
                if not math.isfinite(training + held_out):
                    log.warning("%s: NaN or Inf in fine-tuning, which ends here", name)
                    break
                report.epochs += 1
                report.history.append((training, held_out))
                since_best = 0 if self._better(own, held_out) else since_best + 1
                if since_best >= tuning.finetune_patience:
                    break
            self._restore()
        for tensor in trained:
            tensor.store()
        for part, layer in self.quantized.items():
            layer.codes.data.copy_(self.codes[part])
        report.held_out_after, _ = self._error(self.held_out)
        report.training_after, _ = self._error(self.probe)
        report.seconds = time.perf_counter() - started
        return report

    def _epoch(self, optimizer: torch.optim.Optimizer, epoch: int) -> float:
        """One pass over the training batches; the relative error meanwhile."""
        generator = torch.Generator().manual_seed(self.seed + 7919 * self.index + epoch)
        order = [self.training[i] for i in torch.randperm(len(self.training), generator=generator).tolist()]
        per_step = math.ceil(self.tuning.finetune_batch_size / max(self.sequences))
        total = 0.0
        for step in range(0, len(order), per_step):
            batches = order[step : step + per_step]
            optimizer.zero_grad()
            for batch, error in zip(batches, self._gradients(batches), strict=True):
                total += error * self.sequences[batch]
            optimizer.step()
        return total / sum(self.sequences[batch] for batch in order)

    def _gradients(self, batches: list[int]) -> list[float]:
        """Add up the gradients of a step's batches, of all ranks; the batches' errors."""
        whole = sum(self.sequences[batch] for batch in batches)
        if group().size == 1:
            return [self._backward(batch, self.sequences[batch] / whole) for batch in batches]
        changes = [tensor.change for tensor in self.trained]
        of_ranks = [[batch for batch in batches if batch in there] for there in self.of_ranks]
        own = of_ranks[group().rank]
        width = 1 + len(changes) + sum(change.numel() for change in changes)
        rows = changes[0].detach().new_zeros(len(own), width)  # error, which tensors have a gradient, gradients
        for row, batch in zip(rows, own, strict=True):
            row[0] = self._backward(batch, self.sequences[batch] / whole)
            gradients = [change.grad for change in changes]
            parts = [torch.zeros_like(of) if g is None else g for of, g in zip(changes, gradients, strict=True)]
            has = row.new_tensor([g is not None for g in gradients])
            row[1:] = torch.cat([has, *(part.view(-1) for part in parts)])
            for change in changes:
                change.grad = None
        told = group().gather_rows(rows, list(map(len, of_ranks)))
        found = dict(zip(itertools.chain(*of_ranks), itertools.chain(*told), strict=True))
        for batch in batches:
            given = found[batch][1 : 1 + len(changes)].tolist()
            values = found[batch][1 + len(changes) :].split([change.numel() for change in changes])
            for change, value, is_given in zip(changes, values, given, strict=True):
                if is_given:
                    value = value.view_as(change)
                    change.grad = value.clone() if change.grad is None else change.grad + value
        return [found[batch][0].item() for batch in batches]

    def _backward(self, batch: int, share: float) -> float:
        """Add the gradients of a batch of this rank, times its share of a step, to the tensors'; its error."""
        own, *ahead = self._errors(batch - self.own.start)
        loss = sum(ahead, own) / len(self.goals)
        (loss * (share * self.gradient_scale)).backward()
        return loss.item()

    def _errors(self, batch: int) -> list[Tensor]:
        """The relative errors that are tuned for, of one batch, by its number among this rank's."""
        targets = (goal.hidden[batch].float() for goal in self.goals)
        pairs = zip(self._outputs(batch), targets, strict=True)
        return [
            (output.float() - target).square().sum() / _above_zero(target.square().sum()) for output, target in pairs
        ]

    def _outputs(self, batch: int, rounded: bool = False) -> list[Tensor]:
        """What the trained block gives for a batch and, with lookahead, what the blocks ahead make of it."""
        tensors = self._tensors(rounded)

        def block(*args, **kwargs):
            return torch.func.functional_call(self.block, tensors, args, kwargs)

        own = self.inputs.forward(self.index, block, batch)
        return [own, self._look_ahead(batch, own)] if self.ahead else [own]

    def _look_ahead(self, batch: int, hidden: Tensor) -> Tensor:
        for ahead, block in enumerate(self.ahead, self.index + 1):
            hidden = self.inputs.forward(ahead, block, batch, hidden)
        return hidden

    def _tensors(self, rounded: bool) -> dict[str, Tensor]:
        """The block's parameters by name: dense weights decoded, norms and biases."""
        dtypes = {name: parameter.dtype for name, parameter in self.block.named_parameters()}
        tensors = {name: tensor.value(rounded) for name, tensor in self.others.items()}
        for name in self.quantized:
            books, scales = self.codebooks[name].value(rounded), self.scales[name].value(rounded)
            tensors[f"{name}.weight"] = ops.decode_rows(self.codes[name], books, scales)
        return {name: tensor.to(dtypes[name]) for name, tensor in tensors.items()}

    @torch.no_grad()
    def _error(self, batches: list[int]) -> tuple[float, float]:
        """Relative errors ||Y - Yq||^2 / ||Y||^2 of rounded values: of the block's output, and the mean tuned for."""
        of_ranks = [[batch for batch in batches if batch in there] for there in self.of_ranks]
        own = torch.zeros(len(of_ranks[group().rank]), len(self.goals), 2, dtype=torch.float64)
        for squares, number in zip(own, of_ranks[group().rank], strict=True):
            batch = number - self.own.start
            for i, (output, goal) in enumerate(zip(self._outputs(batch, rounded=True), self.goals, strict=True)):
                target = goal.hidden[batch].float()
                squares[i, 0] = (output.float() - target).square().sum().double().cpu()
                squares[i, 1] = target.square().sum().double().cpu()
        sums = torch.zeros(len(self.goals), 2, dtype=torch.float64)
        for row in itertools.chain(*group().gather_rows(own.flatten(1), list(map(len, of_ranks)))):  # in order
            sums += row.view_as(sums)
        errors = sums[:, 0] / _above_zero(sums[:, 1])
        return errors[0].item(), errors.mean().item()

    def _better(self, own: float, objective: float) -> bool:
        """Keep the state if it is the best yet."""
        if not (objective < self.best and own <= self.ceiling):
            return False
        self.best = objective
        self._keep()
        return True

    def _keep(self) -> None:
        self.kept = [tensor.change.detach().clone() for tensor in self.trained], dict(self.codes)

    @torch.no_grad()
    def _restore(self) -> None:
        changes, codes = self.kept
        for tensor, change in zip(self.trained, changes, strict=True):
            tensor.change.copy_(change)
        self.codes = dict(codes)

    def _search_again(self, search: Search) -> int | None:
        """Search each layer's codes again under the trained codebooks; how many were better on held-out text, None
        where the method searches none.
        """
        kept, searched = 0, False
        for name, codes in list(self.codes.items()):
            books, scales = (part[name].value(True).detach() for part in (self.codebooks, self.scales))
            found = search(name, codes, books, scales)
            if found is None:
                continue
            self.codes[name], searched = found, True
            if self._better(*self._error(self.held_out)):
                kept += 1
            else:
                self.codes[name] = codes
        return kept if searched else None
