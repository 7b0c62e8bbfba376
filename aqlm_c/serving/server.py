"""The server: its routes, how errors look, how it starts and stops."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import ipaddress
import json
import logging
import os
import signal
import socket
import threading
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import uvicorn
from fastapi import HTTPException
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.utils import CBWorkerDeadError, Modality

from ..errors import one_line, wrong
from . import requests
from .generation import Batched, GenerationError, OneByOne, generation_config, most_tokens
from .requests import Sampling

log = logging.getLogger("aqlm_c")
_MOST_REQUESTS = 256  # at once
_STOPS = "the server stops"
_GRACE = 5  # seconds that answers have to end in


class _OneModel:
    """What handlers ask of transformers' ModelManager and GenerationState, of a model that is there."""

    def __init__(self, name: str, model: Any, tokenizer: Any, manager: Any) -> None:
        self.name, self.model, self.tokenizer, self.manager = name, model, tokenizer, manager

    def get_model_modality(self, *_: Any, **__: Any) -> Any:
        return Modality.LLM

    def use_continuous_batching(self, *_: Any) -> bool:
        return isinstance(self.manager, Batched)

    def get_manager(self, *_: Any, **__: Any) -> Any:
        return self.manager


class _Own:
    """A handler of transformers that answers for one model, as a checked request asks."""

    model_manager: _OneModel

    def _validate_request(self, body: dict[str, Any]) -> None:
        """Done before."""

    def _resolve_model(self, body: dict[str, Any]) -> tuple[str, Any, Any]:
        own = self.model_manager
        return own.name, own.model, own.tokenizer

    def _build_generation_config(self, body: dict[str, Any], config: Any, use_cb: bool = False) -> Any:
        own, sampling = self.model_manager, requests.sampling_of(body)
        own.manager.sampling = sampling  # which it reads at once: nothing is awaited in between
        built = generation_config(own.model, own.tokenizer, sampling)
        built.use_cache = not use_cb  # a batch has its own cache
        return built


class _Chat(_Own, ChatCompletionHandler):
    check = staticmethod(requests.check_chat)


class _Completion(_Own, CompletionHandler):
    check = staticmethod(requests.check_completion)


