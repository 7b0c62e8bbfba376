"""Tuning a whole quantized model against its original: the steps (AQLM, arXiv 2401.06118, section 3.4, end to end).

The loss is KL(original || quantized) of the next token, mean over all positions. Codebooks, scales, norms and biases
are trained by Adam in relative steps; with `pv` codes too (`train.pv`). Whatever a step uses follows from the seed and
its number, so that a run goes on from a saved state as if it had not ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..config import FinetuneOptions
from ..core.runtime import deterministic
from ..distributed import group
from ..model.logits import SplitModel
from ..model.masks import one_text_each
from ..report.finetune import FinetuneReport
from .block import held_out_batches
from .cost import Estimate
from .output import sliced_kl
from .pv import Changes, CodeTuning
from .relative import load_moments
from .replay import ReplayedPass, own_stream
from .student import Student
from .teacher import Teacher

log = logging.getLogger("aqlm_c")

Save = Callable[[dict[str, Tensor], dict[str, Any]], None]


def rate_of(step: int, options: FinetuneOptions) -> float:
    """The factor of all rates in step number `step`, from 0 on: a rise in `warmup` steps, then the schedule's fall."""
    if step < options.warmup:
        return (step + 1) / options.warmup
    share = (step - options.warmup) / max(1, options.steps - options.warmup)
    fall = {"constant": 1.0, "linear": 1 - share, "cosine": (1 + math.cos(math.pi * share)) / 2}[options.schedule]
    return options.final_rate + (1 - options.final_rate) * fall


class Order:
    """Which of n sequences a step takes: a random order of all, then another one, and so on."""

    def __init__(self, numbers: list[int], seed: int) -> None:
        self.numbers, self.seed = numbers, seed
        self._epoch, self._drawn = -1, list[int]()

    def of_step(self, step: int, size: int) -> list[int]:
        found = []
        for place in range(step * size, (step + 1) * size):
            epoch, at = divmod(place, len(self.numbers))
            if epoch != self._epoch:
                generator = torch.Generator().manual_seed(self.seed + 7919 * epoch)
                self._epoch, self._drawn = epoch, torch.randperm(len(self.numbers), generator=generator).tolist()
            found.append(self.numbers[self._drawn[at]])
        return found


@dataclasses.dataclass
class Best:
    """The best state yet by its held-out loss."""

    loss: float
    step: int
    change: Tensor
    codes: list[Tensor]


