"""The routes of the server; page.html beside it is the page.

GET  /                      a page to chat with the run
POST /v1/chat/completions   OpenAI's protocol, as do the next three
POST /v1/completions
GET  /v1/models, /v1/models/NAME
GET  /health                200, or 503 with the line of a device that failed
GET  /metrics               for Prometheus
GET  /openapi.json          the schema of all this
"""

import asyncio
import dataclasses
import time
import uuid
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gpt_jax.data.tokenizer import marker_ids
from gpt_jax.inference.conversation import TooLong, check_length, fit_text
from gpt_jax.inference.engine import EngineFailed, QueueFull
from gpt_jax.inference.engine import Request as Prompt
from gpt_jax.inference.sampling import SamplingOptions, choice_seed
from gpt_jax.inference.served_run import ServedRun
from gpt_jax.serving.access import KnownHosts, check_key
from gpt_jax.serving.answers import ChatFormat, Format, RequestedTexts, TextFormat, streamed_answer, whole_answer
from gpt_jax.serving.limits import DEFAULT_LIMITS, Limits, read_json
from gpt_jax.serving.observed import Observed
from gpt_jax.serving.openapi import schema
from gpt_jax.serving.prometheus import CONTENT_TYPE, ServerMetrics
from gpt_jax.serving.requests import (
    ChatRequest,
    CompletionRequest,
    RequestError,
    choices_of,
    parse,
)
from gpt_jax.serving.responses import error_body
from gpt_jax.serving.sending import EventStream, WholeAnswer, unless_client_leaves

PAGE = "page.html"
# The page needs nothing from anywhere, and may reach nothing but this server.
_PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_CLIENT_LEFT = 499  # as nginx has it: nobody reads this answer
DEFAULT_COMPLETION = 16  # tokens, as OpenAI has it


def make_app(
    run: ServedRun,
    limits: Limits = DEFAULT_LIMITS,
    *,
    name: str = "",
    api_key: str | None = None,
    origins: Sequence[str] = (),
    hosts: Sequence[str] = ("*",),
) -> Starlette:
    """The application that serves a run.

    Args:
      name: of the model; the run's, if empty.
      api_key: that requests must bring, but for the page, /health and the schema.
      origins: of web pages elsewhere that may use the server; '*': all.
      hosts: by which it may be called; another name is that of a page which has had its own name point here.
    """
    routes = Routes(run, limits, name or run.name, api_key)
    return Starlette(
        routes=[
            Route("/", routes.page),
            Route("/v1/chat/completions", routes.chat_completions, methods=["POST"]),
            Route("/v1/completions", routes.completions, methods=["POST"]),
            Route("/v1/models", routes.models),
            Route("/v1/models/{model:path}", routes.model),
            Route("/health", routes.health),
            Route("/metrics", routes.metrics_text),
            Route("/openapi.json", routes.openapi),
        ],
        middleware=[
            Middleware(KnownHosts, hosts=hosts),
            Middleware(CORSMiddleware, allow_origins=list(origins), allow_methods=["GET", "POST"], allow_headers=["*"]),
            Middleware(Observed, metrics=routes.metrics, clients=limits.clients),
        ],
        exception_handlers={
            RequestError: _answer_request_error,
            HTTPException: _answer_http_exception,
            QueueFull: _refusal(429, "queue_full", {"retry-after": "1"}),
            EngineFailed: _refusal(503, "engine_failed"),
            TooLong: _refusal(400, "context_length_exceeded"),
            Exception: _answer_mistake,
        },
    )


