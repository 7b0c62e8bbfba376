"""Studies that the method's authors left open: what one choice changes, over several points and seeds, with a plot.

    python benchmarks/ablation.py samples --device cuda --data-dir DIR --calibration web.txt --calibration wiki.txt \\
        --evaluate wikitext2=wikitext2_test_raw.txt --evaluate c4=c4_evaluation.txt --out ablations

    samples  how many sequences are calibrated on
    domain   calibrated on each --text NAME=FILE, evaluated on the held-out ends of all
    beam     width of the code search; 0: exact pairs
    tokens   millions (2^20) of tokens of tuning the whole model, without codes and with them (N+pv)
    format   codebooks, bits and group size, such as 2x8g8

A trial is one `quantize_model` (for tokens one `finetune_model`, all from one quantized model) and perplexity and KL to
the original on each text that is evaluated. The seed chooses the sequences, too, of which a larger number contains the
smaller one's. Rows go to OUT/NAME.jsonl as they are made: the same command goes on with the trials that are missing,
also after it was killed; a file of other settings is refused. `--index I --of N` runs every N-th of them, into a file
of its own, for one process a GPU. At the end, or by --plot alone: a table, OUT/NAME.json, NAME.png and NAME.svg, and a
sentence of what is beyond twice its spread over seeds.
"""

from __future__ import annotations

import argparse
import copy
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import _bench
import _device
import _study
import _study_plot
import torch

from aqlm_c.config import FinetuneOptions
from aqlm_c.core.runtime import set_threads
from aqlm_c.evaluate import divergence
from aqlm_c.finetune import finetune_model
from aqlm_c.format import Format
from aqlm_c.hf.models import load_model
from aqlm_c.io.data import BUNDLED, check_source, cut, sha256, token_stream, window_start
from aqlm_c.pipeline.resume import facts_of
from aqlm_c.quantize import quantize_model
from aqlm_c.recipe import PRESETS, AqlmConfig, options_of, parse_option, parse_pair, quantizer_options

POINTS = {
    "samples": ["8", "16", "32", "64", "128", "256", "512"],
    "domain": [],  # the names of --text
    "beam": ["0", "1", "2", "4", "8", "16"],
    "tokens": [f"{size}{codes}" for codes in ("", "+pv") for size in ("0.25", "0.5", "1", "2", "4", "8")],
    "format": [f"{books}g{g}" for books in ("2x4", "2x6", "2x8", "1x12") for g in (4, 8, 16)],
}
HELD_OUT = 64  # sequences of a tuning, at most
MILLION = 1 << 20


class Text(NamedTuple):
    """A text to evaluate on: a stream of token ids [n], the number of its windows, the token that they begin with."""

    stream: torch.Tensor
    windows: int
    start: int | None


