"""The Ingress replica: the OpenAI API in front of the engine.

Owns HTTP: keys, parsing, tokenising, error shapes and server-sent events. Holds no weights and imports no torch. The
engine is whatever has `stream` and `complete`: a Ray Serve handle in production (`serve.deployment`).
"""

import asyncio
import hmac
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Coroutine
from typing import Protocol, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from serve.api.answers import AnswerWriter
from serve.api.completions import Choice, Completion, CompletionRequest, ModelCard, ModelList, Usage, parse_request
from serve.api.errors import error_body, error_headers
from serve.engine.detokenizer import Vocabulary
from serve.engine.messages import Delta, EngineRequest
from serve.engine.sequence import SamplingParams
from serve.errors import (
    AuthenticationError,
    EngineFailedError,
    InvalidRequestError,
    ModelNotFoundError,
    PayloadTooLargeError,
    PromptTooLongError,
    RouteError,
    ServeError,
)
from serve.model_folder import ModelFolder
from serve.preflight import key_digest

__all__ = ["MAX_BODY_BYTES", "EnginePort", "build_app"]

_LOG = logging.getLogger(__name__)
MAX_BODY_BYTES = 8 * 2**20
_DEFAULT_MAX_TOKENS = 16
_ResultT = TypeVar("_ResultT")


class EnginePort(Protocol):
    """The engine, as the ingress sees it."""

    def stream(self, request: EngineRequest) -> AsyncGenerator[list[Delta]]:
        """Deltas of a request; raises ServeError; closing it aborts the request."""
        ...

    async def complete(self, request: EngineRequest) -> list[Delta]:
        """All deltas of a request; raises ServeError; cancelling aborts the request."""
        ...

    async def ready(self) -> None:
        """Returns when a replica answers; raises ServeError."""
        ...


def build_app(
    engine: EnginePort, folder: ModelFolder, model_name: str, fingerprint: str, key: bytes | None
) -> Starlette:
    """The ASGI application.

    Args:
        engine: computes.
        folder: tokenizer and limits of the model that the engine serves.
        model_name: the `model` clients ask for.
        fingerprint: `system_fingerprint` of every answer.
        key: digest of the bearer key, or None where no key is asked for.
    """
    api = _Api(engine, folder, model_name, fingerprint, key)
    return Starlette(
        routes=[
            Route("/v1/completions", api.completions, methods=["POST"]),
            Route("/v1/models", api.models, methods=["GET"]),
            Route("/v1/models/{model:path}", api.model, methods=["GET"]),
            Route("/healthz", api.healthz, methods=["GET"]),
            Route("/readyz", api.readyz, methods=["GET"]),
        ],
        exception_handlers={
            ServeError: _on_serve_error,
            HTTPException: _on_http_error,
            ClientDisconnect: _on_disconnect,
            Exception: _on_crash,
        },
    )


