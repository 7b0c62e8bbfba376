"""The commands, each a function whose parameters are its arguments and options."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import distributed
from ..config import (
    BOS,
    CANDIDATES,
    CHECKPOINTING,
    DTYPES,
    PV_STATES,
    TEACHER_CACHES,
    CalibrationOptions,
    FinetuneOptions,
)
from ..errors import int_between, printable, wrong
from ..files import JsonFile
from ..format import Rules
from ..methods import METHODS
from ..recipe import PRESETS, RunConfig, options_of, parse_option, parse_pair, parse_rule, quantizer_options
from ..run import run
from ..tasks import TASKS
from ..units import binary_size, megabytes
from ..versions import __version__
from .board import run_sweep
from .display import Display, check_threads, prepare, show
from .help import App

log = logging.getLogger("aqlm_c")


def _preset(name: str) -> str:
    fields = ", ".join(f"{option}={value}" for option, value in quantizer_options(name).items())
    tune = " ".join(f"{option}={value}" for option, value in PRESETS[name].get("tune", {}).items())
    return f"Preset {name}: {fields or 'the defaults'}{tune and f', then --tune {tune}'}."


_PRESETS = "\n\n".join(map(_preset, PRESETS))

app = App(
    help="Quantize Llama-like language models to about 2 bits per weight with AQLM, and use them.",
    epilog="MODEL is a directory, a hub name, a .gguf file, or smollm2. Something does not work: aqlm-c doctor.",
    pretty_exceptions_enable=False,
)

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="Directory, hub name, .gguf file, or smollm2.", show_default=False),
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        help="Text: .txt .jsonl (text, messages or instructions) .npy .safetensors, or a data set "
        "name\\[,config]\\[:split]; repeatable. "
        "None: the text bundled with Python.",
        show_default=False,
    ),
]


def _choices(names: Iterable[str]) -> dict[str, Any]:
    """What an option with these values has for its help and for shells that complete it."""
    known = tuple(names)
    return {"metavar": "|".join(known), "autocompletion": lambda: list(known)}


Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Threads = Annotated[int | None, typer.Option(help="Threads; all cores if not given.", show_default=False)]
Device = Annotated[
    str,
    typer.Option(metavar="cpu|cuda[:N]|auto", help="Where the model runs; auto: on a GPU if one is there and works."),
]
Json = Annotated[Path | None, typer.Option(metavar="FILE", help="Write the result as JSON.", show_default=False)]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show the log on stderr.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress and no tables; evaluate prints the figures alone.")]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"aqlm-c {__version__}")


def _optional(help: str, *names: str, **options: Any) -> Any:
    """An option of a run: None if not given, so that the config file, the preset or the default decides."""
    return typer.Option(*names, help=help, show_default=False, **options)


def _tuning(help: str, name: str) -> Any:
    """The same, of whole-model tuning, with the default of FinetuneOptions in the help."""
    return _optional(f"{help} \\[default: {getattr(FinetuneOptions(), name)}]")


_MOST_STDIN = 64 << 20  # bytes
_NOT_OF_A_RUN = {
    "config",
    "rule",
    "tune",
    "set_",
    "json",
    "verbose",
    "quiet",
    "plot",
}  # parameters of `quantize` that are no options


@app.command(epilog=_PRESETS, rich_help_panel="Quantize")
def quantize(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Directory, hub name, .gguf file, or smollm2.")
    ] = None,
    out: Annotated[str | None, typer.Argument(metavar="OUT", help="Directory to write.")] = None,
    config: Annotated[
        Path | None, _optional("YAML file of all of these options by name; explicit ones win.", metavar="FILE")
    ] = None,
    preset: Annotated[
        str | None, _optional("Set of options, see below. \\[default: balanced]", **_choices(PRESETS))
    ] = None,
    scheme: Annotated[
        str | None, _optional("Codebooks x bits g group size: 2x8g8, 1x16g8, ... \\[default: 2x8g8]")
    ] = None,
    bits: Annotated[
        float | None,
        _optional("In place of --scheme: a scheme for each layer, for so many bits per parameter of the whole model."),
    ] = None,
    target_size: Annotated[
        str | None, _optional("The same for the size of the model's files, such as 60MB.", metavar="SIZE")
    ] = None,
    candidates: Annotated[
        list[str] | None,
        _optional(f"Schemes to choose from, by commas. \\[default: {','.join(CANDIDATES)}]", metavar="SCHEME,..."),
    ] = None,
    plot: Annotated[
        Path | None, _optional("Draw where the bits went: a .png, .svg or .pdf file.", metavar="FILE")
    ] = None,
    data: Data = None,
    samples: Annotated[
        int | None, _optional("Calibration sequences, spread evenly over the data. \\[default: 64]")
    ] = None,
    sequence_length: Annotated[int | None, _optional("Tokens in each. \\[default: 1024]")] = None,
    shuffle: Annotated[bool | None, _optional("Draw them at random, not from the start.", "--shuffle")] = None,
    bos: Annotated[
        str | None, _optional("Begin each with the tokenizer's BOS token. \\[default: auto]", **_choices(BOS))
    ] = None,
    seed: Annotated[int | None, _optional("Seed of everything random. \\[default: 0]")] = None,
    threads: Threads = None,
    layers: Annotated[str | None, _optional("Quantize only layers whose name matches.", metavar="REGEX")] = None,
    rule: Annotated[
        list[str] | None,
        _optional(
            "Another scheme, or dense, for layers whose name matches, also embed_tokens and lm_head; repeatable.",
            metavar="REGEX=SCHEME",
        ),
    ] = None,
    embeddings: Annotated[
        str | None,
        _optional(
            "Of input embedding and output layer; auto: 4 bits where they are more than a tenth of the result. "
            "\\[default: auto]",
            metavar="auto|dense|SCHEME",
        ),
    ] = None,
    solver: Annotated[
        str | None,
        _optional(
            "The method (docs/methods.md): ldl (or aqlm), AQLM as here; paper (aqlm_paper): the reference recipe; rtn: "
            "round to nearest. \\[default: ldl]",
            "--method",
            "--solver",
            **_choices(METHODS),
        ),
    ] = None,
    beam_size: Annotated[int | None, _optional("Beam of the code search; 0: exact pairs where they fit.")] = None,
    relative_mse_tolerance: Annotated[
        float | None, _optional("Stop a layer when a sweep gains less than this share.", "--tolerance")
    ] = None,
    finetune_epochs: Annotated[int | None, _optional("Epochs of block fine-tuning at most; 0: none.")] = None,
    finetune_batch_size: Annotated[int | None, _optional("Sequences for each of its steps.")] = None,
    finetune_learning_rate: Annotated[float | None, _optional("Of codebooks, relative to their size.")] = None,
    finetune_search: Annotated[int | None, _optional("Times the codes are searched again after tuning.")] = None,
    tune: Annotated[
        list[str] | None,
        _optional(
            "At the end tune the whole model, as aqlm-c finetune does: its options, such as steps=400, pv=true; "
            "repeatable.",
            metavar="NAME=VALUE",
        ),
    ] = None,
    gaussian_reference: Annotated[
        bool | None,
        _optional(
            "Compare each layer with Gaussian weights, at the cost of H's eigenvalues. \\[default: yes]",
            "--gaussian-reference/--no-gaussian-reference",
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        _optional("Any other option of the solver or fine-tuning; repeatable.", "--set", metavar="NAME=VALUE"),
    ] = None,
    statistics: Annotated[
        str | None,
        _optional(
            "H that aqlm-c hessians wrote, in place of calibration passes; blocks are then fine-tuned with "
            "--finetune-epochs alone, on --data.",
            metavar="FILE",
        ),
    ] = None,
    work_dir: Annotated[
        str | None, _optional("Keep finished blocks there: the same command then goes on from them.", metavar="FOLDER")
    ] = None,
    memory_limit: Annotated[
        str | None, _optional("Such as 8G: activations that do not fit go to disk.", metavar="SIZE")
    ] = None,
    device: Annotated[
        str | None,
        _optional("Where it is quantized. \\[default: auto, a GPU if one is there]", metavar="cpu|cuda[:N]|auto"),
    ] = None,
    device_memory_limit: Annotated[str | None, _optional("Such as 24G, of the GPU's memory.", metavar="SIZE")] = None,
    batch_size: Annotated[int | None, _optional("Sequences in one forward pass at most.")] = None,
    overwrite: Annotated[bool | None, _optional("Replace OUT if it exists.", "--overwrite")] = None,
    json: Json = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Quantize MODEL to the directory OUT in the published AQLM layout.

    OUT also gets run.yaml (all options as they were used, for --config) and report.json. Several GPUs or machines:
    torchrun --nproc-per-node N -m aqlm_c quantize ...
    """
    options = {name: value for name, value in context.params.items() if name not in _NOT_OF_A_RUN}
    explicit = {name: value for name, value in options.items() if value not in (None, [], ())}
    check_threads(threads)
    if candidates:
        explicit["candidates"] = [scheme.strip() for text in candidates for scheme in text.split(",")]
    if scheme is not None and (bits is not None or target_size is not None):
        raise wrong("--scheme", scheme, "none beside --bits and --target-size, which choose among --candidates")
    explicit |= dict(map(parse_option, set_ or []))
    if rule:
        explicit["rules"] = Rules(list(map(parse_rule, rule))).to_dict()
    if tune:
        explicit["tune"] = dict(parse_pair("--tune", text) for text in tune)
    run_config = RunConfig.from_file(config, **explicit) if config else RunConfig.from_fields(explicit)
    run_config.resolve().config.check_searchable()
    context.obj.kept = (
        f"finished blocks are kept in {run_config.work_dir}, the same command goes on from there"
        if run_config.work_dir
        else "nothing is kept; with --work-dir FOLDER finished blocks would be"
    )
    with distributed.started(context.obj.lost) as ranks:
        output = _output(json if ranks.first else None)
        prepare(None)
        with Display(quiet, verbose, silent=not ranks.first) as display:
            report = run(run_config, display, plot=plot)
        context.obj.kept = f"{run_config.out} is complete"
        if ranks.first and not quiet:
            show(report)
        with output:
            output.write(report.to_dict())


