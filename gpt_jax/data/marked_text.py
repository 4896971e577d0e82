"""Text with the markers `<|user|>`, `<|assistant|>` and `<|end_of_text|>`, read as dialogues."""

import re
from collections.abc import Callable, Iterable, Iterator

from gpt_jax.data import files
from gpt_jax.data.dialogue import ASSISTANT, END, MARKERS, USER, Dialogue, Turn, add_turn, finish
from gpt_jax.data.reading import Reading
from gpt_jax.errors import UserError

MARKER = re.compile("(" + "|".join(map(re.escape, MARKERS)) + ")")
_HOW_MARKED = f"write {USER}question{ASSISTANT}answer{END}"


def read_marked(
    chunks: Iterable[str], where: Callable[[int], str], reading: Reading, source: str | None = None
) -> Iterator[Dialogue]:
    turns: list[Turn] = []
    size, line = 0, 1
    refused = lost = False  # up to the next end: whether an error is counted, whether turns are passed over
    for line, marker, text in _pieces(chunks, where):
        size += len(text)
        if size > files.MAX_DIALOGUE:
            raise UserError(f"{where(line)}: the dialogue is over {files.MAX_DIALOGUE:,} characters: is {END} missing?")
        dialogue = None
        try:
            if marker in (USER, ASSISTANT):
                if not lost:
                    add_turn(turns, Turn(marker[2:-2], text), where(line))
                continue
            if marker == END and (turns or not refused):
                dialogue = finish(turns, where(line), source)
        except UserError as error:
            if not refused and not reading.skips(error):
                raise
            turns, refused, lost = [], True, True
        if marker == END:
            turns, size, refused, lost = [], 0, False, False
        if dialogue:
            yield dialogue
        if marker in ("", END) and text.strip():  # a dialogue may begin after it all the same
            error = UserError(f"{where(line)}: found {text.strip()[:40]!r} outside any dialogue: {_HOW_MARKED}")
            if not reading.skips(error):
                raise error
            refused = True
    if turns and not refused:
        error = UserError(f"{where(line)}: the last dialogue is not closed: write {END} after it")
        if not reading.skips(error):
            raise error


def _pieces(chunks: Iterable[str], where: Callable[[int], str]) -> Iterator[tuple[int, str, str]]:
    """Yields (line, marker, the text after it) for every marker, and first ('', what stands before any)."""
    line, marker, pending = 1, "", ""
    for chunk in chunks:
        parts = MARKER.split(pending + chunk)  # text, marker, text, marker, ..., text
        for text, following in zip(parts[:-1:2], parts[1::2], strict=True):
            yield line, marker, text
            line += text.count("\n")
            marker = following
        pending = parts[-1]
        if len(pending) > files.MAX_DIALOGUE:
            raise UserError(f"{where(line)}: found no marker in {files.MAX_DIALOGUE:,} characters: {_HOW_MARKED}")
    yield line, marker, pending