class Pool(NamedTuple):
    """Sequences [n, length] that are drawn from, by source."""

    sources: dict[str, torch.Tensor]

    def draw(self, samples: int, seed: int) -> torch.Tensor:
        """As many of each source, and more of the others where one has not as many; random ones, of which a larger
        number contains a smaller one's.
        """
        left, shares = samples, dict[str, int]()
        for place, name in enumerate(sorted(self.sources, key=lambda name: len(self.sources[name]))):
            shares[name] = min(len(self.sources[name]), -(-left // (len(self.sources) - place)))
            left -= shares[name]
        if left > 0:
            raise ValueError(f"{', '.join(self.sources)}: got {samples - left} sequences, expected {samples}")
        parts = []
        for number, (name, windows) in enumerate(self.sources.items()):
            order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(1000 * seed + number))
            parts.append(windows[order[: shares[name]]])
        return torch.cat(parts)


class Texts(NamedTuple):
    """pools: by the name of what is calibrated on, and "tuning"; evaluated: by name."""

    pools: dict[str, Pool]
    evaluated: dict[str, Text]


def read(file: str, tokenizer: Any, args: argparse.Namespace) -> tuple[torch.Tensor, int | None]:
    """The first --pool tokens [n] of a file, and the token that its windows begin with."""
    return token_stream(file, tokenizer, args.pool or None, whole=False), window_start(tokenizer, "auto", file)


def pool_of(files: dict[str, str], tokenizer: Any, args: argparse.Namespace) -> Pool:
    found = {}
    for name, file in files.items():
        stream, start = read(file, tokenizer, args)
        found[name] = cut(stream[None], args.sequence_length, start)
    return Pool(found)


def windows_of(name: str, stream: torch.Tensor, start: int | None, args: argparse.Namespace) -> Text:
    found = len(cut(stream[None], args.window, start))
    if not found:
        raise ValueError(f"{name}: got {len(stream)} tokens to evaluate on, expected at least --window {args.window}")
    return Text(stream, min(args.windows or found, found), start)


def split(name: str, tokenizer: Any, args: argparse.Namespace) -> tuple[Pool, Text]:
    """Of a --text what is calibrated on and, behind a gap, its end, a quarter at most, which is evaluated. The gap is a
    quarter of that: a document that both would have a part of is none's.
    """
    stream, start = read(args.text[name], tokenizer, args)
    most = len(stream) // 4 // args.window
    size = args.window * min(args.windows or most, most)
    text = windows_of(name, stream[len(stream) - size :], start, args)
    head = stream[: len(stream) - size - size // 4]
    return Pool({name: cut(head[None], args.sequence_length, start)}), text


def texts_of(tokenizer: Any, args: argparse.Namespace) -> Texts:
    """What the study reads; ValueError for what is too short."""
    pools, evaluated = {}, {}
    if args.study == "domain":
        for name in args.text:
            pools[name], evaluated[name] = split(name, tokenizer, args)
    elif not args.quantized:
        pools["calibration"] = pool_of(args.calibration, tokenizer, args)
    if args.study == "tokens":
        pools["tuning"] = pool_of(args.tuning, tokenizer, args)
    for name, file in args.evaluate.items():
        limit = args.windows * args.window or None
        stream = token_stream(file, tokenizer, limit)
        evaluated[name] = windows_of(name, stream, window_start(tokenizer, "auto", file), args)
    return Texts(pools, evaluated)


def scores(model: Any, original: Any, texts: Texts, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    kept = ("perplexity", "kl", "kl_p99", "top1", "original_perplexity")
    found = {}
    for name, text in texts.evaluated.items():
        whole = divergence(model, original, text.stream, args.window, text.windows, bos_token=text.start)
        found[name] = {metric: whole[metric] for metric in kept}
    return found


class Bench:
    """The original, loaded once, and what is made of copies of it."""

    def __init__(self, original: Any, tokenizer: Any, args: argparse.Namespace) -> None:
        self.original, self.args = original, args
        self.texts = texts_of(tokenizer, args)
        self.start: Any = None

    def check(self, trials: list[_study.Key]) -> None:
        """Raise ValueError, before any work, for trials that there is not text enough for."""
        for point, seed in trials:
            if self.args.study == "tokens":
                self.tuning(point, seed)
            if not self.args.quantized:
                self.sequences(point, seed)

    def sequences(self, point: str, seed: int) -> torch.Tensor:
        """To calibrate on."""
        pool = self.texts.pools[point if self.args.study == "domain" else "calibration"]
        return pool.draw(int(point) if self.args.study == "samples" else self.args.samples, seed)

    def tuning(self, point: str, seed: int) -> tuple[torch.Tensor, FinetuneOptions]:
        """To tune on, held-out ones among them."""
        options = tuning_options(point, seed, self.args)
        needed = options.steps * options.batch_size
        held_out = min(options.most_held_out, max(1, round(options.held_out * needed)))
        return self.texts.pools["tuning"].draw(needed + held_out, seed), options

    def timed(self, work: Callable[[], Any]) -> tuple[Any, float]:
        _device.wait(self.args.device)
        started = time.perf_counter()
        found = work()
        _device.wait(self.args.device)
        return found, time.perf_counter() - started

    def quantized(self, point: str, seed: int) -> tuple[Any, dict[str, Any]]:
        config, ids, model = (
            config_of(point, seed, self.args),
            self.sequences(point, seed),
            copy.deepcopy(self.original),
        )
        report, seconds = self.timed(lambda: quantize_model(model, ids, config, device=self.args.device))
        format = config.format
        nominal = format.num_codebooks * format.nbits_per_codebook / format.in_group_size / format.out_group_size
        return model, {"seconds": seconds, "bits": report.bits_per_weight, "nominal bits": nominal}

    def warm_up(self, point: str, seed: int) -> None:
        """What takes its time once in a process is done: few sequences are quantized on, and nothing is kept."""
        ids = self.sequences(point, seed)[:2]
        quantize_model(copy.deepcopy(self.original), ids, config_of(point, seed, self.args), device=self.args.device)

    def tuned(self, point: str, seed: int) -> tuple[Any, dict[str, Any]]:
        if self.start is None and self.args.quantized:
            self.start = load_model(self.args.quantized, "auto", self.args.device)[0], None
        elif self.start is None:
            model, row = self.quantized("", 0)
            self.start = model, row["bits"]
        model, bits = copy.deepcopy(self.start[0]), self.start[1]
        sequences, options = self.tuning(point, seed)
        report, seconds = self.timed(lambda: finetune_model(model, self.original, sequences, options))
        found = {"steps": report.steps, "best step": report.best_step, "groups changed": report.changed}
        return model, {"seconds": seconds, "bits": bits, "tokens": report.tokens, **found}

    def row(self, point: str, seed: int) -> dict[str, Any]:
        """Of one trial."""
        model, found = (self.tuned if self.args.study == "tokens" else self.quantized)(point, seed)
        row = {"point": point, "seed": seed, **found, "scores": scores(model, self.original, self.texts, self.args)}
        del model
        if self.args.device == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
        return row


def config_of(point: str, seed: int, args: argparse.Namespace) -> AqlmConfig:
    """What a point quantizes to, and how; for tokens all start from one model."""
    fields = {"embeddings": "dense", "gaussian_reference": False, **quantizer_options(args.preset), **args.set}
    if args.study == "beam":
        fields["beam_size"] = int(point)
    config = AqlmConfig.from_scheme(point if args.study == "format" else args.scheme, **{**fields, "seed": seed})
    config.check_searchable()
    return config


def tuning_options(point: str, seed: int, args: argparse.Namespace) -> FinetuneOptions:
    """Of as many steps as the point's tokens make. None stops earlier, and the first eighth at most warms up."""
    batch = int(args.set_tuning.get("batch_size", FinetuneOptions.batch_size))
    steps = max(1, round(_study.size(point) * MILLION / (batch * args.sequence_length)))
    own = {"warmup": min(FinetuneOptions.warmup, steps // 8), "patience": 0, "most_held_out": HELD_OUT}
    fixed = {"steps": steps, "pv": point.endswith("+pv"), "seed": seed}
    return options_of(FinetuneOptions, {**own, **args.set_tuning, **fixed})


def check_point(point: str, args: argparse.Namespace) -> str:
    """As it is written in rows; ValueError for what is none of the study's."""
    expected = {"samples": "1, 2, ...", "domain": "a NAME of --text", "beam": "0, 1, ... 64", "tokens": "N or N+pv"}
    wrong = ValueError(f"--points: got {point}, expected {expected.get(args.study)}")
    if args.study == "domain":
        if point not in args.text:
            raise wrong
    elif args.study == "format":
        point = Format.parse(point).scheme
    elif args.study == "tokens":
        try:
            size = _study.size(point)
        except ValueError:
            raise wrong from None
        if not 0 < size < 1e6:
            raise wrong
        point = f"{size:g}{'+pv' * point.endswith('+pv')}"
        tuning_options(point, 0, args)
    elif not point.isdecimal() or (args.study == "samples" and not int(point)):
        raise wrong
    else:
        point = str(int(point))
    config_of(point, 0, args)
    return point


def settings_of(original: Any, args: argparse.Namespace) -> dict[str, Any]:
    """What all rows of a study have in common, but for where files lie: rows of other settings do not go with them."""
    digests = {
        part: {name: sha256(file) for name, file in getattr(args, part).items()}
        for part in ("text", "calibration", "tuning", "evaluate")
    }

    def weights(model: Any) -> str:
        return facts_of(model, torch.zeros(1, 1, dtype=torch.long), {})["model"]["weights"]

    quantized = args.quantized and weights(load_model(args.quantized)[0])
    same = ("device", "preset", "set", "sequence_length", "window", "windows", "pool")
    found = {name: getattr(args, name) for name in same}
    found |= {"study": args.study, "model": Path(args.model).name, "weights": weights(original), **digests}
    if args.study != "samples":
        found["samples"] = args.samples
    if args.study != "format":
        found["scheme"] = args.scheme
    if args.study == "tokens":
        found |= {"quantized": quantized, "set_tuning": args.set_tuning}
    return found


def named(option: str, given: list[str], args: argparse.Namespace) -> dict[str, str]:
    """Files by name of the NAME=FILE or FILE of an option, looked for in --data-dir too."""
    found: dict[str, str] = {}
    for each in given:
        name, file = parse_pair(option, each) if option in ("--text", "--evaluate") else ("", each)
        beside = Path(args.data_dir, file) if args.data_dir else Path(file)
        file = str(beside) if file != BUNDLED and not Path(file).exists() and beside.exists() else file
        if file != BUNDLED:
            check_source(file)
        name = name or Path(file).name
        if name in found:
            raise ValueError(f"{option}: got {name} twice, expected different names")
        found[name] = file
    return found


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=list(POINTS))
    parser.add_argument("--points", nargs="+", help="instead of the study's own")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--model", default="smollm2", help="the original")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--data-dir", metavar="DIR", help="where FILEs are looked for that are not here")
    parser.add_argument("--text", action="append", default=[], metavar="NAME=FILE", help="of domain; repeatable")
    parser.add_argument("--calibration", action="append", default=[], metavar="FILE", help="repeatable")
    parser.add_argument("--tuning", action="append", default=[], metavar="FILE", help="of tokens; repeatable")
    parser.add_argument("--evaluate", action="append", default=[], metavar="NAME=FILE", help="whole; repeatable")
    parser.add_argument("--pool", type=int, default=4_000_000, help="tokens that are read of each text; 0: all")
    parser.add_argument("--scheme", default="2x8g8")
    parser.add_argument("--preset", choices=list(PRESETS), help="default: fast; of tokens balanced")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="an AqlmConfig field")
    parser.add_argument("--set-tuning", action="append", default=[], metavar="FIELD=VALUE", help="of FinetuneOptions")
    parser.add_argument("--quantized", metavar="DIR", help="what tokens starts from, if it is not made first")
    parser.add_argument("--samples", type=int, default=64, help="sequences that are calibrated on")
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--window", type=int, default=2048, help="tokens of windows that are evaluated")
    parser.add_argument("--windows", type=int, default=64, help="of each text at most; 0: all")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--index", type=int, default=0)
    parser.add_argument("--of", type=int, default=1)
    parser.add_argument("--plot", action="store_true", help="of the rows that there are, without any work")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if not args.plot:
        _device.check_device(parser, args.device)
    try:
        complete(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def complete(args: argparse.Namespace) -> None:
    """Options as the study needs them; ValueError for what is wrong in them."""
    for name, least in (("pool", 0), ("samples", 1), ("sequence_length", 2), ("window", 2), ("windows", 0), ("of", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name.replace('_', '-')}: got {getattr(args, name)}, expected at least {least}")
    if not 0 <= args.index < args.of:
        raise ValueError(f"--index: got {args.index}, expected 0 to {args.of - 1}, less than --of")
    if min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
        raise ValueError(f"--seeds: got {args.seeds}, expected different numbers of at least 0")
    if args.plot:
        return
    args.set = dict(sorted(map(parse_option, args.set)))
    args.set_tuning = dict(sorted(parse_pair("--set-tuning", text) for text in args.set_tuning))
    args.preset = args.preset or ("balanced" if args.study == "tokens" else "fast")
    if args.quantized and args.study != "tokens":
        raise ValueError(f"--quantized: got {args.quantized}, expected none but of tokens")
    if (len(args.text) > 1) != (args.study == "domain") or (args.text and args.study != "domain"):
        raise ValueError(f"--text: got {len(args.text)} of them, expected two or more of domain, and else none")
    if args.study != "domain":
        args.calibration = args.calibration or [BUNDLED]
        args.evaluate = args.evaluate or [f"bundled={BUNDLED}"]
    args.tuning = args.tuning or ([BUNDLED] if args.study == "tokens" else [])
    for part in ("text", "calibration", "tuning", "evaluate"):
        setattr(args, part, named(f"--{part}", getattr(args, part), args))
    if both := sorted({*args.text} & {*args.evaluate}):
        raise ValueError(f"--evaluate: got {both[0]}, expected a name that no --text has")
    points = args.points or POINTS[args.study] or list(args.text)
    args.points = list(dict.fromkeys(check_point(point, args) for point in points))


def work(args: argparse.Namespace) -> int:
    """Run the trials that are missing; how many there are that other processes have yet to run."""
    set_threads(args.threads)
    original, tokenizer, _ = load_model(args.model, "auto", args.device)
    settings, out = settings_of(original, args), Path(args.out)
    mine = f"{args.study}.jsonl" if args.of == 1 else f"{args.study}.{args.index}.jsonl"
    trials = [(point, seed) for seed in args.seeds for point in args.points]
    _study.load(out, args.study, settings)
    bench = Bench(original, tokenizer, args)
    bench.check(trials)
    writer = _study.Writer(out / mine, {"settings": settings, "machine": _bench.machine(args.device)})
    try:
        done = _study.load(out, args.study, settings).rows
        base = [] if args.of == 1 else _study.load_one(out / f"{args.study}.jsonl")
        mine_now = _study.share(trials, base, done, args.index, args.of)
        if args.study == "beam" and mine_now:  # whose times are compared
            bench.warm_up(*mine_now[0])
        for number, (point, seed) in enumerate(mine_now, 1):
            row = bench.row(point, seed)
            writer.add(row)
            found = ", ".join(f"{name} {score['perplexity']:.5g}" for name, score in row["scores"].items())
            print(
                f"{number}/{len(mine_now)} {args.study} {point}, seed {seed}: {found}, {row['seconds']:.3g} s",
                flush=True,
            )
    finally:
        writer.close()
    have = {_study.key(row) for row in _study.load(out, args.study, settings).rows}
    return sum(trial not in have for trial in trials)


def finish(args: argparse.Namespace) -> None:
    """Table, JSON, plots and sentence of all rows that there are."""
    out = Path(args.out)
    found = _study.load(out, args.study)
    rows = _study.in_order(args.study, found.rows)
    if not rows:
        raise ValueError(f"--out: got no rows of {args.study} in {out.name}, expected some")
    said = _study.conclusion(args.study, rows)
    more = {"settings": found.settings, "machines": [header["machine"] for header in found.headers]}
    more |= {"conclusion": said, "means": _study.means(rows)}
    device = "cpu" if args.plot else args.device
    path = _bench.save(f"ablation_{args.study}", rows, str(out / f"{args.study}.json"), device, **more)
    divergences = [head for head in more["means"][0] if head.startswith("KL ")]
    apart = divergences if len(divergences) > 2 else []  # else too wide
    _bench.show(f"{args.study}: mean ± standard deviation over seeds", more["means"], apart)
    if apart:
        _bench.show("KL to the original", [{name: line[name] for name in ("point", *apart)} for line in more["means"]])
    for written in [path, *_study_plot.plot(args.study, rows, said, out)]:
        print(written)
    print(said)


def main() -> None:
    args = parse_arguments()
    try:
        missing = 0 if args.plot else work(args)
        if missing:
            print(f"{missing} trials are missing yet, of other processes or of none")
        finish(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"ablation.py: {error}") from None


if __name__ == "__main__":
    main()