@app.command(rich_help_panel="Quantize")
def hessians(
    model: Model,
    out: Annotated[str, typer.Argument(metavar="OUT", help="File to write, .safetensors.", show_default=False)],
    data: Data = None,
    samples: Annotated[int, typer.Option(help="Sequences, spread evenly over the data.")] = 64,
    sequence_length: Annotated[int, typer.Option(help="Tokens in each.")] = 1024,
    shuffle: Annotated[bool, typer.Option("--shuffle", help="Draw them at random, not from the start.")] = False,
    bos: Annotated[str, typer.Option(help="Begin each with the tokenizer's BOS token.", **_choices(BOS))] = "auto",
    seed: Annotated[int, typer.Option(help="Of --shuffle.")] = 0,
    layers: Annotated[
        str | None, _optional("Only of layers whose name matches; else of the output layer too.", metavar="REGEX")
    ] = None,
    threads: Threads = None,
    device: Device = "auto",
    batch_size: Annotated[int | None, _optional("Sequences in one forward pass at most.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    json: Json = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Gather H = X^T X of the inputs of MODEL's linears, as it is, for quantize --statistics OUT.

    Runs that share OUT, with other schemes or methods, calibrate no more. OUT is of one model in one dtype, and of the
    tokens that it was gathered on.
    """
    check_threads(threads)
    output = _output(json)
    prepare(threads)

    from ..statistics import StatisticsRun

    drawn = CalibrationOptions(samples, sequence_length, shuffle, bos)
    place: dict[str, Any] = {"threads": threads, "device": device, "batch_size": batch_size, "overwrite": overwrite}
    work = StatisticsRun(model, out, _check_data(data), drawn, seed, layers, **place)
    with Display(quiet, verbose) as display:
        found = work.run(display)
    if not quiet:
        print(printable(found.describe()))
    with output:
        output.write(found.facts)


_OF_TUNING = (  # parameters of `finetune` that are fields of FinetuneOptions
    *("steps", "batch_size", "micro_batch_size", "learning_rate", "held_out", "evaluation_interval", "patience"),
    *("embeddings", "gradient_checkpointing", "cache_teacher", "pv", "pv_learning_rate", "pv_fraction"),
    *("pv_trust_ratio", "pv_states", "seed"),
)


@app.command(rich_help_panel="Quantize")
def finetune(
    context: typer.Context,
    quantized: Annotated[str, typer.Argument(metavar="QUANTIZED", help="Directory of a quantized model.")],
    original: Annotated[
        str, typer.Argument(metavar="ORIGINAL", help="The model it was made from, as MODEL elsewhere.")
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Directory to write.")],
    data: Annotated[
        list[str] | None,
        _optional("Text, as in quantize; or self:N, N tokens that ORIGINAL makes itself; repeatable."),
    ] = None,
    samples: Annotated[int | None, _optional("Sequences, spread evenly over the data. \\[default: all needed]")] = None,
    sequence_length: Annotated[int, typer.Option(help="Tokens in each.")] = 1024,
    shuffle: Annotated[bool, typer.Option("--shuffle", help="With --samples: draw them at random.")] = False,
    bos: Annotated[str, typer.Option(help="Begin each with the tokenizer's BOS token.", **_choices(BOS))] = "auto",
    steps: Annotated[int | None, _tuning("Steps of Adam.", "steps")] = None,
    batch_size: Annotated[int | None, _tuning("Sequences a step.", "batch_size")] = None,
    micro_batch_size: Annotated[int | None, _optional("Sequences in one pass, if not as memory likes.")] = None,
    learning_rate: Annotated[float | None, _tuning("Of codebooks, over their rms.", "learning_rate")] = None,
    held_out: Annotated[float | None, _tuning("Share of the sequences that validate.", "held_out")] = None,
    evaluation_interval: Annotated[int | None, _tuning("Steps between looks at these.", "evaluation_interval")] = None,
    patience: Annotated[int | None, _optional("Looks without a better state to stop after; 0: never.")] = None,
    embeddings: Annotated[
        bool | None, _optional("Train quantized embeddings and output layer too.", "--embeddings/--no-embeddings")
    ] = None,
    gradient_checkpointing: Annotated[
        str | None, _optional("Less memory, a third more time.", **_choices(CHECKPOINTING))
    ] = None,
    cache_teacher: Annotated[
        str | None, _optional("Keep ORIGINAL's hidden states for later epochs.", **_choices(TEACHER_CACHES))
    ] = None,
    pv: Annotated[bool | None, _optional("Change codes too: PV-Tuning.", "--pv/--no-pv")] = None,
    pv_learning_rate: Annotated[float | None, _tuning("Of its buffers.", "pv_learning_rate")] = None,
    pv_fraction: Annotated[float | None, _tuning("Of groups encoded again a step.", "pv_fraction")] = None,
    pv_trust_ratio: Annotated[float | None, _tuning("Most change of a weight a step.", "pv_trust_ratio")] = None,
    pv_states: Annotated[
        str | None, _optional("Moments of its Adam; auto: as memory likes.", **_choices(PV_STATES))
    ] = None,
    set_: Annotated[
        list[str] | None, _optional("Any other option of tuning; repeatable.", "--set", metavar="NAME=VALUE")
    ] = None,
    seed: Annotated[int | None, _optional("Seed of everything random. \\[default: 0]")] = None,
    work_dir: Annotated[
        str | None, _optional("Keep the state there: the same command then goes on from it.", metavar="FOLDER")
    ] = None,
    threads: Threads = None,
    device: Device = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    json: Json = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Tune all of QUANTIZED so that it predicts what ORIGINAL predicts, and write it to the directory OUT.

    Codebooks, scales, norms and biases are trained, with --pv codes too; the state that is best on held-out text is
    kept. Several GPUs or machines: torchrun --nproc-per-node N -m aqlm_c finetune ...
    """
    check_threads(threads)
    given = {name: context.params[name] for name in _OF_TUNING if context.params[name] is not None}
    options = options_of(FinetuneOptions, {**given, **dict(parse_pair("--set", text) for text in set_ or [])})
    context.obj.kept = (
        f"the state is kept in {work_dir}, the same command goes on from there"
        if work_dir
        else "nothing is kept; with --work-dir FOLDER the state would be"
    )
    with distributed.started(context.obj.lost) as ranks:
        output = _output(json if ranks.first else None)

        from ..finetune import FinetuneRun, finetune_directory

        draw: dict[str, Any] = {
            "data": data or [],
            "samples": samples,
            "sequence_length": sequence_length,
            "shuffle": shuffle,
        }
        place: dict[str, Any] = {
            "threads": threads,
            "device": device,
            "work_dir": work_dir,
            "overwrite": overwrite,
            "bos": bos,
        }
        tuning = FinetuneRun(quantized, original, out, **draw, **place, options=options)
        prepare(None)
        with Display(quiet, verbose, silent=not ranks.first) as display:
            report = finetune_directory(tuning, display)
        context.obj.kept = f"{out} is complete"
        if ranks.first and not quiet:
            show(report)
        with output:
            output.write(report.to_dict())


@app.command(rich_help_panel="Measure")
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...", help="Directory, hub name, .gguf file, or smollm2; one or several.", show_default=False
        ),
    ],
    against: Annotated[
        str | None,
        typer.Option(
            metavar="ORIGINAL", help="Compare with this model: KL, top-1 agreement, perplexity.", show_default=False
        ),
    ] = None,
    data: Data = None,
    sequence_length: Annotated[int, typer.Option(help="Tokens in a window.")] = 2048,
    windows: Annotated[
        int | None, typer.Option(help="Only the first N windows.", metavar="N", show_default=False)
    ] = None,
    bos: Annotated[
        str,
        typer.Option(
            help="Begin each window with the tokenizer's BOS token; auto: where it begins texts with it; never: cut "
            "windows out of one stream, as most published perplexities have them.",
            **_choices(BOS),
        ),
    ] = "auto",
    tasks: Annotated[
        str | None,
        typer.Option(help=f"Zero-shot tasks, by commas: {', '.join(TASKS)}.", metavar="NAMES", show_default=False),
    ] = None,
    task_data: Annotated[
        str | None,
        typer.Option(
            help="Folder of their .jsonl files; none: lm-eval fetches its own.", metavar="DIR", show_default=False
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Only N items of each task.", metavar="N", show_default=False)
    ] = None,
    shots: Annotated[int, typer.Option(help="Worked examples before each question of mmlu.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Sequences in one forward pass of tasks.")] = 8,
    threads: Threads = None,
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help="Of the models; auto: that on disk.", **_choices(DTYPES))] = "auto",
    record: Annotated[
        bool, typer.Option("--record", help="Put the figures into MODEL's report.json and model card, too.")
    ] = False,
    json: Json = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Perplexity of MODEL per token, by the GPTQ protocol: windows of one stream that do not overlap; how far it is
    from ORIGINAL; zero-shot tasks, by lm-eval.
    """
    int_between("--sequence-length", sequence_length, 2)
    for name, number in (("--windows", windows), ("--limit", limit), ("--batch-size", batch_size)):
        if number is not None:
            int_between(name, number, 1)
    int_between("--shots", shots, 0, 5)
    for name, value, known in (("--bos", bos, BOS), ("--dtype", dtype, DTYPES)):
        if value not in known:
            raise wrong(name, value, f"one of {', '.join(known)}")
    output, sources = _output(json), _check_data(data)
    prepare(threads)

    from ..core.runtime import find_device
    from ..evaluate import evaluate_models
    from ..hf.card import record_perplexity
    from ..report.evaluation import Evaluation

    place = str(find_device(device, "--device"))
    if record:
        _check_record(models, sources, tasks is not None)
    options: dict[str, Any] = {"sequence_length": sequence_length, "windows": windows, "bos": bos, "dtype": dtype}
    names = tuple(name.strip() for name in tasks.split(",")) if tasks is not None else ()
    options |= {"tasks": names, "task_data": task_data, "limit": limit, "shots": shots, "batch_size": batch_size}
    result = Evaluation(models)
    try:
        with Display(quiet, verbose) as display:
            evaluate_models(models, sources, against, device=place, progress=display, found=result, **options)
    finally:  # rows of models that came before an error
        if result.results or result.tasks:
            _show_evaluation(result, quiet)
    with output:
        output.write(result.to_dict())
    for model in models if record else ():
        rows = [row for row in result.results if row["model"] == model]
        record_perplexity(model, {_described(row): _recorded(row) for row in rows})


@app.command(rich_help_panel="Quantize")
def sweep(
    context: typer.Context,
    space: Annotated[
        Path, typer.Argument(metavar="SPACE.yaml", help="What to try: docs/sweeps.md.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of rows, tables and best.yaml.", show_default=False)],
    workers: Annotated[
        int | None, _optional("Processes on this machine. \\[default: one a GPU, else one]", metavar="N")
    ] = None,
    index: Annotated[
        int | None, _optional("Be worker I of N, of an array job; a grid in files is divided.", metavar="I")
    ] = None,
    of: Annotated[int | None, _optional("With --index.", metavar="N")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say how many trials, how long and how large.")] = False,
    worker: Annotated[int | None, typer.Option(hidden=True)] = None,
    threads: Threads = None,
    device: Device = "auto",
    json: Json = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> int:
    """Quantize a model by every choice of SPACE.yaml, evaluate each, and keep a row of it.

    The same command goes on with the trials that are missing, also after it was killed. Exit code 1 where trials are
    missing in the end, since workers ended.
    """
    check_threads(threads)
    output = _output(json)

    from ..sweeps.space import Space

    chosen = Space.from_file(space)
    prepare(threads)
    context.obj.kept = f"rows are kept in {out}, the same command goes on from there"
    place: dict[str, Any] = {"device": device, "threads": threads}
    if dry_run:
        from ..sweeps.estimate import estimate

        expected = estimate(chosen, out, workers or 1, **place)
        print(*map(printable, expected.lines()), sep="\n")
        with output:
            output.write(expected.to_dict())
        return 0
    result = run_sweep(chosen, out, (workers, index, of, worker), place, quiet, verbose)
    if not quiet:
        show(result)
        print(*map(printable, result.files), sep="\n")
    with output:
        output.write(result.to_dict())
    return 0 if result.complete or index is not None or worker is not None else 1


@app.command(rich_help_panel="Measure")
def compare(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL|SWEEP...", help="Models, and folders of aqlm-c sweep; one or several.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for JSON, HTML, SVG and PNG.", show_default=False)],
    against: Annotated[str | None, _optional("The original that models are compared with.", metavar="ORIGINAL")] = None,
    data: Data = None,
    sequence_length: Annotated[int, typer.Option(help="Tokens in a window.")] = 2048,
    windows: Annotated[int | None, _optional("Only the first N windows.", metavar="N")] = None,
    bos: Annotated[str, typer.Option(help="As in evaluate.", **_choices(BOS))] = "auto",
    tasks: Annotated[str | None, _optional("Zero-shot tasks, by commas.", metavar="NAMES")] = None,
    task_data: Annotated[str | None, _optional("Folder of their .jsonl files.", metavar="DIR")] = None,
    limit: Annotated[int | None, _optional("Only N items of each task.", metavar="N")] = None,
    family: Annotated[
        str | None, _optional("Tell effective sizes by the line of an unquantized family.", metavar="llama-2|FILE")
    ] = None,
    title: Annotated[str, typer.Option(help="Of table and page.")] = "Comparison",
    threads: Threads = None,
    device: Device = "cpu",
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Put models, and the trials of sweeps, into one table: bits, bytes, perplexity, KL, tasks, effective size.

    DIR gets compare.json, compare.png, compare.svg and compare.html, a page that needs no other file.
    """
    sources = _check_data(data)
    prepare(threads)

    from ..compare import compare as compare_all
    from ..compare import write_comparison

    names = tuple(name.strip() for name in tasks.split(",")) if tasks is not None else ()
    options: dict[str, Any] = {"sequence_length": sequence_length, "windows": windows, "bos": bos, "device": device}
    options |= {"tasks": names, "task_data": task_data, "limit": limit}
    with Display(quiet, verbose) as display:
        found = compare_all(models, against, data=sources, family=family, title=title, progress=display, **options)
    written = write_comparison(found, out)
    if not quiet:
        show(found)
        print(*(printable(str(path)) for path in written), sep="\n")


