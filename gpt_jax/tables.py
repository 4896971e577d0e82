"""Tables for people, as text: as wide as the terminal, or as they need where standard output is none."""

import io
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import Any

_WIDE = 1000  # columns: wider than any table


def render(columns: Sequence[str], rows: Iterable[Sequence[Any]], numbers: Sequence[str] = ()) -> str:
    """A table; the columns called in `numbers` are set to the right. What is in a cell is shown as it is, in one line.

    A terminal that is too narrow gets cells of several lines.
    """
    from rich import box  # only where a table is printed: it takes as long as all else here
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(" ".join(str(cell).split())) for cell in row))
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else _WIDE
    file = io.StringIO()
    console = Console(file=file, width=width, color_system=None, legacy_windows=False)
    console.print(table)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()).strip("\n")
