"""A run's folder while a process trains in it."""

import contextlib
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from gpt_jax.errors import UserError
from gpt_jax.log import Log
from gpt_jax.output import make_log, print_line
from gpt_jax.runs.info import INFO_FILE
from gpt_jax.storage.files import StorageError
from gpt_jax.storage.lock import LockedError, lock

LOCK_FILE, LOG_FILE = "run.lock", "log.txt"
REPORT = "report"  # .md, .json and .html
PROFILE = "profile"  # the folder of `config.log.profile_step`


def unwritable(workdir: Path, error: OSError) -> UserError:
    """The error for a run folder that the system refuses."""
    cause = f"{error.filename or workdir}: {error.strerror or error}"
    return UserError(f"cannot write to the run folder: {cause}; choose another --workdir")


@contextlib.contextmanager
def open_folder(workdir: Path) -> Iterator[Log]:
    """A run's folder, made if it is missing, for this process alone; gives its log.

    A folder that was made here goes again if the run failed before it began.

    Raises:
      UserError: another process has it, or it cannot be written.
    """
    made = not workdir.exists()
    with contextlib.ExitStack() as stack:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock(workdir / LOCK_FILE, print_line))
            file = (workdir / LOG_FILE).open("a", encoding="utf-8", errors="backslashreplace")
            stack.callback(_close, file)
        except LockedError as error:
            raise UserError(
                f"{workdir} is in use by {error}: wait for it to end, or choose another --workdir"
            ) from None
        except OSError as error:
            raise unwritable(workdir, error) from None
        warnings = logging.StreamHandler(file)
        logging.getLogger("gpt_jax").addHandler(warnings)
        stack.callback(logging.getLogger("gpt_jax").removeHandler, warnings)
        try:
            yield make_log(file)
        except BaseException as error:
            text = f"error: {error}" if isinstance(error, Exception) else "interrupted"
            with contextlib.suppress(OSError):
                print(text, file=file, flush=True)
            if made and not (workdir / INFO_FILE).exists():
                shutil.rmtree(workdir, ignore_errors=True)
            elif isinstance(error, StorageError):
                raise StorageError(f"{error}; then python -m gpt_jax.main --workdir={workdir} goes on") from error
            raise


def _close(file: TextIO) -> None:
    """Closes the log. A line that the disk did not take is tried once more, and was told of when it was written."""
    with contextlib.suppress(OSError):
        file.close()
