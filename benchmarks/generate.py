"""Tokens per second, bytes and memory of a whole quantized model beside the dense one and llama.cpp.

    aqlm-c quantize smollm2 OUT --scheme 2x8g8 --preset fast
    python benchmarks/generate.py OUT --compile --llama /elsewhere/bin/python

One sequence, greedy. Each contender has a process of its own, so that its memory is its own. llama.cpp runs the GGUF
file that the dense model came from, as it is and requantized: --llama is the interpreter of an environment with the
package llama-cpp-python. The columns:

    tokens/s     new tokens by the time of the whole call, prompt included; the median of --repeats
    x dense      tokens/s by those of the fastest dense row, eager or compiled as this one is (llama.cpp: of any)
    outside %    ours: share of the time outside of our operators (torch.profiler, a pass of its own)
    prefill/s    tokens of a prompt of --prefill-tokens by the time of one forward
    model MB     ours: the checkpoint's tensors; dense: its parameters in that dtype; llama.cpp: the file
    bare MB      resident memory before the model, with all that any model needs: imports, a tokenizer, what torch and
                 transformers read of their libraries for the first forward of a tiny dense Llama. What malloc keeps of
                 freed memory is given back first: the model would move into it unseen
    resident MB  resident memory after the first forward
    x model      (resident - bare) / model: 1 where nothing but the model is in memory
    peak MB      the most that was resident, loading and compiling included

    python benchmarks/generate.py --device cuda --compile

On a GPU the models have Llama's shapes and random weights (_llama.py): --shape, in --schemes beside the dense one where
the GPU holds it. The cache is static, a step one CUDA graph; with --compile a second row has the layers compiled. The
JSON also has the kernels of a step. The columns:

    context      tokens, prompt included, that the cache has space for, and attention reads
    in products  ms a token of the products with the layers' weights, by themselves; "outside %" is all the rest
    peak GiB     the most that the GPU held, with CUDA's own share, from building the model to its last token
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# llama.cpp's environment has neither torch nor this package: they are imported where they are needed.


def resident(field: str) -> int:
    """Bytes: VmRSS, what is in memory now, or VmHWM, the most that ever was."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status: no {field}")


def prompt(n: int, vocabulary: int) -> list[int]:
    return random.Random(0).choices(range(vocabulary), k=n)


def seconds(call: Callable[[], Any], repeats: int) -> float:
    """The median of `repeats` calls after one that is not timed."""
    times = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])