class Service:
    """One model and the ways to answer for it: an ASGI application.

    batch_tokens: what the cache of a batch holds, None: as fits into a GPU; batching False: one request at a time.
    """

    def __init__(
        self, name: str, model: Any, tokenizer: Any, batching: bool = False, batch_tokens: int | None = None
    ) -> None:
        self.name, self.model, self.tokenizer, self._stopped = name, model, tokenizer, False
        most = most_tokens(model)
        self._managers: dict[str, Any] = {"one": OneByOne(most)}
        if batching:
            self._managers |= {kind: Batched(most, batch_tokens, kind == "sampled") for kind in ("greedy", "sampled")}
        self._handlers = {
            (handler, kind): handler(own, own)
            for kind, manager in self._managers.items()
            for own in [_OneModel(name, model, tokenizer, manager)]
            for handler in (_Chat, _Completion)
        }
        routes = [
            Route("/v1/chat/completions", self._route(_Chat), methods=["POST"]),
            Route("/v1/completions", self._route(_Completion), methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._one_model),
            Route("/health", self._health),
        ]
        self.app = Starlette(routes=routes, exception_handlers={HTTPException: _http_error, Exception: _fault})

    def stop(self) -> None:
        """End all answers; what is asked from now on is refused."""
        self._stopped = True
        for manager in self._managers.values():
            manager.stop()

    def _route(self, kind: Any) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            try:
                body = requests.parse(await _content(request))
                if body.get("model") not in (None, self.name):
                    return self._unknown(body["model"])
                sampling = kind.check(body)
                if kind is _Chat and not self.tokenizer.chat_template:
                    raise wrong("model", self.name, "one with a chat template, or a request for /v1/completions")
            except ClientDisconnect:
                return _left()
            except ValueError as error:
                return _error(400, one_line(error))
            if self._stopped:
                return _error(503, _STOPS, "server_error")
            handler = self._handlers[kind, self._way(sampling)]
            work = handler.handle_request(body, f"{'chatcmpl' if kind is _Chat else 'cmpl'}-{uuid.uuid4().hex}")
            try:
                response = await _while_connected(request, work)
                if isinstance(response, StreamingResponse):
                    response.body_iterator = _as_openai(response.body_iterator)
                return response
            except CBWorkerDeadError as error:
                return _error(503, one_line(error), "server_error")
            except GenerationError as error:
                return _error(500, one_line(error), "server_error")
            except HTTPException:
                raise
            except asyncio.CancelledError:  # it took too long to stop
                return _error(503, _STOPS, "server_error")
            except Exception as error:  # of a chat template, of a tokenizer: whatever these raise
                log.debug("a request failed", exc_info=True)
                return _error(400, one_line(error))

        return answer

    def _way(self, sampling: Sampling) -> str:
        """One by one what a batch cannot do: stop texts, seeds."""
        if "greedy" not in self._managers or sampling.stop or sampling.seed is not None:
            return "one"
        samples = bool(self.model.generation_config.do_sample) if sampling.temperature is None else sampling.temperature
        return "sampled" if samples else "greedy"

    def _described(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": 0, "owned_by": "local"}

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def _one_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        return JSONResponse(self._described()) if name == self.name else self._unknown(name)

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    def _unknown(self, name: Any) -> Response:
        text = one_line(wrong("model", name, f"{self.name!r}, the one that is served here"))
        return _error(404, text, code="model_not_found")


async def _content(request: Request) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # what a page of another site may send without being asked has another
        raise HTTPException(415, f"content-type: got {kind!r}, expected 'application/json'")
    content = bytearray()
    async for piece in request.stream():
        content += piece
        if len(content) > requests.MOST_BYTES:
            raise HTTPException(413, f"body: got more than {requests.MOST_BYTES >> 20} MiB")
    return bytes(content)


async def _while_connected(request: Request, work: Awaitable[Response]) -> Response:
    """What `work` gives; it is cancelled if the client leaves first."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answer, gone = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        return _left()
    finally:
        answer.cancel()
        gone.cancel()
        await asyncio.gather(answer, gone, return_exceptions=True)


def _left() -> Response:
    """The answer that nobody reads."""
    return Response(status_code=499)


async def _as_openai(pieces: Any) -> AsyncIterator[str]:
    """A stream with what clients of OpenAI look for: errors that are objects, and an end."""
    async for piece in pieces:
        before, error, text = piece.partition('data: {"error": "')
        if error:
            yield before
            fields = {"message": json.loads(f'"{text.rstrip()[:-1]}'), "type": "server_error"}
            piece = f"data: {json.dumps({'error': fields})}\n\n"
        yield piece
    yield "data: [DONE]\n\n"


def _error(status: int, message: str, kind: str = "invalid_request_error", code: str | None = None) -> Response:
    """An error as OpenAI's API has it."""
    name = message.partition(":")[0]
    parameter = name if status == 400 and name.replace("_", "").isalnum() else None
    error = {"message": message, "type": kind, "param": parameter, "code": code}
    return JSONResponse({"error": error}, status_code=status)


async def _http_error(request: Request, error: Any) -> Response:
    return _error(error.status_code, one_line(str(error.detail)))


async def _fault(request: Request, error: Exception) -> Response:
    return _error(500, one_line(error), "server_error")


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0: any that is free. ValueError where that cannot be."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise wrong("--host", host, f"an address of this machine ({one_line(error)})") from None
    try:
        return socket.create_server(address[:2], family=family, backlog=128)
    except (OSError, OverflowError) as error:
        raise wrong("--port", port, f"one that is free on {host} ({one_line(error)})") from None


def url(bound: socket.socket) -> str:
    """Where a client finds the API."""
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def is_loopback(bound: socket.socket) -> bool:
    """Whether only this machine reaches it."""
    return ipaddress.ip_address(bound.getsockname()[0].partition("%")[0]).is_loopback


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # `run` answers them


def run(
    service: Service,
    bound: socket.socket,
    access_log: bool = False,
    on_start: Callable[[Callable[[int], None]], None] | None = None,
) -> int:
    """Serve until SIGINT or SIGTERM comes, in a thread that is not the main one until `stop` is called, which
    `on_start` is given; returns the signal's number, or what `stop` was called with.

    Answers that are being made end with an error after their next token.
    """
    logging_config = copy.deepcopy(uvicorn.config.LOGGING_CONFIG)
    logging_config["handlers"]["access"]["stream"] = "ext://sys.stderr"
    config = uvicorn.Config(
        service.app,
        log_config=logging_config,
        lifespan="off",
        log_level="info" if access_log else "error",
        limit_concurrency=_MOST_REQUESTS,
        timeout_graceful_shutdown=_GRACE,
    )
    server, seen = _Server(config), list[int]()

    def stop(number: int) -> None:
        if seen:
            os._exit(128 + number)  # asked twice
        seen.append(number)
        server.should_exit = True
        service.stop()

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        awaited = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        for number in awaited:
            loop.add_signal_handler(number, stop, number)
        if on_start is not None:
            on_start(lambda number: loop.call_soon_threadsafe(stop, number))  # type: ignore[arg-type]
        try:
            await server.serve(sockets=[bound])
        finally:
            for number in awaited:
                loop.remove_signal_handler(number)

    asyncio.run(serve())
    return seen[0] if seen else 0
