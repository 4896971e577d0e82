"""Which run and checkpoint a command means.

    runs/ID, ID                a run's folder, or its name below runs/: the checkpoint of the lowest validation loss
    runs/ID/checkpoints/500    one checkpoint
    ID, TAG, NAME              the run below runs/ of this id, tag (`python -m gpt_jax.runs tag`) or config.name
    latest                     the run below runs/ that was written last; where a model is needed, with a checkpoint
    best                       the run below runs/ with the lowest validation loss
    RUN@500, RUN@best, RUN@latest    another checkpoint of a run; RUN is any of the above but one checkpoint

Nothing is written.
"""

import math
import os
from pathlib import Path
from typing import NamedTuple

from gpt_jax.config import text_problem
from gpt_jax.errors import UserError
from gpt_jax.runs.info import CONFIG_FILE, read_info
from gpt_jax.runs.metrics import METRICS_FILE
from gpt_jax.runs.tags import read_tags
from gpt_jax.storage.checkpoint_files import BASE, CHECKPOINTS, read_losses, step_directories

RUNS = Path("runs")  # where `gpt_jax.main` makes new ones
LATEST, BEST = "latest", "best"


class FoundRun(NamedTuple):
    """A run's folder, and the path of the checkpoint that `restore_parameters` is to read.

    Where no step was named, that is the folder itself, which stands for its best good checkpoint.
    """

    workdir: Path
    checkpoint: Path


def runs_folder(value: str) -> Path:
    """The folder that `--runs` means. Raises UserError if its value is none that a folder can have."""
    if problem := text_problem(value):
        raise UserError(f"--runs {problem}")
    if not value:
        raise UserError("--runs is empty: name the folder that runs are in, or leave it out")
    return Path(value)


def find_run(name: str, runs: Path = RUNS, *, saved: bool = True) -> FoundRun:
    """The run and checkpoint that a name stands for, as the module says.

    Args:
      saved: whether `latest` is the latest that has a checkpoint, as whoever needs a model wants it.

    Raises:
      UserError: there is none; the message lists what there is.
    """
    if problem := text_problem(name):
        raise UserError(f"RUN {problem}")
    if not name:
        raise UserError(f"RUN is empty: give the folder of a run, {LATEST} or {BEST}")
    folder = _folder(name, runs, saved)
    if folder is not None:
        return _of_folder(folder)
    run, at, step = name.rpartition("@")
    if not at:
        raise UserError(f"there is no run {name}: {_what_there_is(runs)}")
    folder = _folder(run, runs, saved)
    if folder is None or (folder.parent.name == CHECKPOINTS and not (folder / CONFIG_FILE).exists()):
        raise UserError(f"there is no run {run}: {_what_there_is(runs)}")
    return FoundRun(folder, find_step(folder, step))


def find_step(workdir: Path, step: str) -> Path:
    """The path of a run's checkpoint `step`, a number, `best` or `latest`, for `restore_parameters`.

    Raises:
      UserError: the run has no such checkpoint.
    """
    directory = workdir / CHECKPOINTS
    steps = step_directories(directory) if directory.is_dir() else {}
    if not steps:
        raise UserError(f"{workdir} has no checkpoint")
    if step == LATEST:
        return steps[max(steps)]
    if step == BEST:
        return workdir
    if not step.isascii() or not step.isdigit() or int(step[:20]) not in steps:
        there = ", ".join(map(str, sorted(steps)))
        raise UserError(f"{workdir} has no checkpoint {step!r}: there are {there}, {BEST} and {LATEST}")
    return steps[int(step)]


def _folder(name: str, runs: Path, saved: bool) -> Path | None:
    """The folder that a name without a step stands for."""
    for path in (Path(name), runs / name):
        if os.path.isdir(path):  # not Path.is_dir, which raises for a name too long
            return path
    if name == LATEST:
        return max(_runs(runs, saved), key=_written)
    if name == BEST:
        return min(_runs(runs, saved=True), key=lambda run: (_lowest_loss(run), -_written(run)))
    return _called(name, runs)


def _called(name: str, runs: Path) -> Path | None:
    """The run below `runs` whose id, or else a tag, or else the name, is `name`."""
    found: dict[str, list[Path]] = {"id": [], "tag": [], "name": []}
    for file in runs.glob(f"*/{CONFIG_FILE}"):
        try:
            info, tags = read_info(file.parent), read_tags(file.parent)
        except UserError:  # told by whoever asks for that run
            continue
        for kind, is_so in (
            ("id", info.get("run_id") == name),
            ("tag", name in tags),
            ("name", info.get("name") == name),
        ):
            if is_so:
                found[kind].append(file.parent)
    for kind, folders in found.items():
        if len(folders) > 1:
            there = ", ".join(folder.name for folder in sorted(folders, key=_written, reverse=True)[:6])
            more = ", ..." if len(folders) > 6 else ""
            raise UserError(f"{len(folders)} runs below {runs} have the {kind} {name}: give one of {there}{more}")
        if folders:
            return folders[0]
    return None


def _of_folder(folder: Path) -> FoundRun:
    """The run of a folder, which may be its `checkpoints` or one of these, or what its adapters stand beside."""
    path = folder.resolve()
    if not (path / CONFIG_FILE).exists():
        if path.name == CHECKPOINTS:
            return FoundRun(path.parent, path.parent)
        if path.parent.name == CHECKPOINTS:
            return FoundRun(path.parent.parent, path)
        if path.name == BASE:
            return FoundRun(path.parent, path)
    return FoundRun(folder, folder)


def _runs(runs: Path, saved: bool) -> list[Path]:
    """The runs below a folder, all or those with a checkpoint; raises UserError if there is none."""
    found = [file.parent for file in runs.glob(f"*/{CONFIG_FILE}")]
    if saved:
        found = [run for run in found if (run / CHECKPOINTS).is_dir() and step_directories(run / CHECKPOINTS)]
    if not found:
        missing = (
            f"no run below {runs.resolve()} has a checkpoint" if saved else f"there is no run below {runs.resolve()}"
        )
        raise UserError(f"{missing}: train one first, or give a run's folder")
    return found


def _written(run: Path) -> float:
    """When a run was written to last."""
    file = run / METRICS_FILE
    return (file if file.exists() else run / CONFIG_FILE).stat().st_mtime


def _lowest_loss(run: Path) -> float:
    losses = read_losses(run / CHECKPOINTS).values()
    return min((loss for loss in losses if loss is not None), default=math.inf)


def _what_there_is(runs: Path) -> str:
    names = sorted((path.parent for path in runs.glob(f"*/{CONFIG_FILE}")), key=_written, reverse=True)
    listed = ", ".join(run.name for run in names[:6]) + (", ..." if len(names) > 6 else "")
    return f"give the folder of a run, {LATEST} or {BEST}" + (f"; below {runs} there are {listed}" if names else "")
