"""The command line: `aqlm-c quantize`, `evaluate`, `generate`, `inspect`, `doctor`; also `python -m aqlm_c`.

Results go to stdout, progress to stderr. A wrong input gives one line on stderr and exit code 2, and nothing
is written; Ctrl-C one line and 130. torch and transformers are imported by the command that needs them.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from . import __version__
from .config import SOLVERS, AqlmConfig, int_between
from .report import BlockReport, LayerReport, QuantizationReport, db_text, write_json
from .run import FIELDS, PRESETS, RunConfig, parse_option, parse_rule, run, set_threads

os.environ.setdefault("TQDM_DISABLE", "1")  # read when torch imports tqdm: progress is shown by `Display` alone

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
except ModuleNotFoundError as error:
    print(f"aqlm-c: the package {error.name} is missing: pip install 'aqlm-c[hf]'", file=sys.stderr)
    raise SystemExit(2) from None

_PRESETS = "\n\n".join(
    f"Preset {name}: {', '.join(f'{option}={value}' for option, value in options.items()) or 'the defaults'}."
    for name, options in PRESETS.items()
)
_PATIENCE = 1.5  # seconds between Ctrl-C and the end of a process whose main thread does not answer

app = typer.Typer(
    help="Quantize Llama-like language models to about 2 bits per weight with AQLM, and use them.",
    epilog="MODEL is a directory, a hub name, a .gguf file, or smollm2. Something does not work: aqlm-c doctor.",
    pretty_exceptions_enable=False,
    add_completion=False,
)

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="Directory, hub name, .gguf file, or smollm2.", show_default=False),
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        help="Text: .txt .jsonl .npy .safetensors, or a data set name\\[,config]\\[:split]; repeatable. "
        "None: the text bundled with Python.",
        show_default=False,
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Threads = Annotated[int | None, typer.Option(help="Threads; all cores if not given.", show_default=False)]
Json = Annotated[Path | None, typer.Option(metavar="FILE", help="Write the result as JSON.", show_default=False)]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show the log on stderr.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress and no tables; evaluate prints the figure alone.")]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"aqlm-c {__version__}")


def _optional(help: str, *names: str, **options: Any) -> Any:
    """An option of a run: None if not given, so that the config file, the preset or the default decides."""
    return typer.Option(*names, help=help, show_default=False, **options)


@app.command(epilog=_PRESETS)
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
        str | None, _optional("Set of options, see below. \\[default: balanced]", metavar="|".join(PRESETS))
    ] = None,
    scheme: Annotated[
        str | None, _optional("Codebooks x bits g group size: 2x8g8, 1x16g8, ... \\[default: 2x8g8]")
    ] = None,
    data: Data = None,
    samples: Annotated[
        int | None, _optional("Calibration sequences, spread evenly over the data. \\[default: 64]")
    ] = None,
    sequence_length: Annotated[int | None, _optional("Tokens in each. \\[default: 1024]")] = None,
    shuffle: Annotated[bool | None, _optional("Draw them at random, not from the start.", "--shuffle")] = None,
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
    solver: Annotated[
        str | None, _optional("paper: the reference recipe. \\[default: ldl]", metavar="|".join(SOLVERS))
    ] = None,
    beam_size: Annotated[int | None, _optional("Beam of the code search; 0: exact pairs where they fit.")] = None,
    relative_mse_tolerance: Annotated[
        float | None, _optional("Stop a layer when a sweep gains less than this share.", "--tolerance")
    ] = None,
    finetune_epochs: Annotated[int | None, _optional("Epochs of block fine-tuning at most; 0: none.")] = None,
    finetune_batch_size: Annotated[int | None, _optional("Sequences for each of its steps.")] = None,
    finetune_learning_rate: Annotated[float | None, _optional("Of codebooks, relative to their size.")] = None,
    finetune_search: Annotated[int | None, _optional("Times the codes are searched again after tuning.")] = None,
    set_: Annotated[
        list[str] | None,
        _optional("Any other option of the solver or fine-tuning; repeatable.", "--set", metavar="NAME=VALUE"),
    ] = None,
    work_dir: Annotated[
        str | None, _optional("Keep finished blocks there: the same command then goes on from them.", metavar="FOLDER")
    ] = None,
    memory_limit: Annotated[str | None, _optional("Such as 8GiB: activations that do not fit go to disk.")] = None,
    overwrite: Annotated[bool | None, _optional("Replace OUT if it exists.", "--overwrite")] = None,
    json: Json = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Quantize MODEL to the directory OUT in the published AQLM layout.

    OUT also gets run.yaml (all options as they were used, for --config) and report.json.
    """
    explicit = {name: value for name, value in context.params.items() if name in FIELDS and value not in (None, [], ())}
    _check_threads(threads)
    explicit |= dict(map(parse_option, set_ or []))
    if rule:
        explicit["rules"] = AqlmConfig(rules=list(map(parse_rule, rule))).rules
    run_config = RunConfig.from_file(config, **explicit) if config else RunConfig(**explicit)
    run_config.resolve()[0].check_searchable()
    _check_json(json)
    context.obj.kept = (
        f"finished blocks are kept in {run_config.work_dir}, the same command goes on from there"
        if run_config.work_dir
        else "nothing is kept; with --work-dir FOLDER finished blocks would be"
    )
    prepare(None)
    with Display(quiet, verbose) as display:
        report = run(run_config, display)
    context.obj.kept = f"{run_config.out} is complete"
    if json:
        write_json(json, report.to_dict())
    if not quiet:
        show(report)