@app.command(rich_help_panel="Use")
def generate(
    model: Model,
    prompt: Annotated[
        str,
        typer.Argument(
            metavar="PROMPT", help="Text to continue or message to answer; -: what stdin has.", show_default=False
        ),
    ],
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw",
            help="Use the chat template, or continue the text as it is. Default: chat if the model has a template.",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Stop after this many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens of this total probability.")] = 1.0,
    seed: Seed = 0,
    threads: Threads = None,
    device: Device = "cpu",
    verbose: Verbose = False,
) -> None:
    """Generate text with MODEL, streamed to stdout."""
    int_between("--max-new-tokens", max_new_tokens, 1)
    int_between("--seed", seed, 0, 2**63 - 1)
    if temperature != 0 and not 1e-4 <= temperature < math.inf:  # logits are divided by it
        raise ValueError(f"--temperature: got {temperature}, expected 0 or a finite number of at least 0.0001")
    if not 0 < top_p <= 1:
        raise ValueError(f"--top-p: got {top_p}, expected a number in (0, 1]")
    if prompt == "-":
        prompt = _stdin()
    prepare(threads)

    from ..core.runtime import find_device
    from ..generate import generate as stream
    from ..hf.models import load_model

    place = str(find_device(device, "--device"))
    with Display(verbose=verbose) as display:
        display.on_phase("load")
        network, tokenizer, _ = load_model(model, "auto", place)
    sampling = {"temperature": temperature, "top_p": top_p}
    stream(model, network, tokenizer, prompt, chat=chat, seed=seed, max_new_tokens=max_new_tokens, **sampling)


