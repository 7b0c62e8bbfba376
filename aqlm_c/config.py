"""Options, each kind a class of its own: of the AQLM methods, of block fine-tuning, of calibration.

A method reads its own class (`Method.options_type`); the names of all fields together are one flat schema, which the
command line, YAML files and Python share (`recipe`).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

from .errors import int_between, number_between, share, wrong
from .format import DENSE, Format
from .patterns import pattern_of
from .units import parse_size

BOS = ("auto", "always", "never")  # no words that YAML reads as true or false
DTYPES = ("auto", "float32", "bfloat16", "float16")
CHECKPOINTING = ("auto", "always", "never")
SCHEDULES = ("cosine", "linear", "constant")
PV_STATES = ("auto", "float32", "8bit")
TEACHER_CACHES = ("none", "memory", "disk")
TARGETS = ("own", "original")
CANDIDATES = ("1x8g8", "2x8g8", "3x8g8", "4x8g8", "6x8g8", DENSE)  # those that products are fastest with

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclasses.dataclass(frozen=True)
class MethodOptions:
    """Options of a method that has none; the others derive from it."""

    # Fields to which no preset gives a value: their defaults are part of the method.
    fixed: ClassVar[frozenset[str]] = frozenset()

    def few_passes(self, format: Format) -> Self:
        """The options for a large weight of many bits, which few passes of search bring close to the best."""
        return self


@dataclasses.dataclass(frozen=True)
class AqlmOptions(MethodOptions):
    """Options of AQLM's solver of one layer (arXiv 2401.06118, section 3).

    beam_size: of the code search; 0: exact pairs where num_codebooks >= 2 and nbits_per_codebook <= 8 (with a beam of 4
    where there are more than two), else a beam of 1. relative_mse_tolerance: stop when a sweep gains less of the
    error. init_max_iter: at most this many k-means rounds per codebook. ldl_passes: passes of sequential error
    feedback, each followed by an update of the codebooks. max_sweeps: at most this many coordinate sweeps after them.
    cg_steps: conjugate-gradient steps per update of the codebooks. adam_steps, adam_learning_rate: of the method
    "paper", per update of codebooks and scales. relative_damp: added to H's diagonal, in units of its mean.

    Raises ValueError naming the field, its value and what was expected.
    """

    beam_size: int = 0
    relative_mse_tolerance: float = 0.003
    init_max_iter: int = 20
    ldl_passes: int = 10
    max_sweeps: int = 12
    cg_steps: int = 3
    adam_steps: int = 100
    adam_learning_rate: float = 1e-4
    relative_damp: float = 3e-3

    def __post_init__(self) -> None:
        int_between("beam_size", self.beam_size, 0, 64)
        share("relative_mse_tolerance", self.relative_mse_tolerance, zero=True)
        int_between("init_max_iter", self.init_max_iter, 1)
        int_between("ldl_passes", self.ldl_passes, 0)
        int_between("max_sweeps", self.max_sweeps, 0)
        int_between("cg_steps", self.cg_steps, 0)
        int_between("adam_steps", self.adam_steps, 1)
        share("adam_learning_rate", self.adam_learning_rate)
        share("relative_damp", self.relative_damp)

    def few_passes(self, format: Format) -> Self:
        # Rows of SmolLM2's embedding at 4x8g8: error .0070 after a pass and a sweep with a beam of 4 in 40 s, .0077
        # with one of 2 in 16 s, .0085 with one of 1 and a pass more in 16 s. At 2x8g4: .0104 without a search, .0077
        # after two passes and a sweep in 13 s, .0074 after six and eight.
        beam_size = 2 if format.num_codebooks > 2 and not self.beam_size else self.beam_size
        passes, sweeps = min(1, self.ldl_passes), min(1, self.max_sweeps)
        return dataclasses.replace(self, beam_size=beam_size, ldl_passes=passes, max_sweeps=sweeps)


@dataclasses.dataclass(frozen=True)
class PaperOptions(AqlmOptions):
    """`AqlmOptions` with the reference's own values where they differ."""

    fixed: ClassVar[frozenset[str]] = frozenset({"init_max_iter", "relative_mse_tolerance"})

    relative_mse_tolerance: float = 0.01
    init_max_iter: int = 100


@dataclasses.dataclass(frozen=True)
class KmeansOptions(MethodOptions):
    """Options of k-means alone. init_max_iter: at most this many rounds per codebook.

    Raises ValueError naming the field, its value and what was expected.
    """

    fixed: ClassVar[frozenset[str]] = frozenset({"init_max_iter"})

    init_max_iter: int = 100

    def __post_init__(self) -> None:
        int_between("init_max_iter", self.init_max_iter, 1)