class _Api:
    def __init__(
        self, engine: EnginePort, folder: ModelFolder, model_name: str, fingerprint: str, key: bytes | None
    ) -> None:
        self._engine = engine
        self._folder = folder
        self._vocabulary = Vocabulary(folder.tokenizer)
        self._model_name = model_name
        self._fingerprint = fingerprint
        self._key = key
        self._created = int(time.time())

    async def healthz(self, request: Request) -> Response:
        """The process answers."""
        return JSONResponse({"status": "ok"})

    async def readyz(self, request: Request) -> Response:
        """An engine replica answers."""
        await self._engine.ready()
        return JSONResponse({"status": "ready"})

    async def models(self, request: Request) -> Response:
        """`GET /v1/models`."""
        self._authenticate(request)
        return _json(ModelList(data=[self._card()]))

    async def model(self, request: Request) -> Response:
        """`GET /v1/models/NAME`."""
        self._authenticate(request)
        self._know(request.path_params["model"])
        return _json(self._card())

    async def completions(self, request: Request) -> Response:
        """`POST /v1/completions`."""
        self._authenticate(request)
        asked = parse_request(await _read_body(request))
        self._know(asked.model)
        prompts = [self._encode(prompt) for prompt in asked.prompts]
        params = self._params(asked, prompts)
        writer = AnswerWriter(asked, prompts, self._vocabulary)
        order = EngineRequest(
            f"cmpl-{uuid.uuid4().hex}", tuple(tuple(ids) for ids in prompts), asked.num_completions, params
        )
        if not asked.stream:
            choices = writer.whole(await _while_connected(request, self._engine.complete(order)))
            return _json(self._answer(order, choices, writer.usage()))
        pieces = self._engine.stream(order)
        # the first piece comes before the headers, so that a refusal has its status
        try:
            first = await _while_connected(request, _next(pieces))
        except BaseException:
            await pieces.aclose()
            raise
        return StreamingResponse(
            self._events(order, writer, first, pieces),
            media_type="text/event-stream",
            headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
        )

    async def _events(
        self, order: EngineRequest, writer: AnswerWriter, first: list[Delta] | None, rest: AsyncGenerator[list[Delta]]
    ) -> AsyncGenerator[bytes]:
        """Server-sent events; a failure after the first is an event of its own, and then no [DONE] follows."""
        try:
            deltas = first
            while deltas is not None:
                events = [
                    _event(self._answer(order, [choice], None).model_dump_json(exclude={"usage"}))
                    for choice in writer.chunks(deltas)
                ]
                if events:
                    yield b"".join(events)
                deltas = await _next(rest)
            options = writer.request.stream_options
            if options is not None and options.include_usage:
                yield _event(self._answer(order, [], writer.usage()).model_dump_json())
            yield _event("[DONE]")
        except ServeError as error:
            _LOG.warning("request %s failed after its first token: %s", order.request_id, error)
            yield _event(error_body(error).model_dump_json())
        finally:
            await rest.aclose()

    def _answer(self, order: EngineRequest, choices: list[Choice], usage: Usage | None) -> Completion:
        return Completion(
            id=order.request_id,
            created=int(time.time()),
            model=self._model_name,
            system_fingerprint=self._fingerprint,
            choices=choices,
            usage=usage,
        )

    def _card(self) -> ModelCard:
        return ModelCard(
            id=self._model_name,
            created=self._created,
            max_model_len=self._folder.max_positions,
            system_fingerprint=self._fingerprint,
        )

    def _authenticate(self, request: Request) -> None:
        if self._key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(key_digest(given.strip()), self._key):
            raise AuthenticationError(
                "the bearer key is missing or wrong. Send the header `Authorization: Bearer KEY`."
            )

    def _know(self, model: str) -> None:
        if model != self._model_name:
            raise ModelNotFoundError(f"model={model!r} is not served here; {self._model_name!r} is.", "model")

    def _encode(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str) and len(prompt) > self._folder.max_positions * self._folder.longest_token:
            # known without encoding, which would keep other requests waiting
            raise PromptTooLongError(
                f"the prompt's {len(prompt)} characters are more than {self._folder.max_positions} tokens can hold. "
                "Shorten the prompt.",
                "prompt",
            )
        ids = self._folder.encode(prompt) if isinstance(prompt, str) else prompt
        if not ids:
            raise InvalidRequestError("the prompt has no tokens. Send some text.", "prompt")
        if max(ids) >= self._folder.vocab_size:
            raise InvalidRequestError(
                f"the prompt holds the token id {max(ids)}; the vocabulary ends at {self._folder.vocab_size - 1}.",
                "prompt",
            )
        return ids

    def _params(self, asked: CompletionRequest, prompts: list[list[int]]) -> SamplingParams:
        """Settings for the engine; where max_tokens is not asked for, the context may shorten it."""
        longest = max(len(ids) for ids in prompts)
        limit = self._folder.max_positions
        explicit = asked.max_tokens is not None and "max_tokens" in asked.model_fields_set
        wanted = asked.max_tokens if explicit and asked.max_tokens is not None else _DEFAULT_MAX_TOKENS
        if longest + (wanted if explicit else 1) > limit:
            raise PromptTooLongError(
                f"the prompt has {longest} tokens and max_tokens={wanted}; prompt and completion together may have "
                f"{limit}. Shorten the prompt or lower max_tokens.",
                "prompt" if longest >= limit else "max_tokens",
            )
        params = asked.sampling(min(wanted, limit - longest))
        for token, _ in params.logit_bias:
            if token >= self._folder.vocab_size:
                raise InvalidRequestError(
                    f"logit_bias names the token id {token}; the vocabulary ends at {self._folder.vocab_size - 1}.",
                    "logit_bias",
                )
        return params


async def _next(pieces: AsyncGenerator[list[Delta]]) -> list[Delta] | None:
    """The next piece, or None after the last."""
    return await anext(pieces, None)


async def _while_connected(request: Request, work: Coroutine[None, None, _ResultT]) -> _ResultT:
    """Await `work`; a client that hangs up cancels it."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    """Returns when the client hangs up; the body has been read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _read_body(request: Request) -> bytes:
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BODY_BYTES:
            raise PayloadTooLargeError(
                f"the body is larger than {MAX_BODY_BYTES} bytes. Send fewer or shorter prompts."
            )
    return bytes(body)


def _json(model: Completion | ModelCard | ModelList) -> Response:
    return Response(model.model_dump_json(), media_type="application/json")


def _event(data: str) -> bytes:
    return b"data: " + data.encode() + b"\n\n"


def _error_response(error: ServeError) -> Response:
    return Response(
        error_body(error).model_dump_json(),
        status_code=error.status,
        media_type="application/json",
        headers=error_headers(error),
    )


async def _on_serve_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServeError), "registered for ServeError"
    return _error_response(error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), "registered for HTTPException"
    return _error_response(
        RouteError(f"{request.method} {request.url.path}: {error.detail}. See GET /v1/models.", error.status_code)
    )


async def _on_disconnect(request: Request, error: Exception) -> Response:
    """Nobody reads this; 499 is the usual status for it in logs."""
    return Response(status_code=499)


async def _on_crash(request: Request, error: Exception) -> Response:
    _LOG.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return _error_response(EngineFailedError("the server failed. See the log of the ingress replica."))