@app.command(rich_help_panel="Use")
def serve(
    context: typer.Context,
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen at; other machines reach 0.0.0.0.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at; 0: any that is free.")] = 8000,
    name: Annotated[
        str | None, _optional("What requests call the model. \\[default: the last part of MODEL's name]")
    ] = None,
    batching: Annotated[
        bool | None,
        _optional(
            "Answer requests together, by continuous batching, or one at a time. \\[default: together on a GPU]",
            "--batching/--no-batching",
        ),
    ] = None,
    batch_tokens: Annotated[
        int | None,
        _optional("Tokens that requests of a batch may have together. \\[default: 16384; on a GPU as many as fit]"),
    ] = None,
    threads: Threads = None,
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help="Of the model; auto: that on disk.", **_choices(DTYPES))] = "auto",
    verbose: Verbose = False,
) -> int:
    """Answer OpenAI's API for MODEL: /v1/chat/completions, /v1/completions and /v1/models, streamed or not.

    Ctrl-C and SIGTERM stop it. There is no key: who reaches the port may ask.
    """
    int_between("--port", port, 0, 65535)
    if batch_tokens is not None:
        int_between("--batch-tokens", batch_tokens, 512)
    if dtype not in DTYPES:
        raise wrong("--dtype", dtype, f"one of {', '.join(DTYPES)}")

    from .serve import check_packages, serve_model

    check_packages()
    prepare(threads)
    context.obj.kept = ""
    options: dict[str, Any] = {"name": name, "batching": batching, "batch_tokens": batch_tokens}
    return serve_model(model, (host, port), dtype, device, verbose=verbose, **options)


