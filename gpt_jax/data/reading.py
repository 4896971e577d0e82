"""How a source is read: whether a bad row stops or is skipped, and counts of what is found on the way."""

import collections
import dataclasses

from gpt_jax.data.dialogue import Dialogue
from gpt_jax.errors import UserError

LISTED = 20  # skipped rows, keys and formats that are named one by one

_EXAMPLE = 60  # characters of a turn that are shown


@dataclasses.dataclass
class Reading:
    """Choices of how a source is read, and what was found in it.

    tool_calls: 'text' reads calls of tools and their answers as text, 'refuse' does not. on_error: 'stop' at a bad row,
    dialogue or file of a folder, or 'skip' it.
    """

    tool_calls: str = "text"
    on_error: str = "stop"
    skipped: int = 0
    skipped_first: list[str] = dataclasses.field(default_factory=list)
    tools: int = 0
    context: int = 0
    joined: int = 0
    rejected: int = 0
    parts: int = 0
    empty_files: int = 0
    unread: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    formats: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    examples: dict[str, str] = dataclasses.field(default_factory=dict)  # by format

    def skips(self, error: UserError) -> bool:
        """Whether to go on after a bad row, which is counted then."""
        if self.on_error != "skip":
            return False
        self.skipped += 1
        if self.skipped <= LISTED:
            self.skipped_first.append(str(error))
        return True

    def of_a_row(self) -> "Reading":
        """The same choices, with nothing found: what is found in a row counts where the row is read to its end."""
        return Reading(self.tool_calls, self.on_error)

    def add(self, row: "Reading") -> None:
        """Counts what was found in a row, and leaves `row` empty for the next one: a new one each time is slow."""
        if row.tools or row.context or row.joined or row.rejected or row.parts:
            self.tools += row.tools
            self.context += row.context
            self.joined += row.joined
            self.rejected += row.rejected
            self.parts += row.parts
            row.tools = row.context = row.joined = row.rejected = row.parts = 0
        if row.unread:
            for key, count in row.unread.items():
                self.unread[key] += count
            row.unread.clear()

    def took(self, format_: str, where: str, dialogue: Dialogue) -> None:
        """Counts a dialogue or document by the format that it was taken for."""
        if format_ not in self.formats:
            shown = " / ".join(f"{role}: {_cut(text)}" for role, text in dialogue.turns[:2])
            self.examples[format_] = f"{where}: {shown}"
        self.formats[format_] += 1

    def taken(self) -> list[str]:
        """A line for each format that was found, with its first dialogue."""
        lines = [
            f"read {count:,} x {format_}; the first, {self.examples[format_]}"
            for format_, count in self.formats.most_common(LISTED)
        ]
        return lines + ([f"and {len(self.formats) - LISTED:,} more formats"] if len(self.formats) > LISTED else [])

    def notes(self) -> list[str]:
        """Lines about what was read in another way than as turns that count."""
        lines = []
        if self.skipped:
            lines.append(f"{self.skipped:,} bad rows, dialogues or files skipped (data.on_error=skip):")
            lines += [f"  {error}" for error in self.skipped_first]
            if self.skipped > LISTED:
                lines.append(f"  and {self.skipped - LISTED:,} more")
        if self.rejected:
            lines.append(
                f"{self.rejected:,} rows are pairs of preferences: the chosen side is read, the rejected is left out"
            )
        if self.tools:
            lines.append(
                f"{self.tools:,} tool calls, answers and lists of tools are read as text "
                "(data.tool_calls=refuse refuses them)"
            )
        if self.joined:
            lines.append(f"{self.joined:,} turns follow one of the same side and are joined to it by a blank line")
        if self.context:
            lines.append(f"{self.context:,} turns of weight 0 are context, never targets")
        if self.parts:
            lines.append(f"long documents are split between training and validation by {self.parts:,} parts of them")
        if self.empty_files:
            lines.append(f"{self.empty_files:,} empty files")
        if self.unread:
            keys = ", ".join(f"{key} ({count:,})" for key, count in self.unread.most_common(LISTED))
            lines.append(f"keys that were not read: {keys}" + (", ..." if len(self.unread) > LISTED else ""))
        return lines


def _cut(text: str) -> str:
    """The beginning of a text in one line, of characters that do nothing to a terminal."""
    text = " ".join(text[: 4 * _EXAMPLE].split())
    text = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
    return text if len(text) <= _EXAMPLE else f"{text[: _EXAMPLE - 3]}..."
