"""One HTTP request's texts on their way through the engine, and how they are told: in one piece, or as a stream."""

import asyncio
import contextlib
import functools
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

from gpt_jax.inference.engine import DrawnToken, Engine, Event, Request
from gpt_jax.serving import responses
from gpt_jax.serving.prometheus import ServerMetrics
from gpt_jax.serving.requests import RequestError
from gpt_jax.serving.responses import Bytes

DONE = "data: [DONE]\n\n"


class RequestedTexts:
    """The texts of one request. Iterate over their events; leaving the context cancels those that have not ended.

    Raises:
      QueueFull, EngineFailed: as `Engine.submit`; then none of them is on its way.
    """

    def __init__(self, engine: Engine, requests: Sequence[Request], seconds: float, metrics: ServerMetrics) -> None:
        loop = asyncio.get_running_loop()
        self.requests = requests
        self._metrics, self._begun = metrics, loop.time()
        self._has_begun = False
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self.deadline, self._seconds = loop.time() + seconds, seconds
        self._generations = []
        try:
            for index, request in enumerate(requests):
                deliver = functools.partial(self._deliver, loop, index)
                self._generations.append(engine.submit(request, deliver))
        except BaseException:
            self.cancel()
            raise

    def _deliver(self, loop: asyncio.AbstractEventLoop, index: int, event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads any more
            loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

    def cancel(self) -> None:
        for generation in self._generations:
            generation.cancel()

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """(which text, its event) as they come, until all have ended.

        Raises:
          RequestError: a text failed, or the time that a request may take is over.
        """
        left = len(self.requests)
        while left:
            try:
                async with asyncio.timeout_at(self.deadline):
                    index, event = await self._events.get()
            except TimeoutError:
                raise RequestError(f"not answered within {self._seconds:g} s", code="timeout", status=504) from None
            if event.error is not None:
                raise RequestError(event.error, code="engine_failed", status=503)
            left -= event.is_last
            self._count(event)
            yield index, event

    def _count(self, event: Event) -> None:
        if event.tokens and not self._has_begun:
            self._has_begun = True
            self._metrics.first_token.observe(asyncio.get_running_loop().time() - self._begun)
        self._metrics.tokens.labels("completion").inc(len(event.tokens))


class Format(Protocol):
    """Shape of answers in one of the protocols. choice: of an answer in one piece. delta: of a chunk of a stream."""

    kind: str  # 'object' of an answer
    chunk_kind: str  # 'object' of a chunk

    def opening(self, index: int) -> dict[str, Any] | None:
        """The first chunk's choice, if there is one before any text."""

    def delta(self, index: int, event: Event) -> dict[str, Any]: ...

    def choice(self, index: int, text: str, drawn: Sequence[DrawnToken], reason: str) -> Any: ...


class ChatFormat:
    """/v1/chat/completions. logprobs: whether they are told."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def __init__(self, vocabulary: Bytes, logprobs: int | None) -> None:
        self._vocabulary, self._told = vocabulary, logprobs is not None

    def _logprobs(self, drawn: Sequence[DrawnToken]) -> responses.ChatLogprobs | None:
        return responses.chat_logprobs(drawn, self._vocabulary) if self._told else None

    def opening(self, index: int) -> dict[str, Any] | None:
        return responses.delta_choice(index, {"role": "assistant", "content": ""}, None, None)

    def delta(self, index: int, event: Event) -> dict[str, Any]:
        delta = {"content": event.text} if event.text or event.tokens else {}
        logprobs = self._logprobs(event.tokens) if event.tokens else None
        return responses.delta_choice(index, delta, logprobs, event.reason)

    def choice(self, index: int, text: str, drawn: Sequence[DrawnToken], reason: str) -> responses.ChatChoice:
        return responses.chat_choice(index, text, self._logprobs(drawn), reason)


class TextFormat:
    """/v1/completions. logprobs: how many alternatives are told; None: no log-probability at all."""

    kind = chunk_kind = "text_completion"

    def __init__(self, vocabulary: Bytes, logprobs: int | None) -> None:
        self._vocabulary, self._asked = vocabulary, logprobs
        self._offsets: dict[int, int] = {}

    def opening(self, index: int) -> dict[str, Any] | None:
        return None

    def delta(self, index: int, event: Event) -> dict[str, Any]:
        offset = self._offsets.get(index, 0)
        self._offsets[index] = offset + len(event.text)
        return {**responses.text_choice(index, event.text, self._logprobs(event.tokens, offset), event.reason)}

    def choice(self, index: int, text: str, drawn: Sequence[DrawnToken], reason: str) -> responses.TextChoice:
        return responses.text_choice(index, text, self._logprobs(drawn, 0), reason)

    def _logprobs(self, drawn: Sequence[DrawnToken], offset: int) -> responses.TextLogprobs | None:
        if self._asked is None:
            return None
        return responses.text_logprobs(drawn, self._vocabulary, offset, self._asked)


async def whole_answer(texts: RequestedTexts, form: Format, head: dict[str, Any], prompt_tokens: int) -> dict[str, Any]:
    """The answer in one piece; head: the fields that say which answer it is."""
    text = [""] * len(texts.requests)
    drawn: list[list[DrawnToken]] = [[] for _ in text]
    reasons = [""] * len(text)
    async for index, event in texts.events():
        text[index] += event.text
        drawn[index] += event.tokens
        reasons[index] = event.reason or ""
    choices = [form.choice(index, text[index], drawn[index], reasons[index]) for index in range(len(text))]
    counts = responses.usage(prompt_tokens, sum(map(len, drawn)))
    return {"object": form.kind, **head, "choices": choices, "usage": counts}


async def streamed_answer(
    texts: RequestedTexts, form: Format, head: dict[str, Any], prompt_tokens: int, *, with_usage: bool
) -> AsyncIterator[str]:
    """The same as server-sent events. A failure on the way is an error in `data`, which OpenAI's clients raise."""
    base = {"object": form.chunk_kind, **head} | ({"usage": None} if with_usage else {})
    count = 0
    try:
        for index in range(len(texts.requests)):
            if opening := form.opening(index):
                yield _data({**base, "choices": [opening]})
        async for index, event in texts.events():
            count += len(event.tokens)
            if event.text or event.tokens or event.reason:
                yield _data({**base, "choices": [form.delta(index, event)]})
    except RequestError as error:
        yield _data(responses.error_body(str(error), error.status, error.param, error.code))
        return
    if with_usage:
        yield _data({**base, "choices": [], "usage": responses.usage(prompt_tokens, count)})
    yield DONE


def _data(value: Any) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"
