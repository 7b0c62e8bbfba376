"""The stages of one step: capture what its layers are given, quantize them, tune the block."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..calibrate.activations import Activations
from ..calibrate.hessians import NO_POOLS
from ..calibrate.offload import Room
from ..calibrate.sources import Calibration, Chain, LayerInputs, embedding_hessian
from ..calibrate.upstream import original_of
from ..core import arrays, grid, verbs
from ..core.verbs import Array
from ..distributed import group
from ..format import Format
from ..io.checkpoint import quantized_linears
from ..methods import get_method
from ..methods.base import DenseWeight, LayerProblem, QuantizedWeight, Result, gaussian_references
from ..model.blocks import is_norm_or_bias
from ..model.embeddings import search_config
from ..model.residence import Residence
from ..nn.dense import with_weight
from ..nn.embedding import quantized_class
from ..nn.linear import QuantizedLayer
from ..recipe import AqlmConfig
from ..report.layers import BlockReport, LayerReport
from ..train.block import finetune_block, tune_remaining
from ..weights import layer_problem, solve
from .estimate import Rates, groups_of
from .plan import BlockPlan, Plan
from .progress import Phases
from .resume import sha256_of
from .reuse import LayerStore
from .spread import spread_layers

log = logging.getLogger("aqlm_c")

Reports = dict[str, list[dict[str, Any]]]  # of a step, as JSON can hold them: "layers" and "blocks"


def quantize_module(
    name: str,
    module: torch.nn.Linear | torch.nn.Embedding,
    hessian: Any,
    format: Format,
    config: AqlmConfig,
    dtype: torch.dtype | None = None,
    weight: Any = None,
) -> tuple[torch.nn.Module, Result, LayerProblem]:
    """The quantized layer for the place of a dense one, its weight, and the problem that it solves. The layer of a
    method whose results are dense is dense too, with the weight that it decodes to.

    dtype: of codebooks and scales; None: `disk_dtype`, of a dense weight the module's own. weight: what is quantized,
    if not the module's.
    """
    dtype = dtype or (module.weight.dtype if config.is_dense else disk_dtype(module.weight))
    weight = module.weight if weight is None else weight
    problem = layer_problem(name, weight, hessian, format, config, str(dtype).removeprefix("torch."))
    solved = solve(problem, config)
    return placed(module, solved, dtype), solved, problem


def placed(module: torch.nn.Linear | torch.nn.Embedding, solved: Result, dtype: torch.dtype) -> torch.nn.Module:
    """The layer of a solved weight for the place of the dense `module`; dtype: of what is stored."""
    if isinstance(solved, DenseWeight):
        return with_weight(module, torch.as_tensor(solved.weight).to(dtype))
    return quantized_class(module).from_quantized_weight(solved, module, dtype)


def disk_dtype(weight: torch.Tensor) -> torch.dtype:
    """The 16-bit float in which codebooks and scales of a layer are stored: the weight's own; of others float16, or
    bfloat16 where the sizes of the rows are beyond float16 (on the meta device there are none).
    """
    if weight.dtype in (torch.float16, torch.bfloat16):
        return weight.dtype
    if weight.is_meta:
        return torch.float16
    sizes = arrays.to_numpy(arrays.root_sum_of_rows(arrays.of_tensor(weight.float()), mean=True))
    return torch.float16 if grid.holds(sizes, "float16") else torch.bfloat16


class _Solved(NamedTuple):
    layer: torch.nn.Module
    weight: Result
    report: LayerReport
    problem: LayerProblem | None  # if its codes will be searched again


@dataclasses.dataclass
class _Block:
    """A block at work. original: it as it was, where the original is followed. outputs: what it is tuned towards.
    ranks: which has which layer. problems: of this rank's layers.
    """

    step: BlockPlan
    index: int
    reports: Reports
    original: torch.nn.Module | None = None
    outputs: Activations | None = None
    ranks: dict[str, int] = dataclasses.field(default_factory=dict)
    problems: dict[str, LayerProblem] = dataclasses.field(default_factory=dict)


class BlockStages:
    """Quantizes the steps of a plan, one at a time, in place. dtype: the model's. residence: brings to the device what
    a step works on; the step's own block is there.

    Of several ranks each quantizes some layers of a step, and has the sums of H of these alone; all have the results.
    """

    def __init__(
        self,
        residence: Residence,
        plan: Plan,
        config: AqlmConfig,
        calibration: Calibration,
        phases: Phases,
        dtype: torch.dtype,
    ) -> None:
        self.model: Any = residence.model
        self.residence, self.plan, self.config = residence, plan, config
        self.calibration, self.phases, self.dtype = calibration, phases, dtype
        self._found: dict[str, torch.nn.Module] = {}  # of the step, by name
        # Weights of a block that were tuned before they are quantized, float32, and as they were, by the layer's name.
        self._masters: dict[str, torch.nn.Parameter] = {}
        self._untuned: dict[str, torch.Tensor] = {}
        self.most_hessians: int | None = None  # bytes that all H of a step may take together; None: any number
        self.place: Path | Room | None = None  # of activations; None: memory
        self.store = LayerStore.of(calibration, config, residence.device)

    def quantize(self, step: BlockPlan) -> Reports:
        """Quantize and tune a step; the reports of its layers and, after fine-tuning, of the block."""
        reports: Reports = {"layers": [], "blocks": []}
        if step.index is None:
            self._quantize_embeddings(step, reports)
        elif step.targets:
            self._quantize_block(step, step.index, reports)
        else:
            self.follow(step)
        return reports

    def follow(self, step: BlockPlan) -> None:
        """The original's activations, where they are asked for, go through a block that is as it was."""
        if step.index is not None and self.calibration.originals is not None:
            with self.phases("propagate"):
                self.calibration.follow(step.index, self.plan.blocks[step.index])

    @property
    def tunes(self) -> bool:
        """Whether blocks are tuned."""
        return self.config.tuning.finetune_epochs > 0 and self.calibration.tokens > 0

    @property
    def follows(self) -> bool:
        """Whether the original's activations are asked for."""
        target = self.config.target
        original = target.finetune_target == "original" and self.tunes
        return self.calibration.tokens > 0 and (target.error_correction > 0 or original)

    def _quantize_block(self, step: BlockPlan, index: int, reports: Reports) -> None:
        block, calibration, target = self.plan.blocks[index], self.calibration, self.config.target
        remaining = target.tune_remaining > 0 and self.tunes
        with contextlib.ExitStack() as stack:
            work = _Block(step, index, reports)
            stack.callback(self._close_outputs, work)
            if calibration.originals is not None:
                work.original = original_of(block, shared=not remaining)
                if self.tunes and target.finetune_target == "original":
                    with self.phases("calibrate"):
                        work.outputs = calibration.originals.outputs(index, work.original)
            turns = self._turns(work) if target.sequential or remaining else [list(step.targets)]
            for number, names in enumerate(turns):
                self._quantize_groups(work, names, number > 0)
                left = [name for later in turns[number + 1 :] for name in later]
                if remaining and left:
                    self._tune_remaining(work, left)
            if work.original is not None:
                followed = work.outputs if target.finetune_target == "original" else None
                with self.phases("propagate"):
                    calibration.follow(index, work.original, followed)
                work.original = None
            if self.tunes:
                self._tune(work)
            self._masters.clear()
            self._untuned.clear()

    def _close_outputs(self, work: _Block) -> None:
        if work.outputs is not None and work.outputs is not self.calibration.originals:
            work.outputs.close()

    @contextlib.contextmanager
    def _running(self, block: torch.nn.Module, partly: bool = False) -> Iterator[None]:
        """A block can run on its inputs. partly: some of its layers are quantized."""
        whole = contextlib.nullcontext() if self.plan.blocks.chained else self.residence.running()
        with whole, dense(block, self.dtype) if partly else contextlib.nullcontext():
            yield

    def _turns(self, work: _Block) -> list[list[str]]:
        block, linears = self.plan.blocks[work.index], {n: self.model.get_submodule(n) for n in work.step.targets}
        with self.phases("calibrate"), self._running(block):
            return self.calibration.turns(work.index, block, linears)

    def _quantize_groups(self, work: _Block, names: list[str], later: bool) -> None:
        """Quantize layers of a block: all under H of the block as it is, which runs for each group of those whose H fit
        memory together. later: some others are quantized already.
        """
        block, linears = self.plan.blocks[work.index], {name: self.model.get_submodule(name) for name in names}
        groups = groups_of({name: linear.weight.shape for name, linear in linears.items()}, self.most_hessians)
        pools = NO_POOLS

        if len(groups) > 1:
            with self.phases("calibrate"), self._running(block, later):
                pools = self.calibration.pools(work.index, block, linears)
        for group_names in groups:
            spread = functools.partial(self._spread, work.step)
            part = {name: linears[name] for name in group_names}
            outputs = self.tunes and work.outputs is None
            with self.phases("calibrate"), self._running(block, later):
                given = self.calibration.of_block(
                    work.index, block, part, outputs, spread, pools, original=work.original
                )
            self.phases.move("calibrate", "hessian", given.seconds)
            if given.outputs is not None:
                work.outputs = given.outputs
            work.ranks |= given.ranks
            targets = {name: work.step.targets[name] for name in group_names}
            work.problems |= self._quantize_layers(targets, given, work.reports)
        self._place_all()

    def _ahead(self, index: int) -> tuple[list[torch.nn.Module], list[torch.nn.Module]]:
        """The blocks that tuning number `index` is told of, and those ahead of it that run for it."""
        blocks = self.plan.blocks[:] if self.plan.blocks.chained else self.plan.blocks[: index + 1]  # none is ahead
        return blocks, blocks[index + 1 : index + 1 + self.config.tuning.finetune_lookahead]

    def _tune(self, work: _Block) -> None:
        inputs, name, index = self.calibration.inputs, work.step.name, work.index
        blocks, ahead = self._ahead(index)
        assert inputs is not None and work.outputs is not None, "tuning compares activations"

        def search(part: str, *state: torch.Tensor) -> torch.Tensor | None:
            layer, device = f"{name}.{part}", state[0].device
            found = search_again(work.problems[layer], self.config, *state) if layer in work.problems else None
            told = {} if found is None else {"codes": found}
            rank = work.ranks.get(layer, group().rank)
            codes = group().broadcast_arrays(told, rank, device).get("codes")
            return None if codes is None else torch.as_tensor(codes)

        using = self.residence.using(*ahead)
        with self.phases("finetune"), using, dense(blocks[index], self.dtype) as quantized:
            tuned = finetune_block(name, index, blocks, quantized, inputs, work.outputs, self.config, search)
            same_everywhere(name, quantized, blocks[index])
        work.reports["blocks"].append(tuned.to_dict())
        self.phases.progress.on_block_report(tuned)

    def _tune_remaining(self, work: _Block, left: list[str]) -> None:
        """Tune what is quantized of a block by now together with the linears `left` to quantize."""
        inputs, name, index = self.calibration.inputs, work.step.name, work.index
        blocks, ahead = self._ahead(index)
        assert inputs is not None and work.outputs is not None, "tuning compares activations"
        linears = {layer: self.model.get_submodule(layer) for layer in left}
        for layer, linear in linears.items():
            start = self._masters.get(layer, linear.weight).detach()
            self._untuned.setdefault(layer, start)
            self._masters[layer] = torch.nn.Parameter(start.to(torch.float32, copy=True), requires_grad=False)
        remaining = {layer.removeprefix(f"{name}."): self._masters[layer] for layer in left}
        using = self.residence.using(*ahead)
        with self.phases("finetune"), using, dense(blocks[index], self.dtype) as quantized:
            given = (inputs, work.outputs)
            tune_remaining(name, index, blocks, quantized, remaining, given, self.config)
            same_everywhere(name, quantized, blocks[index], remaining)
        for layer, linear in linears.items():
            weight = self._masters[layer].to(linear.weight.dtype, copy=True)
            linear.weight = torch.nn.Parameter(weight, requires_grad=False)  # the old one may be another block's too

    def _quantize_embeddings(self, step: BlockPlan, reports: Reports) -> None:
        """H of the output layer is that of its inputs in the model as it is; of the input embedding: see
        `embedding_hessian`. This step comes before the blocks, so that every block is calibrated on the activations of
        a quantized embedding.
        """
        embeddings = self.plan.embeddings
        ranks = self._spread(step, {name: (name,) for name in step.targets})
        given, of_output = LayerInputs({}, ranks), None
        if embeddings.output in step.targets or embeddings.tied:
            (rank,) = (ranks[name] for name in step.targets if embeddings.tied or name == embeddings.output)
            in_turn = self.residence.moves and self.plan.blocks.chained
            chain = Chain(self.residence, self.plan.blocks, self.place) if in_turn else None
            with self.phases("calibrate"), contextlib.nullcontext() if in_turn else self.residence.running():
                found = self.calibration.of_output(
                    self.model, embeddings.output, lambda names: dict.fromkeys(names, rank), chain
                )
            of_output = found.hessians.get(embeddings.output)
            self.phases.move("calibrate", "hessian", found.seconds)
        for name in step.targets:
            if given.rank_of(name) != group().rank:
                continue
            hessian = of_output
            if name == embeddings.input:
                width = self.model.get_submodule(name).embedding_dim
                hessian = embedding_hessian(width, of_output if embeddings.tied else None, self.residence.device)
            assert hessian is not None, "an output layer has one"
            given.hessians[name] = hessian
        if self.calibration.tokens:
            given.tokens = dict.fromkeys(step.targets, self.calibration.tokens)
        self._quantize_layers(step.targets, given, reports)
        self._place_all()

    def _spread(self, step: BlockPlan, shared: Mapping[str, tuple[str, ...]]) -> dict[str, int]:
        layers = {}
        for name in shared:
            weight = self.model.get_submodule(name).weight
            layers[name] = (step.targets[name], tuple(weight.shape), self._config_of(name, step.targets[name]))
        return spread_layers(layers, shared, group().size, Rates.of_kind(self.residence.device))

    def _config_of(self, name: str, format: Format) -> AqlmConfig:
        return search_config(self.config, format) if name in self.plan.embeddings.names else self.config

    def _quantize_layers(
        self, targets: Mapping[str, Format], given: LayerInputs, reports: Reports
    ) -> dict[str, LayerProblem]:
        """Find quantized layers for the place of the dense ones; their reports join the others. The problems of this
        rank's.
        """
        ranks, own = group(), {}
        for name, format in targets.items():
            if given.rank_of(name) == ranks.rank:
                own[name] = self._quantize_layer(name, format, given)
                if ranks.size == 1:
                    self._keep(name, own[name].layer, own[name].report, reports)
        for name in targets if ranks.size > 1 else ():
            with self.phases("quantize"):
                layer, report = self._shared(name, own.get(name), given.rank_of(name))
            self._keep(name, layer, report, reports)
        return {name: found.problem for name, found in own.items() if found.problem is not None}

    def _place_all(self) -> None:
        """Put the layers that were found in the place of the dense ones, all of which saw the same inputs."""
        for name, layer in self._found.items():
            self.model.set_submodule(name, layer)
        self._found.clear()

    def _keep(self, name: str, layer: torch.nn.Module, report: LayerReport, reports: Reports) -> None:
        self._found[name] = layer
        reports["layers"].append(report.to_dict())
        self.phases.progress.on_layer(report)

    def _shared(self, name: str, found: _Solved | None, rank: int) -> tuple[torch.nn.Module, LayerReport]:
        """The quantized layer and its report, which `rank` has found, on every rank."""
        module = self.model.get_submodule(name)
        dtype = module.weight.dtype if self.config.is_dense else disk_dtype(module.weight)
        report = LayerReport.from_dict(group().broadcast(found and found.report.to_dict(), rank))
        tensors = group().broadcast_arrays(found and found.weight.tensors(), rank, module.weight.device)
        if found is not None:
            return found.layer, report
        name_of_dtype = str(dtype).removeprefix("torch.")
        solved: Result
        if self.config.is_dense:
            solved = DenseWeight(tensors["weight"], name_of_dtype, report.bits_per_weight, 0.0, {}, [])
        else:
            codes, books, scales = (tensors[part] for part in ("codes", "codebooks", "scales"))
            solved = QuantizedWeight(codes, books, scales, name_of_dtype, 0.0, {}, [])
        return placed(module, solved, dtype), report

    def _quantize_layer(self, name: str, format: Format, given: LayerInputs) -> _Solved:
        module, config = self.model.get_submodule(name), self._config_of(name, format)
        if self.store is not None:
            dtype = module.weight.dtype if config.is_dense else disk_dtype(module.weight)
            path = self.store.path(name, str(dtype), format, config)
            if kept := self.store.load(path, module.weight.device):
                return _Solved(placed(module, kept[0], dtype), *kept, None)
        with self.phases("quantize"):
            started = time.perf_counter()
            hessian = given.hessians.pop(name)
            try:
                weight, correction = self._weight_of(name, module, hessian, given.crosses.pop(name, None))
                layer, solved, problem = quantize_module(name, module, hessian, format, config, weight=weight)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            seconds = time.perf_counter() - started
        with self.phases("reference"):
            bits = get_method(config.solver).bits_per_weight(format, problem.shape, config.options)
            report = layer_report(problem, solved, bits, seconds, self.config.gaussian_reference)
        report.tokens, report.embedding = given.tokens.get(name), name in self.plan.embeddings.names
        report.correction = correction
        if self.store is not None:
            self.store.save(path, solved, report.to_dict())
        return _Solved(layer, solved, report, problem if self.config.tuning.finetune_search else None)

    def _weight_of(self, name: str, module: Any, hessian: Any, cross: Array | None) -> tuple[Any, float | None]:
        """What is quantized of a layer, and how far it was moved for what was quantized before it: all that it does to
        the original weight is made up for, of which tuning it has done a part.
        """
        weight = self._masters.get(name, module.weight)
        if cross is None:
            return weight, None
        target, start = self.config.target, arrays.as_matrix("weight", weight)
        alpha, untuned = target.error_correction, arrays.as_matrix("weight", self._untuned.get(name, weight))
        moved = hessian.corrected(untuned, cross, alpha, target.error_correction_damp)
        if name in self._untuned:
            moved = moved + (1 - alpha) * (start - untuned)
        H = hessian.like(start).H
        signal = verbs.quantization_error(start, H)
        return moved, verbs.quantization_error(moved - start, H) / signal if signal > 0 else 0.0