@dataclasses.dataclass(frozen=True)
class AdditiveOptions(KmeansOptions):
    """Options of additive quantization without H: those of `AqlmOptions` that it has.

    Raises ValueError naming the field, its value and what was expected.
    """

    beam_size: int = 0
    relative_mse_tolerance: float = 0.003
    max_sweeps: int = 12
    cg_steps: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        int_between("beam_size", self.beam_size, 0, 64)
        share("relative_mse_tolerance", self.relative_mse_tolerance, zero=True)
        int_between("max_sweeps", self.max_sweeps, 0)
        int_between("cg_steps", self.cg_steps, 0)


@dataclasses.dataclass(frozen=True)
class TuningOptions:
    """Options of block fine-tuning (arXiv 2401.06118, section 3.4).

    finetune_epochs: 0 is none. finetune_batch_size: sequences for each step of Adam. finetune_learning_rate: of
    codebooks, relative to their size; a seventh of it for all else. finetune_lookahead: outputs are compared after so
    many of the following blocks too. finetune_patience: stop after so many epochs without a lower held-out error.
    finetune_held_out: share of the sequences that validate and are not trained on. finetune_search: times the codes are
    searched again after tuning, kept where the held-out error falls.

    Raises ValueError naming the field, its value and what was expected.
    """

    finetune_epochs: int = 5
    finetune_batch_size: int = 4
    finetune_learning_rate: float = 7e-3
    finetune_lookahead: int = 2
    finetune_patience: int = 2
    finetune_held_out: float = 0.125
    finetune_search: int = 0

    def __post_init__(self) -> None:
        int_between("finetune_epochs", self.finetune_epochs, 0)
        int_between("finetune_batch_size", self.finetune_batch_size, 1)
        share("finetune_learning_rate", self.finetune_learning_rate)
        int_between("finetune_lookahead", self.finetune_lookahead, 0)
        int_between("finetune_patience", self.finetune_patience, 1)
        share("finetune_held_out", self.finetune_held_out)
        int_between("finetune_search", self.finetune_search, 0)


@dataclasses.dataclass(frozen=True)
class TargetOptions:
    """Options of what layers and blocks are drawn to, all of them off.

    sequential: a block's linears are quantized in the order in which they run, each under H of the inputs that those
    before it give it, quantized as they are by then; else all of a block under H of the dense one. error_correction: in
    [0, 1], how much of what the quantized layers before it did to a linear's inputs its weight is moved to make up for
    before it is quantized (QEP, arXiv 2504.09629, section 4; GPTAQ, 2504.02692). error_correction_damp: added then to
    the diagonal of H, in units of its mean. error_correction_skip: a regular expression, linears whose name it finds
    are not moved (QEP: down_proj). finetune_target: what a tuned block's output is compared with, one of `TARGETS`: the
    original block's for the quantized model's inputs, or the original model's. tune_remaining: epochs of block
    fine-tuning each time linears of a block were quantized, in which those that are dense yet are tuned too (QuIP#,
    arXiv 2402.04396, section 5); it implies sequential. tune_remaining_learning_rate: of these, relative to their size.

    Without calibration data none has an effect, without block fine-tuning neither of the last three.

    Raises ValueError naming the field, its value and what was expected.
    """

    sequential: bool = False
    error_correction: float = 0.0
    error_correction_damp: float = 0.01
    error_correction_skip: str = "down_proj"
    finetune_target: str = "own"
    tune_remaining: int = 0
    tune_remaining_learning_rate: float = 3e-4
    fisher_share: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.sequential, bool):
            raise wrong("sequential", self.sequential, "true or false")
        number_between("error_correction", self.error_correction, 0, 1)
        share("error_correction_damp", self.error_correction_damp)
        pattern_of("error_correction_skip", self.error_correction_skip)
        if self.finetune_target not in TARGETS:
            raise wrong("finetune_target", self.finetune_target, f"one of {', '.join(TARGETS)}")
        int_between("tune_remaining", self.tune_remaining, 0)
        share("tune_remaining_learning_rate", self.tune_remaining_learning_rate)
        number_between("fisher_share", self.fisher_share, 0, 1)

    def corrects(self, name: str) -> bool:
        """Whether the weight of the linear `name` is moved."""
        skip = self.error_correction_skip
        return self.error_correction > 0 and not (skip and pattern_of("error_correction_skip", skip).found_in(name))

    def check_without_inputs(self) -> None:
        """Raise ValueError for an option that needs inputs as they are in the quantized model: `statistics` are of the
        original's alone.
        """
        for name in ("sequential", "error_correction", "tune_remaining", "fisher_share"):
            if getattr(self, name):
                raise wrong(name, getattr(self, name), "none with statistics, which are of the original model's inputs")

    def changed(self) -> dict[str, Any]:
        """The fields that have not their default, by name."""
        found = {field.name: (getattr(self, field.name), field.default) for field in dataclasses.fields(self)}
        return {name: value for name, (value, default) in found.items() if value != default}