class Routes:
    """The handlers, and what they share."""

    def __init__(self, run: ServedRun, limits: Limits, name: str, api_key: str | None) -> None:
        self._run, self._limits, self._name, self._api_key = run, limits, name, api_key
        self._created = int(time.time())
        self._page = (resources.files("gpt_jax.serving") / PAGE).read_bytes()
        self.metrics = ServerMetrics(run.engine)

    async def page(self, request: Request) -> Response:
        headers = {"content-security-policy": _PAGE_POLICY, "x-content-type-options": "nosniff"}
        return Response(self._page, media_type="text/html", headers=headers)

    async def health(self, request: Request) -> Response:
        engine = self._run.engine
        failure = engine.failure
        counts = {"waiting": engine.waiting, "running": engine.running}
        value = {"status": failure or "ok", "model": self._name, **counts}
        return JSONResponse(value, status_code=503 if failure else 200)

    async def metrics_text(self, request: Request) -> Response:
        check_key(request, self._api_key)
        return Response(self.metrics.text(), headers={"content-type": CONTENT_TYPE})

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(schema(self._name, with_key=self._api_key is not None))

    async def models(self, request: Request) -> Response:
        check_key(request, self._api_key)
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        check_key(request, self._api_key)
        self._check_model(request.path_params["model"])
        return JSONResponse(self._model())

    async def chat_completions(self, request: Request) -> Response:
        check_key(request, self._api_key)
        asked: ChatRequest = parse(ChatRequest, await read_json(request, self._limits))
        self._check_model(asked.model)
        choices, (system, turns) = choices_of(asked), asked.conversation()
        run = self._run
        default = run.block_size if asked.asked_tokens is None else asked.asked_tokens
        options = asked.options(run.defaults, default, choices.logprobs or 0)
        # In a thread: a long text takes a while to encode.
        first, fitted = await asyncio.to_thread(run.request, turns, system, options)
        if fitted.left_out:
            self.metrics.left_out.inc(fitted.left_out)
        return await self._answer(
            request,
            asked,
            [(first.tokens, choice) for choice in range(choices.count)],
            options,
            ChatFormat(self._run.vocabulary, choices.logprobs),
            {"id": f"chatcmpl-{uuid.uuid4().hex}", **self._head(), "left_out": fitted.left_out},
            prompt_tokens=len(first.tokens),
        )

    async def completions(self, request: Request) -> Response:
        check_key(request, self._api_key)
        asked: CompletionRequest = parse(CompletionRequest, await read_json(request, self._limits))
        self._check_model(asked.model)
        choices = choices_of(asked)
        options = asked.options(self._run.defaults, asked.max_tokens or DEFAULT_COMPLETION, choices.logprobs or 0)
        prompts = [await asyncio.to_thread(self._prompt, prompt) for prompt in asked.prompts()]
        return await self._answer(
            request,
            asked,
            [(prompt, choice) for prompt in prompts for choice in range(choices.count)],
            options,
            TextFormat(self._run.vocabulary, choices.logprobs),
            {"id": f"cmpl-{uuid.uuid4().hex}", **self._head()},
            prompt_tokens=sum(map(len, prompts)),
        )

    async def _answer(
        self,
        request: Request,
        asked: ChatRequest | CompletionRequest,
        prompts: Sequence[tuple[Sequence[int], int]],
        options: SamplingOptions,
        form: Format,
        head: dict[str, Any],
        prompt_tokens: int,
    ) -> Response:
        """Answers prompts, each with the number of the choice that it is for."""
        most = self._run.engine.capacity
        if len(prompts) > most:
            raise RequestError(
                f"{len(prompts)} texts are asked for at once, and this server takes {most}: ask for fewer"
            )
        ends = marker_ids(self._run.tokenizer)
        seed = options.seed or 0
        texts = RequestedTexts(
            self._run.engine,
            [
                Prompt(tokens, dataclasses.replace(options, seed=choice_seed(seed, choice)), ends)
                for tokens, choice in prompts
            ],
            self._limits.seconds,
            self.metrics,
        )
        self.metrics.tokens.labels("prompt").inc(prompt_tokens)
        if asked.stream:
            with_usage = asked.includes_usage
            events = streamed_answer(texts, form, head, prompt_tokens, with_usage=with_usage)
            return EventStream(events, self._limits.seconds, at_end=texts.cancel)
        try:
            answer = await unless_client_leaves(whole_answer(texts, form, head, prompt_tokens), request.receive)
        finally:
            texts.cancel()
        return Response(status_code=_CLIENT_LEFT) if answer is None else WholeAnswer(answer, texts.deadline)

    def _prompt(self, prompt: str | list[int]) -> list[int]:
        """The ids of a prompt of /v1/completions."""
        if isinstance(prompt, str):
            return fit_text(self._run.tokenizer, prompt, block_size=self._run.block_size)
        known = len(self._run.vocabulary)
        if max(prompt) >= known:
            message = f"prompt: token {max(prompt)} is none of the {known} that the model knows"
            raise RequestError(message, "prompt")
        check_length(prompt, self._run.block_size)
        return prompt

    def _head(self) -> dict[str, Any]:
        return {"created": int(time.time()), "model": self._name}

    def _model(self) -> dict[str, Any]:
        """The model, as OpenAI's clients read it, and what the page begins with."""
        defaults = {name: value for name, value in vars(self._run.defaults).items() if name not in ("seed", "logprobs")}
        return {
            "id": self._name,
            "object": "model",
            "created": self._created,
            "owned_by": "gpt_jax",
            "description": self._run.description,
            "block_size": self._run.block_size,
            "defaults": defaults,
        }

    def _check_model(self, model: str | None) -> None:
        if model not in (None, self._name):
            message = f"there is no model {model!r} here, only {self._name!r}"
            raise RequestError(message, "model", "model_not_found", status=404)


async def _answer_request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    body = error_body(str(error), error.status, error.param, error.code)
    return JSONResponse(body, status_code=error.status, headers=_WITH_STATUS.get(error.status))


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    """A path or a method that there is not."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail.lower()}"
    return JSONResponse(error_body(message, error.status_code), status_code=error.status_code, headers=error.headers)


async def _answer_mistake(request: Request, error: Exception) -> Response:
    """A mistake of ours, whose traceback goes to the log and not to the client."""
    return JSONResponse(error_body("internal error; the server's log has more", 500), status_code=500)


def _refusal(status: int, code: str, headers: dict[str, str] | None = None) -> Callable[[Request, Exception], Any]:
    """A handler that answers an exception with a status and its message."""

    async def handler(request: Request, error: Exception) -> Response:
        return JSONResponse(error_body(str(error), status, code=code), status_code=status, headers=headers)

    return handler


# A body that was not read to its end cannot be followed by another request.
_WITH_STATUS = {401: {"www-authenticate": "Bearer"}, 408: {"connection": "close"}, 413: {"connection": "close"}}