def same_everywhere(
    name: str,
    layers: Mapping[str, QuantizedLayer],
    block: torch.nn.Module,
    others: Mapping[str, torch.nn.Parameter] | None = None,
) -> None:
    """See that fine-tuning left the block `name` the same bits on all ranks; where machines of several kinds do not
    give them, all take the first rank's, and a warning says so. others: what was tuned beside it.
    """
    ranks = group()
    if ranks.size == 1:
        return
    state = {f"{part} {key}": p.detach() for part, layer in layers.items() for key, p in layer.named_parameters()}
    state |= {part: p.detach() for part, p in block.named_parameters() if is_norm_or_bias(p)}
    state |= {f"{part} weight": p.detach() for part, p in (others or {}).items()}
    if len(set(ranks.gather(sha256_of(state.items())))) == 1:
        return
    log.warning("%s: fine-tuning gave other bits on some ranks, those of rank 0 are taken", name)
    told = ranks.broadcast_arrays(state, 0, next(block.parameters()).device)
    for part, tensor in state.items():
        tensor.copy_(torch.as_tensor(told[part]))


def layer_report(
    problem: LayerProblem, quantized: Result, bits_per_weight: float, seconds: float, reference: bool = True
) -> LayerReport:
    """The layer's error at so many true bits, with `reference` beside that of Gaussian weights under the same H by
    reverse water-filling.
    """
    out_features, in_features = problem.shape
    code_rate, true_rate = gaussian_references(problem, bits_per_weight) if reference else (None, None)
    return LayerReport(
        name=problem.name,
        out_features=out_features,
        in_features=in_features,
        scheme=problem.format.scheme,
        relative_error=quantized.relative_error,
        gaussian_code_rate=code_rate,
        gaussian_true_rate=true_rate,
        bits_per_weight=bits_per_weight,
        seconds=seconds,
    )


