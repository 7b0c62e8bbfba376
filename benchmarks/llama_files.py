"""Files of a model as llama.cpp quantizes it beside ours, by size: perplexity, and KL to the original.

    python benchmarks/llama_files.py --make FOLDER --llama /elsewhere/bin/python
    python benchmarks/llama_files.py FOLDER/*.gguf OURS ... --data wikitext2_test.txt --windows 4 \\
        --sequence-length 1024 --llama /elsewhere/bin/python --json FILE.json --plot FILE.png

--llama is the interpreter of an environment with the package llama-cpp-python. --make writes an F16 file of the GGUF
file that --against comes from and of that one each of --formats, all of which need no importance matrix; a format that
llama.cpp does not make of the model is named. OURS are directories of quantized models.

Every model, GGUF files too, is evaluated by `aqlm_c.evaluate_models`, so that windows, arithmetic and the original are
the same. Rows that FILE.json has of the same windows are kept: models may be evaluated on several machines, and more
of them later. The columns:

    MB         the whole GGUF file; ours: all *.safetensors
    +-         standard error of the perplexity over windows
    KL, p99    to the original, nats: mean and 99th percentile over tokens
    top-1      share of the tokens for which both have the same likeliest next one
    by itself  with --llama, the perplexity of the first --check windows by llama.cpp, which rounds activations too
    by us      that of the same windows as it is computed here
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import generate

# llama.cpp's environment has neither torch nor this package: they are imported where they are needed.
FORMATS = (
    "Q2_K",
    "Q3_K_S",
    "Q3_K_M",
    "Q3_K_L",
    "Q4_0",
    "Q4_1",
    "Q4_K_S",
    "Q4_K_M",
    "IQ3_XXS",
    "IQ3_S",
    "IQ3_M",
)
FORMATS += ("IQ4_XS", "IQ4_NL")


def make(folder: Path, args: argparse.Namespace) -> None:
    """Write the F16 file and one of each format."""
    from aqlm_c.hf.models import load_model

    source = load_model(args.against)[2].path
    if not source.endswith(".gguf"):
        raise SystemExit(f"--against: got {args.against!r}, which came from {source!r}, expected a GGUF file")
    folder.mkdir(parents=True, exist_ok=True)
    half = folder / f"{Path(args.against).stem}-F16.gguf"
    for name, model, out in [("F16", source, half), *((name, half, place(half, name)) for name in args.formats)]:
        job = {"contender": "requantize", "format": name, "model": str(model), "out": str(out), "threads": args.threads}
        try:
            generate.run(args.llama, job)
        except RuntimeError as error:
            out.unlink(missing_ok=True)
            print(f"llama.cpp: no {name}: {error}", file=sys.stderr)
        else:
            print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")


def place(half: Path, name: str) -> Path:
    return half.with_name(half.name.replace("-F16", f"-{name}"))


def losses_worker(job: dict[str, Any]) -> list[float]:
    """The mean loss of each window [n, length] of token ids by llama.cpp."""
    import llama_cpp
    import numpy as np

    windows = np.load(job["windows"])
    length = windows.shape[1]
    llama = llama_cpp.Llama(
        *(job["model"],), n_ctx=length, n_batch=length, n_threads=job["threads"], logits_all=True, verbose=False
    )
    found = []
    for tokens in windows.tolist():
        llama.reset()
        llama.eval(tokens)
        logits = np.asarray(llama.scores[: length - 1], dtype=np.float64)
        most = logits.max(1)
        likely = logits[np.arange(length - 1), tokens[1:]]
        found.append(float(np.mean(np.log(np.exp(logits - most[:, None]).sum(1)) + most - likely)))
    return found


def bytes_of(model: str) -> int:
    """Of a file, or of a directory's tensors."""
    path = Path(model)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise SystemExit(f"MODEL: got {model!r}, expected a GGUF file or a directory with *.safetensors")
    return sum(file.stat().st_size for file in files)


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("model", "MB", "text", "sha256", "windows", "length"))


def row_of(model: str, found: dict[str, Any]) -> dict[str, Any]:
    """What a result of `evaluate_models` says, and the size of the model."""
    return {
        **{"model": Path(model).name, "by": "llama.cpp" if model.endswith(".gguf") else "ours"},
        **{"MB": bytes_of(model) / 1e6, "text": Path(found["data"]).name, "windows": found["windows"]},
        **{"length": found["sequence_length"], "perplexity": found["perplexity"], "+-": found["perplexity_stderr"]},
        **{"KL": found["kl"], "p99": found["kl_p99"], "top-1": found["top1"]},
        **{"by itself": None, "by us": None, "original": found["original_perplexity"], "sha256": found["sha256"]},
    }


class Kept:
    """Rows of a JSON file, which is written anew with each that is added."""

    def __init__(self, path: str | None) -> None:
        self.path, self.rows = path, []
        if path and Path(path).exists():
            self.rows = json.loads(Path(path).read_text())["rows"]

    def has(self, model: str, texts: list[tuple[str, str]], args: argparse.Namespace) -> bool:
        """Whether there is a row of the model on each text, (name, SHA-256)."""
        keys = {key_of({**row, "windows": args.windows and row["windows"]}) for row in self.rows}
        name, size = Path(model).name, bytes_of(model) / 1e6
        return all((name, size, *text, args.windows, args.sequence_length) in keys for text in texts)

    def add(self, row: dict[str, Any], args: argparse.Namespace) -> None:
        import _bench

        self.rows = [one for one in self.rows if key_of(one) != key_of(row)] + [row]
        if self.path:
            arguments = {name: getattr(args, name) for name in ("against", "dtype", "device")}
            _bench.save("llama_files", self.rows, self.path, args.device, arguments=arguments)


