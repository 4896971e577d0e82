"""A server over a decoder without a model, in a thread of the test's process."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import httpx
import uvicorn
from fake_decoder import FakeDecoder
from stub_run import stub_run
from waiting import PATIENCE, wait_for

from gpt_jax.inference.engine import Engine
from gpt_jax.serving.app import make_app
from gpt_jax.serving.limits import DEFAULT_LIMITS, Limits


class Stub(NamedTuple):
    """A server that runs: its address, its engine and the decoder in it."""

    url: str
    client: httpx.Client
    engine: Engine
    decoder: FakeDecoder


@contextlib.contextmanager
def serve(
    say: Callable[[str, Any], str],
    limits: Limits = DEFAULT_LIMITS,
    *,
    app: dict[str, Any] | None = None,
    **options: Any,
) -> Iterator[Stub]:
    """A server that answers what `say` makes of a prompt."""
    with stub_run(say, **options) as (run, decoder), socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(make_app(run, limits, **app or {}), log_level="critical", lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            with httpx.Client(base_url=url, timeout=PATIENCE) as client:
                wait_for(lambda: server.started)
                yield Stub(url, client, run.engine, decoder)
        finally:
            server.should_exit = True
            thread.join()
