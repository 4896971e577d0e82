"""How a source is read, and what is found in it on the way."""

import collections
import dataclasses

from gpt_jax.errors import UserError

LISTED = 20  # skipped rows that are named one by one


@dataclasses.dataclass
class Reading:
    """Choices of how a source is read, and what was found in it.

    tool_calls: 'text' reads calls of tools and their answers as text, 'refuse' does not. on_error: 'stop' at a bad row
    or dialogue, or 'skip' it.
    """

    tool_calls: str = "text"
    on_error: str = "stop"
    skipped: int = 0
    skipped_first: list[str] = dataclasses.field(default_factory=list)
    tools: int = 0
    context: int = 0
    unread: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def skips(self, error: UserError) -> bool:
        """Whether to go on after a bad row, which is counted then."""
        if self.on_error != "skip":
            return False
        self.skipped += 1
        if self.skipped <= LISTED:
            self.skipped_first.append(str(error))
        return True

    def notes(self) -> list[str]:
        """Lines about what was read in another way than as turns that count."""
        lines = []
        if self.skipped:
            lines.append(f"{self.skipped:,} bad rows or dialogues skipped (data.on_error=skip):")
            lines += [f"  {error}" for error in self.skipped_first]
            if self.skipped > LISTED:
                lines.append(f"  and {self.skipped - LISTED:,} more")
        if self.tools:
            lines.append(
                f"{self.tools:,} tool calls, answers and lists of tools are read as text "
                "(data.tool_calls=refuse refuses them)"
            )
        if self.context:
            lines.append(f"{self.context:,} turns of weight 0 are context, never targets")
        if self.unread:
            keys = ", ".join(f"{key} ({count:,})" for key, count in self.unread.most_common(LISTED))
            lines.append(f"keys that were not read: {keys}" + (", ..." if len(self.unread) > LISTED else ""))
        return lines
