"""Block fine-tuning (AQLM, arXiv 2401.06118, section 3.4): the quantized block's output is drawn to the original's.

The original block and the quantized one are given the same activations, those of the model quantized so far, unless
`finetune_target` is what the block gives in the original model. The outputs are compared as they leave the block and,
again, after `finetune_lookahead` more blocks, which are still the original's: what these make of an error says how much
it matters. Trained weights are dense, decoded in C at every step; gradients to codebooks and scales come back through
C.

Measured on SmolLM2 at 2x8g8, codes held, 5 epochs: perplexity 43.1, and 45.8 where outputs were compared with the
activations of the original model instead. More epochs did not help (20: 42.3), comparing after more blocks did (after
one more 41.4, after three 40.0).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..calibrate.activations import Activations
from ..distributed import group
from ..model.blocks import is_norm_or_bias
from ..nn.linear import QuantizedLinear
from ..recipe import AqlmConfig
from ..report.layers import BlockReport
from .relative import Decoder, Trained, add_gradients, values_of
from .replay import ReplayedPass

log = logging.getLogger("aqlm_c")

_BETAS = (0.9, 0.95)
_LONG = 2**38  # tokens times weights of a block, from which on launching kernels takes no longer than they do
_OTHERS = 1 / 7  # rate of scales, norms and biases over that of codebooks (measured)

_AS_EVER: set[type] = set()  # kinds of blocks that could not be recorded

Search = Callable[[str, Tensor, Tensor, Tensor], "Tensor | None"]


def held_out_batches(n_batches: int, share: float) -> list[int]:
    """Numbers of the batches that validate: about `share` of them, at least one, spread evenly."""
    count = min(max(1, round(share * n_batches)), n_batches - 1)
    return [(2 * i + 1) * n_batches // (2 * count) for i in range(count)]


def shuffled(batches: list[int], per_step: int, generator: torch.Generator) -> list[int]:
    """A random order in which each step takes one batch of each of as many equal parts of them: ranks that have a part
    each all have work in each step.
    """
    ends = [len(batches) * i // per_step for i in range(per_step + 1)]
    parts = [batches[start:end] for start, end in itertools.pairwise(ends)]
    drawn = [[part[i] for i in torch.randperm(len(part), generator=generator).tolist()] for part in parts]
    return [batch for step in itertools.zip_longest(*drawn) for batch in step if batch is not None]


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
    block's outputs, for these or in the original model. search: gives new codes for (name, codes, codebooks float32,
    scales float32) of a layer, all as in `QuantizedLinear`; None where the method has none.

    What is tuned for is the mean of the relative errors at both outputs. Epochs end early after `finetune_patience` of
    them without a better state: one with a lower held-out mean and an error at the block's own output that is not
    above the start's. All errors are of values rounded to the layers' dtype: those that are saved.

    Of several ranks each has some of the batches, those of the first rank first. Gradients and errors of each batch are
    told to all ranks and added there in the order of one process, so that all have the same state.

    What the blocks ahead make of the targets is kept where memory has room for it, and else made again whenever it is
    compared with, to the same bits.

    Raises ValueError for NaN or Inf in the block's outputs.
    """
    with _streams(inputs, targets) as streams:
        return _Tuner(index, blocks, quantized, streams, config).run(name, search)


def tune_remaining(
    name: str,
    index: int,
    blocks: Sequence[nn.Module],
    quantized: Mapping[str, QuantizedLinear],
    remaining: Mapping[str, nn.Parameter],
    activations: tuple[Activations, Activations],
    config: AqlmConfig,
) -> BlockReport:
    """`finetune_block` of a block in which some linears are quantized, in `tune_remaining` epochs (QuIP#, arXiv
    2402.04396, section 5); `remaining` are trained too: weights, float32, of dense linears by their names in the block.

    activations: inputs and targets.
    """
    config = config.replace(finetune_epochs=config.target.tune_remaining, finetune_search=0)
    with _streams(*activations) as streams:
        return _Tuner(index, blocks, quantized, streams, config, remaining).run(name, None)


class _Streams(NamedTuple):
    """The inputs of a block, what its outputs are compared with, and a place for what blocks ahead make of that."""

    inputs: Activations
    targets: Activations
    ahead: Activations | None


