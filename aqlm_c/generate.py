"""Text from a model, streamed to stdout."""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import LogitsProcessor, TextStreamer

from .errors import is_text, one_line, printable, wrong
from .model.positions import check_length, most_positions


def generate(
    name: str,
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    chat: bool | None = None,
    seed: int = 0,
    temperature: float = 0.0,
    **options: Any,
) -> None:
    """Continue `prompt`, or answer it by the chat template (`chat` None: if the tokenizer has one), on stdout.

    name: of the model, for errors. temperature 0: always the likeliest token. options: max_new_tokens, top_p. Raises
    ValueError for a prompt without tokens, for more tokens than the model has positions, a template that fails, logits
    that are NaN, a model that cannot generate.
    """
    inputs = _inputs(name, tokenizer, prompt, chat).to(model.device)
    _check_positions(model, inputs["input_ids"].shape[1], options.get("max_new_tokens", 1))
    top_p = options.pop("top_p", 1.0)
    if temperature > 0:
        options |= {"temperature": temperature, "top_p": top_p, "top_k": 0}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    torch.manual_seed(seed)
    try:
        with torch.inference_mode():
            model.generate(
                **inputs,
                **options,
                do_sample=temperature > 0,
                num_beams=1,  # whatever the directory's generation_config says: more cannot be streamed
                num_return_sequences=1,
                pad_token_id=pad,
                streamer=_Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
                logits_processor=[FiniteLogits()],
                tokenizer=tokenizer,  # for stop texts of generation_config.json
                trust_remote_code=False,
            )
    except OSError:  # of stdout
        raise
    except Exception as error:  # of many types, as what the directory says of generation
        raise ValueError(f"model: got {name!r}, which cannot generate: {one_line(error)}") from error


def _inputs(name: str, tokenizer: Any, prompt: str, chat: bool | None) -> Any:
    if chat and not tokenizer.chat_template:
        raise ValueError(f"--chat: {name!r} has no chat template, expected --raw")
    by_template = bool(tokenizer.chat_template) and chat is not False
    try:
        if by_template:
            messages = [{"role": "user", "content": prompt}]
            prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # whatever a template raises
        raise ValueError(f"--chat: the chat template of {name!r} fails ({one_line(error)}), expected --raw") from error
    if not is_text(prompt):
        raise ValueError("PROMPT: got half of a character, expected Unicode text")
    try:
        inputs = tokenizer(prompt, return_tensors="pt", **({"add_special_tokens": False} if by_template else {}))
    except Exception as error:  # tokenizers raises Exception itself
        raise ValueError(f"model: got {name!r}, whose tokenizer fails: {one_line(error)}") from error
    if not inputs["input_ids"].numel():
        raise ValueError("PROMPT: got '': expected at least one token")
    return inputs


def _check_positions(network: Any, prompt: int, new: int) -> None:
    """Raise ValueError where the model has too few positions for so many tokens; a warning where it says so."""
    most = most_positions(network)
    if most is not None and prompt <= most < prompt + new - 1:  # the last token is not read
        raise wrong("--max-new-tokens", new, f"at most {most - prompt + 1} after {prompt} tokens of PROMPT")
    check_length("PROMPT and new tokens" if most is None or prompt <= most else "PROMPT", prompt + new - 1, network)


class FiniteLogits(LogitsProcessor):
    """Raises ValueError where logits are NaN, instead of tokens that mean nothing."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if scores.isnan().any():
            raise ValueError("its logits are NaN")
        return scores


class _Streamer(TextStreamer):
    """To a terminal without what would command it."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(printable(text) if sys.stdout.isatty() else text, stream_end)
