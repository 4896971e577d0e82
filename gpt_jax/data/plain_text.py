"""Plain text, read as documents: whole, or in parts where they are long.

`<|end_of_text|>`, or GPT-2's `<|endoftext|>`, stands between two documents of a file. A document of more than LONG
characters is cut into parts of PART characters or less, at the end of a paragraph, of a line or of a word. Every part
is a unit of the split between training and validation, so that a single book can be split, and memory stays flat.
"""

import re
from collections.abc import Callable, Iterable, Iterator

from gpt_jax.data.dialogue import ASSISTANT, END, USER, Dialogue, finish_document
from gpt_jax.data.reading import Reading
from gpt_jax.errors import UserError

LONG = 65_536
PART = 8_192
GPT2_END = "<|endoftext|>"

_BETWEEN = re.compile("|".join(map(re.escape, (END, GPT2_END))))
_TAIL = len(END) - 1  # characters at the end of a chunk that may be half of a marker
_ROLE = re.compile("|".join(map(re.escape, (USER, ASSISTANT))))


def read_documents(
    chunks: Iterable[str], where: Callable[[int], str], reading: Reading, source: str | None = None
) -> Iterator[Dialogue]:
    """Yields the documents, and in place of a long one its parts.

    Args:
      chunks: the text.
      where: names a line, for messages.
      reading: the choices; findings are added to it.
      source: of the documents; None: each part is known by a digest of its text.

    Raises:
      UserError: it holds a marker of a turn, or half of a surrogate pair.
    """
    for line, text, begun, goes_on in _parts(chunks):
        try:
            if role := _ROLE.search(text):
                place = where(line + text.count("\n", 0, role.start()))
                raise UserError(f"{place}: found {role[0]} in plain text: a text with markers begins with {USER}")
            document = finish_document(text, where(line), source, goes_on=goes_on)
        except UserError as error:
            if not reading.skips(error):
                raise
            if goes_on or not begun:
                continue
            document = finish_document("", where(line), source)  # closes what was given before
        reading.parts += goes_on or begun
        yield document


def _parts(chunks: Iterable[str]) -> Iterator[tuple[int, str, bool, bool]]:
    """Yields (line, text, whether a part of the same document was given before, whether one follows).

    What is given does not depend on where the chunks end.
    """
    rest, line, begun = "", 1, False
    for chunk in chunks:
        *whole, rest = _BETWEEN.split(rest + chunk)
        for text in whole:
            yield from _last_parts(text, line, begun)
            line, begun = line + text.count("\n"), False
        if not begun:
            kept = rest.lstrip()
            line, rest = line + rest.count("\n", 0, len(rest) - len(kept)), kept
        start = 0
        if begun or len(rest.rstrip()) > LONG + _TAIL:
            while len(rest) - start > 2 * PART + _TAIL:
                end = _cut(rest, start)
                yield line, rest[start:end], begun, True
                line, start, begun = line + rest.count("\n", start, end), end, True
        rest = rest[start:]
    yield from _last_parts(rest, line, begun)


def _last_parts(text: str, line: int, begun: bool) -> Iterator[tuple[int, str, bool, bool]]:
    """The parts of the rest of a document, as `_parts`."""
    text, start = text.rstrip(), 0
    if not begun:
        start = len(text) - len(text.lstrip())
        line += text.count("\n", 0, start)
        if start == len(text):
            return
    cutting = begun or len(text) - start > LONG
    while cutting and len(text) - start > PART:
        end = _cut(text, start)
        yield line, text[start:end], begun, True
        line, start, begun = line + text.count("\n", start, end), end, True
    yield line, text[start:], begun, False


def _cut(text: str, start: int) -> int:
    """The end of the part of a longer text that begins at `start`: half of PART to two times PART after it."""
    low, high = start + PART // 2, start + PART
    for mark in ("\n\n", "\n"):
        if (found := text.rfind(mark, low, high)) >= 0:
            end, most = found + len(mark), min(len(text), start + 2 * PART)
            while end < most and text[end].isspace():
                end += 1
            return end
    found = text.rfind(" ", low, high)
    return found if found >= 0 else high