def search_again(
    problem: LayerProblem, config: AqlmConfig, codes: torch.Tensor, codebooks: torch.Tensor, scales: torch.Tensor
) -> torch.Tensor | None:
    """The method's new codes of a layer under other codebooks and scales, all as in QuantizedLinear; None if it has
    none.
    """
    state = (arrays.of_tensor(codes), arrays.of_tensor(codebooks), arrays.of_tensor(scales))
    trained = QuantizedWeight(*state, problem.dtype, 0.0, {}, [])
    found = get_method(config.solver).search_again(problem, trained, config.options)
    return None if found is None else torch.as_tensor(found).to(codes.device)


@contextlib.contextmanager
def dense(block: torch.nn.Module, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """The block with dense linears of `dtype` in place of the quantized, which are given by their names in it.

    For runs over the calibration sequences: a dense product is the fastest there.
    """
    quantized: dict[str, Any] = dict(quantized_linears(block))
    try:
        for name, layer in quantized.items():
            block.set_submodule(name, layer.dequantize(dtype))
        block.requires_grad_(False)
        yield quantized
    finally:
        for name, layer in quantized.items():
            block.set_submodule(name, layer)


def block_reports(reports: Reports) -> tuple[list[LayerReport], list[BlockReport]]:
    """Those of a step, also after a round trip through JSON."""
    return list(map(LayerReport.from_dict, reports["layers"])), list(map(BlockReport.from_dict, reports["blocks"]))
