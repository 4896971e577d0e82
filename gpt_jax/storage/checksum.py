"""CRC-32 of what is saved, by which a reader tells damage."""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PIECE = 2**16  # bytes read at a time: memory stays flat


def crc32_of_file(path: Path) -> int:
    """CRC-32 of a file's bytes. Raises OSError."""
    crc = 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            crc = zlib.crc32(piece, crc)
    return crc


def crc32_of_json(record: Mapping[str, Any]) -> int:
    """CRC-32 of a JSON object, whatever the order of its fields."""
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())
