"""How much of the server one client may take: bytes, seconds, open requests; and who may come at all."""

import asyncio
import contextlib
import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from gpt_jax.serving.requests import RequestError
from gpt_jax.serving.responses import error_body


class Limits(NamedTuple):
    """body: bytes of a request. body_seconds: until it must have come. seconds: until a request must be answered, and
    its answer read. clients: requests that may be open at a time."""

    body: int = 2**20
    body_seconds: float = 30.0
    seconds: float = 600.0
    clients: int = 1000


DEFAULT_LIMITS = Limits()
# Times the limit that a body may go on, read and dropped: where bytes are unread when a connection is closed, the
# answer that says why may be lost.
_DROPPED = 16
_PART = 2**16  # bytes of an answer that are sent at a time


async def read_json(request: Request, limits: Limits) -> Any:
    """The decoded body.

    Raises:
      RequestError: it is too large, comes too slowly, or is no JSON.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a page of another origin may send other types without asking first
        found = repr(kind) if kind else "none"
        raise RequestError(f"content-type must be application/json, found {found}", code="content_type", status=415)
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for piece in request.stream():
                size += len(piece)
                if size <= limits.body:
                    body += piece
                elif size > _DROPPED * limits.body:
                    break
    except TimeoutError:
        if size <= limits.body:
            message = f"the body did not come within {limits.body_seconds:g} s"
            raise RequestError(message, code="timeout", status=408) from None
    except ClientDisconnect:
        raise RequestError("the client left", status=400) from None
    if size > limits.body:
        raise RequestError(f"the body is longer than {limits.body:,} bytes", code="too_large", status=413)
    try:
        return json.loads(body, parse_constant=_refuse_constant)
    except RecursionError:
        raise RequestError("the body is nested too deeply") from None
    except ValueError as error:  # JSON's, UTF-8's, or that of a number of too many digits
        raise RequestError(f"the body is no JSON: {error}") from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def check_key(request: Request, key: str | None) -> None:
    """Raises RequestError if a key is asked for, and the request has another one or none."""
    if key is None:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    # A header's characters stand for its bytes.
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("latin-1"), key.encode()):
        message = "the API key is wrong or missing: send the header 'Authorization: Bearer KEY'"
        raise RequestError(message, code="invalid_api_key", status=401)


class KnownHosts:
    """Middleware that refuses requests to another name than one of `hosts`, without a port; '*': none is refused."""

    def __init__(self, app: Any, hosts: Collection[str]) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        name = host_name(Headers(scope=scope).get("host", "")) if scope["type"] == "http" else ""
        if scope["type"] != "http" or "*" in self._hosts or name in self._hosts:
            await self._app(scope, receive, send)
            return
        message = f"this server is not called {name!r}, but {' or '.join(self._hosts)}"
        await JSONResponse(error_body(message, 400, code="unknown_host"), status_code=400)(scope, receive, send)


def host_name(header: str) -> str:
    """The name in a Host header: without a port, and without the brackets of an IPv6 address; empty if it has none."""
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:  # half a pair of brackets
        return ""


async def unless_client_leaves(work: Awaitable[Any], receive: Callable[[], Awaitable[Any]]) -> Any:
    """The result of `work`, which is cancelled when the client goes; None then."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class WholeAnswer(JSONResponse):
    """An answer in one piece, given up at a time of the loop's clock if it has not been read by then.

    It is sent in parts, each when the one before is on its way: what a client does not read is kept no longer than it.
    """

    def __init__(self, content: Any, until: float) -> None:
        self._until = until
        super().__init__(content)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = bytes(self.body)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(self._until):
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                for start in range(0, len(body), _PART):
                    part = body[start : start + _PART]
                    await send({"type": "http.response.body", "body": part, "more_body": start + _PART < len(body)})


class EventStream(Response):
    """Server-sent events, until they end, the client goes, or the time is over that it may take to read them.

    at_end: called in any case, whether an event was sent or not.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], seconds: float, at_end: Callable[[], None]) -> None:
        self._events, self._seconds, self._at_end = events, seconds, at_end
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        # A client that reads too slowly holds `send` up, and this task alone.
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._seconds):
                    await unless_client_leaves(self._send(send), receive)
        finally:
            self._at_end()

    async def _send(self, send: Any) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with contextlib.aclosing(self._events) as events:
            async for event in events:
                await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
