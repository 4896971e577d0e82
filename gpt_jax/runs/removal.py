"""Removes a run's folder: whole, and never one in which a process trains or that is no run's."""

import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from gpt_jax.data.names import TOKENIZER_FILE
from gpt_jax.errors import UserError
from gpt_jax.output import print_line
from gpt_jax.runs.find import FoundRun
from gpt_jax.runs.folder import LOCK_FILE, LOG_FILE, PROFILE, REPORT
from gpt_jax.runs.info import CONFIG_FILE, INFO_FILE
from gpt_jax.runs.metrics import METRICS_FILE, SAMPLES_FILE, TENSORBOARD
from gpt_jax.runs.summary import is_run
from gpt_jax.runs.tags import TAGS_FILE
from gpt_jax.runs.tracker_services import FOLDER as TRACKER
from gpt_jax.storage.checkpoint_files import BASE, CHECKPOINTS
from gpt_jax.storage.files import writing
from gpt_jax.storage.lock import LockedError, is_held, lock

_WRITTEN = {  # what a run and the commands that read it write
    *(INFO_FILE, CONFIG_FILE, METRICS_FILE, SAMPLES_FILE, TENSORBOARD, CHECKPOINTS, LOCK_FILE, LOG_FILE),
    *(
        TAGS_FILE,
        BASE,
        TOKENIZER_FILE,
        PROFILE,
        TRACKER,
        *(f"{REPORT}{suffix}" for suffix in (".md", ".html", ".json")),
    ),
}


class Removal(NamedTuple):
    """A folder to remove: how many files it has, their bytes, and the names in it that no run writes."""

    folder: Path
    files: int
    size: int
    others: list[str]


def plan_removal(found: FoundRun, name: str) -> Removal:
    """Looks at what would be removed.

    Raises:
      UserError: it is a checkpoint, a link or no run, runs stand in it, or a process trains there.
    """
    folder = found.workdir.absolute()
    if found.checkpoint != found.workdir:
        raise UserError(f"{name} is a checkpoint, and a run is removed whole: give {folder}")
    if folder.is_symlink():
        raise UserError(f"{folder} is a link: remove it by hand, or give the folder that it leads to")
    if not all((folder / file).is_file() for file in (INFO_FILE, CONFIG_FILE)):
        raise UserError(
            f"{folder} is no run folder: it has not both of {INFO_FILE} and {CONFIG_FILE}; remove it by hand"
        )
    entries = sorted(folder.iterdir())
    if inner := [entry.name for entry in entries if entry.is_dir() and is_run(entry)]:
        raise UserError(f"{folder} holds other runs ({', '.join(inner[:3])}): remove these first, or it by hand")
    if is_held(folder / LOCK_FILE):
        raise UserError(f"{folder} is in use: a process trains there, stop it first")
    files = [path for path in folder.rglob("*") if path.is_file() or path.is_symlink()]
    size = sum(path.lstat().st_size for path in files)
    return Removal(folder, len(files), size, [entry.name for entry in entries if entry.name not in _WRITTEN])


def remove_run(folder: Path, log: Callable[[str], object] = print_line) -> None:
    """Removes a run's folder; if that is cut short, no half of a run stands at its place.

    Raises:
      UserError: a process trains there by now.
      StorageError: it cannot be removed.
    """
    removed = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.removed")
    with writing(folder):
        try:
            with lock(folder / LOCK_FILE, log):  # so that none begins meanwhile
                folder.rename(removed)
        except LockedError as error:
            raise UserError(f"{folder} is in use by {error}: stop it first") from None
        shutil.rmtree(removed)
