"""How the texts of requests are made: one request after another, or all in one batch that changes with every token.

Both are managers of generation as transformers' handlers know them: they are given tokens and a GenerationConfig.
"""

from __future__ import annotations

import asyncio
import copy
import json
import math
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.cli.serving import utils as serving

from ..errors import one_line, wrong
from ..generate import FiniteLogits
from ..model.positions import most_positions, rated_positions
from .requests import Sampling, up_to_stop

_DEFAULT_TOKENS = 1024  # of an answer, where the request does not say
_PAGE = 256  # tokens of a block of the batch's cache


class GenerationError(RuntimeError):
    """The model failed at a request that was well formed."""


class _Ended(Exception):
    """Raised inside of `generate` to end it: the text has a stop text, or nobody waits for it."""


def generation_config(model: Any, tokenizer: Any, sampling: Sampling) -> GenerationConfig:
    """The model's generation_config with what a request asks for; as `aqlm-c generate` does where both can say it."""
    config = copy.deepcopy(model.generation_config)
    config.num_beams = config.num_return_sequences = 1
    config.max_new_tokens = sampling.max_new_tokens
    if config.pad_token_id is None:
        pad = tokenizer.pad_token_id
        config.pad_token_id = pad if pad is not None else tokenizer.eos_token_id
    if sampling.temperature is None:
        config.top_p = sampling.top_p if sampling.top_p is not None else config.top_p
    elif sampling.temperature > 0:
        config.do_sample, config.temperature, config.top_k = True, sampling.temperature, 0
        config.top_p = 1.0 if sampling.top_p is None else sampling.top_p
    if sampling.temperature == 0 or not config.do_sample:
        config.do_sample, config.temperature, config.top_p, config.top_k = False, None, None, None
    return config


def most_tokens(model: Any) -> int | None:
    """The tokens that a request and its answer may have together, by the model's positions; None: any number."""
    most = [limit for limit in (most_positions(model), rated_positions(model)) if limit is not None]
    return min(most, default=None)


def fit(config: GenerationConfig, n_prompt: int, most: int | None) -> None:
    """Set the length of an answer where the request leaves it open; ValueError where both do not fit in `most`."""
    if not n_prompt:
        raise ValueError("prompt: got no token, expected at least one")
    room = math.inf if most is None else most - n_prompt
    if room < 1:
        raise ValueError(f"prompt: got {n_prompt} tokens, expected fewer than the {most} that the model is served for")
    if config.max_new_tokens is None:
        config.max_new_tokens = int(min(_DEFAULT_TOKENS, room))
    elif config.max_new_tokens > room:
        raise wrong("max_tokens", config.max_new_tokens, f"at most {room} after {n_prompt} tokens of the prompt")


class _Streamer(serving.DirectStreamer):
    """The text of one answer as it is made, up to the first stop text."""

    def __init__(self, tokenizer: Any, parser: Any, stop: tuple[str, ...]) -> None:
        super().__init__(tokenizer._tokenizer, asyncio.get_running_loop(), asyncio.Queue(), parser)
        self.ids: list[int] = []
        self._stop, self._held, self._has_prompt, self._stopped = stop, "", False, False

    @property
    def is_cancelled(self) -> bool:
        return self._cancelled.is_set()

    @property
    def queue(self) -> asyncio.Queue[Any]:
        """What the handler of a streamed answer reads."""
        return self._queue

    def put(self, value: torch.Tensor) -> None:
        if self.is_cancelled:
            raise _Ended
        if self._has_prompt:
            self.ids += value.tolist()
        self._has_prompt = True
        super().put(value)
        if self._stopped:
            raise _Ended

    def _enqueue(self, item: Any) -> None:
        if item is None and self._held and not self._stopped:
            super()._enqueue(self._held)
        elif type(item) is str and self._stop:
            shown, self._held, stopped = up_to_stop(self._held + item, self._stop)
            if shown and not self._stopped:
                super()._enqueue(shown)
            self._stopped = self._stopped or stopped
            return
        super()._enqueue(item)

    def fail(self, text: str) -> None:
        """End the stream with an error; the handler puts its text between the quotes of a JSON string."""
        self._loop.call_soon_threadsafe(self.queue.put_nowait, serving._StreamError(json.dumps(text)[1:-1]))


