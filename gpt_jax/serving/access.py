"""Who may come to the server: the API key, and the names that it is called by."""

import hmac
from collections.abc import Collection
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse

from gpt_jax.serving.requests import RequestError
from gpt_jax.serving.responses import error_body


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