@app.command(rich_help_panel="Pass on")
def export(
    model: Model,
    out: Annotated[str, typer.Argument(metavar="OUT", help="Directory to write.", show_default=False)],
    dense: Annotated[
        bool,
        typer.Option("--dense", help="The weights that the codes decode to, for any program and for GGUF."),
    ] = False,
    aqlm: Annotated[
        bool,
        typer.Option(
            "--aqlm",
            help="Codes of one scheme, that of most weights, for programs that read the published AQLM layout; the "
            "rest, embeddings among it, is made dense.",
        ),
    ] = False,
    dtype: Annotated[str, typer.Option(help="Of --dense; auto: the model's own.", **_choices(DTYPES))] = "auto",
    threads: Threads = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Write the quantized MODEL to the directory OUT in a form that other programs read."""
    if dense == aqlm:
        raise ValueError(f"export: got {'both' if dense else 'none'} of --dense and --aqlm, expected one of them")
    if dtype not in DTYPES or (aqlm and dtype != "auto"):
        raise wrong("--dtype", dtype, "auto with --aqlm" if aqlm else f"one of {', '.join(DTYPES)}")
    prepare(threads)

    from ..export import export_aqlm, export_dense
    from ..io.checkpoint import disk_sizes

    with Display(quiet, verbose) as display:
        display.on_phase("export")
        if dense:
            what = export_dense(model, out, dtype, overwrite=overwrite)
        else:
            what = export_aqlm(model, out, overwrite=overwrite)
    if not quiet:
        print(printable(f"{out}: {what}, {megabytes(disk_sizes(out, ())[0])}"))


@app.command(rich_help_panel="Pass on")
def push(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Directory of a quantized model.", show_default=False)
    ],
    name: Annotated[str, typer.Argument(metavar="NAME", help="Repository: owner/name.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, _optional("Branch; made if it is not there.", metavar="BRANCH")] = None,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "Upload a model quantized by aqlm_c",
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Upload the model in DIR to the Hugging Face hub, when all its tensors are verified.

    Log in with hf auth login, or set HF_TOKEN.
    """
    from ..inspection import check_model

    prepare(None)

    from ..hf.card import push_directory

    with Display(quiet, verbose) as display:
        display.on_phase("verify")
        check_model(directory)
        display.on_phase("upload")
        url = push_directory(directory, name, private=private or None, revision=revision, commit_message=message)
    print(printable(url))


@app.command(rich_help_panel="Measure")
def inspect(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Directory of a quantized or dense model.")],
    check: Annotated[bool, typer.Option("--check", help="Read and verify every tensor.")] = False,
    json: Json = None,
) -> None:
    """Show what MODEL holds: layers, schemes, true bits per weight, bytes, where it came from."""
    output = _output(json)

    from ..inspection import check_model, inspect_model

    inspection = inspect_model(model)
    if check:
        prepare(None)
        inspection.checked = check_model(model)
    show(inspection)
    with output:
        output.write(inspection.to_dict())


@app.command(rich_help_panel="This machine")
def doctor() -> int:
    """Say what works here and what cures what does not; exit code 1 if models cannot be quantized on the CPU."""
    from ..doctor import main

    return main()


@app.command(
    "exec", rich_help_panel="Use", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False}
)
def execute(
    command: Annotated[
        list[str],
        typer.Argument(
            metavar="COMMAND",
            help="With its arguments: one that is installed, such as lm_eval or transformers, a script, -m MODULE or "
            "-c CODE. A -- before it is left out.",
            show_default=False,
        ),
    ],
) -> int:
    """Run a Python COMMAND that loads quantized models: with aqlm_c.hf imported first, else as Python would."""
    from ..execute import main

    return main(command)


