"""Reads what a run folder says of the run's past, before anything in it is changed."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from gpt_jax.errors import UserError
from gpt_jax.log import Log
from gpt_jax.runs.info import INFO_FILE, read_config, read_info, read_json
from gpt_jax.runs.metrics import METRICS_FILE, SAMPLES_FILE, read_lines
from gpt_jax.storage.checkpoint_files import CHECKPOINTS, read_losses, saved_steps
from gpt_jax.training.early_stopping import Evaluation, why_stop

STOPPED_EARLY = "stopped_early"  # field of run.json: why a run ended before its last step, if it did
LAST_CHECKPOINT = "last_checkpoint"  # field of run.json: step of the newest checkpoint that was committed, or None


def check_history(workdir: Path, log: Log) -> None:
    """Tells a folder whose checkpoints are gone from one that never had any.

    Starting afresh drops all lines of metrics and samples: of a run that was killed before its first checkpoint
    nothing is lost, its steps are made again.

    Raises:
      UserError: there were checkpoints, and there are none; or an older version, which did not note whether there
        were, was killed before the first one.
    """
    checkpoints = workdir / CHECKPOINTS
    if saved_steps(checkpoints):
        return
    info = read_json(workdir / INFO_FILE)
    saved = info.get(LAST_CHECKPOINT)
    last = max((record["step"] for record in read_lines(workdir / METRICS_FILE)), default=0)
    if not last and not saved:
        return
    if checkpoints.is_dir() and saved is None and LAST_CHECKPOINT in info:
        log(f"{workdir} stopped at step {last}, before its first checkpoint: it starts again from step 0")
        return
    first = _first_due(read_config(workdir))
    killed = info.get("status") in ("running", "failed")  # what stops or ends in order saves
    if checkpoints.is_dir() and LAST_CHECKPOINT not in info and killed and first is not None and last < first:
        raise UserError(
            f"the run in {workdir} stopped at step {last}, before its first checkpoint, which was due at step {first}: "
            "there is nothing to go on from, so start anew in another --workdir; nothing was changed"
        )
    if checkpoints.is_symlink() and not checkpoints.exists():
        found = f"{checkpoints} is a link to {checkpoints.readlink()}, which is not there (is its disk mounted?)"
    else:
        found = f"{checkpoints} {'holds no checkpoint' if checkpoints.is_dir() else 'is not there'}"
    raise UserError(
        f"the run in {workdir} came to step {max(last, saved or 0)}, but {found}: put it back to go on, "
        "or start anew in another --workdir; nothing was changed"
    )


def why_complete(config: ConfigDict, workdir: Path) -> str | None:
    """Why nothing is left to do in a folder, and what would go on with it; None for a run that is not complete."""
    info, checkpoints = read_info(workdir), workdir / CHECKPOINTS
    step = info.get(LAST_CHECKPOINT)
    if info.get("status") != "completed" or not saved_steps(checkpoints) or step not in read_losses(checkpoints):
        return None
    if step >= config.num_steps:
        return f"the run in {workdir} is complete, at step {step}: a larger --config.num_steps=N goes on with it"
    reason = why_stop(read_recorded(workdir, step).evaluations, config.eval.patience)
    if info.get(STOPPED_EARLY) and reason:
        more = f"a larger --config.eval.patience=N, or 0, goes on with it, to step {config.num_steps}"
        return f"the run in {workdir} stopped early, at step {step}: {reason}; {more}"
    return None


def _first_due(config: dict[str, Any]) -> int | None:
    """The step of a run's first checkpoint: one that is due, of an evaluation or at the end; None: not known."""
    if not config.get("num_steps"):
        return None
    every = ((config.get(part) or {}).get("every") for part in ("checkpoint", "eval"))
    return min([config["num_steps"], *filter(None, every)])


@dataclass(frozen=True)
class Recorded:
    """The records of the step that a run goes on from.

    That step was saved before it was evaluated and sampled, so a run that was killed may lack some of it.
    """

    validation_loss: float | None
    parts: frozenset[str]  # eval, diagnostics, both or none
    samples: int
    last_step: int  # of metrics.jsonl
    evaluations: tuple[Evaluation, ...] = ()  # all until then, in order


def recorded_to_json(recorded: Recorded) -> dict[str, Any]:
    """Makes it what JSON can hold."""
    return {**dataclasses.asdict(recorded), "parts": sorted(recorded.parts)}


def recorded_from_json(fields: dict[str, Any]) -> Recorded:
    """The inverse of `recorded_to_json`."""
    evaluations = tuple(Evaluation(*each) for each in fields["evaluations"])
    return Recorded(**{**fields, "parts": frozenset(fields["parts"]), "evaluations": evaluations})


NOTHING = Recorded(None, frozenset(), 0, 0)


def read_recorded(workdir: Path, step: int) -> Recorded:
    """Reads what was recorded at `step`."""
    names = {"validation": "eval", "diagnostics": "diagnostics"}
    at_step: dict[str, dict[str, Any]] = {}
    last_step = 0
    evaluations = []
    for record in read_lines(workdir / METRICS_FILE):
        last_step = max(last_step, record["step"])
        if record["step"] <= step and record.get("split") == "validation":
            evaluations.append(Evaluation(record["step"], _loss_of(record, workdir)))
        if record["step"] == step and record.get("split") in names:
            at_step[names[record["split"]]] = record
    samples = sum(record["step"] == step for record in read_lines(workdir / SAMPLES_FILE))
    loss = _loss_of(at_step["eval"], workdir) if "eval" in at_step else None
    return Recorded(loss, frozenset(at_step), samples, last_step, tuple(evaluations))


def _loss_of(record: dict[str, Any], workdir: Path) -> float:
    try:
        return float(record["loss"])
    except (KeyError, TypeError, ValueError):
        where = f"{workdir / METRICS_FILE}: the validation of step {record['step']}"
        raise UserError(f"{where} has no number as its loss: remove its line") from None


def lost_work(workdir: Path, step: int | None) -> dict[str, float]:
    """The records beyond `step`, which a run that goes on from there forgets: how many steps and seconds they are of.

    Call it before they are dropped. The time in which no process ran is no part of it. None: nothing stays.

    Returns:
      lost_steps, lost_seconds; empty if nothing is lost.
    """
    last_step, seconds, before = 0, 0.0, None
    for record in read_lines(workdir / METRICS_FILE):
        now = record.get("time")
        if step is None or record["step"] > step:
            last_step = max(last_step, record["step"])
            if isinstance(start := record.get("start_seconds"), int | float):  # another process than the one before
                seconds += start + (record.get("lost_seconds") or 0.0)
            elif isinstance(now, int | float) and before is not None:
                seconds += max(now - before, 0.0)
        before = now if isinstance(now, int | float) else before
    if not last_step and not seconds:
        return {}
    return {"lost_steps": max(last_step - (step or 0), 0), "lost_seconds": seconds}