def checked(model: str, source: str, args: argparse.Namespace) -> dict[str, float]:
    """Perplexities of a text's first windows by llama.cpp and by us."""
    import numpy as np

    from aqlm_c import evaluate_models
    from aqlm_c.hf.models import load_tokenizer
    from aqlm_c.io.data import cut, token_stream, window_start

    tokenizer = load_tokenizer(args.against)
    stream = token_stream(source, tokenizer, args.check * args.sequence_length)
    windows = cut(stream[None], args.sequence_length, window_start(tokenizer, "auto", source))[: args.check]
    with tempfile.TemporaryDirectory() as folder:
        np.save(os.path.join(folder, "windows.npy"), windows.numpy())
        job = {"contender": "losses", "model": model, "windows": os.path.join(folder, "windows.npy")}
        losses = generate.run(args.llama, {**job, "threads": args.threads}, __file__)
    options = {"windows": args.check, "sequence_length": args.sequence_length, "dtype": args.dtype}
    ours = evaluate_models(model, source, device=args.device, **options).results[0]["perplexity"]
    return {"by itself": math.exp(sum(losses) / len(losses)), "by us": ours}


def evaluate(models: list[str], kept: Kept, args: argparse.Namespace) -> None:
    """Rows of the models that have none yet."""
    from aqlm_c import evaluate_models
    from aqlm_c.io.data import sha256
    from aqlm_c.report.evaluation import Evaluation

    texts = [(Path(source).name, sha256(source)) for source in args.data]
    missing = [model for model in models if not kept.has(model, texts, args)]
    result, written = Evaluation(missing), 0

    class Writing:
        """Writes rows as soon as the next phase begins."""

        def on_window(self, *_: Any) -> None: ...

        def on_phase(self, name: str) -> None:
            nonlocal written
            print(name, file=sys.stderr, flush=True)
            for found in result.results[written:]:
                row = row_of(found["model"], found)
                if args.llama and row["by"] == "llama.cpp" and args.check:
                    row |= checked(found["model"], found["data"], args)
                kept.add(row, args)
            written = len(result.results)

    if missing:
        options = {"windows": args.windows, "sequence_length": args.sequence_length, "dtype": args.dtype}
        writing = Writing()
        evaluate_models(missing, args.data, args.against, device=args.device, progress=writing, found=result, **options)
        writing.on_phase("done")


def plot(rows: list[dict[str, Any]], path: str) -> None:
    """Perplexity and KL over the size, a row of panels for each text."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    texts = list(dict.fromkeys(row["text"] for row in rows))
    figure, axes = pyplot.subplots(len(texts), 2, figsize=(13, 5 * len(texts)), squeeze=False, layout="constrained")
    for text, panels in zip(texts, axes, strict=True):
        chosen = [row for row in rows if row["text"] == text]
        for panel, name in zip(panels, ("perplexity", "KL"), strict=True):
            for by, style in (
                ("ours", {"marker": "o", "c": "#d62728"}),
                ("llama.cpp", {"marker": "s", "c": "#1f77b4"}),
            ):
                own = [row for row in chosen if row["by"] == by]
                panel.scatter([row["MB"] for row in own], [row[name] for row in own], label=by, **style)
                for row in own:
                    said = row["model"].removesuffix(".gguf").rpartition("-")[2] if by == "llama.cpp" else row["model"]
                    panel.annotate(said, (row["MB"], row[name]), xytext=(5, 4), textcoords="offset points", size=8)
            panel.set(
                xlabel="size of the file, MB", ylabel=name if name == "perplexity" else "KL to the original, nats"
            )
            panel.grid(alpha=0.3)
            if name == "perplexity":
                panel.axhline(chosen[0]["original"], ls="--", c="gray", label="original")
            panel.legend()
        panels[0].set_title(f"{text}, {chosen[0]['windows']} windows of {chosen[0]['length']:,} tokens")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        job, out = json.loads(sys.argv[2]), Path(sys.argv[3])
        out.write_text(json.dumps({"losses": losses_worker}[job["contender"]](job)))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="GGUF files, and directories of quantized models")
    parser.add_argument("--make", type=Path, metavar="FOLDER", help="write llama.cpp's files there, and end")
    parser.add_argument("--formats", nargs="*", default=FORMATS, help="with --make")
    parser.add_argument("--llama", metavar="PYTHON", help="interpreter that can import llama_cpp")
    parser.add_argument("--against", default="smollm2", metavar="ORIGINAL")
    parser.add_argument("--data", action="append", metavar="FILE", help="text; repeatable")
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--windows", type=int, help="only the first so many")
    parser.add_argument("--check", type=int, default=1, help="windows that llama.cpp runs itself")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2, help="of llama.cpp")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--plot", metavar="FILE")
    args = parser.parse_args()
    if args.make:
        if not args.llama:
            parser.error("--make: needs --llama")
        make(args.make, args)
        return
    if not (args.models and args.data):
        parser.error("MODEL, --data: got none, expected at least one of each")
    import _bench

    kept = Kept(args.json)
    evaluate(args.models, kept, args)
    names, texts = ({Path(one).name for one in some} for some in (args.models, args.data))
    shown = [row for row in kept.rows if row["length"] == args.sequence_length and row["model"] in names]
    shown = [row for row in shown if row["text"] in texts and args.windows in (None, row["windows"])]
    shown.sort(key=lambda row: (row["text"], row["MB"]))
    _bench.show(f"{args.against}: {shown[0]['original']:.4g} as it is", shown, hidden={"sha256", "original", "length"})
    if args.plot:
        plot(shown, args.plot)


if __name__ == "__main__":
    main()
