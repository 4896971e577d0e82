"""Opens what shows a run beside its folder: a service, a webhook."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from gpt_jax.config import leaves
from gpt_jax.log import Log
from gpt_jax.runs.metrics import Tracker
from gpt_jax.runs.tracker_process import TrackerProcess
from gpt_jax.runs.tracker_services import NONE, TrackedRun
from gpt_jax.runs.webhook import Webhook


def settings_of(config: ConfigDict) -> dict[str, Any]:
    """The settings of a config by dotted name, as texts, numbers and bools."""
    values = leaves(json.loads(config.to_json_best_effort()))
    return {name: ", ".join(map(str, value)) if isinstance(value, list) else value for name, value in values}


@contextlib.contextmanager
def open_trackers(config: ConfigDict, workdir: Path, run_id: str, url: str, log: Log) -> Iterator[list[Tracker]]:
    """The service and the webhook of a run, while it goes on. Neither can stop it or make it wait, but at its end.

    Args:
      config: what may be shown of it.
      url: of the webhook; empty: none.
      log: is told what they fail at.
    """
    with contextlib.ExitStack() as stack:
        trackers: list[Tracker] = []
        service = config.log.tracker
        if service != NONE:
            run = TrackedRun(run_id, config.name, str(workdir.absolute()), settings_of(config))
            try:
                trackers.append(stack.enter_context(TrackerProcess(service, run, log)))
            except OSError as error:
                log(f"tracker {service}: cannot be started, the run goes on without it: {error.strerror or error}")
        if url:
            webhook = Webhook(url, {"run": run_id, "name": config.name}, log)
            stack.callback(webhook.close)
            trackers.append(webhook)
        yield trackers
