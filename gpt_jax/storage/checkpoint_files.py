"""The folders of checkpoints: the record beside the arrays, its checksums, and which steps are kept."""

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from gpt_jax.storage.checksum import crc32_of_json
from gpt_jax.storage.files import replacing
from gpt_jax.storage.json_file import DamagedError, check_version, read_object

FORMAT_VERSION = 1  # of position.json; raise it when an older program would misread it
CHECKPOINTS = "checkpoints"  # the folder of a run that holds them
BASE = "base"  # that of a run of adapters with the one checkpoint of the parameters that they stand beside
STATE, POSITION = "state", "position.json"
STEP = re.compile(r"0|[1-9][0-9]*")
NEW, OLD = ".new", ".old"  # endings of a step being written, and of one being removed
LEFTOVER = re.compile(r"[0-9]+(\.new|\.old|\.orbax-checkpoint-tmp.*)")


class DamagedCheckpoint(Exception):
    """A checkpoint whose content is not what was saved; the message says why in one line.

    A disk that does not let it be read just now is another thing, a StorageError: the checkpoint may be whole, so no
    older one takes its place and nothing is removed.
    """


def step_directories(directory: Path) -> dict[int, Path]:
    """The folders of a directory that are called by a step, by step; damaged ones too."""
    return {int(path.name): path for path in directory.iterdir() if STEP.fullmatch(path.name)}


def saved_steps(directory: Path) -> list[int]:
    """The steps that have a checkpoint in a directory, damaged ones too; none if there is no such directory."""
    return sorted(step_directories(directory)) if os.path.isdir(directory) else []  # Path.is_dir raises for some names


def best_step(losses: Mapping[int, float | None]) -> int | None:
    """The step with the lowest loss, the earliest of equals; None if none has one."""
    return min((s for s in losses if losses[s] is not None), key=lambda s: (losses[s], s), default=None)


def steps_to_keep(losses: Mapping[int, float | None], keep_last: int, keep_every: int | None) -> set[int]:
    """The last `keep_last` steps, those that are a multiple of `keep_every`, and the best."""
    steps = sorted(losses)
    best = best_step(losses)
    return (
        set(steps[-keep_last:])
        | {step for step in steps if keep_every and step % keep_every == 0}
        | (set() if best is None else {best})
    )


def delete(path: Path) -> None:
    """Deletes a file or a folder."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def remove(path: Path) -> None:
    """Deletes what stands at a step's place; if that is cut short, no half of it stands there."""
    old = path.rename(path.with_name(path.name + OLD))
    delete(old)


def read_record(path: Path) -> dict:
    """The JSON of a checkpoint: position, validation_loss, leaves {name: spec}, files {name: CRC-32}."""
    try:
        record = read_object(path / POSITION, known=None)
    except DamagedError as error:
        if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
            raise DamagedCheckpoint(f"it has no {POSITION}") from error
        raise DamagedCheckpoint(f"its {str(error).removeprefix(f'{path}{os.sep}')}") from error
    if record.pop("crc32", None) != crc32_of_json(record):  # first: a flipped bit must not pass for a newer version
        raise DamagedCheckpoint(f"its {POSITION} fails its checksum")
    check_version(path / POSITION, record, FORMAT_VERSION)
    return record


def write_record(path: Path, record: dict) -> None:
    """Writes what `read_record` reads: whole, or the one before stays."""
    with replacing(path / POSITION) as file:
        json.dump(record | {"crc32": crc32_of_json(record)}, file)


def read_losses(directory: Path) -> dict[int, float | None]:
    """The validation losses of the steps whose JSON is good."""
    losses = {}
    for step, path in step_directories(directory).items():
        try:
            losses[step] = read_record(path)["validation_loss"]
        except DamagedCheckpoint:
            continue  # told by whoever goes on to restore it
    return losses