@app.command()
def evaluate(
    model: Model,
    data: Data = None,
    sequence_length: Annotated[int, typer.Option(help="Tokens in a window.")] = 2048,
    windows: Annotated[
        int | None, typer.Option(help="Only the first N windows.", metavar="N", show_default=False)
    ] = None,
    threads: Threads = None,
    json: Json = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Perplexity of MODEL per token, by the GPTQ protocol: non-overlapping windows of one stream."""
    int_between("--sequence-length", sequence_length, 2)
    if windows is not None:
        int_between("--windows", windows, 1)
    _check_json(json)
    sources = _check_data(data)
    prepare(threads)

    from .data import BUNDLED, sha256, token_stream
    from .evaluate import perplexity
    from .models import load_model

    results = []
    with Display(quiet, verbose) as display:
        display.on_phase("load")
        network, tokenizer, _ = load_model(model)
        for source in sources or [BUNDLED]:
            display.on_phase(f"evaluate {source}")
            input_ids = token_stream(source, tokenizer, windows and windows * sequence_length)
            try:
                result = perplexity(network, input_ids, sequence_length, windows, display.on_window)
            except ValueError as error:
                raise ValueError(f"data={source!r}: {error}") from error
            results.append({"data": source, "sha256": sha256(source), **result})
    if json:
        write_json(json, {"model": model, "results": results})
    for result in results:
        figure = result["perplexity"]
        if quiet:
            print(figure)
            continue
        counts = f"{result['windows']} x {sequence_length} tokens, {result['seconds']:.1f} s"
        print(f"{result['data']}: perplexity {figure:.4f} ({counts})")


@app.command()
def generate(
    model: Model,
    prompt: Annotated[
        str,
        typer.Argument(metavar="PROMPT", help="Text to continue or message to answer.", show_default=False),
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
    verbose: Verbose = False,
) -> None:
    """Generate text with MODEL, streamed to stdout."""
    int_between("--max-new-tokens", max_new_tokens, 1)
    int_between("--seed", seed, 0, 2**63 - 1)
    if temperature != 0 and not 1e-4 <= temperature < math.inf:  # logits are divided by it
        raise ValueError(f"--temperature={temperature}: expected 0 or a finite number of at least 0.0001")
    if not 0 < top_p <= 1:
        raise ValueError(f"--top-p={top_p}: expected a number in (0, 1]")
    prepare(threads)

    import torch
    from transformers import TextStreamer

    from .models import load_model

    with Display(verbose=verbose) as display:
        display.on_phase("load")
        network, tokenizer, _ = load_model(model)
    if chat and not tokenizer.chat_template:
        raise ValueError(f"--chat: {model!r} has no chat template, expected --raw")
    if tokenizer.chat_template and chat is not False:
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")  # the template wrote them
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    if not inputs["input_ids"].numel():
        raise ValueError("PROMPT='': expected at least one token")
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}
    torch.manual_seed(seed)
    with torch.inference_mode():
        network.generate(
            **inputs,
            do_sample=temperature > 0,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            **sampling,
        )


@app.command()
def inspect(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Directory of a quantized or dense model.")],
    check: Annotated[bool, typer.Option("--check", help="Read and verify every tensor.")] = False,
    json: Json = None,
) -> None:
    """Show what MODEL holds: layers, schemes, true bits per weight, bytes, where it came from."""
    _check_json(json)

    from .inspection import check_model, inspect_model

    inspection = inspect_model(model)
    if check:
        prepare(None)
        inspection.checked = check_model(model)
    if json:
        write_json(json, inspection.to_dict())
    show(inspection)


@app.command()
def doctor() -> int:
    """Say what works here and what cures what does not; exit code 1 if models cannot be quantized on the CPU."""
    from .doctor import main

    return main()


class Display:
    """What a command shows on stderr while it works: bars with ETA in a terminal, plain lines elsewhere.

    A context manager. Its methods are the `progress` of `quantize_model` and, `on_window`, of `perplexity`.
    While it is open, warnings of the logger "aqlm_c" appear as lines, with `verbose` all it has to say.
    """

    def __init__(self, quiet: bool = False, verbose: bool = False) -> None:
        self._notebook = Console().is_jupyter
        plain = {"force_jupyter": False, "force_terminal": False} if self._notebook else {}
        self._console = Console(stderr=True, highlight=False, soft_wrap=True, **plain)
        self._quiet = quiet
        self._log = _LogLines(self._console, logging.DEBUG if verbose else logging.WARNING)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=quiet or not self._console.is_terminal,
            speed_estimate_period=3600,  # a block may take minutes
        )
        self._all = self._current = None
        self._block = ""
        self._n_blocks = 0
        self._started = 0.0

    def __enter__(self) -> Display:
        logger = logging.getLogger("aqlm_c")
        self._level = logger.level
        logger.setLevel(min(self._log.level, self._level or logging.WARNING))
        logger.addHandler(self._log)
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()
        logger = logging.getLogger("aqlm_c")
        logger.removeHandler(self._log)
        logger.setLevel(self._level)

    def on_estimate(self, estimate: Any) -> None:
        self._print(f"estimate: {escape(estimate.describe())}")

    def on_resume(self, n_finished_blocks: int) -> None:
        self._print(f"finished blocks found: {n_finished_blocks}, going on from there")

    def on_start(self, n_blocks: int, n_layers: int) -> None:
        self._n_blocks, self._started = n_blocks, time.monotonic()
        self._clear()
        self._all = self._bars.add_task("blocks", total=n_blocks)
        self._current = self._bars.add_task("", total=n_layers / n_blocks)

    def on_block(self, index: int, name: str) -> None:
        self._block = escape(name)
        self._bars.update(self._all, completed=index)
        self._bars.reset(self._current, description=self._block)
        if not self._console.is_terminal:
            elapsed = time.monotonic() - self._started
            self._print(f"{self._block} ({index + 1} of {self._n_blocks}), {elapsed:.0f} s")

    def on_layer(self, report: LayerReport) -> None:
        self._bars.advance(self._current)
        if not self._notebook:  # where hundreds of lines would stay in the file
            self._print(
                f"  {escape(report.name)}: error {report.relative_error:.5f}, "
                f"{db_text(report.db_above_true_rate)} dB, {report.bits_per_weight:.3f} bits, "
                f"{report.seconds:.1f} s"
            )

    def on_block_report(self, report: BlockReport) -> None:
        which, before, after = "held-out", report.held_out_before, report.held_out_after
        if after is None:
            which, before, after = "training", report.training_before, report.training_after
        self._print(
            f"  {escape(report.name)}: {which} output error {_error(before)} -> {_error(after)}, "
            f"{report.epochs} epochs, {report.seconds:.1f} s"
        )

    def on_phase(self, name: str) -> None:
        if self._all is not None:
            self._bars.update(self._current, description=f"{self._block} {name}".lstrip())
            return
        self._clear()
        self._current = self._bars.add_task(escape(name), total=None)
        if not self._console.is_terminal:
            self._print(f"{escape(name)} ...")

    def on_window(self, done: int, total: int, perplexity: float) -> None:
        self._bars.update(self._current, completed=done, total=total)

    def on_finish(self, report: QuantizationReport) -> None:
        self._clear()
        self._all = self._current = None

    def _clear(self) -> None:
        for task in self._bars.task_ids:
            self._bars.remove_task(task)

    def _print(self, line: str) -> None:
        if not self._quiet:
            self._console.print(line)


class _LogLines(logging.Handler):
    """Log records as lines of a console, above its bars."""

    def __init__(self, console: Console, level: int) -> None:
        super().__init__(level)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.print(escape(f"{record.levelname.lower()}: {self.format(record)}"))


def _error(error: float | None) -> str:
    return "-" if error is None else f"{error:.5f}"


class _Interrupt:
    """Ctrl-C. The first one raises KeyboardInterrupt, later ones are ignored; a process whose main thread is
    inside a long call and does not answer is ended all the same. Files appear by rename only, so none is half.
    """

    kept = ""  # what is left of the work, for the one line that is shown

    def line(self) -> str:
        return f"aqlm-c: stopped{self.kept and ': '}{self.kept}\n"

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        mine = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if not mine or threading.current_thread() is not threading.main_thread():
            yield  # someone else answers it
            return
        done = threading.Event()
        reader, writer = os.pipe()
        os.set_blocking(writer, False)

        def watch() -> None:  # the C handler writes to the pipe at once, Python's waits for the main thread
            while (number := os.read(reader, 1)) not in (b"", bytes([signal.SIGINT])):
                pass
            if number and not done.wait(_PATIENCE):
                Console(stderr=True).show_cursor()
                os.write(2, self.line().encode())
                os._exit(130)

        def interrupt(*_: object) -> None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            raise KeyboardInterrupt

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            done.set()
            os.close(writer)
            thread.join()
            os.close(reader)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (none: the process's); returns the exit code: 2 wrong input, 130 Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    command, interrupt = typer.main.get_command(app), _Interrupt()
    with interrupt.guard():
        try:
            result = command.main(arguments, prog_name="aqlm-c", standalone_mode=False, obj=interrupt)
            code = result if isinstance(result, int) else 0
        except _UsageError as error:
            code, message = 2, error.format_message()
        except (ValueError, OSError, ImportError) as error:
            code, message = 2, str(error)
        except (KeyboardInterrupt, typer.Abort):
            code = 130
        if code == 130:
            sys.stderr.write(interrupt.line())
        elif code == 2:
            print(f"aqlm-c: {' '.join(message.split())}", file=sys.stderr)
    return code


_UsageError = typer.BadParameter.__base__  # click's; typer imports click or carries its own, by version


def prepare(threads: int | None) -> None:
    """Set the threads of torch and of the C core, and keep transformers to errors."""
    _check_threads(threads)

    from transformers.utils import logging

    set_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def show(result: Any) -> None:
    """Print something rich to stdout, which need not be a terminal."""
    width = None if sys.stdout.isatty() else 120  # a file has no width of its own
    Console(highlight=False, width=width).print(result)


def _check_threads(threads: int | None) -> None:
    if threads is not None:
        int_between("--threads", threads, 1, 1024)


def _check_json(path: Path | None) -> None:
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise ValueError(f"--json={str(path)!r}: expected a file in a directory that exists")


def _check_data(data: list[str] | None) -> list[str]:
    from .data import check_source

    for source in data or []:
        check_source(source)
    return data or []
