"""The JSON files of a run and of its checkpoints: an object each, with the version of its format.

A file without a version is of version 1: the first runs wrote none. A file of a newer version than the program knows is
refused in one line, as is one that is damaged.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpt_jax.errors import UserError
from gpt_jax.storage.files import is_absent, unreadable

VERSION = "format_version"
NUMBER = (int, float)

Types = Mapping[str, Any]  # of fields: a type, several, or the Types of an object


def parse_json(text: str | bytes) -> Any:
    """The value that a JSON text is of; a whole number of over 63 bits is a float, so that NumPy takes all of them.

    Raises:
      ValueError: it is no JSON, or not UTF-8.
      RecursionError: it is nested too deep.
    """
    return _DECODER.decode(text if isinstance(text, str) else text.decode())


def _whole_number(text: str) -> int | float:
    number = int(text)  # refuses what has over 4,300 digits
    return number if abs(number) < 2**63 else float(text)


_DECODER = json.JSONDecoder(parse_int=_whole_number)


class DamagedError(UserError):
    """A file that is missing, cut short or not what it should be."""


class NewerError(UserError):
    """A file that a newer version of this program wrote."""


def read_object(path: Path, known: int | None, types: Types | None = None) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
      known: the newest version of its format that the caller can read; None: the caller calls `check_version`.
      types: of fields; one that is absent or null is left to the caller.

    Raises:
      DamagedError: it is no such object.
      StorageError: the file is there and cannot be read.
      NewerError: its version is above `known`.
    """
    try:
        value = parse_json(path.read_bytes())
    except OSError as error:
        if not is_absent(error):
            raise unreadable(path, error) from error
        raise DamagedError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path} is not valid JSON ({error}): put back a good copy") from None
    if not isinstance(value, dict):
        raise DamagedError(f"{path} holds {_kind(value)} where an object must be: put back a good copy")
    if known is not None:
        check_version(path, value, known)
    _check_types(path, value, types or {})
    return value


def check_version(path: Path, value: dict[str, Any], known: int) -> None:
    """Raises NewerError if the object of a file has a version above `known`, DamagedError if it has none at all."""
    version = value.get(VERSION, 1)
    if type(version) is not int or version < 1:
        raise DamagedError(f"{path}: {VERSION} is {version!r}, not a whole number from 1: put back a good copy")
    if version > known:
        raise NewerError(
            f"{path} has format version {version}, and this program knows none above {known}: "
            "a newer program wrote it, use that one"
        )


def _check_types(path: Path, value: dict[str, Any], types: Types, prefix: str = "") -> None:
    for name, wanted in types.items():
        found = value.get(name)
        if found is None:
            continue
        inner = isinstance(wanted, Mapping)
        if not isinstance(found, dict if inner else wanted) or (isinstance(found, bool) and wanted is not bool):
            raise DamagedError(f"{path}: {prefix}{name} cannot be {_kind(found)}: put back a good copy")
        if inner:
            _check_types(path, found, wanted, f"{prefix}{name}.")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", type(None): "null", bool: "true or false"}
    return names.get(type(value), "a number")