def torch_worker(job: dict[str, Any]) -> dict[str, Any]:
    """A model of transformers, ours or dense."""
    import torch
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    from aqlm_c.hf.models import load_model
    from aqlm_c.io.mapped import give_back

    torch.set_num_threads(job["threads"])
    dtype, tokenizer = getattr(torch, job["dtype"]), None
    if Path(job["model"], "config.json").exists():  # else a hub name or a GGUF file
        MODEL_FOR_CAUSAL_LM_MAPPING[type(transformers.AutoConfig.from_pretrained(job["model"]))]  # imports its code
        tokenizer = transformers.AutoTokenizer.from_pretrained(job["model"])
    torch.nn.functional.linear(*torch.ones(2, 64, 64, dtype=dtype))
    sizes = {"vocab_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    tiny = transformers.LlamaConfig(hidden_size=16, intermediate_size=16, **sizes)
    with torch.inference_mode():
        transformers.LlamaForCausalLM(tiny).to(dtype)(torch.zeros(1, 2, dtype=torch.long), logits_to_keep=1)
    give_back()
    bare = resident("VmRSS")
    del tokenizer  # the model brings its own
    model, _, source = load_model(job["model"], dtype)
    if job["contender"] == "ours" and not source.quantized:
        raise ValueError(f"MODEL={job['model']!r}: no quantized layer, expected a directory of `aqlm-c quantize`")
    bytes_of = source.total_bytes if source.quantized else sum(p.nbytes for p in model.parameters())
    options = {f"{limit}_new_tokens": job["new_tokens"] for limit in ("min", "max")}
    options |= {"do_sample": False, "pad_token_id": 0}
    if job["compiled"]:
        options["compile_config"] = transformers.CompileConfig(mode="default", fullgraph=True)
        options["compile_config"]._compile_all_devices = True  # else only accelerators compile
        options["cache_implementation"] = "static"

    def forward(tokens: torch.Tensor) -> Any:
        return model(tokens, use_cache=True, logits_to_keep=1)

    def generate() -> None:
        tokens = model.generate(short, attention_mask=torch.ones_like(short), **options)
        if tokens.shape[1] != job["prompt_tokens"] + job["new_tokens"]:
            got = tokens.shape[1] - job["prompt_tokens"]
            raise RuntimeError(f"got {got} new tokens, expected {job['new_tokens']}")

    vocabulary = model.config.vocab_size
    short, long = (torch.tensor([prompt(job[n], vocabulary)]) for n in ("prompt_tokens", "prefill_tokens"))
    with torch.inference_mode():
        forward(short)
        after = resident("VmRSS")
        for _ in range(3 * job["compiled"]):  # torch.compile works in each of them
            generate()
        generation = seconds(generate, job["repeats"])
        prefill = seconds(lambda: forward(long), job["repeats"])
        peak = resident("VmHWM")  # the profiler takes gigabytes
        outside = 1 - seconds_in_ours(generate) / generation if source.quantized else None
    return {
        "source": source.path,
        "generation": generation,
        "prefill": prefill,
        "outside": outside,
        "bytes": bytes_of,
        "bare": bare,
        "resident": after,
        "peak": peak,
    }


def seconds_in_ours(call: Callable[[], None]) -> float:
    """The time that a call spends in our operators."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
    events = [event for event in profiler.events() if event.name.startswith("aqlm_c::")]
    return sum(event.cpu_time_total for event in events) * 1e-6


def llama_worker(job: dict[str, Any]) -> dict[str, Any]:
    """llama.cpp on a GGUF file."""
    import llama_cpp

    bare = resident("VmRSS")
    llama = llama_cpp.Llama(
        job["model"],
        n_ctx=max(job["prompt_tokens"] + job["new_tokens"], job["prefill_tokens"]) + 1,
        n_batch=max(512, job["prefill_tokens"]),
        n_threads=job["threads"],
        n_threads_batch=job["threads"],
        verbose=False,
    )
    short, long = (prompt(job[n], llama.n_vocab()) for n in ("prompt_tokens", "prefill_tokens"))

    def forward(tokens: list[int]) -> None:
        llama.reset()
        llama.eval(tokens)

    def generate() -> None:
        llama.reset()  # else it goes on from the prompt that it remembers
        tokens = llama.generate(short, temp=0.0)
        for _ in range(job["new_tokens"]):
            next(tokens)

    forward(short)
    after = resident("VmRSS")
    prefix = "LLAMA_FTYPE_MOSTLY_"
    formats = {value: name.removeprefix(prefix) for name, value in vars(llama_cpp).items() if name.startswith(prefix)}
    return {
        "format": formats.get(int(llama.metadata.get("general.file_type", -1)), "GGUF"),
        "generation": seconds(generate, job["repeats"]),
        "prefill": seconds(lambda: forward(long), job["repeats"]),
        "outside": None,
        "bytes": os.path.getsize(job["model"]),
        "bare": bare,
        "resident": after,
        "peak": resident("VmHWM"),
    }


def quantize_worker(job: dict[str, Any]) -> dict[str, Any]:
    """llama.cpp requantizes a GGUF file."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{job['format']}")
    params.nthread, params.allow_requantize = job["threads"], True
    if status := llama_cpp.llama_model_quantize(job["model"].encode(), job["out"].encode(), params):
        raise RuntimeError(f"llama_model_quantize: status {status}")
    return {}