@dataclasses.dataclass(frozen=True)
class CalibrationOptions:
    """What is drawn from the data.

    samples: sequences, spread evenly over the sources. sequence_length: tokens in each. shuffle: draw them at random,
    not from the start. bos: whether each begins with the tokenizer's BOS token, one of `BOS` ("auto": where the
    tokenizer begins texts with it).

    Raises ValueError naming the field, its value and what was expected.
    """

    samples: int = 64
    sequence_length: int = 1024
    shuffle: bool = False
    bos: str = "auto"

    def __post_init__(self) -> None:
        int_between("samples", self.samples, 1)
        int_between("sequence_length", self.sequence_length, 2)
        if self.bos not in BOS:
            raise wrong("bos", self.bos, f"one of {', '.join(BOS)}")


@dataclasses.dataclass(frozen=True)
class SizeOptions:
    """The size that schemes are chosen for.

    bits: that are stored per parameter of the whole model, embeddings and what stays dense among them. target_size: of
    its safetensors files, bytes or text such as "60MB"; one of the two. candidates: schemes to choose from, "dense"
    being none. samples: sequences whose gradients are measured. together: layers that share an input, and the experts
    of a block, are given one scheme.

    Raises ValueError naming the field, its value and what was expected.
    """

    bits: float | None = None
    target_size: int | str | None = None
    candidates: tuple[str, ...] = CANDIDATES
    samples: int = 8
    together: bool = True

    def __post_init__(self) -> None:
        if self.bits is not None and self.target_size is not None:
            raise wrong("bits", self.bits, f"none beside target_size={self.target_size!r}")
        if self.bits is None and self.target_size is None:
            raise ValueError("bits: missing, expected bits or target_size")
        if self.bits is not None:
            number_between("bits", self.bits, 0.01, 32)
        if self.target_size is not None:
            object.__setattr__(self, "target_size", parse_size("target_size", self.target_size))
        if not isinstance(self.candidates, (list, tuple)) or not self.candidates:
            raise wrong("candidates", self.candidates, "schemes such as 2x8g8, and dense")
        object.__setattr__(self, "candidates", tuple(dict.fromkeys(self.candidates)))
        for scheme in self.candidates:
            if scheme != DENSE:
                try:
                    Format.parse(scheme)
                except ValueError as error:
                    raise ValueError(f"candidates: {error}, or {DENSE!r}") from None
        if set(self.candidates) == {DENSE}:
            raise wrong("candidates", self.candidates, f"a scheme beside {DENSE!r}")
        int_between("samples", self.samples, 1)
        if not isinstance(self.together, bool):
            raise wrong("together", self.together, "true or false")


