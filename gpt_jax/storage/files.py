"""Writing and reading files: every failure names the file and the cause, and says what mends it."""

import contextlib
import errno
import os
import re
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from gpt_jax.errors import UserError

_ABANDONED = 3600.0  # seconds without a change of a file that nobody writes any more
_REMEDIES = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some of the quota there",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f)",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "the whole machine has too many files open, close some",
    errno.EACCES: "give this user the right to write there, or choose another folder",
    errno.EPERM: "give this user the right to write there, or choose another folder",
    errno.EROFS: "make the file system writable, or choose another folder",
    errno.ENOENT: "check the path: it is not there, or no more",
    errno.ENOTDIR: "a file stands where a folder should be, move it away",
    errno.EISDIR: "a folder stands where the file should be, move it away",
    errno.ELOOP: "the link leads to itself, remove it",
    errno.EIO: "the disk fails, choose a folder on another one",
    errno.ESTALE: "the network disk is gone, mount it again",
}


class StorageError(UserError):
    """A file could not be written or read; the message is one line with the file, the cause and what mends it."""

    exit_code = 1  # the input was good


@contextlib.contextmanager
def writing(what: str | os.PathLike) -> Iterator[None]:
    """Turns an OSError inside into a StorageError about `what`: the path, or words that end with it."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot write {os.fspath(what)}: {explain(error)}") from error


def is_absent(error: OSError) -> bool:
    """Whether no such file is there, in contrast to one that is there and could not be read just now."""
    return error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)


def unreadable(path: Path, error: OSError) -> StorageError:
    """The error for a file that is there and cannot be read just now, which is no damage."""
    cause = error.strerror or str(error) or type(error).__name__
    return StorageError(
        f"{path} cannot be read: {cause}; mend that and start again, or remove it if it is lost: it may be whole, so "
        "nothing was changed"
    )


def explain(error: OSError) -> str:
    """The cause of an OSError, and what mends it."""
    cause = error.strerror or str(error) or type(error).__name__
    remedy = _REMEDIES.get(error.errno)
    return f"{cause}; {remedy}" if remedy else cause


def os_error_of(error: BaseException) -> OSError | None:
    """The OSError that an exception of tensorstore or safetensors tells of; None if it tells of none.

    The one raises ValueErrors such as "RESOURCE_EXHAUSTED: Failed to write 9 bytes to file: ... [os_error_code='28']",
    the other "I/O error: No space left on device (os error 28)".
    """
    found = re.search(r"(?:[Oo][Ss] error |os_error_code=')(\d+)", str(error))
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found else None


def sync_folder(folder: Path) -> None:
    """Puts the names in a folder on the disk, where the system can: a rename then survives a loss of power."""
    with contextlib.suppress(OSError):  # Windows and some network disks do not open folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """A text file that takes the place of `path` in one go when it is whole and on the disk.

    Of several writers, in threads or processes, each has a file of its own, and the last one's stays.
    A link stays one, and what it leads to is replaced. Mode, group and owner stay, the latter two where the system lets
    this user give them. What is no file, as /dev/stdout, is written to.

    Raises:
      OSError: it could not be written; what stood at `path` stands there still.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        with open(target, "w", encoding="utf-8") as file:
            yield file
        return
    before = _writable_file(target)
    _remove_leftovers(target)
    temporary = target.with_name(f"{target.name}.{os.getpid()}-{threading.get_native_id()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            yield file
            file.flush()
            if before is not None:
                _give_rights(temporary, before)
            os.fsync(file.fileno())
        temporary.replace(target)
        sync_folder(target.parent)
    finally:
        with contextlib.suppress(OSError):  # its folder may be gone or read-only
            temporary.unlink(missing_ok=True)


def _remove_leftovers(target: Path) -> None:
    """Removes what writers of a file that were killed left beside it, when that is some time ago."""
    name, until = re.compile(rf"{re.escape(target.name)}\.\d+-\d+\.tmp"), time.time() - _ABANDONED
    with contextlib.suppress(OSError):  # the folder is gone, or not ours to read: the write will say so
        with os.scandir(target.parent) as entries:
            left = [entry for entry in entries if name.fullmatch(entry.name)]
        for entry in left:
            if entry.stat(follow_symlinks=False).st_mtime < until:
                os.unlink(entry.path)


def _writable_file(path: Path) -> os.stat_result | None:
    """The rights of a file, None if there is none. Raises OSError where this user may not write it: a rename would."""
    if path.is_symlink():  # a link that leads to itself, else its real path would be another one
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    if not path.exists():
        return None
    if not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    return path.stat()


def _give_rights(path: Path, before: os.stat_result) -> None:
    """Gives a file the owner, the group and the mode of the one whose place it takes."""
    if hasattr(os, "chown"):  # not on Windows
        for owner, group in ((before.st_uid, -1), (-1, before.st_gid)):
            with contextlib.suppress(OSError):  # of another user, or a group that this one is not in
                os.chown(path, owner, group)
    if path.stat().st_mode != before.st_mode:
        path.chmod(stat.S_IMODE(before.st_mode))