def gpu_worker(job: dict[str, Any]) -> list[dict[str, Any]]:
    """A model of Llama's shape with random weights, ours or dense."""
    import _llama

    return _llama.worker(job)


WORKERS = {
    "gpu": gpu_worker,
    "ours": torch_worker,
    "dense": torch_worker,
    "llama.cpp": llama_worker,
    "requantize": quantize_worker,
}


def run(interpreter: str, job: dict[str, Any], script: str = __file__) -> Any:
    """What the job's worker gives in a process of its own; RuntimeError with its last words if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "result.json")
        command = [interpreter, script, "--worker", json.dumps(job), str(out)]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode or not out.exists():
            raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
        return json.loads(out.read_text())


def row(job: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    return {
        "contender": job["contender"],
        "format": result.get("format") or job["dtype"],
        "compiled": "yes" if job["compiled"] else "no",
        "tokens/s": job["new_tokens"] / result["generation"],
        "x dense": None,
        "outside %": result["outside"] and 100 * result["outside"],
        "prefill/s": job["prefill_tokens"] / result["prefill"],
        "model MB": result["bytes"] / 1e6,
        "bare MB": result["bare"] / 1e6,
        "resident MB": result["resident"] / 1e6,
        "x model": (result["resident"] - result["bare"]) / result["bytes"],
        "peak MB": result["peak"] / 1e6,
    }


def torch_rows(args: argparse.Namespace, common: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """The rows of ours and of the dense model, and the file or directory that the dense one came from."""
    rows, source = [], ""
    for compiled in (False, True) if args.compile else (False,):
        for dtype in args.dtypes:
            for contender, model in (("ours", args.model), ("dense", args.dense)):
                job = {**common, "contender": contender, "model": model, "dtype": dtype, "compiled": compiled}
                result = run(sys.executable, job)
                source = result["source"]
                rows.append(row(job, result))
    return rows, source


def llama_rows(args: argparse.Namespace, common: dict[str, Any], gguf: str) -> list[dict[str, Any]]:
    """The rows of llama.cpp: the file as it is, and requantized as far as llama.cpp can."""
    job = {**common, "contender": "llama.cpp", "model": gguf, "dtype": "", "compiled": False}
    rows = [row(job, run(args.llama, job))]
    for name in args.llama_formats:
        with tempfile.TemporaryDirectory() as folder:
            made = {"model": os.path.join(folder, f"{name}.gguf")}
            try:
                run(args.llama, {**job, "contender": "requantize", "format": name, "out": made["model"]})
                rows.append(row(job, run(args.llama, job | made)))
            except RuntimeError as error:
                print(f"llama.cpp: no {name}: {error}", file=sys.stderr)
    return rows


PROMPT = {"llama-2-7b": 128, "llama-2-70b": 1920}  # with 128 new tokens a context of 256 and of 2,048
DENSE = ("llama-2-7b", "tiny")  # in fp16 the others fill more than a GPU


def gpu_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A process for each model; one that fails is named, the others go on."""
    rows = []
    for shape in args.shape:
        for scheme in [*args.schemes[shape], *([None] if shape in DENSE else [])]:
            job = {"contender": "gpu", "shape": shape, "scheme": scheme, "dtype": "float16", "compile": args.compile}
            job |= {name: getattr(args, name) for name in ("device", "new_tokens", "repeats")}
            job["prompt_tokens"] = args.prompt_tokens or PROMPT.get(shape, 16)
            try:
                rows += run(sys.executable, job)
            except RuntimeError as error:
                print(f"{shape}, {scheme or 'dense'}: {error}", file=sys.stderr)
    return rows


