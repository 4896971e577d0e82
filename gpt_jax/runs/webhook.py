"""Alerts posted to a URL as JSON: `--config.log.webhook=URL`, or `$NAME` of an environment variable that holds it.

Such a URL is often a secret. It is neither printed nor saved: `public_url` is what the run's files show in its place.
"""

import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from gpt_jax.errors import UserError
from gpt_jax.log import Log
from gpt_jax.runs.outbox import Outbox

SETTING = "log.webhook"
TIMEOUT = 10.0  # seconds for one alert
PATIENCE = 5.0  # seconds at the end of a run
_NAME = re.compile(r"\$(?:(\w+)|\{(\w+)\})")
_HIDDEN = "/..."
_WANTED = "must be a URL of http or https, or $NAME of an environment variable that holds one"


class Webhook:
    """Posts alerts; a tracker that takes nothing else. See `metrics.Tracker`.

    The body is {"text": a line, "run", "name", "step", "rule", "message"}; "text" is what Slack and Mattermost show.
    """

    def __init__(self, url: str, facts: Mapping[str, Any], log: Log) -> None:
        """facts: more to post with each alert: the run's id and name."""
        self._url, self._facts = url, dict(facts)
        self._outbox: Outbox[dict[str, Any]] = Outbox("config.log.webhook", self._post, log, size=100)

    def scalars(self, step: int, values: Mapping[str, float], now: float) -> None:
        pass

    def text(self, step: int, name: str, text: str, now: float) -> None:
        pass

    def alert(self, step: int, rule: str, text: str, now: float) -> None:
        line = f"{self._facts.get('name', 'a run')}: alert at step {step:,}, {rule}: {text}"
        self._outbox.put({"text": line, **self._facts, "step": step, "rule": rule, "message": text})

    def close(self) -> None:
        """Waits a little for alerts that are on their way."""
        if not self._outbox.close(PATIENCE):
            self._outbox.note("did not answer in time: the last alerts were not posted")
            self._outbox.close(0)

    def _post(self, body: dict[str, Any]) -> None:
        try:
            data, headers = json.dumps(body).encode(), {"content-type": "application/json"}
            request = urllib.request.Request(self._url, data, headers)
            with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                answer.read(1)
        except urllib.error.HTTPError as error:
            raise OSError(f"answered with {error.code}") from None
        except Exception as error:  # whose message may hold the URL
            reason = getattr(error, "reason", error)
            cause = getattr(reason, "strerror", None) or type(reason).__name__
            raise OSError(cause) from None


def resolve(value: str) -> str:
    """The URL that the setting `log.webhook` means; empty: alerts are posted nowhere.

    Raises:
      UserError: it is none, or the variable is not set. The value is not shown.
    """
    if not value or is_hidden(value):
        return ""
    if named := _NAME.fullmatch(value):
        url = os.environ.get(named[1] or named[2], "")
        if not _is_url(url):
            found = "is no URL of http or https" if url else "is not set"
            raise UserError(f"config.{SETTING} is {value}, and that environment variable {found}")
        return url
    if not _is_url(value):
        raise UserError(f"config.{SETTING} {_WANTED}; what was found is not shown, since it may be a secret")
    return value


def public_url(value: str) -> str:
    """Hides what may be a secret in the setting `log.webhook`: of a URL all but its host."""
    if not value or _NAME.fullmatch(value) or is_hidden(value):
        return value
    if not _is_url(value):
        return "..."
    parts = urlsplit(value)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{_HIDDEN}"


def is_hidden(value: str) -> bool:
    """Whether a URL is one of which a run saved the host alone."""
    return value.endswith(_HIDDEN)


def _is_url(value: str) -> bool:
    try:
        parts = urlsplit(value)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        return False
