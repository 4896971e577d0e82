"""Folders of a cache: each is built beside its place and renamed into it, so a killed run leaves no half folder.

`stats.json` of a folder holds the CRC-32 of every other file, which is verified each time that the folder is opened,
at 2 GB/s. A damaged folder is built again.
"""

import contextlib
import getpass
import hashlib
import json
import os
import shutil
import tempfile
import time
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from gpt_jax.log import Log
from gpt_jax.storage.checksum import crc32_of_file, crc32_of_json
from gpt_jax.storage.files import StorageError, explain, replacing
from gpt_jax.storage.json_file import VERSION, read_object
from gpt_jax.storage.lock import wait_for_lock

T = TypeVar("T")

_ABANDONED = 3600  # seconds without a write after which a build is taken for dead
_FACTS = "stats.json"


def open_or_build(
    folder: Path, opening: Callable[[Path], T], building: Callable[[Path], None], what: str, log: Log
) -> tuple[T, bool]:
    """Opens a folder of the cache, or builds it.

    Args:
      folder: its place.
      opening: opens a whole one; raises OSError, ValueError, KeyError or TypeError for one that is not.
      building: writes the files of a new folder, `write_facts` last.
      what: names the folder in messages.

    Returns:
      What `opening` gave, and whether it was there.

    Raises:
      OSError: a file cannot be written.
    """
    if not isinstance(opened := _try(opening, folder), Exception | None):
        return opened, True
    folder.parent.mkdir(parents=True, exist_ok=True)
    with wait_for_lock(build_lock(folder), log):  # whoever holds it builds the same
        if not isinstance(opened := _try(opening, folder), Exception | None):
            return opened, True
        if opened is not None:
            log(f"warning: the {what} {folder} is damaged ({opened}): building it again")
            _remove(folder.rename(folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.partial")))
        _build(folder, building)
    return opening(folder), False


def _try(opening: Callable[[Path], T], folder: Path) -> T | Exception | None:
    """The opened folder; or why it is damaged; or None if there is none."""
    if not folder.exists():
        return None
    try:
        return opening(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return error


def _build(folder: Path, building: Callable[[Path], None]) -> None:
    _remove_abandoned(folder.parent, folder.name)
    partial = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.partial")
    try:
        partial.mkdir()
        building(partial)
        try:
            partial.rename(folder)
        except OSError:  # where there are no locks, another run has built the same in the meantime: it is as good
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_facts(folder: Path, version: int, facts: dict[str, Any], checksums: dict[str, int]) -> None:
    """Writes stats.json: facts, and the CRC-32 of every other file by its name."""
    meta = {VERSION: version, **facts, "checksums": checksums}
    meta["checksum"] = _checksum(meta)
    with replacing(folder / _FACTS) as file:
        json.dump(meta, file, indent=2)


def read_facts(folder: Path, version: int, types: dict[str, Any], files: Iterable[str]) -> dict[str, Any]:
    """Reads stats.json and verifies `files`. Raises OSError, ValueError, KeyError or TypeError if one is not whole."""
    meta = read_object(folder / _FACTS, version, types | {"checksums": dict})
    if meta["checksum"] != _checksum(meta):
        raise ValueError(f"{_FACTS} fails its checksum")
    for name in files:
        if meta["checksums"][name] != crc32_of_file(folder / name):
            raise ValueError(f"{name} fails its checksum")
    return meta


def _checksum(meta: dict[str, Any]) -> int:
    """CRC-32 of what stats.json says, but of itself."""
    return crc32_of_json({name: meta[name] for name in meta if name != "checksum"})


def build_lock(folder: Path) -> Path:
    """A lock of this user's processes on this machine: it saves work. Builds on two machines do not harm each other."""
    user = os.getuid() if hasattr(os, "getuid") else getpass.getuser()
    place = hashlib.blake2b(str(folder.resolve()).encode(), digest_size=8).hexdigest()
    return Path(tempfile.gettempdir()) / f"gpt_jax-{user}-{place}.lock"


@contextlib.contextmanager
def writing_cache(root: Path, source: str) -> Iterator[None]:
    """Turns an OSError of a file that is not the source's into one line."""
    try:
        yield
    except OSError as error:
        if error.filename and not Path(error.filename).is_relative_to(root):
            raise
        failed = f"cannot write the token cache: {error.filename}"
        if not error.filename:  # a read or a write of an open file has no name
            failed = f"cannot read the data source {source!r} or write the token cache {root}"
        raise StorageError(f"{failed}: {explain(error)}, or set data.cache_dir") from error


def _remove_abandoned(root: Path, fingerprint: str) -> None:
    for partial in root.glob(f"{fingerprint}.*.partial"):
        changed = max(path.stat().st_mtime for path in [partial, *partial.glob("*")])
        if time.time() - changed > _ABANDONED:
            _remove(partial)


def _remove(path: Path) -> None:
    """Removes a folder, or the file that damage left in the place of one, as far as the disk lets it."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


class ChecksummedFile:
    """A new file that knows the CRC-32 of what was written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.crc = file, 0

    def write(self, array: np.ndarray) -> None:
        written = array.tobytes()
        self.crc = zlib.crc32(written, self.crc)
        self.file.write(written)


def map_array(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    """An array of a file, mapped into memory, not read. Raises ValueError for a file of another size."""
    size, expected = path.stat().st_size, count * dtype.itemsize
    if size != expected:
        raise ValueError(f"{path.name} has {size} bytes, not {expected}")
    return np.memmap(path, dtype, mode="r", shape=(count,)) if count else np.empty(0, dtype)
