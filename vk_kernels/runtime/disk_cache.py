"""The cache on disk of kernels and tiles, shared by all processes of a user. A file is whole or not there.

Together they have a bound, over which those go that were not used for the longest. Processes agree on nothing for
that: a file's time of change is when it was last used, whoever writes looks now and then whether all are too many, and
a file that is gone is made again.
"""

import contextlib
import hashlib
import os
import re
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from vk_kernels.errors import SettingError

MOST_MB = 1000  # of all files, where VK_KERNELS_CACHE_MB does not say
_BETWEEN_LOOKS = 1 / 16  # of the bound: so much is written until somebody looks, on average
_LEFT = 7 / 8  # of the bound, when some had to go
_USE = 3600.0  # seconds in which a file that is used again counts as used
_FILE = re.compile(r"[0-9a-f]{40}\.bin")  # what `file_of` calls them: nothing else is ever removed


def root() -> Path:
    """The folder of all: VK_KERNELS_CACHE, or one in the user's cache folder."""
    own = os.environ.get("VK_KERNELS_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vk_kernels"


def most_bytes() -> int:
    """The bound of all files together, VK_KERNELS_CACHE_MB; 0: there is none. Raises SettingError for what is none."""
    text = os.environ.get("VK_KERNELS_CACHE_MB") or str(MOST_MB)
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII):
        raise SettingError(f"VK_KERNELS_CACHE_MB is a whole number of megabytes, 0 for any number, not {text!r}")
    return int(text) * 10**6


def file_of(folder: Path, key: str) -> Path:
    """The file of `key`, a text of any length, in `folder`."""
    return folder / f"{hashlib.sha256(key.encode()).hexdigest()[:40]}.bin"


def load(file: Path) -> bytes:
    """The bytes that were saved there; none where there is no file, or a damaged one."""
    try:
        content = file.read_bytes()
    except OSError:
        return b""
    with contextlib.suppress(OSError):  # another user's, or gone meanwhile
        if time.time() - file.stat().st_mtime > _USE:
            os.utime(file)
    digest, data = content[:32], content[32:]
    return data if hashlib.sha256(data).digest() == digest else b""


def save(file: Path, data: bytes) -> None:
    """Puts a file there, or in the place of another one. Where that cannot be it is a warning: the next process makes
    the data again."""
    digest, most = hashlib.sha256(data).digest(), most_bytes()
    try:
        replace(file, digest + data)
    except OSError as error:
        warnings.warn(f"compiled kernels are not cached: {error}", stacklevel=3)
        return
    # By the content's hash, which is as good as drawn: a file of so many bytes is as likely as that to be the one.
    if len(data) > int.from_bytes(digest[:6], "big") / 2**48 * most * _BETWEEN_LOOKS:
        remove_unused(file.parents[1], most)


def remove_unused(folder: Path, most: int) -> None:
    """Removes files of the cache in `folder` if they have more bytes than `most`, which is 0 for any number of them."""
    found = [(status.st_mtime, status.st_size, path) for path, status in _files(folder)] if most else []
    total = sum(size for _, size, _ in found)
    if total <= most:
        return
    for _, size, path in sorted(found):
        with contextlib.suppress(OSError):  # another process removed it, or reads it where the system forbids that
            os.unlink(path)
        total -= size
        if total <= _LEFT * most:
            return


def _files(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """The files of the cache, one folder deep, with what the system knows of each."""
    for group in _entries(folder):
        for entry in _entries(group.path) if group.is_dir(follow_symlinks=False) else ():
            with contextlib.suppress(OSError):
                if _FILE.fullmatch(entry.name):
                    yield entry.path, entry.stat(follow_symlinks=False)


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:  # gone meanwhile, or not ours to read
        return []


def replace(file: Path, content: bytes) -> None:
    """Writes a file of the cache, or another one in its place, that is whole or not there. Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:  # gone also if the disk is full
        whole = Path(folder) / "whole"
        whole.write_bytes(content)
        os.replace(whole, file)
