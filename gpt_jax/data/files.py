"""The files of a source: found, read in chunks, decoded and hashed."""

import codecs
import hashlib
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gpt_jax.errors import UserError

MAX_DIALOGUE = 16 * 2**20  # characters (bytes for a line of JSON): what bounds the memory of a reader
CHUNK = 2**20  # bytes


def existing_file(source: str) -> Path:
    path = Path(source).expanduser()
    if not path.is_file():
        found = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise UserError(f"data source {source!r} {found}: give a file, 'default' or 'hf:NAME'")
    return path


def hash_files(paths: Iterable[Path]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()


def text_chunks(path: Path) -> Iterator[str]:
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
    line = 1
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield (text := decode(decoder, chunk, path, line, final=False))
            line += text.count("\n")
        yield decode(decoder, b"", path, line, final=True)


def decode(decoder: Any, data: bytes, path: Path, line: int, final: bool) -> str:
    try:
        return decoder.decode(data, final)
    except UnicodeDecodeError as error:
        line += error.object[: error.start].count(b"\n")
        raise UserError(f"{path}:{line}: found byte {error.object[error.start]:#04x}: save it as UTF-8") from None
