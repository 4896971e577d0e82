"""Files that all processes of a user share, so that what takes long is made once. A file is whole or not there."""

import hashlib
import os
import tempfile
import warnings
from pathlib import Path


def root() -> Path:
    """The folder of all: VK_KERNELS_CACHE, or one in the user's cache folder."""
    own = os.environ.get("VK_KERNELS_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vk_kernels"


def file_of(folder: Path, key: str) -> Path:
    """The file of `key`, a text of any length, in `folder`."""
    return folder / f"{hashlib.sha256(key.encode()).hexdigest()[:40]}.bin"


def load(file: Path) -> bytes:
    """The bytes that were saved there; none where there is no file, or a damaged one."""
    try:
        content = file.read_bytes()
    except OSError:
        return b""
    digest, data = content[:32], content[32:]
    return data if hashlib.sha256(data).digest() == digest else b""


def save(file: Path, data: bytes) -> None:
    """Puts a file there, or in the place of another one. Where that cannot be it is a warning: the next process makes
    the data again."""
    try:
        replace(file, hashlib.sha256(data).digest() + data)
    except OSError as error:
        warnings.warn(f"compiled kernels are not cached: {error}", stacklevel=3)


def replace(file: Path, content: bytes) -> None:
    """Writes a file of the cache, or another one in its place, that is whole or not there. Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:  # gone also if the disk is full
        whole = Path(folder) / "whole"
        whole.write_bytes(content)
        os.replace(whole, file)