def against_dense(rows: list[dict[str, Any]]) -> None:
    """Fills "x dense" where there is a dense model of that shape."""
    for this in rows:
        peers = [
            r["tokens/s"]
            for r in rows
            if r["contender"] == "dense"
            and r.get("shape") == this.get("shape")
            and (this["contender"] == "llama.cpp" or r["compiled"] == this["compiled"])
        ]
        this["x dense"] = this["tokens/s"] / max(peers) if peers else None


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        job, out = json.loads(sys.argv[2]), Path(sys.argv[3])
        out.write_text(json.dumps(WORKERS[job["contender"]](job)))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="directory of a quantized model: `aqlm-c quantize smollm2 OUT --scheme 2x8g8 --preset fast`",
    )
    parser.add_argument("--dense", default="smollm2", metavar="MODEL", help="the same model, not quantized")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shape", nargs="+", choices=["llama-2-7b", "llama-2-70b", "tiny"], help="on a GPU")
    parser.add_argument("--schemes", nargs="+", help="on a GPU (default: 2x8g8 1x16g8; 70B: 2x8g8)")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="on the CPU")
    parser.add_argument("--compile", action="store_true", help="also with static cache and torch.compile")
    parser.add_argument("--llama", metavar="PYTHON", help="interpreter that can import llama_cpp")
    parser.add_argument("--llama-formats", nargs="*", default=["Q2_K"], help="what llama.cpp requantizes its file to")
    parser.add_argument("--prompt-tokens", type=int, help="default: 16; on a GPU as many as make 256, 70B 2,048 in all")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--prefill-tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json")
    args = parser.parse_args()
    main_on = main_gpu if args.device == "cuda" else main_cpu
    main_on(parser, args)


def main_cpu(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    import _bench

    if not args.model:
        parser.error("MODEL: got none, expected the directory of a quantized model")
    args.prompt_tokens = args.prompt_tokens or 16
    common = {k: getattr(args, k) for k in ("prompt_tokens", "new_tokens", "prefill_tokens", "repeats", "threads")}
    try:
        rows, source = torch_rows(args, common)
        if args.llama:
            if not source.endswith(".gguf"):
                raise RuntimeError(f"--llama: --dense={args.dense!r} came from {source!r}, expected a GGUF file")
            rows += llama_rows(args, common, source)
    except RuntimeError as error:
        raise SystemExit(str(error)) from None
    against_dense(rows)
    _bench.show(f"{args.new_tokens} new tokens, {args.threads} threads", rows)
    for r in rows:
        if r["contender"] == "ours":
            print(
                f"ours, {r['format']}, compiled: {r['compiled']}: resident after the first forward minus the bare "
                f"interpreter is {r['x model']:.3f} x the checkpoint of {r['model MB']:.1f} MB"
            )
    exact = os.environ.get("AQLM_C_EXACT")
    names = ("device", "dtypes", "compile", "llama_formats", *common)
    arguments = {name: getattr(args, name) for name in names}
    print(_bench.save("generate", rows, args.json, arguments=arguments, AQLM_C_EXACT=exact))


def main_gpu(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    import _bench
    import torch

    from aqlm_c.nn import ops

    if not (torch.cuda.is_available() and ops.has_cuda):
        parser.error("--device: got cuda, expected a GPU that torch can use, and aqlm_c built with _cuda")
    args.shape = args.shape or ["llama-2-7b", "llama-2-70b"]
    args.schemes = {s: args.schemes or ["2x8g8", *(["1x16g8"] if s != "llama-2-70b" else [])] for s in args.shape}
    rows = gpu_rows(args)
    if not rows:
        raise SystemExit("no model was timed")
    against_dense(rows)
    _bench.show(f"{args.new_tokens} new tokens, {torch.cuda.get_device_name()}", rows, hidden={"kernels"})
    arguments = {
        name: getattr(args, name) for name in ("device", "shape", "schemes", "compile", "new_tokens", "repeats")
    }
    print(_bench.save("generate_cuda", rows, args.json, "cuda", arguments=arguments))


if __name__ == "__main__":
    main()
