"""All runs below a folder, in a moment: a summary of each, by way of an index of those in which nobody trains.

The folders are the truth. The index, `.index.json` beside them, saves reading those that have not changed: by the time,
size and number of each of their files. One that is lost, damaged or cannot be written costs time and nothing else. A
run in which a process trains is read anew each time.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpt_jax.runs.folder import LOCK_FILE
from gpt_jax.runs.info import CONFIG_FILE, INFO_FILE
from gpt_jax.runs.metrics import METRICS_FILE
from gpt_jax.runs.status import RUNNING
from gpt_jax.runs.summary import DAMAGED, Summary, is_run, summarise
from gpt_jax.runs.tags import TAGS_FILE
from gpt_jax.storage.checkpoint_files import CHECKPOINTS
from gpt_jax.storage.lock import is_held

INDEX_FILE = ".index.json"
FORMAT_VERSION = 1  # of the index; another one is built anew
_FILES = (INFO_FILE, CONFIG_FILE, TAGS_FILE, METRICS_FILE, CHECKPOINTS)  # that a summary is made of

FileStates = list[list[int]]  # of the files of a run: changes when one of them does


def list_runs(runs: Path) -> list[Summary]:
    """The runs in a folder, the one that was written to last first; none if there is no such folder."""
    known = _read_index(runs / INDEX_FILE)
    found, index = [], {}
    for folder in _run_folders(runs):
        state, entry = _state(folder), known.get(folder.name)
        if entry and entry["state"] == state and is_held(folder / LOCK_FILE) is False:
            index[folder.name] = entry
            found.append(_from_index(entry, folder))
            continue
        summary = summarise(folder)
        if summary.status not in (RUNNING, DAMAGED):
            index[folder.name] = {"state": state, "summary": vars(summary)}
        found.append(summary)
    if index != known:
        _write_index(runs / INDEX_FILE, index)
    return sorted(found, key=lambda summary: (-(summary.written or 0.0), summary.run))


def _run_folders(runs: Path) -> Iterator[Path]:
    try:
        entries = sorted(os.scandir(runs), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        if entry.is_dir() and not entry.name.startswith(".") and is_run(Path(entry.path)):
            yield Path(entry.path)


def _state(folder: Path) -> FileStates:
    state = []
    for name in _FILES:
        try:
            found = os.stat(folder / name)
            state.append([found.st_mtime_ns, found.st_size, found.st_ino])
        except OSError:
            state.append([])
    return state


def _from_index(entry: dict[str, Any], folder: Path) -> Summary:
    fields = entry["summary"]
    return Summary(**{**fields, "folder": str(folder), "tags": tuple(fields["tags"])})


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index = json.loads(path.read_bytes())
        if index["format_version"] != FORMAT_VERSION:
            return {}
        names = {field.name for field in dataclasses.fields(Summary)}
        runs = index["runs"].items()
        return {name: entry for name, entry in runs if set(entry["summary"]) == names and "state" in entry}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _write_index(path: Path, index: dict[str, Any]) -> None:
    """Puts an index in the place of the one before, whole; where that cannot be, there is none."""
    new = path.with_name(f"{path.name}.{os.getpid()}")  # another process may write one at the same time
    with contextlib.suppress(OSError):
        try:
            new.write_text(json.dumps({"format_version": FORMAT_VERSION, "runs": index}, allow_nan=True))
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)