class OneByOne(serving.BaseGenerateManager):
    """Answers one request after the other in a thread of its own, each by the model's `generate`."""

    def __init__(self, most: int | None) -> None:
        self._most = most
        self._thread = ThreadPoolExecutor(1, "generate")
        self._running: weakref.WeakSet[_Streamer] = weakref.WeakSet()
        self.sampling = Sampling()  # of the request that comes at once

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, response_parser: Any = None
    ) -> tuple[Any, Any]:
        """Begin an answer; (the queue of its pieces, its streamer). Raises ValueError for one that does not fit."""
        streamer, work = self._prepared(model, processor, inputs, gen_config, response_parser)

        def run() -> None:
            try:
                work()
            except Exception as error:
                streamer.fail(one_line(error))

        self._thread.submit(run)
        return streamer.queue, streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> tuple[str, int, list[int]]:
        """(text, tokens of the prompt, ids of the answer); the work ends where this is cancelled."""
        stop = self.sampling.stop
        streamer, work = self._prepared(model, processor, inputs, gen_config, None)
        try:
            await asyncio.wrap_future(self._thread.submit(work))
        except asyncio.CancelledError:
            streamer.cancel()
            raise
        except Exception as error:
            raise GenerationError(one_line(error)) from error
        text, held, stopped = up_to_stop(processor.decode(streamer.ids, skip_special_tokens=True), stop)
        return text if stopped else text + held, inputs["input_ids"].shape[-1], streamer.ids

    def _prepared(self, model: Any, tokenizer: Any, inputs: Any, config: Any, parser: Any) -> tuple[_Streamer, Any]:
        sampling = self.sampling
        fit(config, inputs["input_ids"].shape[-1], self._most)
        streamer = _Streamer(tokenizer, parser, sampling.stop)
        self._running.add(streamer)

        def work() -> None:
            if streamer.is_cancelled:
                return
            if sampling.seed is not None:
                torch.manual_seed(sampling.seed)
            options = {"logits_processor": [FiniteLogits()], "tokenizer": tokenizer, "trust_remote_code": False}
            try:
                with torch.inference_mode():
                    model.generate(**inputs, generation_config=config, streamer=streamer, **options)
            except _Ended:
                streamer.end()

        return streamer, work

    def stop(self) -> None:
        """End all answers after their next token, and the thread with them."""
        for streamer in list(self._running):
            streamer.cancel()
            streamer.fail("the server stops")
        self._thread.shutdown(wait=False, cancel_futures=True)


class _Batch:
    """A batch of transformers, whose requests are given what this one asks for."""

    def __init__(self, batch: Any, options: dict[str, Any]) -> None:
        self._batch, self._options = batch, options

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batch, name)

    def add_request(self, *args: Any, **options: Any) -> Any:
        accepted = self._batch.add_request(*args, **options, **self._options)
        if accepted is None:  # else it would be waited for without end
            raise serving.CBWorkerDeadError("the batch takes no request any more")
        return accepted

    def cancel_request(self, request_id: str) -> None:
        """End a request; what it has made until it is gone still finds its handler."""
        self._batch.cancel_request(request_id)
        handlers = self._batch.output_router.result_handlers
        asyncio.get_running_loop().call_later(60, handlers.pop, request_id, None)


class Batched(serving.CBGenerateManager):
    """Answers all requests together, by transformers' continuous batching with a paged cache of `n_tokens` (None: as
    many as fit into a GPU). All of a batch sample, each with its own temperature and top_p, or none does.
    """

    def __init__(self, most: int | None, n_tokens: int | None, samples: bool) -> None:
        n_blocks = None if n_tokens is None else max(2, -(-n_tokens // _PAGE))
        # An attention that is fetched is code of others; processors that a request has of its own sample with it.
        options: dict[str, Any] = {"auto_switch_to_flash": False, "per_request_processors": samples}
        options |= {"page_size": _PAGE, "num_blocks": n_blocks}
        if n_blocks is not None:
            options["max_batch_tokens"] = min(512, n_blocks * _PAGE)
        super().__init__(ContinuousBatchingConfig(**options))
        limits = [limit for limit in (most, n_blocks and n_blocks * _PAGE) if limit]
        self._most, self._samples = min(limits, default=None), samples
        self._batch: Any = None

    def init_cb(self, model: Any, gen_config: Any) -> None:
        """Start the batch, again if its thread has died, and take what `gen_config` says of sampling."""
        if self._batch is None or not self.is_alive():
            shared = copy.deepcopy(gen_config)
            if self._samples:  # any but the values that mean nothing: each request says its own
                shared.temperature, shared.top_k, shared.top_p = 0.5, 1, 0.5
            self._cb = None
            super().init_cb(model, shared)
            self._batch = self._cb
        options: dict[str, Any] = {}
        if self._samples:
            options = {"temperature": float(gen_config.temperature or 1), "top_p": float(gen_config.top_p or 1)}
            options["top_k"] = int(gen_config.top_k or 2**31 - 1)
        self._cb = _Batch(self._batch, options)

    def generate_streaming(self, model: Any, processor: Any, inputs: Any, gen_config: Any, **options: Any) -> Any:
        """As `OneByOne.generate_streaming`."""
        fit(gen_config, len(inputs["input_ids"]), self._most)
        return super().generate_streaming(model, processor, inputs, gen_config, **options)

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> tuple[str, int, list[int]]:
        """As `OneByOne.generate_non_streaming`."""
        fit(gen_config, len(inputs["input_ids"]), self._most)
        batch: Any = self._cb
        try:
            return await super().generate_non_streaming(model, processor, inputs, gen_config, request_id)
        except asyncio.CancelledError:
            batch.cancel_request(request_id)
            raise
        except serving.CBWorkerDeadError:
            raise
        except Exception as error:
            raise GenerationError(one_line(error)) from error

    def stop(self) -> None:
        """End all answers, and the thread with them."""
        if self._batch is not None:
            self._batch.stop(block=True, timeout=5, hard_stop=True)


def can_batch(model: Any, tokenizer: Any) -> bool:
    """Whether a batch gives what `generate` gives: with an attention that it knows, and no processor of logits nor
    stop texts that the model's generation_config.json asks for.
    """
    greedy = generation_config(model, tokenizer, Sampling(max_new_tokens=1, temperature=0.0))
    attention = getattr(model.config, "_attn_implementation", None)
    return (
        hasattr(model, "init_continuous_batching")
        and attention == "sdpa"
        and not greedy.stop_strings
        and not model._get_logits_processor(greedy)
    )