class Distiller:
    """One run. sequences: token ids [n, length]. plan: of its passes. progress: told of steps and looks."""

    def __init__(
        self,
        student: Student,
        output: SplitModel,
        teacher: Teacher,
        sequences: Tensor,
        options: FinetuneOptions,
        plan: Estimate,
        progress: Any,
    ) -> None:
        self.student, self.output, self.teacher = student, output, teacher
        self.sequences, self.options, self.progress = sequences, options, progress
        self.micro, self._replays = plan.micro, plan.replays
        self._passes: dict[bool, ReplayedPass] = {}  # with gradients and without
        n = len(sequences)
        self.held_out = held_out_batches(n, min(options.held_out, options.most_held_out / n))
        training = sorted(set(range(n)) - set(self.held_out))
        self.order = Order(training, options.seed)
        groups = [{"params": [run.parameter], "lr": run.rate} for run in student.together.runs]
        device = student.together.change.device
        fused = True if device.type == "cuda" else None
        self.optimizer = torch.optim.Adam(groups, betas=(options.beta1, options.beta2), fused=fused)
        self.codes: CodeTuning | None = None
        if options.pv:
            blocks = [w for w in student.weights if w.trained and not {*w.names} & {*student.embeddings.names}]
            at_once = plan.micro * group().size >= options.batch_size
            self.codes = CodeTuning(blocks, options, output.dtype or torch.float32, at_once, plan.replays)
        self.report = FinetuneReport(
            options=dataclasses.asdict(options),
            sequences=n,
            sequence_length=sequences.shape[1],
            held_out=len(self.held_out),
            micro_batch_size=plan.micro,
        )
        self.step = self.since_best = 0
        self.best: Best | None = None
        self._seconds, self._losses = 0.0, list[Tensor]()
        self._last, self._broken = math.inf, False

    def run(self, state: tuple[Mapping[str, Tensor], Mapping[str, Any]] | None, save: Save | None) -> FinetuneReport:
        """All steps from a state that `save` was given on; the best values and codes are then in the model.

        Raises ValueError for a loss that is not finite before the first step.
        """
        started = time.perf_counter()
        saves = any(group().gather(save is not None))  # one rank does, of what all have
        with self._running():
            if state is not None:
                self._load(*state)
            self.teacher.fill(self._asked_for())
            if self._replays:
                self._record()
            if state is None:
                self._look()
            while self.step < self.options.steps and not self._is_over():
                self._step()
                ends = self.step == self.options.steps
                if ends or self.step % self.options.evaluation_interval == 0:
                    self.report.seconds = self._seconds + time.perf_counter() - started
                    self._look()
                if saves and not ends and self.step % self.options.save_interval == 0:
                    self.report.seconds = self._seconds + time.perf_counter() - started
                    state = self._state()
                    if save is not None:
                        save(*state)
            self._restore()
        self.student.store()
        assert self.best is not None
        self.report.seconds = self._seconds + time.perf_counter() - started
        self.report.steps, self.report.best_step = self.step, self.best.step
        self.report.tokens = self.step * self.options.batch_size * self.sequences.shape[1]
        self.report.held_out_after = self.best.loss
        return self.report

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if self._replays:
                stack.enter_context(own_stream(self.student.together.change.device))
            for context in (one_text_each(), self.student.running(), deterministic()):
                stack.enter_context(context)
            yield

    def _is_over(self) -> bool:
        return self._broken or (bool(self.options.patience) and self.since_best >= self.options.patience)

    def _own(self, numbers: list[int]) -> Iterator[list[int]]:
        """Those of this rank, as many as go in one pass at a time."""
        ranks = group()
        begin, end = (len(numbers) * rank // ranks.size for rank in (ranks.rank, ranks.rank + 1))
        for first in range(begin, end, self.micro):
            yield numbers[first : min(end, first + self.micro)]

    def _keep_up(self, numbers: list[int]) -> None:
        """Where all ranks run the teacher, those that have fewer of these sequences go on as long as the others."""
        ranks = group()
        if ranks.size == 1 or not self.teacher.is_run:
            return
        n, size = len(numbers), ranks.size
        passes = [-(-(n * (rank + 1) // size - n * rank // size) // self.micro) for rank in range(size)]
        self.teacher.keep_up(max(passes) - passes[ranks.rank])

    def _asked_for(self) -> list[int]:
        """The sequences of all passes of this rank from now on."""
        found = {number for batch in self._own(self.held_out) for number in batch}
        for step in range(self.step, self.options.steps):
            found.update(*self._own(self.order.of_step(step, self.options.batch_size)))
        return sorted(found)

    def _step(self) -> None:
        numbers = self.order.of_step(self.step, self.options.batch_size)
        positions = len(numbers) * self.sequences.shape[1]
        rate = rate_of(self.step, self.options)
        if self.codes is not None:
            self.codes.begin(self.step + 1, positions, rate)
        loss = torch.zeros((), dtype=torch.float64, device=self.student.together.change.device)
        for batch in self._own(numbers):
            loss += self._pass(batch, gradient=True)
        self._keep_up(numbers)
        if self.codes is not None:
            self.codes.settle()
        loss = self._sum_over_ranks(loss)
        self.student.together.settle(positions)
        for part, run in zip(self.optimizer.param_groups, self.student.together.runs, strict=True):
            part["lr"] = run.rate * rate
        if self.codes is not None:
            self.codes.leave()
        self.optimizer.step()
        self.student.update()
        if self.codes is not None:
            options = self.options
            changes = self.step >= options.pv_start and self.step % options.pv_interval == 0
            self.codes.step(changes)
        self.step += 1
        self._losses.append(loss / positions)
        self.progress.on_step(self.step, self.options.steps)

    def _pass(self, numbers: list[int], gradient: bool) -> Tensor:
        """The sum of the loss over the positions of some sequences, float64; gradients are added to those there are."""
        replayed = self._passes.get(gradient) if len(numbers) == self.micro else None
        return replayed(*self._inputs(numbers)) if replayed else self._sum_of(gradient, *self._inputs(numbers))

    def _inputs(self, numbers: list[int]) -> tuple[Tensor, ...]:
        """Token ids and, where they are kept, the original's hidden states."""
        ids = self.sequences[numbers]
        return (ids,) if self.teacher.is_run else (ids, self.teacher.hidden(numbers))

    def _sum_of(self, gradient: bool, ids: Tensor, targets: Tensor | None = None) -> Tensor:
        """`_pass` of sequences [n, length]; targets: the original's hidden states, else it is run."""
        targets = self.teacher.states(ids) if targets is None else targets
        weight, dtype = self.student.output_weight, self.output.dtype
        assert dtype is not None, "output is split"
        with torch.set_grad_enabled(gradient), contextlib.nullcontext() if weight is None else weight.held(dtype):
            return sliced_kl(self.output, self.teacher.output, self.output.hidden(ids), targets, gradient)

    def _record(self) -> None:
        """Have passes of `micro` sequences replayed. No gradients are there yet, and none are afterwards."""
        inputs, device = self._inputs(self.order.of_step(self.step, self.micro)), self.student.together.change.device
        for gradient in (True, False):
            first = self._passes.get(True)
            run = functools.partial(self._sum_of, gradient)
            replayed = ReplayedPass(run, inputs, device, self.student.forget_pass, first)
            if not replayed.works:
                return
            self._passes[gradient] = replayed

    def _sum_over_ranks(self, loss: Tensor) -> Tensor:
        """Add the losses of all ranks and the gradients, but those of buffers, in their order."""
        ranks = group()
        if ranks.size == 1:
            return loss
        gradient = self.student.together.gradient
        parts = ranks.gather_rows(gradient.view(1, -1), [1] * ranks.size)
        gradient.view(-1).copy_(_sum(part[0] for part in parts))
        return _sum(part[0, 0] for part in ranks.gather_rows(loss.view(1, 1), [1] * ranks.size))

    @torch.no_grad()
    def _held_out_loss(self) -> float:
        """Of values that are rounded as they are saved."""
        self.student.update(rounded=True)
        found = torch.zeros(len(self.held_out), 1, dtype=torch.float64, device=self.student.together.change.device)
        done = 0
        for batch in self._own(self.held_out):
            found[done] = self._pass(batch, gradient=False)
            done += 1
        self._keep_up(self.held_out)
        self.student.update()
        ranks = group()
        counts = [done] if ranks.size == 1 else ranks.gather(done)
        sums = [row[0] for rows in ranks.gather_rows(found[:done], counts) for row in rows]
        return float(_sum(iter(sums))) / (len(self.held_out) * self.sequences.shape[1])

    def _look(self) -> None:
        """Look at the held-out text: keep the best state, undo codes that made it worse."""
        loss = self._held_out_loss()
        undone, changed = False, Changes()
        if self.codes is not None:
            changed = self.codes.changes
            if self.options.pv_undo and not loss <= self._last:
                undone, loss = self._undo(loss)
            self.codes.look()
        self._last = loss
        training = torch.stack(self._losses).mean().item() if self._losses else None
        entry = {
            **{"step": self.step, "held_out": loss, "training": training, "seconds": self.report.seconds},
            **({"changed": changed.fraction, "undone": undone} if self.codes is not None else {}),
        }
        self._losses = []
        if self.best is None and not math.isfinite(loss):
            raise ValueError(f"model: got a held-out KL divergence of {loss}, expected a finite number")
        self.report.history.append(entry)
        if self.best is None:
            self.report.held_out_before = loss
        self.since_best += 1
        if self.best is None or loss < self.best.loss:
            codes = self.codes.looked_at if self.codes else []  # those of now
            self.best, self.since_best = Best(loss, self.step, self.student.together.change.clone(), codes), 0
        elif not math.isfinite(loss):
            log.warning("NaN or Inf in tuning, which ends here")
            self._broken = True
        self.progress.on_look(entry)

    def _undo(self, loss: float) -> tuple[bool, float]:
        """Whether the codes of the last look are better, which are then taken, and the loss."""
        assert self.codes is not None
        codes = self.codes.undo()
        before = self._held_out_loss()
        if before < loss:
            self.codes.forget(codes)
            return True, before
        self.codes.take(codes)
        return False, loss

    @torch.no_grad()
    def _restore(self) -> None:
        assert self.best is not None
        self.student.together.change.copy_(self.best.change)
        if self.codes is not None:
            self.report.changed = sum(
                int((weight.layer.codes != codes.to(weight.codes.device)).any(-1).sum())
                for weight, codes in zip(self.codes.weights, self.best.codes, strict=True)
            )
            self.codes.take(self.best.codes)
        self.student.update()

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and facts from which `_load` goes on; all of them on the first rank."""
        assert self.best is not None
        tensors = {"change": self.student.together.change, "best": self.best.change}
        for i, part in enumerate(self.optimizer.param_groups):
            tensors |= {f"adam.{i}.{name}": value for name, value in self.optimizer.state[part["params"][0]].items()}
        if self._losses:
            tensors["losses"] = torch.stack(self._losses)
        if self.codes is not None:
            tensors |= self.codes.state()
            for i, (weight, best) in enumerate(zip(self.codes.weights, self.best.codes, strict=True)):
                tensors |= {f"codes.{i}": weight.codes, f"best.{i}": best}
        changes = dataclasses.asdict(self.codes.changes) if self.codes else {}
        facts = {
            **{"step": self.step, "since_best": self.since_best, "last": self._last, "report": self.report.to_dict()},
            **{"best_loss": self.best.loss, "best_step": self.best.step, "changes": changes},
        }
        return tensors, facts

    @torch.no_grad()
    def _load(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        device = self.student.together.change.device
        self.student.together.change.copy_(tensors["change"])
        for i, part in enumerate(self.optimizer.param_groups):
            load_moments(self.optimizer, part["params"][0], f"adam.{i}.", tensors)
        self._losses = list(tensors["losses"].to(device)) if "losses" in tensors else []
        codes = []
        if self.codes is not None:
            self.codes.load(tensors)
            count = range(len(self.codes.weights))
            self.codes.take([tensors[f"codes.{i}"].to(device) for i in count])
            self.codes.changes = Changes(**facts["changes"])
            codes = [tensors[f"best.{i}"].to(kept.device) for i, kept in enumerate(self.codes.looked_at)]
        self.step, self.since_best, self._last = facts["step"], facts["since_best"], facts["last"]
        self.best = Best(facts["best_loss"], facts["best_step"], tensors["best"].to(device, copy=True), codes)
        self.report = FinetuneReport.from_dict(facts["report"])
        self._seconds = self.report.seconds
        self.student.update()


def _sum(parts: Iterator[Tensor]) -> Tensor:
    total = next(parts).clone()
    for part in parts:
        total += part
    return total