@contextlib.contextmanager
def _streams(inputs: Activations, targets: Activations) -> Iterator[_Streams]:
    with contextlib.ExitStack() as stack:
        kept = stack.enter_context(inputs.empty()) if inputs.has_room() else None
        yield _Streams(inputs, targets, kept)


def _square_error(output: Tensor, target: Tensor) -> Tensor:
    return (output.float() - target.float()).square().sum()


def _above_zero(square: Tensor) -> Tensor:
    """Of outputs that are zero everywhere too: an error is then what it is, not NaN."""
    return square.clamp(min=1e-30)


class _Tuner:
    def __init__(
        self,
        index: int,
        blocks: Sequence[nn.Module],
        quantized: Mapping[str, QuantizedLinear],
        streams: _Streams,
        config: AqlmConfig,
        remaining: Mapping[str, nn.Parameter] | None = None,
    ) -> None:
        inputs, targets, ahead = streams
        self.index, self.block, self.quantized = index, blocks[index], quantized
        tuning = self.tuning = config.tuning
        self.ahead = list(blocks[index + 1 : index + 1 + tuning.finetune_lookahead])
        self.inputs, self.targets, self.seed = inputs, targets, config.seed
        self.kept = ahead if self.ahead else None  # what the blocks ahead make of the targets
        self.dtypes = {name: parameter.dtype for name, parameter in self.block.named_parameters()}
        self.decoders = {name: self._decoder(name, layer.codes.detach()) for name, layer in quantized.items()}
        rate = tuning.finetune_learning_rate
        layers = quantized.items()
        self.codebooks = {name: Trained(layer.codebooks, rate, common_size=True) for name, layer in layers}
        self.scales = {name: Trained(layer.scales, rate * _OTHERS, zeros_stay=True) for name, layer in layers}
        biases = ((name, layer.bias) for name, layer in layers)
        kept = {f"{name}.bias": bias for name, bias in biases if bias is not None}  # the dense layers have copies
        dense = {f"{name}.weight" for name in quantized}
        self.others = {  # norms and biases; matrices that were not quantized stay
            name: Trained(kept.get(name, parameter), rate * _OTHERS)
            for name, parameter in self.block.named_parameters()
            if name not in dense and is_norm_or_bias(parameter)
        }
        rate = config.target.tune_remaining_learning_rate
        for name, weight in (remaining or {}).items():
            self.others[f"{name}.weight"] = Trained(weight, rate, common_size=True)
        self.trained = [*self.codebooks.values(), *self.scales.values(), *self.others.values()]
        sizes = group().gather(inputs.batch_sizes())
        ends = list(itertools.accumulate(map(len, sizes), initial=0))
        self.of_ranks = [range(*pair) for pair in itertools.pairwise(ends)]  # numbers of their batches
        self.start = self.of_ranks[group().rank].start
        self.sequences = [size for there in sizes for size in there]
        n_batches = len(self.sequences)
        first = inputs.hidden[0]
        self.device, self.gradient_scale = first.device, group().broadcast(gradient_scale(first))
        self.held_out = held_out_batches(n_batches, tuning.finetune_held_out)
        self.training = [batch for batch in range(n_batches) if batch not in self.held_out]
        self.probe = self.training[: len(self.held_out)]  # shows the error on what is trained on
        self.places = 2 if self.ahead else 1  # where outputs are compared
        self.squares: dict[tuple[int, int], Tensor] = {}
        self.replayed: ReplayedPass | None = None
        if self.kept is not None:
            for batch in range(len(targets.hidden)):
                self.kept.hidden.append(self._look_ahead(batch, targets.hidden[batch]).detach())

    def _decoder(self, name: str, codes: Tensor) -> Decoder:
        return Decoder(self.quantized[name], codes, self.dtypes[f"{name}.weight"])

    def run(self, name: str, search: Search | None) -> BlockReport:
        started = time.perf_counter()
        tuning, trained = self.tuning, self.trained
        self.ceiling, self.best = self._error(self.held_out)
        self.own = self.ceiling  # error of the best state at the block's own output
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
        self._keep_state()
        for round_ in range(1 + (tuning.finetune_search if search else 0)):
            if round_ and search:
                better = self._search_again(search)
                if better is None:
                    break
                report.searched += better
            since_best = 0
            groups = [{"params": [tensor.change], "lr": tensor.rate} for tensor in trained]
            optimizer = torch.optim.Adam(groups, betas=_BETAS, fused=self.device.type == "cuda" or None)
            self._record()
            for _ in range(tuning.finetune_epochs):
                mean = self._epoch(optimizer, report.epochs)
                own, held_out = self._error(self.held_out)
                training = mean.item()
                if not math.isfinite(training + held_out):
                    log.warning("%s: NaN or Inf in fine-tuning, which ends here", name)
                    break
                report.epochs += 1
                report.history.append((training, held_out))
                since_best = 0 if self._better(own, held_out) else since_best + 1
                if since_best >= tuning.finetune_patience:
                    break
            self._restore()
        self._store()
        report.held_out_after = self.own
        report.training_after, _ = self._error(self.probe, 1)
        report.seconds = time.perf_counter() - started
        return report

    def _epoch(self, optimizer: torch.optim.Optimizer, epoch: int) -> Tensor:
        """One pass over the training batches; the relative error meanwhile, float64, which nobody waits for."""
        generator = torch.Generator().manual_seed(self.seed + 7919 * self.index + epoch)
        per_step = math.ceil(self.tuning.finetune_batch_size / max(self.sequences))
        order = shuffled(self.training, per_step, generator)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for step in range(0, len(order), per_step):
            batches = order[step : step + per_step]
            optimizer.zero_grad(set_to_none=self.replayed is None)
            for batch, error in zip(batches, self._gradients(batches, order[step + per_step :]), strict=True):
                total += error * self.sequences[batch]
            optimizer.step()
        return total / sum(self.sequences[batch] for batch in order)

    def _gradients(self, batches: list[int], later: list[int]) -> list[Tensor]:
        """Add up the gradients of a step's batches, one after another, of all ranks; the batches' errors, float64.

        later: the batches after these.
        """
        whole = sum(self.sequences[batch] for batch in batches)
        own, upcoming = self._own(batches), self._own(later)
        rows = []
        for batch, following in zip(own, [*own[1:], *upcoming[:1], None], strict=False):
            self._prefetch(following)
            error = self._backward(batch, self.sequences[self.start + batch] / whole)
            rows.append(error if group().size == 1 else self._taken(error))
        return rows if group().size == 1 else self._told(batches, rows)

    def _own(self, batches: Sequence[int]) -> list[int]:
        """Those of these batches that this rank has, by their numbers here."""
        return [batch - self.start for batch in batches if batch in self.of_ranks[group().rank]]

    def _backward(self, batch: int, share: float) -> Tensor:
        """Add the gradients of a batch of this rank, times its share of a step, to those of the changes; its error."""
        inputs = self._inputs(batch, share)
        if self.replayed is not None and self._is_like(batch, inputs):
            return self.replayed(*inputs)
        return self._error_of(batch, *inputs)

    def _inputs(self, batch: int, share: float) -> tuple[Tensor, ...]:
        """Of `_error_of`, what is not the same for all batches."""
        goals = self._goals(batch, self.places)
        squares = [_above_zero(self._square(place, batch, goal)) for place, goal in enumerate(goals)]
        factor = torch.full((), share * self.gradient_scale, dtype=torch.float32, device=self.device)
        return (factor, self.inputs.hidden[batch], *goals, *squares)

    def _error_of(self, batch: int, factor: Tensor, hidden: Tensor, *compared: Tensor) -> Tensor:
        """The error that is tuned for, float64, of a batch `hidden` with the arguments of `batch`; its gradients, times
        `factor`, are added. compared: with what the outputs are, and the squares of that.
        """
        with self._trainable() as tensors:  # decoded for each, so that the sums do not depend on who has which
            own, *ahead = self._errors(self._outputs(batch, tensors, self.places, hidden), compared)
            loss = sum(ahead, own) / self.places
            (loss * factor).backward()
        return loss.detach().double()

    def _errors(self, outputs: list[Tensor], compared: Sequence[Tensor]) -> list[Tensor]:
        """The relative errors that are tuned for."""
        errors = map(_square_error, outputs, compared[: self.places])
        return [error / square for error, square in zip(errors, compared[self.places :], strict=True)]

    def _record(self) -> None:
        """Have the passes of most batches replayed, as they are with the codes of now, where launching them would take
        longer than they do. No gradients are there yet, and none are afterwards.
        """
        self.replayed, size = None, max(self.sequences)
        full = [batch for batch in self.training if self.sequences[batch] == size]
        tokens = self.targets.hidden[full[0]].shape[:-1].numel()
        weights = sum(parameter.numel() for parameter in self.block.parameters())
        if self.device.type != "cuda" or group().size > 1 or tokens * weights > _LONG or type(self.block) in _AS_EVER:
            return
        self.like = full[0]
        run = functools.partial(self._error_of, self.like)
        replayed = ReplayedPass(run, self._inputs(self.like, 1.0), self.device, self._forget)
        if replayed.works:
            self.replayed = replayed
        else:  # as of blocks that ask the device which experts run
            _AS_EVER.add(type(self.block))

    def _forget(self) -> None:
        """Leave no gradients; where they are is not changed."""
        for tensor in self.trained:
            if tensor.change.grad is not None:
                tensor.change.grad.zero_()

    def _is_like(self, batch: int, inputs: tuple[Tensor, ...]) -> bool:
        """Whether a batch goes through the blocks as the one that was recorded."""
        assert self.replayed is not None
        own, known = self.inputs.arguments[batch], self.inputs.arguments[self.like]
        places = range(self.index, self.index + 1 + len(self.ahead))
        return self.replayed.takes(inputs) and all(own[place] is known[place] for place in places)

    def _taken(self, error: Tensor) -> Tensor:
        """A batch's error, which tensors it gave a gradient, and these, which are then gone: float32."""
        gradients = [tensor.change.grad for tensor in self.trained]
        parts = [tensor.start if g is None else g for tensor, g in zip(self.trained, gradients, strict=True)]
        has = torch.tensor([float(g is not None) for g in gradients]).to(error.device)
        for tensor in self.trained:
            tensor.change.grad = None
        return torch.cat([error.float().view(1), has, *(part.reshape(-1) for part in parts)])

    def _told(self, batches: list[int], rows: list[Tensor]) -> list[Tensor]:
        """Add the gradients of the batches of all ranks to those of the changes, in the order of the step."""
        of_ranks = [[batch for batch in batches if batch in there] for there in self.of_ranks]
        sizes = [tensor.change.numel() for tensor in self.trained]
        own = torch.stack(rows) if rows else torch.zeros(0, 1 + len(sizes) + sum(sizes), device=self.device)
        told = group().gather_rows(own, list(map(len, of_ranks)))
        found = dict(zip(itertools.chain(*of_ranks), itertools.chain(*told), strict=True))
        given = torch.stack([found[batch][1 : 1 + len(sizes)] for batch in batches]).tolist()
        for batch, of_tensors in zip(batches, given, strict=True):
            parts = found[batch][1 + len(sizes) :].split(sizes)
            for tensor, part, is_given in zip(self.trained, parts, of_tensors, strict=True):
                if is_given:
                    grad = part.view_as(tensor.change)
                    tensor.change.grad = grad.clone() if tensor.change.grad is None else tensor.change.grad + grad
        return [found[batch][0].double() for batch in batches]

    @contextlib.contextmanager
    def _trainable(self) -> Iterator[dict[str, Tensor]]:
        """The block's tensors; what their gradients come to is added to those of the changes."""
        values = [value.requires_grad_() for value in self._values()]
        tensors = self._tensors(values)
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
        yield leaves
        given = [(tensors[name], leaf.grad) for name, leaf in leaves.items() if leaf.grad is not None]
        torch.autograd.backward([tensor for tensor, _ in given], [grad for _, grad in given])
        reached = [
            (tensor, value.grad) for tensor, value in zip(self.trained, values, strict=True) if value.grad is not None
        ]
        add_gradients(reached)

    def _prefetch(self, batch: int | None) -> None:
        if batch is not None:
            for activations in (self.inputs, self.targets, self.kept):
                if activations is not None:
                    activations.prefetch(batch)

    @torch.no_grad()
    def _goals(self, batch: int, places: int) -> list[Tensor]:
        """What the outputs of a batch are compared with, at the first of the places."""
        target = self.targets.hidden[batch]
        if places == 1:
            return [target]
        return [target, self._look_ahead(batch, target) if self.kept is None else self.kept.hidden[batch]]

    def _square(self, place: int, batch: int, goal: Tensor) -> Tensor:
        """Of a batch of a goal, summed."""
        if (place, batch) not in self.squares:
            self.squares[place, batch] = goal.float().square().sum()
        return self.squares[place, batch]

    def _outputs(
        self, batch: int, tensors: dict[str, Tensor], places: int, hidden: Tensor | None = None
    ) -> list[Tensor]:
        """What the trained block gives for a batch and, at the second place, what the blocks ahead make of it; hidden:
        what goes in, if not the activations' own.
        """

        def block(*args, **kwargs):
            return torch.func.functional_call(self.block, tensors, args, kwargs)

        own = self.inputs.forward(self.index, block, batch, hidden)
        return [own, self._look_ahead(batch, own)] if places > 1 else [own]

    def _look_ahead(self, batch: int, hidden: Tensor) -> Tensor:
        for ahead, block in enumerate(self.ahead, self.index + 1):
            hidden = self.inputs.forward(ahead, block, batch, hidden)
        return hidden

    def _values(self, rounded: bool = False) -> list[Tensor]:
        """What is trained, in the order of `trained`; rounded: to what is saved."""
        return values_of(self.trained, rounded)

    def _tensors(self, values: Sequence[Tensor]) -> dict[str, Tensor]:
        """The block's parameters by name: dense weights decoded, norms and biases."""
        left = iter(values)
        codebooks, scales = ([next(left) for _ in self.quantized] for _ in range(2))
        tensors = {name: value.to(self.dtypes[name]) for name, value in zip(self.others, left, strict=True)}
        for name, *given in zip(self.quantized, codebooks, scales, strict=True):
            tensors[f"{name}.weight"] = self.decoders[name](*given)
        return tensors

    @torch.no_grad()
    def _error(self, batches: Sequence[int], places: int = 0) -> tuple[float, float]:
        """Relative errors ||Y - Yq||^2 / ||Y||^2 of rounded values: of the block's output, and the mean tuned for.

        places: at how many outputs are compared, if not at all.
        """
        places = places or self.places
        tensors = self._tensors(self._values(rounded=True))
        own = self._own(batches)
        squares = torch.zeros(len(own), places, 2, dtype=torch.float64, device=self.device)
        for row, batch, upcoming in zip(squares, own, [*own[1:], None], strict=False):
            self._prefetch(upcoming)
            goals = self._goals(batch, places)
            for place, (output, goal) in enumerate(zip(self._outputs(batch, tensors, places), goals, strict=True)):
                row[place, 0] = _square_error(output, goal).double()
                row[place, 1] = self._square(place, batch, goal).double()
        counts = [sum(batch in there for batch in batches) for there in self.of_ranks]
        sums = torch.zeros(places, 2, dtype=torch.float64, device=self.device)
        for row in itertools.chain(*group().gather_rows(squares.flatten(1), counts)):  # in order, as batches are
            sums += row.view_as(sums)
        errors = sums[:, 0] / _above_zero(sums[:, 1])
        own, mean = torch.stack([errors[0], errors.mean()]).tolist()
        return own, mean

    def _better(self, own: float, objective: float) -> bool:
        """Keep the state if it is the best yet."""
        if not (objective < self.best and own <= self.ceiling):
            return False
        self.best, self.own = objective, own
        self._keep_state()
        return True

    def _keep_state(self) -> None:
        self.best_state = [tensor.change.detach().clone() for tensor in self.trained], dict(self.decoders)

    @torch.no_grad()
    def _restore(self) -> None:
        changes, decoders = self.best_state
        for tensor, change in zip(self.trained, changes, strict=True):
            tensor.change.copy_(change)
        self.decoders = dict(decoders)

    @torch.no_grad()
    def _store(self) -> None:
        for tensor, value in zip(self.trained, self._values(), strict=True):  # in memory of their own: no page of a
            tensor.parameter.data = value.to(tensor.parameter.dtype)  # mapped file that is written to can be given back
        for name, layer in self.quantized.items():
            layer.codes.copy_(self.decoders[name].codes)

    def _search_again(self, search: Search) -> int | None:
        """Search each layer's codes again under the trained codebooks; how many were better on held-out text, None
        where the method searches none.
        """
        kept, searched = 0, False
        values = dict(zip(map(id, self.trained), self._values(rounded=True), strict=True))
        for name, decoder in list(self.decoders.items()):
            books, scales = (values[id(part[name])] for part in (self.codebooks, self.scales))
            found = search(name, decoder.codes, books, scales)
            if found is None:
                continue
            self.decoders[name], searched = self._decoder(name, found), True
            if self._better(*self._error(self.held_out)):
                kept += 1
            else:
                self.decoders[name] = decoder
        return kept if searched else None
