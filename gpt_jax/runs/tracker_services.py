"""Services that show a run: `--config.log.tracker=wandb|trackio|mlflow`, each by its own library.

A library lives in a process of its own (`tracker_process.py`), so that nothing it does, a crash among it, reaches the
run. Where it sends to, the library's own environment variables say; without them

    wandb     asks for a key of its service, or with WANDB_MODE=offline writes below the run's folder `tracker/`
    trackio   writes to its cache folder, which `trackio show` reads; TRACKIO_SERVER_URL, TRACKIO_SPACE_ID: elsewhere
    mlflow    needs MLFLOW_TRACKING_URI, the address of a server
"""

import html
import importlib.util
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from gpt_jax.errors import UserError

NONE = "none"
FOLDER = "tracker"  # in a run's folder: what the library prints and writes
PROJECT = "gpt_jax"  # where the library's own variable names no other
_NO_NAME = re.compile(r"[^\w\-. /:]")  # what MLflow takes in no name
_PARAMETERS_AT_ONCE = 100  # of MLflow
_MLFLOW_STATUS = {"completed": "FINISHED", "interrupted": "KILLED"}  # all else: FAILED


class TrackedRun(NamedTuple):
    """A run, as a tracker is told of it. settings: by dotted name, texts, numbers and bools alone."""

    run_id: str
    name: str
    folder: str
    settings: dict[str, Any]

    @property
    def label(self) -> str:
        return f"{self.name} {self.run_id}"


class Service(Protocol):
    """A tracker in its library's process. `now`: in unix seconds. A run that was begun there before goes on."""

    def scalars(self, step: int, values: Mapping[str, float], now: float) -> None: ...

    def text(self, step: int, name: str, text: str, now: float) -> None: ...

    def alert(self, step: int, rule: str, text: str, now: float) -> None: ...

    def finish(self, status: str) -> None:
        """Ends it. status: of run.json, or 'crashed'."""
        ...


class Wandb:
    def __init__(self, run: TrackedRun) -> None:
        import wandb  # pyrefly: ignore[missing-import]

        self._html, self._level = wandb.Html, wandb.AlertLevel.WARN
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=run.run_id,
            name=run.label,
            config=run.settings,
            dir=str(Path(run.folder) / FOLDER),
            resume="allow",
        )
        self._run.define_metric("*", step_metric="step")  # its own steps may not go back, as those of a resumed run do

    def scalars(self, step: int, values: Mapping[str, float], now: float) -> None:
        self._run.log({**values, "step": step})

    def text(self, step: int, name: str, text: str, now: float) -> None:
        self._run.log({name: self._html(f"<pre>{html.escape(text)}</pre>"), "step": step})

    def alert(self, step: int, rule: str, text: str, now: float) -> None:
        self._run.alert(title=rule, text=f"step {step:,}: {text}", level=self._level)

    def finish(self, status: str) -> None:
        self._run.finish(exit_code=0 if status == "completed" else 1)


class Trackio:
    def __init__(self, run: TrackedRun) -> None:
        import trackio  # pyrefly: ignore[missing-import]

        self._markdown = trackio.Markdown
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        self._run = trackio.init(project, name=run.label, config=run.settings, resume="allow", embed=False)

    def scalars(self, step: int, values: Mapping[str, float], now: float) -> None:
        self._run.log(dict(values), step=step)

    def text(self, step: int, name: str, text: str, now: float) -> None:
        self._run.log({name: self._markdown(text)}, step=step)

    def alert(self, step: int, rule: str, text: str, now: float) -> None:
        self._run.alert(title=rule, text=text, step=step)

    def finish(self, status: str) -> None:
        self._run.finish()


class Mlflow:
    def __init__(self, run: TrackedRun) -> None:
        for name, value in (("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2"), ("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")):
            os.environ.setdefault(name, value)  # else a server that is gone is asked for minutes
        from mlflow import MlflowClient  # pyrefly: ignore[missing-import]
        from mlflow.entities import Metric, Param  # pyrefly: ignore[missing-import]

        self._client, self._metric = MlflowClient(), Metric
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(experiment)
        where = found.experiment_id if found else self._client.create_experiment(experiment)
        known = self._client.search_runs([where], f"tags.run_id = '{run.run_id}'", max_results=1)
        its_own = known[0] if known else self._client.create_run(where, run_name=run.label, tags={"run_id": run.run_id})
        self._id, before = its_own.info.run_id, its_own.data.params
        if known:
            self._client.update_run(self._id, status="RUNNING")
        texts = {name: str(value) for name, value in run.settings.items()}
        new = [Param(name, value) for name, value in texts.items() if name not in before]
        for at in range(0, len(new), _PARAMETERS_AT_ONCE):
            self._client.log_batch(self._id, params=new[at : at + _PARAMETERS_AT_ONCE])
        for name, value in texts.items():  # a parameter cannot change there
            if before.get(name, value) != value:
                self._client.set_tag(self._id, f"changed/{name}", value)

    def scalars(self, step: int, values: Mapping[str, float], now: float) -> None:
        metrics = [self._metric(_NO_NAME.sub("_", name), value, int(1e3 * now), step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def text(self, step: int, name: str, text: str, now: float) -> None:
        group, _, rest = name.partition("/")
        called = re.sub(r"\W+", "_", rest)[:60].strip("_")
        self._client.log_text(self._id, text, f"{group}/{step:08}_{called}.txt")

    def alert(self, step: int, rule: str, text: str, now: float) -> None:
        self._client.set_tag(self._id, "alert", f"step {step:,}, {rule}: {text}")
        self.text(step, f"alert/{rule}", text, now)

    def finish(self, status: str) -> None:
        self._client.set_terminated(self._id, _MLFLOW_STATUS.get(status, "FAILED"))


SERVICES: dict[str, type] = {"wandb": Wandb, "trackio": Trackio, "mlflow": Mlflow}  # also the names of the extras


def check_service(name: str) -> None:
    """Raises UserError for a tracker that cannot run here; its library is not imported."""
    if name == NONE:
        return
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:  # the latter: a folder of that name, such as wandb makes
        raise UserError(
            f"config.log.tracker={name}: {name} is not installed: install the extra `{name}` (uv sync --extra {name})"
        )
    if name == "mlflow" and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise UserError(
            "config.log.tracker=mlflow needs the address of a server in the environment variable MLFLOW_TRACKING_URI, "
            "such as http://127.0.0.1:5000 after `mlflow server`"
        )
