"""What a request may ask for: the fields of OpenAI's API that mean something here, checked before any work.

A field that would change the answer and is not supported is an error, never ignored.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import int_between, is_text, wrong

MOST_BYTES = 4 << 20  # of a request
_MOST_STOPS = 16
_MOST_STOP = 256  # characters


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the tokens of a request are chosen. None: as the model's generation_config.json says, greedily without one.

    temperature 0: always the likeliest token. stop: texts before which the answer ends.
    """

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()


def parse(content: bytes) -> dict[str, Any]:
    """The JSON object that a request's content is; ValueError for anything else."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        raise ValueError("body: got no JSON, expected an object of JSON") from None
    if not isinstance(body, dict):
        raise wrong("body", body, "an object of JSON")
    return body


def check_chat(body: Mapping[str, Any]) -> Sampling:
    """How to answer a request for /v1/chat/completions; ValueError, naming the field, for one that cannot be met."""
    _check_fields(body, {**_FIELDS, **_CHAT})
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise wrong("messages", messages, "a list of at least one message")
    for index, message in enumerate(messages):
        _check_message(f"messages[{index}]", message)
    return sampling_of(body)


def check_completion(body: Mapping[str, Any]) -> Sampling:
    """The same for /v1/completions."""
    _check_fields(body, {**_FIELDS, **_COMPLETION})
    prompt = body.get("prompt")
    if not isinstance(prompt, str) or not prompt or not is_text(prompt):
        raise wrong("prompt", prompt, "a text, one and not empty")
    return sampling_of(body)


def up_to_stop(text: str, stop: tuple[str, ...]) -> tuple[str, str, bool]:
    """(what may be shown, what may be the beginning of a stop text, whether one was found) of text that goes on."""
    found = [at for at in (text.find(end) for end in stop) if at >= 0]
    if found:
        return text[: min(found)], "", True
    held = max((n for end in stop for n in range(1, len(end)) if text.endswith(end[:n])), default=0)
    return text[: len(text) - held], text[len(text) - held :], False


def sampling_of(body: Mapping[str, Any]) -> Sampling:
    """What a checked request says of its tokens."""
    most = [body[name] for name in ("max_completion_tokens", "max_tokens") if body.get(name) is not None]
    stop = body.get("stop") or ()
    return Sampling(
        max_new_tokens=most[0] if most else None,
        temperature=None if body.get("temperature") is None else float(body["temperature"]),
        top_p=None if body.get("top_p") is None else float(body["top_p"]),
        seed=body.get("seed"),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
    )


def _check_fields(body: Mapping[str, Any], known: Mapping[str, Callable[[str, Any], None]]) -> None:
    for name, value in body.items():
        if name not in known:
            raise wrong(name, value, "no such field: it is not supported")
        if value is not None:
            known[name](name, value)


def _check_message(name: str, message: Any) -> None:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise wrong(name, message, "an object with a role, such as user, and content")
    content = message.get("content")
    if message.get("tool_calls") is not None:
        _check_calls(f"{name}.tool_calls", message["tool_calls"])
    elif content is None:
        raise wrong(f"{name}.content", content, "a text")
    parts = content if isinstance(content, list) else [] if content is None else [{"type": "text", "text": content}]
    for part in parts:
        if not isinstance(part, dict) or part.get("type") not in ("text", "input_text", "output_text"):
            raise wrong(f"{name}.content", part, "text: the model is served for text alone")
        if not isinstance(part.get("text"), str) or not is_text(part["text"]):
            raise wrong(f"{name}.content", part.get("text"), "a text")


def _check_calls(name: str, calls: Any) -> None:
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("arguments"), (str, dict)):
            raise wrong(name, call, "a list of objects whose function has a name and arguments")
        if isinstance(function["arguments"], str):
            try:
                json.loads(function["arguments"])
            except (ValueError, RecursionError):
                raise wrong(f"{name}.function.arguments", function["arguments"], "JSON") from None


def _text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise wrong(name, value, "a text")


def _true_or_false(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise wrong(name, value, "true or false")


def _count(name: str, value: Any) -> None:
    int_between(name, value, 1)


def _seed(name: str, value: Any) -> None:
    int_between(name, value, 0, 2**63 - 1)


def _temperature(name: str, value: Any) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or (value != 0 and not 1e-4 <= value < math.inf):  # logits are divided by it
        raise wrong(name, value, "0 or a finite number of at least 0.0001")


def _top_p(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= 1:
        raise wrong(name, value, "a number in (0, 1]")


def _stop(name: str, value: Any) -> None:
    texts = value if isinstance(value, list) else [value]
    if len(texts) > _MOST_STOPS or not all(isinstance(text, str) and 0 < len(text) <= _MOST_STOP for text in texts):
        raise wrong(name, value, f"a text, or up to {_MOST_STOPS} of them, of 1 to {_MOST_STOP} characters each")


def _objects(name: str, value: Any) -> None:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise wrong(name, value, "a list of objects")


def _template_values(name: str, value: Any) -> None:
    from transformers import PreTrainedTokenizerBase

    own = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    scalars = isinstance(value, dict) and all(isinstance(item, (str, int, float, bool)) for item in value.values())
    if not scalars or set(value) & {*own, "load_audio_from_video"}:
        raise wrong(name, value, "an object of values that the chat template knows, such as enable_thinking")


def _anything(name: str, value: Any) -> None:
    """A field that changes no token."""


def _only(*allowed: Any) -> Callable[[str, Any], None]:
    def check(name: str, value: Any) -> None:
        if not any(type(value) is type(other) and value == other for other in allowed):
            raise wrong(name, value, f"{' or '.join(map(repr, allowed))}: nothing else is supported")

    return check


_ZERO, _FALSE = _only(0, 0.0), _only(False)
_FIELDS: dict[str, Callable[[str, Any], None]] = {
    "model": _text,
    "stream": _true_or_false,
    "stream_options": _anything,  # the last piece of a stream has the usage anyhow
    "max_tokens": _count,
    "temperature": _temperature,
    "top_p": _top_p,
    "seed": _seed,
    "stop": _stop,
    "n": _only(1),
    "frequency_penalty": _ZERO,
    "presence_penalty": _ZERO,
    "logit_bias": _only({}),
    **dict.fromkeys(("user", "metadata", "store", "service_tier"), _anything),
}
_CHAT: dict[str, Callable[[str, Any], None]] = {
    "messages": _objects,
    "max_completion_tokens": _count,
    "logprobs": _FALSE,
    "top_logprobs": _only(0),
    "response_format": _only({"type": "text"}),
    "tools": _objects,
    "tool_choice": _only("auto"),
    "parallel_tool_calls": _only(True),
    "modalities": _only(["text"]),
    "chat_template_kwargs": _template_values,
}
_COMPLETION: dict[str, Callable[[str, Any], None]] = {
    "prompt": _anything,
    "suffix": _only(""),
    "echo": _FALSE,
    "best_of": _only(1),
}