def _stdin() -> str:
    """The text on stdin, without the end of its last line; ValueError where it is no UTF-8 or has no end."""
    content = sys.stdin.buffer.read(_MOST_STDIN + 1)
    if len(content) > _MOST_STDIN:
        raise ValueError(f"PROMPT: got more than {binary_size(_MOST_STDIN)} on stdin, expected less")
    try:
        return content.decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError:
        raise ValueError("PROMPT: got what is no UTF-8 on stdin, expected text") from None


class _NoFile:
    """What `--json` writes to where it is not given."""

    def write(self, fields: Any) -> None:
        pass

    def __enter__(self) -> _NoFile:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


def _output(path: Path | None) -> JsonFile | _NoFile:
    """The file of --json, tried before the work."""
    return _NoFile() if path is None else JsonFile("--json", path)


def _show_evaluation(result: Any, quiet: bool) -> None:
    if quiet:
        print(*result.figures(), sep="\n")
    elif result.is_plain:
        print(*map(printable, result.lines()), sep="\n")
    else:
        show(result)


def _check_record(models: list[str], sources: list[str], has_tasks: bool) -> None:
    """Raise ValueError unless figures of these texts can be put into reports of the models, by the texts' names."""
    from ..hf.card import check_record

    if has_tasks and not sources:
        raise wrong("--record", models[0], "--data, too: figures of tasks are not recorded")
    names = [Path(source).name for source in sources if Path(source).is_file()]
    if twice := [name for name in names if names.count(name) > 1]:
        raise wrong("--record", twice[0], "files of different names: a report keeps no folders")
    for model in models:
        check_record(model)


def _described(result: dict[str, Any]) -> str:
    """What a perplexity was measured on; of a file without its folder."""
    name = Path(result["data"]).name if Path(result["data"]).is_file() else result["data"]
    start = f", each after {result['bos']}" if result["bos"] else ""
    return f"{name}, {result['windows']} windows of {result['sequence_length']:,} tokens{start}"


def _recorded(row: dict[str, Any]) -> Any:
    """What a model card is given: (the original's, the model's), if there was an original."""
    figure = row["perplexity"]
    return [row["original_perplexity"], figure] if "original_perplexity" in row else figure


def _check_data(data: list[str] | None) -> list[str]:
    from ..io.data import check_source

    for source in data or []:
        check_source(source)
    return data or []
