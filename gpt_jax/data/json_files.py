"""The values of a file of JSON: lines, one list, or values one after another."""

import codecs
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpt_jax.data import files
from gpt_jax.errors import UserError

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
    """The values of a list, or of a file that has one after another, each with the line that it begins in."""
    decode, between = json.JSONDecoder().raw_decode, re.compile(r"[\s,]*")
    text, at, line = "", 0, 1
    begun = in_list = closed = False
    for chunk in itertools.chain(files.text_chunks(path), [None]):
        text, at = text[at:] + (chunk or ""), 0
        while True:
            start, at = at, between.match(text, at).end()
            line += text.count("\n", start, at)
            if at == len(text):
                break
            if closed:
                raise UserError(f"{path}:{line}: found {text[at : at + 40]!r} after the end of the list")
            if text[at] == "]" if in_list else text[at] == "[" and not begun:
                begun, in_list, closed, at = True, not in_list, in_list, at + 1
                continue
            begun = True
            try:
                value, end = decode(text, at)
            except (ValueError, RecursionError) as error:
                if chunk is not None and len(text) - at <= files.MAX_DIALOGUE:
                    break  # the rest of it is in the next chunk
                line += text.count("\n", at, getattr(error, "pos", at))
                raise UserError(f"{path}:{line}: not valid JSON: {getattr(error, 'msg', error)}") from None
            yield f"{path}:{line}", value
            line += text.count("\n", at, end)
            at = end
    if in_list:
        raise UserError(f"{path}:{line}: the list of rows is not closed: is the file cut?")
