"""The values of a file of JSON: lines, one list, or values one after another."""

import codecs
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpt_jax.data import files
from gpt_jax.data.row_keys import is_message
from gpt_jax.errors import UserError

_BETWEEN = re.compile(r"[\s,]*")  # two values
_LIST_OF_ROWS = re.compile(rb"\[\s*(\[\s*)?\{")


def is_one_after_another(path: Path) -> bool:
    """Whether a file is one list, or values over several lines, and not a value a line."""
    with files.opened(path) as file:
        first = b""
        while not first.strip() and (line := file.readline(files.MAX_DIALOGUE + 1)):
            first = line.removeprefix(codecs.BOM_UTF8).strip()
        more = file.read(files.HEAD)
    try:
        json.loads(first)
        return False
    except (ValueError, RecursionError):
        if _LIST_OF_ROWS.match(first) or first in (b"[", b"{"):
            return True
    line = first.decode(errors="replace")
    try:
        _, end = json.JSONDecoder().raw_decode(f"{line}\n{more.decode(errors='replace')}")
    except (ValueError, RecursionError):
        return False  # a line that is no JSON, to be named
    return end > len(line) or line[end:].lstrip(" \t\r,").startswith(("{", "["))


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """The values of lines, (file and line, value) each; for a line that has none, a UserError in its place."""
    with files.opened(path) as file:
        number, decoder = 0, codecs.getincrementaldecoder("utf-8")()
        while line := file.readline(files.MAX_DIALOGUE + 1):
            number += 1
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            where = f"{path}:{number}"
            if len(line) > files.MAX_DIALOGUE:
                while line and not line.endswith(b"\n"):
                    line = file.readline(files.MAX_DIALOGUE)
                yield where, UserError(f"{where}: the line is over {files.MAX_DIALOGUE:,} bytes: one dialogue a line")
                continue
            try:
                text = files.decode(decoder, line, path, number, final=True).strip()
                if text:
                    yield where, json.loads(text)
            except UserError as error:
                decoder.reset()
                yield where, error
            except (ValueError, RecursionError) as error:
                hint = "; remove the comma after it" if text.endswith(",") else ""
                yield where, UserError(f"{where}: found {text[:40]!r}, not a JSON object: {error}{hint}")


def json_values(path: Path) -> Iterator[tuple[str, Any]]:
    """The values of a list, or of a file that has one after another, each with the line that it begins in.

    A list of messages is one value, a dialogue; of any other list only one item at a time is held.
    """
    decode = json.JSONDecoder().raw_decode
    text, at, line = "", 0, 1
    begun = in_list = closed = False
    for chunk in itertools.chain(files.text_chunks(path), [None]):
        text, at = text[at:] + (chunk or ""), 0
        while True:
            start, at = at, _BETWEEN.match(text, at).end()
            line += text.count("\n", start, at)
            if at == len(text):
                break
            if closed:
                raise UserError(f"{path}:{line}: found {text[at : at + 40]!r} after the end of the list")
            too_long = len(text) - at > files.MAX_DIALOGUE
            may_go_on = chunk is not None and not too_long  # the rest of a value may be in the next chunk
            if in_list and text[at] == "]":
                in_list, closed, at = False, True, at + 1
                continue
            if not begun and text[at] == "[":
                first = _first_item(text, at)
                if first is None and may_go_on:
                    break
                if not is_message(first):
                    begun, in_list, at = True, True, at + 1
                    continue
            begun = True
            try:
                value, end = decode(text, at)
            except (ValueError, RecursionError) as error:
                if may_go_on:
                    break
                line += text.count("\n", at, getattr(error, "pos", at))
                found = "not valid JSON" + f", or a row of over {files.MAX_DIALOGUE:,} characters" * too_long
                raise UserError(f"{path}:{line}: {found}: {getattr(error, 'msg', error)}") from None
            yield f"{path}:{line}", value
            line += text.count("\n", at, end)
            at = end
    if in_list:
        raise UserError(f"{path}:{line}: the list of rows is not closed: is the file cut?")


def _first_item(text: str, at: int) -> Any:
    """The first item of the list that begins at `at`; None where it is not whole."""
    try:
        return json.JSONDecoder().raw_decode(text, _BETWEEN.match(text, at + 1).end())[0]
    except (ValueError, RecursionError):
        return None
