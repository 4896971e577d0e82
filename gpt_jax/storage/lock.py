"""One process at a time: a lock file that ends with the process which holds it, however that ends.

The operating system's `flock` holds it, so a kill -9 leaves no lock behind, only a file that the next holder takes
over. The file says who holds it: host, process and since when.

    disk                      holds between
    local                     all processes of the machine
    NFS, Linux                all machines (flock is sent to the server as a lock of the whole file), unless mounted
                              with nolock or local_lock; a machine that crashed holds until its lease ends (90 s)
    SMB, Linux                all machines, unless mounted with nobrl
    Lustre                    all machines if mounted with flock, one machine with localflock
    sshfs and other FUSE      mostly one machine
    no locks at all, Windows  nothing: the run says so and goes on
"""

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from gpt_jax.log import Log
from gpt_jax.storage.files import is_absent

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_BETWEEN_TRIES = 0.2  # seconds
_LOOK, _LOOKS = 0.005, 5.0  # seconds between two tries of a lock that is only looked at, and most of them in all


class LockedError(Exception):
    """Another process holds the lock; the message names it."""


@contextlib.contextmanager
def lock(path: Path, log: Log) -> Iterator[None]:
    """Holds the lock file `path`, and removes it at the end.

    Raises:
      LockedError: another process holds it.
      OSError: the file cannot be made.
    """
    descriptor = _acquire(path, log)
    try:
        yield
    finally:
        _release(path, descriptor)


@contextlib.contextmanager
def wait_for_lock(path: Path, log: Log) -> Iterator[None]:
    """Like `lock`, but waits for the holder, and says once for whom."""
    told = False
    while True:
        try:
            descriptor = _acquire(path, log)
            break
        except LockedError as error:
            if not told:
                log(f"waiting for {path}, held by {error}")
                told = True
            time.sleep(_BETWEEN_TRIES)
    try:
        yield
    finally:
        _release(path, descriptor)


def is_held(path: Path) -> bool | None:
    """Whether a process holds the lock file; None where that cannot be told. Nothing is written, and nobody waits."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        return False if is_absent(error) else None
    try:
        if fcntl is None:
            return None
        return not _is_shared(descriptor)
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _acquire(path: Path, log: Log) -> int | None:
    """The descriptor that holds the lock; None where the system has no locks."""
    until = time.monotonic() + _LOOKS
    while True:
        with contextlib.ExitStack() as closing:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            closing.callback(os.close, descriptor)
            try:
                if fcntl is None:
                    raise OSError(errno.ENOSYS, "this system has no flock")
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < until and _is_shared(descriptor):
                    fcntl.flock(descriptor, fcntl.LOCK_UN)
                    time.sleep(_LOOK)
                    continue
                raise LockedError(_read_holder(descriptor)) from None
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
                log(f"warning: {path} cannot be locked ({error.strerror}): start no second process there")
                return None
            if _is_at(path, descriptor):
                _write_holder(descriptor)
                closing.pop_all()
                return descriptor
            # The holder before removed the file after it was opened here: try the one that is there now.


def _is_shared(descriptor: int) -> bool:
    """Whether nobody holds the lock: who looks has it shared, for no time at all, as this does until it is closed."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def _release(path: Path, descriptor: int | None) -> None:
    if descriptor is None:
        return
    with contextlib.suppress(OSError):  # removed with its folder, or the disk is read-only now
        if _is_at(path, descriptor):
            path.unlink()  # while it is held: whoever opened it meanwhile sees that it is gone
    os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _write_holder(descriptor: int) -> None:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": since}
    with contextlib.suppress(OSError):  # a full disk: then the lock holds, but cannot say for whom
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)


def _read_holder(descriptor: int) -> str:
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # it may be written at this moment
        holder = json.loads(os.pread(descriptor, 1000, 0))
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    return "another process"
