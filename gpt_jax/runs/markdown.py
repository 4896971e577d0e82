"""Markdown of a report: lists, tables and numbers."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

NO_DATA = "No data yet."


def bullet_list(rows: Iterable[tuple[str, Any]]) -> str:
    """A list of what is known."""
    known = [f"- {name}: {value}" for name, value in rows if value not in (None, "", {})]
    return "\n".join(known) or NO_DATA


def make_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table; NO_DATA if it has no rows."""
    if not rows:
        return NO_DATA
    cells = [[f"{cell:,}" if isinstance(cell, int | np.integer) else one_line(cell) for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in (columns, ["---"] * len(columns), *cells))


def one_line(text: Any) -> str:
    """Text in one line, as a table's cell may hold it."""
    return " ".join(str(text).split()).replace("|", "\\|")


def fenced(text: str) -> str:
    """Text as a block of code, whatever backticks it holds."""
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def format_number(value: float | None, form: str | None = None) -> str:
    """A number in as few digits as its size asks for, or in `form`; '-' for one that is not known."""
    if value is None or math.isnan(value):
        return "-"
    return format(value, form or (".3g" if abs(value) < 0.01 else ".4f" if abs(value) < 100 else ",.1f"))


def format_size(count: float | None) -> str | None:
    """Bytes, kB, MB or GB; None stays None."""
    if count is None:
        return None
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000


def format_duration(seconds: float | None) -> str | None:
    """Seconds, minutes or hours; None stays None."""
    if seconds is None:
        return None
    if seconds < 60:
        return f"{seconds:.1f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{seconds / 60:.1f} min"
