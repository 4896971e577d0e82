"""A folder that is there whole or not at all."""

import contextlib
import logging
import os
from collections.abc import Collection, Iterator
from pathlib import Path

from gpt_jax.errors import UserError
from gpt_jax.storage.checkpoint_files import delete
from gpt_jax.storage.files import sync_folder, writing
from gpt_jax.storage.lock import LockedError, lock

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def new_folder(path: Path, *, replace: bool, ours: Collection[str]) -> Iterator[Path]:
    """A folder beside `path` to write files into, which takes its place in one go when they are whole and on the disk.

    Whatever fails, a kill too, what stood at `path` stands there still. A kill may leave the folder beside it, called
    `.NAME.new`, which the next time removes.

    Args:
      replace: whether a folder with files may stand there now, of names `ours` alone.
      ours: names of files that may be replaced.

    Raises:
      UserError: a file stands there, or a folder that may not be replaced, or another process writes it.
      StorageError: it could not be written.
    """
    target = Path(os.path.realpath(path))
    new, old = (target.with_name(f".{target.name}.{ending}") for ending in ("new", "old"))
    with contextlib.ExitStack() as stack:
        with writing(path):
            made = _make_parents(target.parent)
        stack.callback(_remove_empty, made)
        try:
            with writing(path):
                stack.enter_context(lock(target.with_name(f".{target.name}.lock"), logger.warning))
        except LockedError as error:
            raise UserError(f"{path} is being written by {error}: wait for it to end") from None
        with writing(path):
            if old.exists() and not target.exists():
                old.rename(target)  # a kill between the two renames
            check_target(path, replace=replace, ours=ours)
            for left in (new, old):
                if left.exists():
                    delete(left)
            new.mkdir()
        try:
            yield new
            with writing(path):
                _sync(new)
                if target.exists():
                    target.rename(old)
                try:
                    new.rename(target)
                except OSError:
                    if old.exists():
                        old.rename(target)
                    raise
                sync_folder(target.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                delete(new)
            raise
        with writing(old):
            if old.exists():
                delete(old)


def check_target(path: Path, *, replace: bool, ours: Collection[str]) -> None:
    """Raises UserError for a path at which no folder can be put; see `new_folder`."""
    if not os.path.lexists(path):
        return
    if not path.is_dir():
        raise UserError(f"{path} is no folder: give another name")
    found = {entry.name: entry.is_file() for entry in sorted(path.iterdir())}
    others = [name for name, is_file in found.items() if name not in ours or not is_file]
    if others and replace:
        raise UserError(f"{path} holds {others[0]}, which is no file of a model, and is not replaced: move it away")
    if found and not replace:
        raise UserError(f"{path} is not empty: give another folder, or --force to replace its model")


def _make_parents(folder: Path) -> list[Path]:
    """Makes a folder; returns those that were made for it, the lowest first."""
    made = []
    at = folder
    while not at.exists():
        made.append(at)
        at = at.parent
    folder.mkdir(parents=True, exist_ok=True)
    return made


def _remove_empty(folders: list[Path]) -> None:
    with contextlib.suppress(OSError):  # there is something in it, and that is what they were made for
        for folder in folders:
            folder.rmdir()


def _sync(folder: Path) -> None:
    """Puts a folder's files on the disk."""
    for file in folder.iterdir():
        with file.open("r+b") as opened:  # Windows flushes no file that was opened to be read
            os.fsync(opened.fileno())
    sync_folder(folder)
