"""Answers on their way to a client, who may read slowly or leave: in one piece, or as server-sent events."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.responses import JSONResponse, Response

_PART = 2**16  # bytes of an answer that are sent at a time


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
