"""Middleware that counts and times requests, and refuses those beyond the number that may be open."""

import time
from typing import Any

from starlette.responses import JSONResponse

from gpt_jax.serving.prometheus import ServerMetrics
from gpt_jax.serving.responses import error_body

_UNKNOWN = "other"  # paths that there are none of are counted together, or clients could make labels without end


class Observed:
    """Counts the requests of an application; clients: how many of those that are answered by the model may be open."""

    def __init__(self, app: Any, metrics: ServerMetrics, clients: int) -> None:
        self._app, self._metrics, self._clients = app, metrics, clients
        self._open = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status = time.monotonic(), 500

        async def observe(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._open += 1
        self._metrics.open.inc()
        try:
            if self._open > self._clients and scope["method"] == "POST":
                message = f"{self._clients} requests are open already, which is the limit: try again later"
                body = error_body(message, 429, code="too_many_requests")
                await JSONResponse(body, status_code=429, headers={"retry-after": "1"})(scope, receive, observe)
            else:
                await self._app(scope, receive, observe)
        finally:
            self._open -= 1
            self._metrics.open.dec()
            route = scope.get("route")
            path = route.path if route is not None else _UNKNOWN
            self._metrics.requests.labels(path, str(status)).inc()
            self._metrics.seconds.labels(path).observe(time.monotonic() - begun)
