"""The command line: `aqlm-c quantize`, `evaluate`, `generate`; also `python -m aqlm_c`.

Results go to stdout, progress to stderr. A wrong input gives one line on stderr and exit code 2, and nothing
is written. torch and transformers are imported by the command that needs them.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from . import __version__
from .config import AqlmConfig, int_between
from .report import LayerReport, QuantizationReport, db_text, peak_memory, write_json

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

app = typer.Typer(
    help="Quantize Llama-like language models to about 2 bits per weight with AQLM, and use them.",
    epilog="MODEL is a directory, a hub name, a .gguf file, or smollm2.",
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
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress and no tables; evaluate prints the figure alone.")]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"aqlm-c {__version__}")


@app.command()
def quantize(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write.", show_default=False)],
    scheme: Annotated[str, typer.Option(help="Codebooks x bits g group size: 2x8g8, 1x16g8, 3x8g8, ...")] = "2x8g8",
    data: Data = None,
    samples: Annotated[int, typer.Option(help="Calibration sequences, spread evenly over the data.")] = 64,
    sequence_length: Annotated[int, typer.Option(help="Tokens in each.")] = 1024,
    shuffle: Annotated[bool, typer.Option("--shuffle", help="Draw them at random, not from the start.")] = False,
    seed: Seed = 0,
    threads: Threads = None,
    beam_size: Annotated[
        int | None,
        typer.Option(help="Beam of the code search; 0: exact pairs where they fit.", show_default=False),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(help="Stop a layer when a sweep gains less than this share.", show_default=False),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(metavar="REGEX", help="Quantize only layers whose name matches.", show_default=False),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Quantize MODEL to the directory OUT in the published AQLM layout."""
    from .checkpoint import check_output

    options = {"seed": seed, "beam_size": beam_size, "relative_mse_tolerance": tolerance}
    config = AqlmConfig.from_scheme(scheme, **{name: value for name, value in options.items() if value is not None})
    config.check_searchable()
    check_output(out, overwrite)
    _check_json(json)
    sources = _check_data(data)
    started = time.perf_counter()
    prepare(threads)

    from .data import load_sequences, provenance
    from .models import load_model
    from .quantize import quantize_model

    with Display(quiet) as display:
        display.on_phase("load")
        network, tokenizer, source = load_model(model)
        sequences = load_sequences(sources, tokenizer, samples, sequence_length, shuffle, seed)
        loaded = time.perf_counter()
        report = quantize_model(network, sequences, config, layers=layers, progress=display)
        report.phases = {"load": loaded - started, **report.phases}
        report.data = provenance(sources, sequences)
        display.on_phase("save")
        save_and_measure(network, tokenizer, source, out, report, overwrite)
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
    with Display(quiet) as display:
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

    with Display(quiet=False) as display:
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


class Display:
    """What a command shows on stderr while it works: bars with ETA in a terminal, plain lines elsewhere.

    A context manager. Its methods are the `progress` of `quantize_model` and, `on_window`, of `perplexity`.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
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
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

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
            left = f", about {elapsed / index * (self._n_blocks - index):.0f} s left" if index else ""
            self._console.print(f"{self._block} ({index + 1} of {self._n_blocks}), {elapsed:.0f} s{left}")

    def on_layer(self, report: LayerReport) -> None:
        self._bars.advance(self._current)
        self._console.print(
            f"  {escape(report.name)}: error {report.relative_error:.5f}, "
            f"{db_text(report.db_above_true_rate)} dB, {report.bits_per_weight:.3f} bits, "
            f"{report.seconds:.1f} s"
        )

    def on_phase(self, name: str) -> None:
        if self._all is not None:
            self._bars.update(self._current, description=f"{self._block} {name}".lstrip())
            return
        self._clear()
        self._current = self._bars.add_task(escape(name), total=None)
        if not self._console.is_terminal:
            self._console.print(f"{escape(name)} ...")

    def on_window(self, done: int, total: int, perplexity: float) -> None:
        self._bars.update(self._current, completed=done, total=total)

    def on_finish(self, report: QuantizationReport) -> None:
        self._clear()
        self._all = self._current = None

    def _clear(self) -> None:
        for task in self._bars.task_ids:
            self._bars.remove_task(task)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (none: the process's); returns the exit code: 2 wrong input, 130 Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        result = typer.main.get_command(app).main(arguments, prog_name="aqlm-c", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except _UsageError as error:
        message = error.format_message()
    except (ValueError, OSError, ImportError) as error:
        message = str(error)
    except (KeyboardInterrupt, typer.Abort):
        return 130
    print(f"aqlm-c: {' '.join(message.split())}", file=sys.stderr)
    return 2


_UsageError = typer.BadParameter.__base__  # click's; typer imports click or carries its own, by version


def save_and_measure(
    network: Any, tokenizer: Any, source: Any, out: Path, report: QuantizationReport, overwrite: bool
) -> None:
    """Save a model of `quantize_model` and add to its report where it came from, its sizes and the time."""
    from .checkpoint import save_quantized
    from .models import saved_sizes

    started = time.perf_counter()
    save_quantized(network, tokenizer, out, overwrite=overwrite)
    report.phases["save"] = time.perf_counter() - started
    report.peak_memory_bytes = peak_memory()
    report.model, report.note = source.name, source.note
    report.sizes = saved_sizes(network, out)
    if source.total_bytes:
        report.sizes["original_bytes"] = source.total_bytes
        report.sizes["original_embedding_bytes"] = source.embedding_bytes


def prepare(threads: int | None) -> None:
    """Set the threads of torch and of the C core, and keep transformers to errors."""
    if threads is not None:
        int_between("--threads", threads, 1, 1024)

    import torch
    from transformers.utils import logging

    from . import _core

    if threads is not None:
        torch.set_num_threads(threads)
        _core.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def show(result: Any) -> None:
    """Print something rich to stdout, which need not be a terminal."""
    width = None if sys.stdout.isatty() else 120  # a file has no width of its own
    Console(highlight=False, width=width).print(result)


def _check_json(path: Path | None) -> None:
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise ValueError(f"--json={str(path)!r}: expected a file in a directory that exists")


def _check_data(data: list[str] | None) -> list[str]:
    from .data import check_source

    for source in data or []:
        check_source(source)
    return data or []
