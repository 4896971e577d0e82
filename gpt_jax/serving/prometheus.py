"""Counters for Prometheus, of one server.

By prometheus-client: escaping, histograms and the format's versions are its business, and it needs nothing else.
"""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from gpt_jax.inference.engine import Engine

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class ServerMetrics:
    """Counts what one server does."""

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        here = {"registry": self._registry, "namespace": "gpt_jax"}
        labels = ("path", "status")
        self.requests = Counter("http_requests", "requests answered", labels, **here)
        self.seconds = Histogram("http_request_seconds", "until the last byte", ("path",), buckets=_SECONDS, **here)
        self.open = Gauge("http_requests_open", "requests being answered", **here)
        self.tokens = Counter("tokens", "tokens read and drawn", ("kind",), **here)
        self.first_token = Histogram("first_token_seconds", "until the first token", buckets=_SECONDS, **here)
        self.left_out = Counter("messages_left_out", "messages that the model did not see", **here)
        self._gauge("engine_waiting", "texts that wait for a slot", lambda: engine.waiting)
        self._gauge("engine_running", "texts in a slot", lambda: engine.running)
        self._gauge("engine_failed", "1 when the device has failed", lambda: int(engine.failure is not None))

    def _gauge(self, name: str, meaning: str, value: Callable[[], float]) -> None:
        Gauge(name, meaning, registry=self._registry, namespace="gpt_jax").set_function(value)

    def text(self) -> bytes:
        """All of them in Prometheus's text format."""
        return generate_latest(self._registry)