@dataclasses.dataclass(frozen=True)
class FinetuneOptions:
    """Options of tuning a whole quantized model against its original (AQLM, arXiv 2401.06118, section 3.4; PV-Tuning,
    arXiv 2405.14852).

    steps: of Adam. batch_size: sequences a step. micro_batch_size: of these in one pass; None: as memory likes.
    learning_rate: of codebooks, relative to their rms. scale_rate: that of scales, norms and biases, over it. beta1,
    beta2: of Adam. schedule: how rates fall, one of `SCHEDULES`, from the end of `warmup` steps on, to `final_rate` of
    themselves. held_out: share of the sequences, `most_held_out` at most, that validate and are not trained on.
    evaluation_interval: steps between two looks at these. patience: stop after so many looks without a better state; 0:
    never. save_interval: steps between two states in the work directory. embeddings: train a quantized input embedding
    and output layer too. gradient_checkpointing: whether a block runs again for its gradients, one of `CHECKPOINTING`;
    "auto": where memory asks for it. cache_teacher: keep the original's last hidden states, one of `TEACHER_CACHES`,
    and do not run it again: it leaves the device then. shard_original: of several ranks each has a share of each of the
    original's blocks (torch's FSDP2), which is whole while it runs. seed: of the order of the sequences.

    pv: change codes too. pv_learning_rate: of the buffers, relative to the rms of the layer's weights (the paper's own
    code: 1e-2 not relative to it, 3e-3 with a trust ratio). pv_beta1, pv_beta2: of their Adam (paper: 0, 0.95).
    pv_fraction: of a layer's groups that are encoded again a step (paper: 0.01). pv_trust_ratio: the most that a step
    changes of a layer's weight, as a share of its norm (paper: 0.01 or none); 0: no limit. pv_beam_size: as `beam_size`
    of `AqlmOptions` (paper: 5; 0 is exact for two codebooks). pv_start: step from which codes change. pv_interval:
    steps between two changes. pv_follow: whether buffers move with what codebook and scale steps do to the weight.
    pv_undo: whether changes since the last look are undone where that lowers the held-out loss. pv_states: how
    the moments of the buffers' Adam are kept, one of `PV_STATES`; "8bit" makes indexes of codes anew where they are
    used too, and keeps codes of earlier looks in host memory; "auto": float32 unless memory asks for 8bit.

    Raises ValueError naming the field, its value and what was expected.
    """

    steps: int = 400
    batch_size: int = 16
    micro_batch_size: int | None = None
    learning_rate: float = 6e-3
    scale_rate: float = 1 / 3
    beta1: float = 0.9
    beta2: float = 0.95
    schedule: str = "cosine"
    warmup: int = 10
    final_rate: float = 0.0
    held_out: float = 0.05
    most_held_out: int = 64
    evaluation_interval: int = 20
    patience: int = 10
    save_interval: int = 100
    embeddings: bool = False
    gradient_checkpointing: str = "auto"
    cache_teacher: str = "none"
    shard_original: bool = False
    pv: bool = False
    pv_learning_rate: float = 2e-2
    pv_beta1: float = 0.5
    pv_beta2: float = 0.95
    pv_fraction: float = 0.02
    pv_trust_ratio: float = 0.03
    pv_beam_size: int = 0
    pv_start: int = 0
    pv_interval: int = 1
    pv_follow: bool = True
    pv_undo: bool = True
    pv_states: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.micro_batch_size is not None:
            int_between("micro_batch_size", self.micro_batch_size, 1)
        least = {"warmup": 0, "patience": 0, "pv_start": 0}
        counts = ("steps", "batch_size", "most_held_out", "evaluation_interval", "save_interval", "pv_interval")
        for name in (*counts, *least):
            int_between(name, getattr(self, name), least.get(name, 1))
        int_between("pv_beam_size", self.pv_beam_size, 0, 64)
        int_between("seed", self.seed, 0, 2**63 - 1)
        for name in ("learning_rate", "held_out", "pv_learning_rate"):
            share(name, getattr(self, name))
        for name in ("beta1", "beta2", "pv_beta1", "pv_beta2"):
            share(name, getattr(self, name), zero=True)
        for name in ("scale_rate", "final_rate", "pv_fraction", "pv_trust_ratio"):
            number_between(name, getattr(self, name), 0, 1)
        words = {"schedule": SCHEDULES, "gradient_checkpointing": CHECKPOINTING, "cache_teacher": TEACHER_CACHES}
        words["pv_states"] = PV_STATES
        for name, known in words.items():
            if getattr(self, name) not in known:
                raise wrong(name, getattr(self, name), f"one of {', '.join(known)}")
        for name in ("embeddings", "shard_original", "pv", "pv_follow", "pv_undo"):
            if not isinstance(getattr(self, name), bool):
                raise wrong(name, getattr(self, name), "true or false")


@dataclasses.dataclass(frozen=True)
class EvaluationOptions:
    """How models are evaluated.

    sequence_length: tokens in a window. windows: only the first so many; None: all. bos: whether each begins with the
    tokenizer's BOS token, one of `BOS`. dtype: of the models, "auto" being the one on disk. tasks: names of zero-shot
    tasks. task_data: the directory of their files; None: the harness fetches its own. limit: items of each task at
    most. shots: worked examples before each question of MMLU. batch_size: sequences in a forward pass of tasks.

    Raises ValueError naming the field, its value and what was expected.
    """

    sequence_length: int = 2048
    windows: int | None = None
    bos: str = "auto"
    dtype: str = "auto"
    tasks: tuple[str, ...] = ()
    task_data: str | None = None
    limit: int | None = None
    shots: int = 0
    batch_size: int = 8

    def __post_init__(self) -> None:
        int_between("sequence_length", self.sequence_length, 2)
        int_between("windows", 1 if self.windows is None else self.windows, 1)
        if self.bos not in BOS:
            raise wrong("bos", self.bos, f"one of {', '.join(BOS)}")
        if self.dtype not in DTYPES:
            raise wrong("dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        int_between("limit", 1 if self.limit is None else self.limit, 1)
        int_between("shots", self.shots, 0, 5)
        int_between("batch_size", self.batch_size, 1)
