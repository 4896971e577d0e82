"""Tags of a run: words that its user gives it, kept in its folder as `tags.json`."""

import re
from collections.abc import Iterable
from pathlib import Path

from gpt_jax.errors import UserError
from gpt_jax.runs.info import read_json, write_json

TAGS_FILE = "tags.json"
RESERVED = ("latest", "best")  # what else a run can be called by
_TAG = re.compile(r"[^\W_][\w.-]{0,63}")


def read_tags(workdir: Path) -> list[str]:
    """The tags of a run, in the order of the alphabet. Raises UserError if their file is damaged."""
    tags = read_json(workdir / TAGS_FILE, {"tags": list}).get("tags") or []
    return sorted(tag for tag in tags if isinstance(tag, str))


def change_tags(workdir: Path, add: Iterable[str] = (), remove: Iterable[str] = ()) -> list[str]:
    """Adds and removes tags; returns those that the run has now.

    Raises:
      UserError: one is no tag, or is to be removed and not there.
      StorageError: the file cannot be written.
    """
    before, removed = set(read_tags(workdir)), set(remove)
    added = {_checked(tag) for tag in add}
    if missing := sorted(removed - before):
        raise UserError(f"{workdir} has no tag {missing[0]!a}: it has {', '.join(sorted(before)) or 'none'}")
    after = sorted((before | added) - removed)
    if set(after) != before:
        write_json(workdir / TAGS_FILE, {"tags": after})
    return after


def _checked(tag: str) -> str:
    if tag in RESERVED or tag.isdecimal() or not _TAG.fullmatch(tag):
        raise UserError(
            f"{tag!a} is no tag: give a word of letters, digits, '_', '-' and '.', 64 at most, that begins with a "
            f"letter or digit and is neither a number nor {' nor '.join(RESERVED)}"
        )
    return tag
