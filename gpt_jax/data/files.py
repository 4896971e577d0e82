"""The files of a source: found, unpacked, read in chunks, decoded and hashed."""

import bz2
import codecs
import contextlib
import gzip
import hashlib
import importlib
import io
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from gpt_jax.errors import UserError

MAX_DIALOGUE = 16 * 2**20  # characters (bytes for a line of JSON): what bounds the memory of a reader
CHUNK = HEAD = 2**20  # bytes read at a time, and looked at to tell a format


def _open_zstd(path: Path) -> BinaryIO:
    with contextlib.suppress(ImportError):
        return importlib.import_module("compression.zstd").open(path, "rb")  # from Python 3.14 on
    try:
        pyarrow = importlib.import_module("pyarrow")  # of the extra hf
    except ImportError:
        raise UserError(
            f"{path} is zstd, which Python reads from 3.14 on: unpack it, or pip install 'gpt-jax-vulkan[hf]'"
        ) from None
    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


_PACKED: dict[str, tuple[re.Pattern[bytes], Callable[[Path], Any]]] = {  # by name: the first bytes, and what reads it
    "gzip": (re.compile(rb"\x1f\x8b"), gzip.GzipFile),
    "bzip2": (re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"), bz2.BZ2File),
    "xz": (re.compile(rb"\xfd7zXZ\0"), lzma.LZMAFile),
    "zstd": (re.compile(rb"\x28\xb5\x2f\xfd"), _open_zstd),
}
_LONGEST_MAGIC = 10  # bytes
_OTHERS = {  # by the first bytes: what it is, and the way out
    b"PAR1": "Parquet: give its folder as hf:FOLDER, which the package datasets reads",
    b"PK\x03\x04": "a zip archive: unpack it",
    b"%PDF": "a PDF: save its text",
}


def find_files(source: str) -> list[Path]:
    """The file that a source names; of a folder, all in it and below but hidden ones, in the order of their paths.

    Raises:
      UserError: it does not exist, or the folder has no file.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        found: list[Path] = []
        for folder, folders, names in os.walk(path, onerror=_raise):
            folders[:] = [name for name in folders if not name.startswith(".")]
            found += (Path(folder, name) for name in names if not name.startswith("."))
        found = sorted(file for file in found if file.is_file())
        if not found:
            raise UserError(f"data source {source!r} is a folder without files: give one with texts or rows of chats")
        return found
    if not path.is_file():
        raise UserError(f"data source {source!r} does not exist: give a file, a folder, 'default' or 'hf:NAME'")
    return [path]


def _raise(error: OSError) -> None:
    raise error


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked where it is gzip, bzip2, xz or zstd.

    Raises:
      UserError: it is an archive or a format of another kind, or the reader in the `with` finds it damaged.
    """
    with path.open("rb") as file:
        first = file.read(_LONGEST_MAGIC)
        packing = _packing(first)
        if not packing:
            _refuse_others(path, first)
            file.seek(0)
            yield file
            return
    _, open_file = _PACKED[packing]
    try:
        with open_file(path) as file:
            first = file.read(_LONGEST_MAGIC)
        if inner := _packing(first):
            raise UserError(f"{path} is {packing} in which there is {inner}: unpack it once")
        _refuse_others(path, first)
        with open_file(path) as file:
            yield file
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path}: its {packing} is cut or damaged: {error}") from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise UserError(f"{path}: its {packing} is cut or damaged: {error}") from None


def _packing(first: bytes) -> str:
    return next((name for name, (magic, _) in _PACKED.items() if magic.match(first)), "")


def _refuse_others(path: Path, first: bytes) -> None:
    if other := next((found for magic, found in _OTHERS.items() if first.startswith(magic)), None):
        raise UserError(f"{path} is {other}")


def packing_of(path: Path) -> str:
    """'gzip' and the like; '' for a file that is not packed."""
    with path.open("rb") as file:
        return _packing(file.read(_LONGEST_MAGIC))


def text_chunks(path: Path) -> Iterator[str]:
    """The text of a file, a chunk at a time, every line end as a line feed. Raises UserError."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
    line = 1
    with opened(path) as file:
        while chunk := file.read(CHUNK):
            yield (text := decode(decoder, chunk, path, line, final=False))
            line += text.count("\n")
        yield decode(decoder, b"", path, line, final=True)


def decode(decoder: Any, data: bytes, path: Path, line: int, final: bool) -> str:
    """Decodes what begins in a line of a file. Raises UserError for what is not UTF-8."""
    try:
        return decoder.decode(data, final)
    except UnicodeDecodeError as error:
        line += error.object[: error.start].count(b"\n")
        raise UserError(f"{path}:{line}: found byte {error.object[error.start]:#04x}: save it as UTF-8") from None


def hash_files(paths: Iterable[Path]) -> str:
    """A digest of the bytes of files, in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()
