"""How much of the server one client may take: bytes, seconds, open requests; and a body read within that."""

import asyncio
import json
from typing import Any, NamedTuple

from starlette.requests import ClientDisconnect, Request

from gpt_jax.serving.requests import RequestError


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
