"""One run over a model: the stages of each step of the plan, with progress, estimates and resume beside them."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..calibrate.offload import Room
from ..calibrate.sources import Calibration, SequenceCalibration
from ..calibrate.statistics import StoredHessians, TunedStoredHessians
from ..core import runtime
from ..core.runtime import free_device_memory, kind_of_device, peak_device_memory, working_on
from ..distributed import group
from ..files import peak_memory
from ..model import experts
from ..model.embeddings import tie
from ..model.residence import Residence
from ..model.sizes import stored_size
from ..recipe import AqlmConfig
from ..report.diagnose import diagnose
from ..report.report import QuantizationReport
from .block import BlockStages, Reports, block_reports, dense
from .estimate import Estimator, MemoryPlan, Rates, Work, fitting_batch_size, plan_memory, plan_on_device
from .placement import Placement
from .plan import BlockPlan, Plan, make_plan, works_of
from .progress import Phases, Progress
from .resume import WorkDir, block_state, fingerprint, restore_block

log = logging.getLogger("aqlm_c")


class Pipeline:
    """Quantizes a model in place: `run`. What can be checked before any work is checked when it is made.

    config: as the plan has settled it, with which the model is then saved.
    layers, progress, work_dir, placement: as in `quantize_model`, which see for the errors.
    """

    def __init__(
        self,
        model: Any,
        config: AqlmConfig,
        calibration: Calibration,
        *,
        layers: str | None = None,
        progress: Any = None,
        work_dir: str | os.PathLike[str] | None = None,
        placement: Placement | None = None,
    ) -> None:
        self.model, self.calibration, self.layers = model, calibration, layers
        self.progress = progress or Progress()
        self.work_dir = work_dir
        self.placement = placement or Placement()
        self.phases = Phases(self.progress)
        self.residence = Residence(model, self.placement.find(model))
        self.plan = self._make_plan(config.without_tuning())
        self.config = self.plan.config
        self._fit_batch_size()
        dtype = model.dtype  # before its first parameters are codebooks
        self.stages = BlockStages(self.residence, self.plan, self.config, calibration, self.phases, dtype)
        self.report = QuantizationReport(
            tokens=calibration.tokens,
            sequences=calibration.sequences,
            config=config.to_dict(),
            model=getattr(model.config, "_name_or_path", ""),
            threads=runtime.get_num_threads(),
            isa=runtime.get_isa(),
            device=kind_of_device(self.residence.device),
            phases=self.phases.seconds,
            plan={**self.plan.to_dict(), "batch_size": calibration.batch_size},
            ranks=group().size,
        )
        self.store: WorkDir | None = None
        self.finished = 0  # steps found in the work directory

    def _make_plan(self, config: AqlmConfig) -> Plan:
        with working_on(self.residence.device, None), self.residence, self.residence.running():
            plan = make_plan(self.model, config, self.layers, self.residence.done)
            try:
                if self.calibration.tokens:
                    plan.blocks.check_repeatable(self.model)
            except BaseException:
                experts.fuse(self.model)
                raise
        self.residence.settle(plan.blocks)
        return plan

    def run(self) -> QuantizationReport:
        """All steps; the report. The model is left in evaluation mode."""
        self.model.eval()
        with contextlib.ExitStack() as stack:
            stack.enter_context(without_gradients(self.model))
            stack.callback(experts.fuse, self.model)  # if none was quantized
            stack.enter_context(working_on(self.residence.device, self.placement.limits[1]))
            stack.enter_context(self.residence)
            self._open(stack)
            memory, estimator = self._estimate()
            place = self.stages.place = self._place(memory, stack)
            self.stages.most_hessians = agreed(memory.most_hessians)
            stack.enter_context(self.calibration)
            self._see_original(place)
            for number, step in enumerate(self.plan.steps):
                if step.index == 0:
                    with self.phases("calibrate"), self.residence.using(self.model):
                        self.calibration.start(self.model, self.plan.blocks, place)
                    if number == 0:
                        estimator.start(self.phases.seconds)
                self._step(number, step)
                estimator.finish_block(number, self.phases.seconds, alike=step.index is not None)
                self.progress.on_estimate(estimator.estimate())
            # While experts are apart, so that each dense one is counted by its name.
            self.report.parameters, self.report.stored_bytes = stored_size(self.model, self._decoded_bits())
        self.report.peak_memory_bytes = peak_memory()
        self.report.peak_device_memory_bytes = peak_device_memory(self.residence.device)
        if self.calibration.tokens:
            self.report.diagnoses = diagnose(self.report)
        self.progress.on_finish(self.report)
        return self.report

    def _see_original(self, place: Path | Room | None) -> None:
        """What is asked of the original model beside its blocks, while nothing is quantized."""
        blocks, weighs = self.plan.blocks, self.config.target.fisher_share > 0 and self.calibration.tokens > 0
        if (weighs or self.stages.follows) and not blocks.chained:
            log.warning(
                "error_correction, finetune_target, fisher_share: no effect on a model whose blocks are no chain"
            )
            return
        if self.stages.follows:
            with self.phases("calibrate"), self.residence.using(self.model):
                self.calibration.start_originals(self.model, blocks, place)
        if weighs:
            with self.phases("calibrate"), self.residence.using(self.model, *blocks):
                names = (name for step in self.plan.steps if step.index is not None for name in step.targets)
                self.calibration.weigh(self.model, {name: self.model.get_submodule(name) for name in names})

    def _step(self, number: int, step: BlockPlan) -> None:
        """Quantize a step, or take it from the work directory; then run on to the next block."""
        self.progress.on_block(number, step.name)
        module = self.model if step.index is None else self.plan.blocks[step.index]
        reports = None
        if number < self.finished:
            if step.index is not None and self.calibration.originals is not None:
                with self.residence.using(module):
                    self.stages.follow(step)
            reports = self._restore(number, module)
        tuning = self.config.tuning
        if reports is None and step.index is not None and self.calibration.inputs is not None:
            self._read_ahead(step.index, tuning.finetune_lookahead if tuning.finetune_epochs else 0)
        with self.residence.using(module):
            if reports is None:
                reports = self.stages.quantize(step)
                if self.store is not None:
                    state = block_state(module, self._replaced(step), step.index is None) if step.targets else {}
                    self.store.save_block(number, state, {**reports, "ranks": group().size})
            if step.index is None and self.plan.embeddings.tied:
                tie(self.model, self.plan.embeddings, self.config.is_dense)
            if step.index is not None and self.calibration.inputs is not None and number + 1 < len(self.plan.steps):
                self._read_ahead(step.index, 1)
                with self.phases("propagate"), dense(module, self.stages.dtype):
                    self.calibration.advance(step.index, module)
        layers, blocks = block_reports(reports)
        self.report.layers += layers
        self.report.blocks += blocks

    def _replaced(self, step: BlockPlan) -> list[str]:
        """Names, in the module of a step, of the layers whose dense weights are results of the method."""
        start = 0 if step.index is None else len(step.name) + 1
        return [name[start:] for name in step.targets] if self.config.is_dense else []

    def _decoded_bits(self) -> dict[str, float]:
        """Bits per weight of the layers that are stored as what they decode to, by name."""
        layers = self.report.layers if self.config.is_dense else []
        return {layer.name: layer.bits_per_weight for layer in layers}

    def _place(self, memory: MemoryPlan, stack: contextlib.ExitStack) -> Path | Room | None:
        """Where activations are kept."""
        if not is_gpu(self.residence.device):
            return memory.directory
        room = Room(self.residence.device, memory.device_activations, memory.host_activations, memory.directory)
        stack.callback(room.close)
        return room

    def _read_ahead(self, index: int, count: int) -> None:
        for block in self.plan.blocks[index + 1 : index + 1 + count] if self.plan.blocks.chained else ():
            self.residence.read_ahead(block)

    def _open(self, stack: contextlib.ExitStack) -> None:
        """The work directory, which only the first rank sees; before it, that all ranks are of the same run."""
        ranks = group()
        if ranks.size == 1 and self.work_dir is None:
            return
        parts = self._fingerprint()
        ranks.check_same({
            name if part == "options" else f"{part}.{name}": value
            for part, fields in parts.items()
            if part != "machine"
            for name, value in fields.items()
        })  # fmt: skip
        if self.work_dir is not None and ranks.first:
            self.store = stack.enter_context(WorkDir.open(self.work_dir, parts))
        self.finished = ranks.broadcast(self.store.finished if self.store else 0)

    def _restore(self, number: int, module: torch.nn.Module) -> Reports:
        """Take a step from the work directory; its reports."""
        ranks, found = group(), (self.store.load_block(number) if self.store else ({}, {}))
        reports: Any = ranks.broadcast(found[1])
        tensors = ranks.broadcast_arrays(found[0], 0, "cpu")
        restore_block(module, {name: torch.as_tensor(tensor) for name, tensor in tensors.items()})
        self.report.add_ranks(reports.get("ranks", 1))
        return reports

    def _fingerprint(self) -> dict[str, Any]:
        ids = self.calibration.ids if isinstance(self.calibration, SequenceCalibration) else torch.zeros(0, 0)
        options = {"batch_size": self.calibration.batch_size, "device": kind_of_device(self.residence.device)}
        if isinstance(self.calibration, (StoredHessians, TunedStoredHessians)):
            options["statistics"] = self.calibration.statistics.digest
        return fingerprint(self.model, ids, self.config, self.layers, self.residence.done, **options)

    def _fit_batch_size(self) -> None:
        """As many sequences in a pass as a GPU has memory for, on all ranks, unless their number was asked for."""
        calibration, device = self.calibration, self.residence.device
        if calibration.batch_size is None or calibration.batch_size_asked or not is_gpu(device):
            return
        limit, free, works = self.placement.limits[1], free_device_memory(device), self._works()
        size = fitting_batch_size(limit, works, free, calibration.batch_size)
        calibration.set_batch_size(min(group().gather(size)))

    def expected(self) -> dict[str, float]:
        """Seconds by phase that the run will take here, before any of its work; reading of weights is no phase."""
        rates = Rates.measure(self.config, str(self.stages.dtype).removeprefix("torch."), self.residence.device)
        found: dict[str, float] = {}
        for work in self._works():
            for phase, seconds in work.seconds(rates).items():
                found[phase] = found.get(phase, 0.0) + seconds
        return found

    def _works(self) -> list[Work]:
        """The work of each step, for estimates."""
        calibration, config = self.calibration, self.config
        tuned = config if calibration.tokens else config.replace(finetune_epochs=0)
        tokens = -(-calibration.tokens // group().size)  # of this rank
        brought = self.residence.moves or self.residence.mapped_bytes() > 0
        length, size = calibration.sequence_length, calibration.batch_size
        return works_of(self.model, self.plan, tuned, tokens, length, brought, size)

    def _estimate(self) -> tuple[MemoryPlan, Estimator]:
        """What the run will take, as the progress is told."""
        config, works = self.config, self._works()
        dense_bytes = sum(self.model.get_submodule(name).weight.nbytes for name in self.plan.targets())
        kept = sum(parameter.nbytes for parameter in self.model.parameters()) - dense_bytes
        device, limits = self.residence.device, self.placement.limits
        place = self.work_dir if group().first else None  # another machine need not have it
        options: dict[str, Any] = {"work_dir": place, "other_bytes": kept, "resumed": self.finished}
        if is_gpu(device):
            memory = plan_on_device(limits, works, free_device_memory(device), **options)
        else:
            memory = plan_memory(limits[0], works, **options)
        rates = Rates.measure(config, str(self.stages.dtype).removeprefix("torch."), device)
        estimator = Estimator(works, memory, rates, resumed=self.finished)
        self.progress.on_start(len(works), self.plan.n_layers)
        self.progress.on_plan(self.plan)
        if self.finished:
            self.progress.on_resume(self.finished)
        self.progress.on_estimate(estimator.estimate())
        estimator.start(self.phases.seconds)
        return memory, estimator


def is_gpu(device: torch.device) -> bool:
    """Whether memory is planned as that of a GPU."""
    return device.type == "cuda"


def agreed(most: int | None) -> int | None:
    """The least of what the ranks say, None being more than any number."""
    return min((one for one in group().gather(most) if one is not None), default=None)


@contextlib.contextmanager
def without_gradients(model: torch.nn.Module) -> Iterator[None]:
    """No parameter of `model` asks for a gradient."""
    asked = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.requires_grad_(False)
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():  # some are others by now
            if name in asked:
                parameter.requires_grad_()
