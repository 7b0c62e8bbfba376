"""H of all linears of a model as it is, for runs that then need no calibration of their own."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..calibrate.sources import SequenceCalibration
from ..calibrate.statistics import StatisticsWriter
from ..core.runtime import working_on
from ..model import experts
from ..model.blocks import Blocks, find_blocks, quantizable_linears
from ..model.embeddings import find_embeddings
from ..model.probe import dense_reasons, trace
from ..model.residence import Residence
from ..recipe import AqlmConfig
from ..versions import versions
from .pipeline import without_gradients
from .progress import Phases, Progress
from .resume import facts_of


def facts_of_model(model: Any) -> dict[str, Any]:
    """What H of a model depend on beside the tokens: its class, dtype and the SHA-256 of its weights; and its name.

    model: as transformers made it, fused experts as they are.
    """
    facts = facts_of(model, torch.zeros(1, 1, dtype=torch.long), {})["model"]
    chosen = {name: facts[name] for name in ("class", "weights", "attention")}
    return {**chosen, "dtype": str(model.dtype).removeprefix("torch."), "name": facts_name(model)}


def facts_name(model: Any) -> str:
    """The last part of where a model came from: no folder of this machine."""
    return str(getattr(model.config, "_name_or_path", "")).rstrip("/").rpartition("/")[2]


class Collector:
    """Runs calibration sequences through a model that stays as it is, and writes the H of its linears: `run`.

    layers: regular expression, only linears of blocks whose name it finds; None: all, and the output layer's.
    """

    def __init__(
        self,
        model: Any,
        calibration: SequenceCalibration,
        device: torch.device,
        layers: str | None = None,
        progress: Any = None,
    ) -> None:
        self.model, self.calibration, self.layers = model, calibration, layers
        self.residence = Residence(model, device)
        self.phases = Phases(progress or Progress())
        self.device = device
        self.steps: list[tuple[int, dict[str, torch.nn.Linear]]] = []

    def run(self, writer_of: Any, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Write the file. writer_of: gives the `StatisticsWriter` for a number of linears. What the file says."""
        self.model.eval()
        with contextlib.ExitStack() as stack:
            stack.enter_context(without_gradients(self.model))
            experts.unfuse(self.model)
            stack.callback(experts.fuse, self.model)
            stack.enter_context(working_on(self.device, None))
            stack.enter_context(self.residence)
            blocks = self._plan()
            self.residence.settle(blocks)
            output = "" if self.layers else find_embeddings(self.model).output
            count = sum(len(linears) for _, linears in self.steps) + bool(output)
            writer: StatisticsWriter = stack.enter_context(writer_of(count))
            stack.enter_context(self.calibration)
            self.phases.progress.on_start(len(self.steps) + bool(output), count)
            for hessians, tokens in self._blocks(blocks):
                writer.add(hessians, tokens)
            if output:
                self.phases.progress.on_block(len(self.steps), output)
                writer.add(*self._output(output))
            now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
            writer.finish({**facts, "date": now, "versions": versions()})
        return {**facts, "layers": writer.layers, "phases": self.phases.seconds}

    def _plan(self) -> Blocks:
        """What there are linears of, by block, up to the last that has some."""
        with self.residence.running():
            found = trace(self.model)
            _, blocks = find_blocks(self.model, found)
            blocks.check_repeatable(self.model)
            left_out = dense_reasons(self.model, found, blocks.named())
        for index, (prefix, block) in enumerate(blocks.named()):
            names = quantizable_linears(prefix, block, self.layers, AqlmConfig())
            self.steps.append((index, {n: self.model.get_submodule(n) for n in names if n not in left_out}))
        while self.steps and not self.steps[-1][1]:
            self.steps.pop()
        if not self.steps:
            raise ValueError(f"layers: got {self.layers!r}, which leaves no linear, expected names such as 'up_proj'")
        return blocks

    def _blocks(self, blocks: Blocks) -> Iterator[tuple[Mapping[str, Any], Mapping[str, int]]]:
        calibration = self.calibration
        with self.phases("calibrate"), self.residence.using(self.model):
            calibration.start(self.model, blocks, None)
        for index, linears in self.steps:
            self.phases.progress.on_block(index, blocks.names[index])
            for following in blocks[index + 1 : index + 2] if blocks.chained else ():
                self.residence.read_ahead(following)
            with self.residence.using(blocks[index]):
                if not linears:
                    calibration.advance(index, blocks[index])
                    continue
                whole = contextlib.nullcontext() if blocks.chained else self.residence.running()
                with self.phases("calibrate"), whole:
                    given = calibration.of_block(index, blocks[index], linears, outputs=blocks.chained)
                self.phases.move("calibrate", "hessian", given.seconds)
                if given.outputs is not None and calibration.inputs is not None:
                    calibration.inputs.close()
                    calibration.inputs = given.outputs
                yield given.hessians, given.tokens

    def _output(self, name: str) -> tuple[Mapping[str, Any], Mapping[str, int]]:
        with self.phases("calibrate"), self.residence.running():
            given = self.calibration.of_output(self.model, name)
        self.phases.move("calibrate", "hessian", given.seconds)
        return given.hessians, given.tokens
